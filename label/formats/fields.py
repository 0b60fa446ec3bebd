"""Fields of other people's rows: whole numbers written in many ways, lists in a table's cell, texts under several names.

Owns what counts as the same value. Knows no format.
"""

from __future__ import annotations

import ast
import io
import itertools
import json
import math
import re
import tokenize
from collections.abc import Mapping, Sequence
from typing import Any

from draftsmith.label.schema import Span, refusal

Row = Mapping[str, Any]

STEP_BREAK = "\n"
QUESTIONS = (
    "problem",
    "question",
    "Question",
    "input",
    "prompt",
    "instruction",
    "query",
    "Problem",
    "problem_text",
    "question_text",
    "problem_statement",
)
_MODELS = ("generator", "Sampled_Model", "sampled_model", "policy_model", "answer_model", "model", "model_name")
_STEP_TEXTS = ("text", "content", "step", "step_text", "value", "completion", "response", "reasoning", "description")
# A step's own number, which is none of its words.
_STEP_NUMBER = re.compile(r"(?:step\s*)?#?\d+\s*[.:]?", re.IGNORECASE)
_ABSENT = ("", "n/a", "na", "none", "null", "nan")
_WHOLE = re.compile(r"[+-]?\d{1,9}(?:\.0*)?", re.ASCII)


class Contradiction(ValueError):
    """A row of which two fields say different things of its steps."""


def is_absent(value: Any) -> bool:
    """Whether a value is none: null, NaN (as tables write null), an empty text, `N/A` or `None`.

    Args:
        value: of a field.
    """
    if isinstance(value, str):
        return value.strip().lower() in _ABSENT
    return value is None or (isinstance(value, float) and math.isnan(value))


def whole(value: Any) -> int | None:
    """The whole number that a value is: that of 3, 3.0, "3" and "3.0" is 3. None for any other value, also for true and false.

    Args:
        value: of a field.
    """
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    if isinstance(value, str) and _WHOLE.fullmatch(value.strip()):
        return int(value.strip().partition(".")[0])
    return None


def unpacked(value: Any) -> Any:
    """A list or an object that a cell of a table holds as text, in JSON or as Python writes it. Any other value as it is.

    NumPy's way, `['a' 'b']`, stays a text: Python would read it as one word.

    Args:
        value: of a field.
    """
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        pass
    try:
        return value if _are_glued(value) else ast.literal_eval(value.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError, tokenize.TokenError):
        return value


def _are_glued(text: str) -> bool:
    """Whether two texts stand beside each other without a comma."""
    blank = (tokenize.NL, tokenize.NEWLINE, tokenize.COMMENT, tokenize.INDENT, tokenize.DEDENT)
    kinds = [
        token.type for token in tokenize.generate_tokens(io.StringIO(text.strip()).readline) if token.type not in blank
    ]
    return (tokenize.STRING, tokenize.STRING) in itertools.pairwise(kinds)


def list_of(value: Any, place: str, field: str) -> list[Any]:
    """A list, also one that a cell of a table holds as text.

    Args:
        value: of the field.
        place: of the row, for messages.
        field: its name.

    Raises:
        ValueError: it is something else.
    """
    inside = unpacked(value)
    if not isinstance(inside, list):
        remedy = (
            "correct it" if not isinstance(value, str) else 'correct it; in a table write it as JSON, ["...", "..."]'
        )
        raise refusal(place, field, value, "it is a list", remedy)
    return inside


def text_of(value: Any, place: str, field: str) -> str:
    """A value that has to be text; it may be empty.

    Args:
        value: of the field.
        place: of the row, for messages.
        field: its name.

    Raises:
        ValueError: it is something else.
    """
    if not isinstance(value, str):
        raise refusal(place, field, value, "it is text", "correct it")
    return value


def texts_of(value: Any, place: str, field: str) -> list[str]:
    """The texts of steps: a list of texts, or of objects that hold one each.

    A blank step keeps its place, so that the numbers of the others stay right.

    Args:
        value: of the field.
        place: of the row, for messages.
        field: its name.

    Raises:
        ValueError: it is no such list, or no step has a text.
    """
    texts = []
    for index, step in enumerate(list_of(value, place, field)):
        text = step
        if isinstance(step, Mapping):
            text = _text_in(step)
        if not isinstance(text, str):
            raise refusal(place, f"{field}[{index}]", step, "a step is text, or an object with text", "correct it")
        texts.append(text)
    if not any(text.strip() for text in texts):
        raise refusal(place, field, value, "at least one step has text", "correct it")
    return texts


def _text_in(step: Mapping[str, Any]) -> str | None:
    """The text in an object; a `step` of "2" or "Step 2" beside another text is its number."""
    texts = {name: step[name] for name in _STEP_TEXTS if isinstance(step.get(name), str)}
    if len(texts) > 1 and _STEP_NUMBER.fullmatch(texts.get("step", "").strip()):
        del texts["step"]
    return next(iter(texts.values()), None)


def check_one_a_step(values: Sequence[Any], num_steps: int, what: str, place: str, field: str) -> None:
    """Checks that a list has one entry a step.

    Args:
        values: of the field.
        num_steps: how many steps there are.
        what: the word for an entry.
        place: of the row, for messages.
        field: its name.

    Raises:
        ValueError: it has more or fewer.
    """
    if len(values) != num_steps:
        rule = f"it is a list of one {what} a step, and there are {num_steps} steps"
        raise refusal(place, field, values, rule, "add what is missing (null: not rated)")


def span_of_step(steps: Sequence[str], index: int, place: str, field: str) -> Span:
    """Where a step stands among the joined steps: ["ab", "c"], 1 -> (3, 4).

    Args:
        steps: their texts.
        index: of the step, from 0.
        place: of the row, for messages.
        field: that holds the steps.

    Raises:
        ValueError: that step is blank, and nothing of it can be wrong.
    """
    if not steps[index].strip():
        raise refusal(place, f"{field}[{index}]", steps[index], "a step is text, and not empty", "correct it")
    start = sum(len(step) + len(STEP_BREAK) for step in steps[:index])
    return (start, start + len(steps[index]))


def contradiction(place: str, field: str, value: object, rule: str, remedy: str) -> Contradiction:
    """The error for a field that another one contradicts.

    Args:
        place: of the row.
        field: its name.
        value: what it holds.
        rule: what the other one says.
        remedy: what to do.
    """
    return Contradiction(str(refusal(place, field, value, rule, remedy)))


def field_of(row: Row, names: Sequence[str]) -> str:
    """The first of several names that a row uses: one with a value, else one that is there, else the first.

    Args:
        row: of a file.
        names: of one field in different sets.
    """
    there = [name for name in names if name in row]
    return next((name for name in there if row[name] is not None), (there or list(names))[0])


def value_of(row: Row, field: str, place: str) -> Any:
    """A field's value.

    Args:
        row: of a file.
        field: its name.
        place: of the row, for messages.

    Raises:
        ValueError: it is missing.
    """
    if field not in row:
        raise ValueError(f"{place}: {field} is missing; the row has {sorted(row)}; add it, or name another --format")
    return row[field]


def model_of(row: Row) -> str | None:
    """The model that wrote the answer, where the row names it.

    Args:
        row: of a file.
    """
    names = (row.get(name) for name in _MODELS)
    return next((name for name in names if isinstance(name, str) and name.strip()), None)


def licence_of(row: Row) -> str | None:
    """The licence that the row names, or None.

    Args:
        row: of a file.
    """
    names = (row.get(name) for name in ("licence", "license"))
    return next((name for name in names if isinstance(name, str) and name.strip()), None)

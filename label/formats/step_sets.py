"""Sets that name the wrong step by its number: BIG-Bench-Mistake, ProcessBench, MR-GSM8K, MR-Ben, PRMBench, DeltaBench.

Owns the names of their fields, and which step a number means. From which number a file counts is `counting`'s to find out. Knows no store.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from draftsmith.label.formats.counting import StepNumber
from draftsmith.label.formats.fields import (
    QUESTIONS,
    STEP_BREAK,
    Row,
    contradiction,
    field_of,
    is_absent,
    licence_of,
    list_of,
    model_of,
    span_of_step,
    texts_of,
    value_of,
    whole,
)
from draftsmith.label.schema import Answer, refusal
from draftsmith.label.store.label_source import LabelSource

_RIGHT, _WRONG = ("correct", "right", "true", "yes", "1"), ("wrong", "incorrect", "false", "no", "0")
_SECTION = re.compile(r"(?im)^\s*section\s*\d+\s*:")
_NO_OPTIONS = ("", "n/a", "none", "[]")
_NAMED_STEP = re.compile(r"(?:step|paragraph|section|line)?\s*#?\s*(\d{1,9})", re.IGNORECASE)
_NO_ERROR = ("no error", "no errors", "no mistake", "no mistakes", "correct", "all correct")
LESS_KNOWN_ERRORS = (
    "first_error_index",
    "first_error_idx",
    "first_error_step_index",
    "error_index",
    "error_idx",
    "error_step_index",
    "error_step",
    "wrong_step",
    "first_incorrect_step",
    "first_mistake_step",
    "first_mistake_index",
)
"""Names of the first wrong step in sets of which nothing says from which number they count: their rows have to show it."""


@dataclass(frozen=True)
class StepLayout:
    """Where a kind of set has what.

    Attributes:
        questions, steps, errors: the names of these fields in different sets, the usual one first.
        first: the number of the first step, by the set's own description.
        by_list: `errors` is a list of all wrong steps.
        null_is_none: null, too, says that no step is wrong.
        verdicts: fields that say whether the answer is right.
        verdict_is_of_steps: these fields speak of the steps, and not of the final answer alone. Where they say that it is wrong and no
            step is named, nobody has placed the error.
        ends: two fields that differ where the final answer is wrong.
        need: how many numbers have to speak against `first`.
        signature: fields that the published set has and its derivatives seldom keep; with one of them, two numbers have to.
        is_said: the user says from which number the file counts.
    """

    questions: tuple[str, ...]
    steps: tuple[str, ...]
    errors: tuple[str, ...]
    first: int
    by_list: bool = False
    null_is_none: bool = True
    verdicts: tuple[str, ...] = ()
    verdict_is_of_steps: bool = False
    ends: tuple[str, str] | None = None
    need: int = 1
    signature: tuple[str, ...] = ()
    is_said: bool = False

    def field(self, row: Row) -> str:
        """The name of the field with the number."""
        return field_of(row, self.errors)

    def usual(self) -> StepLayout:
        """The layout without the less known names, for files that have the usual one."""
        return replace(self, errors=tuple(name for name in self.errors if name not in LESS_KNOWN_ERRORS))

    def is_less_known(self, row: Row) -> bool:
        """Whether only the rows can show from which number the file counts."""
        return self.field(row) in LESS_KNOWN_ERRORS

    def is_signed(self, row: Row) -> bool:
        """Whether a row has a field that is the published set's own."""
        return any(name in row for name in self.signature)

    def seen(self, row: Row) -> StepNumber | None:
        """What a row says, or None where it cannot be read."""
        try:
            numbers = _numbers(row, self, self.first, "row")
            return StepNumber(tuple(numbers), len(_steps(row, self, "row")), _is_wrong(row, self), self.by_list)
        except ValueError:
            return None


LAYOUTS = {
    "mistake": StepLayout(
        ("input", *QUESTIONS),
        ("steps", "solution_steps", "reasoning_steps"),
        ("mistake_index", *LESS_KNOWN_ERRORS),
        first=0,
        ends=("answer", "target"),
        need=2,
    ),
    "processbench": StepLayout(
        QUESTIONS,
        ("steps",),
        ("label",),
        first=0,
        null_is_none=False,
        verdicts=("final_answer_correct",),
        signature=("final_answer_correct", "generator"),
    ),
    "stepwise": StepLayout(
        ("question", *QUESTIONS),
        ("model_output_steps", "Model_Solution_Steps", "model_output_step_format", "steps", "solution_steps"),
        (
            "first_error_step",
            "model_output_solution_first_error_step",
            "Model_Solution_First_Error_Step",
            "first_wrong_step",
            "first_error",
        ),
        first=1,
        verdicts=("model_output_solution_correctness", "Model_Solution_Correctness", "solution_correctness"),
        verdict_is_of_steps=True,
    ),
    "wrong-steps": StepLayout(
        ("modified_question", "question", *QUESTIONS),
        ("modified_process", "sections", "sections_content", "section_content", "steps", "process"),
        ("error_steps", "reason_error_section_numbers", "wrong_steps"),
        first=1,
        by_list=True,
    ),
}


def read_step_set(layout: StepLayout, first: int, row: Row, place: str, origin: LabelSource) -> Iterator[Answer]:
    """The answer of a row, and PRMBench's right one beside it.

    Args:
        layout: of the set.
        first: the number of the first step in this file.
        row: of the file.
        place: of the row, for messages.
        origin: what the row does not say.

    Raises:
        ValueError: with place, field, value, rule and remedy.
    """
    steps = _steps(row, layout, place)
    numbers = _numbers(row, layout, first, place)
    nones = _nones(layout, first)
    wrong = [number - first for number in numbers if number not in nones]
    field = layout.field(row)
    if any(not 0 <= index < len(steps) for index in wrong):
        raise refusal(place, field, row[field], _rule(layout, first, len(steps)), _remedy(first))
    label = origin.label("person", None)
    if wrong:
        label = origin.label("person", span_of_step(steps, min(wrong), place, field_of(row, layout.steps)))
    elif layout.verdict_is_of_steps and _is_wrong(row, layout):
        label = origin.unplaced("person")
    if wrong and layout.verdict_is_of_steps and _is_wrong(row, layout) is False:
        rule = "another field says that the steps are right"
        said = next(name for name in layout.verdicts if row.get(name) is not None)
        raise contradiction(place, field, row[field], f"{rule}: {said} is {row[said]!r}", "correct either")
    question, response = _question(row, layout, place), STEP_BREAK.join(steps)
    yield origin.answer(question, response, label, place, model_of(row), licence_of(row))
    if row.get("original_process"):
        right = STEP_BREAK.join(texts_of(row["original_process"], place, "original_process"))
        asked = row.get("original_question") or question
        if (asked, right) != (question, response):
            yield origin.answer(asked, right, origin.label("person", None), place, model_of(row), licence_of(row))


def _rule(layout: StepLayout, first: int, num_steps: int) -> str:
    if layout.by_list:
        return f"it lists numbers of the {num_steps} steps, from {first}"
    if first == 1:
        return f"it is the number of one of the {num_steps} steps, from 1; or null, 0, -1 or N/A for none"
    none = "null" if layout.null_is_none else "-1"
    return f"it is {none} or the index of one of the {num_steps} steps, from 0"


def _remedy(first: int) -> str:
    return f"correct it, or say --first_step {'one' if first == 0 else 'zero'} if the file counts from {1 - first}"


def _question(row: Row, layout: StepLayout, place: str) -> Any:
    """The question, with MR-Ben's options, which the model saw."""
    question = value_of(row, field_of(row, layout.questions), place)
    options = row.get("Options")
    if isinstance(question, str) and isinstance(options, str) and options.strip().lower() not in _NO_OPTIONS:
        return f"{question}\n{options}"
    return question


def _steps(row: Row, layout: StepLayout, place: str) -> list[str]:
    """The steps under the first of their names that holds texts. DeltaBench has where its sections begin beside them."""
    usual = field_of(row, layout.steps)
    others = [name for name in layout.steps if name != usual and row.get(name) is not None]
    reasons = []
    for field in (usual, *others):
        value = value_of(row, field, place)
        if isinstance(value, str) and field in ("sections_content", "section_content"):
            parts = _SECTION.split(value)
            value = [part.strip() for part in parts[1:]] if len(parts) > 1 else value
        try:
            return texts_of(value, place, field)
        except ValueError as error:
            reasons.append(error)
    raise reasons[0]


def _numbers(row: Row, layout: StepLayout, first: int, place: str) -> list[int]:
    """The numbers of the wrong steps as they are written, -1 and 0 included. Fields that hold none say nothing; the others agree."""
    given: dict[str, list[int]] = {}
    reasons = []
    for name in [name for name in layout.errors if row.get(name) is not None] or [layout.field(row)]:
        try:
            given[name] = _numbers_in(row, name, layout, first, place)
        except ValueError as error:
            reasons.append(error)
    if not given:
        raise reasons[0]
    (field, numbers), *others = given.items()
    nones = _nones(layout, first)
    for other, named in others:
        if set(named) - nones != set(numbers) - nones:
            rule = f"{other} is {row[other]!r:.60}, and names other steps"
            raise contradiction(place, field, row[field], rule, "take out the one that does not count")
    return numbers


def _nones(layout: StepLayout, first: int) -> set[int]:
    """The numbers that say that no step is wrong."""
    return {-1} if first == 0 or layout.by_list else {-1, 0}


def _numbers_in(row: Row, field: str, layout: StepLayout, first: int, place: str) -> list[int]:
    value = value_of(row, field, place)
    if layout.by_list:
        listed = [] if is_absent(value) else list_of(value, place, field)
    elif layout.null_is_none and _says_none(value):
        return []
    else:
        listed = [value]
    numbers = []
    for entry in listed:
        number = whole(entry)
        if number is None and isinstance(entry, str) and (named := _NAMED_STEP.fullmatch(entry.strip())):
            # A word counts from 1. Where the set counts from 0, it may be meant either way.
            if 1 not in (first, layout.first) and field not in LESS_KNOWN_ERRORS and not layout.is_said:
                rule = "the step with a number may be counted from 0 or from 1"
                raise refusal(place, field, value, rule, "write the number alone, or say --first_step zero or one")
            number = int(named[1])
        if number is None or number < -1:
            rule = _rule(layout, first, len(_steps(row, layout, place)))
            raise refusal(place, field, value, rule, "correct it")
        numbers.append(number)
    return numbers


def names_a_step(row: Row) -> bool:
    """Whether a field names the first wrong step, or says that there is none, in a way that some set of `LAYOUTS` has.

    Args:
        row: of a file, or an annotator's part of it.
    """
    for layout in LAYOUTS.values():
        for name in (name for name in layout.errors if name in row):
            with contextlib.suppress(ValueError):
                _numbers_in(row, name, replace(layout, is_said=True), layout.first, "row")
                return True
    return False


def _says_none(value: Any) -> bool:
    return is_absent(value) or (isinstance(value, str) and value.strip().rstrip(".").lower() in _NO_ERROR)


def _is_wrong(row: Row, layout: StepLayout) -> bool | None:
    for field in layout.verdicts:
        number = whole(row.get(field))  # tables write 0 as 0.0
        said = str(row.get(field) if number is None else number).strip().lower()
        if said in _RIGHT or said in _WRONG:
            return said in _WRONG
    if layout.ends is not None:
        given, right = (row.get(field) for field in layout.ends)
        if isinstance(given, str) and isinstance(right, str):
            return given.split() != right.split()
    return None

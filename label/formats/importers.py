"""Labelled sets of other people, each row turned into answers.

Owns what the fields of each format mean, and the turn of polarity where a format counts the other way. Knows nothing of
the store. Label Studio's tasks are in `label_studio.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from draftsmith.data.sources import read_rows
from draftsmith.json_rows import Dropped
from draftsmith.label.formats import calculations, label_studio
from draftsmith.label.schema import Answer, Label, Span, check_answer, from_row, is_keepable, refusal
from draftsmith.label.store.label_source import LabelSource, SkippedRow

Format = Literal[
    "auto", "answers", "label-studio", "prm800k", "mistake", "processbench", "stepwise", "solutions", "autojudge"
]
Row = Mapping[str, Any]

STEP_BREAK = "\n"
STEPWISE_STEPS = "model_output_steps"
# The second is MR-GSM8K's own name of the field.
_STEPWISE_ERRORS = ("first_error_step", "model_output_solution_first_error_step")
_NO_STEP = (None, 0, -1, "", "N/A")


# Where the rows of each format have the right answer, the fullest first. BIG-Bench-Mistake's `answer` is the model's own.
_REFERENCES: dict[str, tuple[str, ...]] = {
    "prm800k": (
        "ground_truth_solution",
        "question.ground_truth_solution",
        "ground_truth_answer",
        "question.ground_truth_answer",
        "solution",
        "answer",
        "reference",
    ),
    "mistake": ("target", "reference"),
    "processbench": ("solution", "answer", "reference"),
    "stepwise": ("ground_truth_solution", "ground_truth_answer", "answer", "reference"),
    "solutions": ("ground_truth", "answer", "reference"),
    "autojudge": ("answer", "reference"),
}


@dataclass(frozen=True)
class Imported:
    """What a file gave.

    Attributes:
        answers: with their labels.
        left_out: the rows that gave none, each with its place and the reason.
        format: of the rows.
    """

    answers: list[Answer]
    left_out: list[str]
    format: Format


def read_labelled(path: Path, row_format: Format, origin: LabelSource) -> Imported:
    """Reads a whole file. A row that cannot be used is left out, with its place, field, value, rule and remedy.

    Args:
        path: a JSON or JSON-lines file.
        row_format: how a row is read; `auto` decides by the fields of the first row.
        origin: what the file does not say.

    Raises:
        ValueError: there is no such file, it cannot be read as a whole, or no row of it can be used (with the first reason).
    """
    if not path.is_file():
        raise ValueError(f"{path} is not a file; name a JSON or JSON-lines file of labelled answers")
    answers: list[Answer] = []
    left_out: list[str] = []
    unusable: list[str] = []
    unread: list[Dropped] = []
    for place, row in read_rows(str(path), dropped=unread):
        try:
            own_format = detect(row, place) if row_format == "auto" else row_format
            of_row = list(READERS[own_format](row, place, origin))
            for answer in of_row:
                check_answer(answer, place)
        except SkippedRow as error:
            left_out.append(f"{place}: {error}")
        except ValueError as error:
            reason = str(error)
            unusable.append(reason if reason.startswith(place) else f"{place}: {reason}")
        else:
            row_format = own_format
            answers += [_with_reference(answer, row, own_format) for answer in of_row]
    unusable += [f"{row.place}: {row.reason}" for row in unread]
    if unusable and not answers:
        raise ValueError(f"no row of {path} can be used, {len(unusable)} have mistakes; the first: {unusable[0]}")
    return Imported(answers, unusable + left_out, row_format)


def detect(row: Row, place: str) -> Format:
    """Names the format of a row from its fields.

    Args:
        row: of a file.
        place: of the row, `FILE:LINE`.

    Raises:
        ValueError: none fits; names the fields seen.
    """
    if "verdict" in row and "response" in row:
        return "answers"
    if "data" in row:
        return "label-studio"
    if {"steps", "mistake_index"} <= set(row):
        return "mistake"
    if {"problem", "steps", "label"} <= set(row):
        return "processbench"
    if "question" in row and STEPWISE_STEPS in row:
        return "stepwise"
    if {"steps", "ratings"} <= set(row) or {"question", "label"} <= set(row):
        return "prm800k"
    if {"prefix", "draft_token", "important"} <= set(row):
        return "autojudge"
    if "question" in row and _solutions(row):
        return "solutions"
    known = ", ".join(name for name in get_args(Format) if name != "auto")
    raise ValueError(f"{place}: no known format has the fields {sorted(row)}; name one with --format ({known})")


def _with_reference(answer: Answer, row: Row, row_format: Format) -> Answer:
    """The answer with the right one as the row has it, where it has one and the reader has not set it."""
    for path in _REFERENCES.get(row_format, ()):
        value: Any = row
        for name in path.split("."):
            value = value.get(name) if isinstance(value, Mapping) else None
        if isinstance(value, int | float) and not isinstance(value, bool):
            value = str(value)
        if row_format == "solutions" and isinstance(value, str):
            value = calculations.without_marks(value)
        if answer.reference is None and isinstance(value, str) and is_keepable(value):
            return replace(answer, reference=value)
    return answer


def _own(row: Row, place: str, origin: LabelSource) -> Iterator[Answer]:
    yield from_row(row, place)


def _mistake(row: Row, place: str, origin: LabelSource) -> Iterator[Answer]:
    """BIG-Bench-Mistake: `mistake_index` is that of the first wrong step, null where there is none."""
    steps = _steps(_get(row, "steps", place), place, "steps")
    index = _get(row, "mistake_index", place)
    if index is not None and (type(index) is not int or not 0 <= index < len(steps)):
        rule = f"it is null or the index of one of the {len(steps)} steps, from 0"
        raise refusal(place, "mistake_index", index, rule, "correct it")
    yield _of_steps(_get(row, "input", place), steps, index, origin, place)


def _processbench(row: Row, place: str, origin: LabelSource) -> Iterator[Answer]:
    """ProcessBench: `label` is the index of the first wrong step, -1 where there is none."""
    steps = _steps(_get(row, "steps", place), place, "steps")
    index = _get(row, "label", place)
    if type(index) is not int or not -1 <= index < len(steps):
        rule = f"it is -1 or the index of one of the {len(steps)} steps, from 0"
        raise refusal(place, "label", index, rule, "correct it")
    yield _of_steps(_get(row, "problem", place), steps, None if index < 0 else index, origin, place)


def _stepwise(row: Row, place: str, origin: LabelSource) -> Iterator[Answer]:
    """Steps with the number of the first wrong one, counted from 1: MR-GSM8K and its like."""
    steps = _steps(_get(row, STEPWISE_STEPS, place), place, STEPWISE_STEPS)
    field = next((name for name in _STEPWISE_ERRORS if name in row), _STEPWISE_ERRORS[0])
    number = _get(row, field, place)
    if isinstance(number, str) and number.isdecimal():
        number = int(number)
    is_none = number in _NO_STEP and not isinstance(number, bool)
    if not is_none and (type(number) is not int or not 1 <= number <= len(steps)):
        rule = f"it is the number of one of the {len(steps)} steps, from 1; or null, 0, -1 or N/A for none"
        raise refusal(place, field, number, rule, "correct it")
    answer = _of_steps(_get(row, "question", place), steps, None if is_none else number - 1, origin, place)
    if is_none and row.get("model_output_solution_correctness") == "wrong":
        answer = replace(answer, label=Label("unplaced", origin.labelled_by, "person"))
    yield answer


def _of_steps(question: Any, steps: list[str], wrong: int | None, origin: LabelSource, place: str) -> Answer:
    """An answer of which one step is the first wrong one, by its index, or none is."""
    error = None if wrong is None else _step_span(steps, wrong)
    return origin.answer(question, STEP_BREAK.join(steps), origin.label("person", error), place)


def _prm800k(row: Row, place: str, origin: LabelSource) -> Iterator[Answer]:
    """PRM800K: steps rated 1, 0 (neither helps nor harms) or -1 (wrong). The first -1 is the error, 0 is none.

    What was not rated is not checked: the end of an answer (`tail`) of which all rated steps are good.
    """
    if "label" in row:
        rated = _rated(row, place)
    else:
        steps = _steps(_get(row, "steps", place), place, "steps")
        ratings = _get(row, "ratings", place)
        if not isinstance(ratings, list) or len(ratings) != len(steps):
            rule = f"it is a list of one rating a step, and there are {len(steps)} steps"
            raise refusal(place, "ratings", ratings, rule, "add what is missing (null: not rated)")
        tail = _get(row, "tail", place) if row.get("tail") else ""
        rated = _Rated(_get(row, "problem", place), steps, ratings, [tail] if tail else [], origin.labelled_by)
    yield rated.answer(origin, place)


@dataclass(frozen=True)
class _Rated:
    problem: Any
    steps: list[str]
    ratings: list[Any]
    unrated: list[str]
    labelled_by: str

    def answer(self, origin: LabelSource, place: str) -> Answer:
        response = STEP_BREAK.join([*self.steps, *self.unrated])
        num_checked = len(self.steps)
        for index, rating in enumerate(self.ratings):
            if rating not in (1, 0, -1, None) or isinstance(rating, bool | float):
                raise refusal(place, f"ratings[{index}]", rating, "a rating is 1, 0, -1 or null", "correct it")
            if rating == -1:
                label = origin.label("person", _step_span(self.steps, index), labelled_by=self.labelled_by)
                return origin.answer(self.problem, response, label, place)
            if rating is None:
                num_checked = index
                break
        if num_checked == 0:
            raise SkippedRow("no step is rated")
        end = _step_span(self.steps, num_checked - 1)[1]
        checked = (0, end) if end < len(response) else None
        label = origin.label("person", None, checked, labelled_by=self.labelled_by)
        return origin.answer(self.problem, response, label, place)


def _rated(row: Row, place: str) -> _Rated:
    """The published layout: at each step several candidates, of which one was chosen, or none and the work ended."""
    question, label = _get(row, "question", place), _get(row, "label", place)
    for field, value in (("question", question), ("label", label)):
        if not isinstance(value, Mapping):
            raise refusal(place, field, value, "it is an object", "give PRM800K's published rows, or steps and ratings")
    if label.get("finish_reason") == "bad_problem":
        raise SkippedRow("the labeller found the problem itself broken")
    steps: list[str] = []
    ratings: list[Any] = []
    for index, step in enumerate(_list(_get(label, "steps", place), place, "label.steps")):
        chosen = _chosen(step, f"label.steps[{index}]", place)
        if chosen is None:
            break
        steps.append(chosen[0])
        ratings.append(chosen[1])
        if chosen[1] == -1:
            break
    planned = _list(question.get("pre_generated_steps") or [], place, "question.pre_generated_steps")
    tail = planned[len(steps) :] if planned[: len(steps)] == steps else []
    labeller = row.get("labeler")
    labelled_by = labeller if isinstance(labeller, str) and labeller else "prm800k"
    return _Rated(
        _get(question, "problem", place), steps, ratings, _steps(tail, place, "pre_generated_steps"), labelled_by
    )


def _chosen(step: Any, field: str, place: str) -> tuple[str, Any] | None:
    if not isinstance(step, Mapping) or not isinstance(step.get("completions"), list):
        raise refusal(place, field, step, "a step is an object with completions", "correct it")
    candidates, index, human = step["completions"], step.get("chosen_completion"), step.get("human_completion")
    if index is not None:
        if type(index) is not int or not 0 <= index < len(candidates):
            rule = f"it is null or the index of one of {len(candidates)} completions"
            raise refusal(place, f"{field}.chosen_completion", index, rule, "correct it")
        candidate = candidates[index]
    elif human is not None:
        # Written by the labeller in place of candidates that were all wrong.
        candidate = {"text": human.get("text") if isinstance(human, Mapping) else human, "rating": 1}
    else:
        wrong = (item for item in candidates if isinstance(item, Mapping) and item.get("rating") == -1)
        candidate = next(wrong, None)
        if candidate is None:
            return None
    if not isinstance(candidate, Mapping):
        raise refusal(place, field, candidate, "a completion is an object of text and rating", "correct it")
    [text] = _steps([candidate.get("text")], place, f"{field}.text")
    return text, candidate.get("rating")


def _solutions_of(row: Row, place: str, origin: LabelSource) -> Iterator[Answer]:
    """GSM8K's model solutions: one field a model, with `solution` and the verdict `is_correct` on its final number.

    Calculator marks are taken out. Where a solution is wrong, the first wrong calculation is its error if there is one;
    else nobody has said where it is wrong.
    """
    solutions = _solutions(row)
    if not solutions:
        rule = "a row has one object a model, with solution and is_correct"
        raise ValueError(f"{place}: the fields are {sorted(row)}; {rule}; name another --format")
    for model, entry in solutions.items():
        solution, is_correct = entry["solution"], entry["is_correct"]
        if not isinstance(solution, str):
            raise refusal(place, f"{model}.solution", solution, "it is text", "correct it")
        if not isinstance(is_correct, bool):
            raise refusal(place, f"{model}.is_correct", is_correct, "it is true or false", "correct it")
        error = None if is_correct else calculations.first_wrong(solution)
        label = origin.label("rule", error)
        if not is_correct and error is None:
            label = Label("unplaced", origin.labelled_by, "rule")
        response = calculations.without_marks(solution)
        yield origin.answer(_get(row, "question", place), response, label, place, model=model)


def _autojudge(row: Row, place: str, origin: LabelSource) -> Iterator[Answer]:
    """AutoJudge's mined tokens as text: after `prefix`, the draft said `draft_token` where the target had another one.

    Its polarity is the reverse of this project's: important (true, 1) means that the answer changed with the token, so the
    token is wrong. The label speaks of that token alone.
    """
    prefix, token = _get(row, "prefix", place), _get(row, "draft_token", place)
    for field, value in (("prefix", prefix), ("draft_token", token)):
        if not isinstance(value, str) or (field == "draft_token" and not value):
            raise refusal(
                place, field, value, "it is text (only the prefix may be empty)", "decode the token ids first"
            )
    important = _get(row, "important", place)
    if important not in (True, False) or isinstance(important, float):
        raise refusal(place, "important", important, "it is true or false (or 1 or 0)", "correct it")
    span = (len(prefix), len(prefix) + len(token))
    label = origin.label("mined", span if important else None, span)
    yield origin.answer(_get(row, "question", place), prefix + token, label, place)


def _solutions(row: Row) -> dict[str, Mapping[str, Any]]:
    return {
        name: value
        for name, value in row.items()
        if isinstance(value, Mapping) and {"solution", "is_correct"} <= set(value)
    }


def _step_span(steps: list[str], index: int) -> Span:
    """Where step `index` stands among the joined steps: ["ab", "c"], 1 -> (3, 4)."""
    start = sum(len(step) + len(STEP_BREAK) for step in steps[:index])
    return (start, start + len(steps[index]))


def _steps(value: Any, place: str, field: str) -> list[str]:
    for index, step in enumerate(_list(value, place, field)):
        if not isinstance(step, str) or not step:
            raise refusal(place, f"{field}[{index}]", step, "a step is text, and not empty", "correct it")
    return list(value)


def _list(value: Any, place: str, field: str) -> list[Any]:
    if not isinstance(value, list):
        raise refusal(place, field, value, "it is a list", "correct it")
    return value


def _get(row: Row, field: str, place: str) -> Any:
    if field not in row:
        raise ValueError(f"{place}: {field} is missing; the row has {sorted(row)}; add it, or name another --format")
    return row[field]


READERS: dict[str, Callable[[Row, str, LabelSource], Iterator[Answer]]] = {
    "answers": _own,
    "label-studio": label_studio.read_task,
    "prm800k": _prm800k,
    "mistake": _mistake,
    "processbench": _processbench,
    "stepwise": _stepwise,
    "solutions": _solutions_of,
    "autojudge": _autojudge,
}

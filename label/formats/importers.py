"""Labelled sets of other people, each row turned into answers.

Owns which format a file has, what holds for all its rows, and the reasons of rows that give nothing. The fields of a format are
its own module's. Knows nothing of the store.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from draftsmith.data.sources import read_rows
from draftsmith.json_rows import Dropped
from draftsmith.label.formats import calculations, label_studio
from draftsmith.label.formats.counting import FirstStep, StepNumber, counting, unplaced_note, zero_is_neutral
from draftsmith.label.formats.fields import Row, unpacked, whole
from draftsmith.label.formats.prm800k import is_published, read_prm800k
from draftsmith.label.formats.solutions import read_autojudge, read_solutions, solutions_of
from draftsmith.label.formats.step_labels import (
    MARK,
    STEP_FIELDS,
    RatedSteps,
    Rating,
    rated_steps,
    shepherd_steps,
    turned_steps,
)
from draftsmith.label.formats.step_sets import LAYOUTS, layout_of, read_step_set
from draftsmith.label.schema import Answer, Label, check_answer, from_row, is_keepable
from draftsmith.label.store.label_source import LabelSource, SkippedRow

Format = Literal[
    "auto",
    "answers",
    "label-studio",
    "prm800k",
    "mistake",
    "processbench",
    "stepwise",
    "wrong-steps",
    "step-labels",
    "math-shepherd",
    "solutions",
    "autojudge",
]
Reader = Callable[[Row, str, LabelSource], Iterator[Answer]]

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
    "stepwise": (
        "ground_truth_solution",
        "ground_truth_answer",
        "Ground_Truth_Solution",
        "Ground_Truth_Answer",
        "answer",
        "reference",
    ),
    "wrong-steps": ("ground_truth", "answer", "reference"),
    "step-labels": ("ground_truth_solution", "ground_truth_answer", "ground_truth", "answer", "reference"),
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
        notes: what was decided for the whole file, and rows that contradict each other.
    """

    answers: list[Answer]
    left_out: list[str]
    format: Format
    notes: tuple[str, ...] = ()


def read_labelled(path: Path, row_format: Format, origin: LabelSource, first_step: FirstStep = "auto") -> Imported:
    """Reads a whole file. A row that cannot be used is left out, with its place, field, value, rule and remedy.

    The file is read once for its format, where a set numbers or rates its steps once for what holds for all rows, and once for the answers.
    So it holds answers, and no rows.

    Args:
        path: a JSON, JSON-lines, CSV or Parquet file.
        row_format: how a row is read; `auto` decides by the fields of the first usable row.
        origin: what the file does not say.
        first_step: from which number steps are counted; `auto` decides by the rows.

    Raises:
        ValueError: there is no such file, it cannot be read as a whole, no row of it can be used (with the first reason), or the rows
            leave in doubt from which number they count.
    """
    if not path.is_file():
        raise ValueError(f"{path} is not a file; name a JSON, JSON-lines, CSV or Parquet file of labelled answers")
    if row_format == "auto":
        row_format = _format_of(read_rows(str(path), dropped=[]), origin)
    notes, reader = _reader(row_format, (row for _, row in read_rows(str(path), dropped=[])), first_step)
    unread: list[Dropped] = []
    answers: list[Answer] = []
    left_out: list[str] = []
    unusable: list[str] = []
    for place, row in read_rows(str(path), dropped=unread):
        try:
            of_row = list(reader(row, place, origin))
            for answer in of_row:
                check_answer(answer, place)
        except SkippedRow as error:
            left_out.append(f"{place}: {error}")
        except ValueError as error:
            reason = str(error)
            unusable.append(reason if reason.startswith(place) else f"{place}: {reason}")
        else:
            answers += [_with_reference(answer, row, row_format) for answer in of_row]
    unusable += [f"{row.place}: {row.reason}; mend or delete the row" for row in unread]
    if unusable and not answers:
        raise ValueError(f"no row of {path} can be used, {len(unusable)} have mistakes; the first: {unusable[0]}")
    answers, repeated = _agreeing(answers)
    return Imported(answers, unusable + left_out, row_format, (*notes, *repeated))


def _format_of(placed: Iterable[tuple[str, Row]], origin: LabelSource) -> Format:
    """The format of the first row that can be read; else of the first that looks like any."""
    first: Format = "auto"
    for place, row in placed:
        try:
            row_format = detect(row, place)
            first = row_format if first == "auto" else first
            _, reader = _reader(row_format, [row], "auto")
            for answer in reader(row, place, origin):
                check_answer(answer, place)
        except ValueError:
            continue
        return row_format
    return first


def detect(row: Row, place: str) -> Format:
    """Names the format of a row from its fields.

    Args:
        row: of a file.
        place: of the row, `FILE:LINE`.

    Raises:
        ValueError: none fits; names the fields seen.
    """
    fields = {name for name, value in row.items() if value is not None}
    for row_format, fits in _SIGNS:
        if fits(row, fields if row_format not in ("mistake", "stepwise") else set(row)):
            return row_format
    known = ", ".join(name for name in get_args(Format) if name != "auto")
    raise ValueError(f"{place}: no known format has the fields {sorted(row)}; name one with --format ({known})")


def _has_labels_of_steps(row: Row, fields: set[str]) -> bool:
    steps = next((inside for name in STEP_FIELDS if isinstance(inside := unpacked(row.get(name)), list)), None)
    if steps is None:
        return False
    beside = any(isinstance(unpacked(row.get(name)), list) for name in ("labels", "step_labels", "label", "rating"))
    return beside or any(isinstance(step, Mapping) for step in steps)


def _has_number_beside_steps(row: Row, fields: set[str]) -> bool:
    """One number for the whole row: lists of ratings beside it are more than the format needs."""
    steps = unpacked(row.get("steps"))
    are_texts = isinstance(steps, list) and not any(isinstance(step, Mapping) for step in steps)
    return are_texts and whole(row.get("label")) is not None


def _is_shepherd(row: Row, fields: set[str]) -> bool:
    return isinstance(row.get("input"), str) and isinstance(row.get("label"), str) and MARK in row["input"]


def _names_a_step(row: Row, fields: set[str]) -> bool:
    layout = LAYOUTS["stepwise"]
    own = {"model_output_steps", "Model_Solution_Steps"} & fields
    return bool(own and fields & {"question", "Question"}) or bool(
        fields & {*layout.steps} and fields & {*layout.errors}
    )


# The first that fits counts, so that what is peculiar to a format comes before what several have.
_SIGNS: tuple[tuple[Format, Callable[[Row, set[str]], bool]], ...] = (
    ("answers", lambda row, _: "verdict" in row and "response" in row),
    ("label-studio", lambda _, fields: "data" in fields and not fields & {"steps", "completions"}),
    ("mistake", lambda _, fields: {"steps", "mistake_index"} <= fields),
    ("stepwise", _names_a_step),
    ("processbench", _has_number_beside_steps),
    ("wrong-steps", lambda _, fields: bool(fields & {*LAYOUTS["wrong-steps"].errors})),
    ("prm800k", lambda row, fields: is_published(row) or {"steps", "ratings"} <= fields),
    ("math-shepherd", _is_shepherd),
    ("step-labels", _has_labels_of_steps),
    ("step-labels", lambda _, fields: "conversations" in fields),
    ("processbench", lambda _, fields: {"steps", "label"} <= fields),
    ("prm800k", lambda _, fields: {"question", "label"} <= fields),
    ("autojudge", lambda _, fields: {"prefix", "draft_token", "important"} <= fields),
    ("solutions", lambda row, fields: "question" in fields and bool(solutions_of(row))),
)


def _reader(row_format: Format, rows: Iterable[Row], first_step: FirstStep) -> tuple[list[str], Reader]:
    """What holds for all rows of a file, in words, and the reader that keeps to it."""
    if row_format in LAYOUTS:
        fields: set[str] = set()
        numbers: Counter[StepNumber] = Counter()  # few differ, so a set of millions of rows stays small
        for row in rows:
            fields.update(row)
            numbers.update(filter(None, [LAYOUTS[row_format].seen(row)]))
        layout = layout_of(row_format, fields)
        counted = counting(numbers.elements(), layout.first, row_format, first_step, layout.need)
        ends = [] if layout.verdict_is_of_steps else unplaced_note(numbers.elements())
        return [counted.sentence, *ends], lambda row, place, origin: read_step_set(
            layout, counted.first, row, place, origin
        )
    if first_step != "auto":
        counted_formats = ", ".join(LAYOUTS)
        raise ValueError(
            f"first_step is {first_step}; only {counted_formats} number their steps, and this is {row_format}; leave it out"
        )
    if row_format == "step-labels":
        return _step_label_reader(rows)
    return [], READERS[row_format]


def _step_label_reader(rows: Iterable[Row]) -> tuple[list[str], Reader]:
    nobody = LabelSource("", "nobody", "none")
    ratings: set[Rating] = set()
    for row in rows:
        with suppress(ValueError):  # the reader says why
            ratings.update(rating for rating in _rated(row, "row", nobody).ratings if rating is not None)
    neutral = zero_is_neutral(ratings)

    def read(row: Row, place: str, origin: LabelSource) -> Iterator[Answer]:
        yield _rated(row, place, origin).answer(row, origin, place, neutral)

    if 0 not in ratings:
        return [], read
    meaning = (
        "neither right nor wrong, because other steps are rated -1" if neutral else "wrong, because no step is rated -1"
    )
    return [f"a step rated 0 is {meaning}"], read


def _rated(row: Row, place: str, origin: LabelSource) -> RatedSteps:
    return (turned_steps if row.get("conversations") is not None else rated_steps)(row, place, origin)


def _agreeing(answers: list[Answer]) -> tuple[list[Answer], list[str]]:
    """The answers with one reference each, and a sentence on those that a file has twice and labels differently."""
    labels: dict[tuple[str, str], Label] = {}
    references: dict[str, str] = {}
    num_labels = num_references = 0
    kept = []
    for answer in answers:
        if answer.label is not None:
            key = (answer.id, answer.label.labelled_by)
            num_labels += labels.get(key, answer.label) != answer.label
            labels[key] = answer.label
        if answer.reference is not None and references.setdefault(answer.id, answer.reference) != answer.reference:
            num_references += 1
            answer = replace(answer, reference=references[answer.id])
        kept.append(answer)
    notes = []
    if num_labels:
        notes.append(f"{num_labels} rows repeat an earlier answer with another label; the last one counts")
    if num_references:
        notes.append(f"{num_references} rows repeat an earlier answer with another reference; the first one counts")
    return kept, notes


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


def _shepherd(row: Row, place: str, origin: LabelSource) -> Iterator[Answer]:
    yield shepherd_steps(row, place, origin).answer(row, origin, place)


def _unknown(row: Row, place: str, origin: LabelSource) -> Iterator[Answer]:
    yield from READERS[detect(row, place)](row, place, origin)


READERS: dict[str, Reader] = {
    "auto": _unknown,
    "answers": _own,
    "label-studio": label_studio.read_task,
    "prm800k": read_prm800k,
    "math-shepherd": _shepherd,
    "solutions": read_solutions,
    "autojudge": read_autojudge,
}

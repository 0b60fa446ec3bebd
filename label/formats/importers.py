"""Labelled sets of other people, each row turned into answers.

Owns which format a file has, what holds for all its rows, and the reasons of rows that give nothing. The fields of a format are
its own module's. Knows nothing of the store.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from draftsmith.data.progress import progress
from draftsmith.data.sources import read_rows
from draftsmith.json_rows import Dropped
from draftsmith.label.answer_rows import from_row
from draftsmith.label.formats import calculations, label_studio
from draftsmith.label.formats.counting import Counting, FirstStep, StepEvidence, counting, num_rows, zero_is_neutral
from draftsmith.label.formats.detection import Format, detect, fitting_formats
from draftsmith.label.formats.fields import Contradiction, Row, is_absent
from draftsmith.label.formats.meaning import Meaning, settled
from draftsmith.label.formats.prm800k import is_published, read_prm800k
from draftsmith.label.formats.repeats import Repeats
from draftsmith.label.formats.replies import read_reply
from draftsmith.label.formats.row_shapes import (
    STEP_ROWS,
    joined,
    joined_steps,
    origin_of,
    unfolded,
    with_media,
)
from draftsmith.label.formats.solutions import read_autojudge, read_solutions
from draftsmith.label.formats.step_labels import (
    RatedSteps,
    Rating,
    rated_steps,
    shepherd_steps,
    turned_steps,
)
from draftsmith.label.formats.step_sets import LAYOUTS, StepLayout, read_step_set
from draftsmith.label.schema import Answer, Span, check_answer, is_keepable
from draftsmith.label.store.label_source import LabelSource, SkippedRow

_SHOWN_ROWS = 1000
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
    "step-rows": ("ground_truth_solution", "ground_truth_answer", "ground_truth", "reference"),
    "solutions": ("ground_truth", "answer", "reference"),
    "autojudge": ("answer", "reference"),
    "replies": ("answer", "reference"),
}


# Their rows have a shape of their own, and say themselves who labelled.
_AS_THEY_ARE = ("answers", "label-studio", "solutions", "autojudge", "replies")


class RefusedFile(ValueError):
    """A file that was read to its end, and gives no answers that can be taken."""


class LabelledFile:
    """A file of labelled answers, read row by row: neither rows nor answers are kept, however many there are.

    Several passes come before the answers, and keep counts only: one for the format, which ends at the first usable row; one where fields
    have two meanings; one for what holds for all rows of a set that numbers or rates its steps; and one for each other format that fits.

    Attributes:
        format: of the rows.
        notes: what was decided for the whole file; once its answers were read, also in how many rows it contradicts itself.

    Args:
        path: a JSON, JSON-lines, CSV or Parquet file.
        row_format: how a row is read; `auto` decides by the fields of the first usable row, and where formats share a field by all rows.
        origin: what the file does not say.
        first_step: from which number steps are counted; `auto` decides by the rows.
        shown: say on stderr how many rows were looked at, where that takes long.

    Raises:
        ValueError: there is no such file, it cannot be read as a whole, or the rows leave in doubt from which number they count.
    """

    def __init__(
        self,
        path: Path,
        row_format: Format,
        origin: LabelSource,
        first_step: FirstStep = "auto",
        shown: bool = False,
    ) -> None:
        if not path.is_file():
            raise ValueError(f"{path} is not a file; name a JSON, JSON-lines, CSV or Parquet file of labelled answers")
        self._path, self._origin, self._shown = path, origin, shown
        self.format, self.notes = row_format, list[str]()
        self._rivals: dict[Format, Reader] = {}
        fitting: list[Format] = []
        counted = None
        if row_format == "auto":
            fitting = _formats_of(self._rows(), origin)
            # Who says how steps are numbered says that they are.
            is_said = first_step != "auto" and fitting[0] in LAYOUTS
            meaning = Meaning(fitting[0]) if is_said else settled(fitting[0], self._plain_rows())
            self.format, self.notes, counted = meaning.format, list(meaning.notes), meaning.counting
        notes, self._read = _reader(self.format, self._plain_rows(), first_step, counted)
        self.notes += notes
        for rival in fitting:
            if rival != self.format:
                with suppress(ValueError):  # in doubt by itself, so it is no rival
                    self._rivals[rival] = _reader(rival, self._plain_rows(), "auto")[1]
        self._num_other: Counter[Format] = Counter()

    def answers(self, left_out: Callable[[str], None]) -> Iterator[Answer]:
        """The answers of the file. A row that cannot be used is left out.

        Args:
            left_out: takes each row that gives no answer: its place with field, value, rule and remedy.

        Yields:
            each answer, with the reference that the file gave it first.

        Raises:
            RefusedFile: no row of the file can be used, or most of those that name a wrong step contradict themselves (with the first
                reason).
        """
        mistakes = _Mistakes(left_out)
        num_answers = num_wrong = 0
        with Repeats() as repeats:
            for place, row in self._shaped(read_rows(str(self._path), dropped=mistakes)):
                for answer in self._answers_of(place, row, mistakes):
                    num_answers += 1
                    num_wrong += answer.label is not None and answer.label.error is not None
                    yield repeats.agreeing(answer)
                del row
            if mistakes.first is not None and not num_answers:
                raise RefusedFile(
                    f"no row of {self._path} can be used, {mistakes.count} have mistakes; the first: {mistakes.first}"
                )
            if mistakes.num_contradictions > max(1, num_wrong):
                raise RefusedFile(
                    f"{mistakes.num_contradictions} rows of {self._path} contradict themselves, more than the {num_wrong} that name a "
                    f"wrong step and do not; the first: {mistakes.first_contradiction}"
                )
            self.notes += [*repeats.notes(), *self._rival_notes()]

    def _answers_of(self, place: str, row: Row, mistakes: _Mistakes) -> list[Answer]:
        """What a row gives: all its answers, or none of them."""
        try:
            answers = [self._with_media(answer, row, place) for answer in self._read(row, place, self._origin_of(row))]
            for answer in answers:
                check_answer(answer, place)
        except SkippedRow as error:
            mistakes.left_out(f"{place}: {error}")
        except ValueError as error:
            reason = str(error) if str(error).startswith(place) else f"{place}: {error}"
            mistakes.add(reason, isinstance(error, Contradiction))
        else:
            self._compare(place, row, answers)
            return [_with_reference(answer, row, self.format) for answer in answers]
        return []

    def _compare(self, place: str, row: Row, answers: list[Answer]) -> None:
        """Counts the formats whose signs the file bears, too, and which would label this row differently."""
        for rival, read in self._rivals.items():
            with suppress(ValueError):  # it is no row of the rival's
                others = list(read(row, place, self._origin))
                self._num_other[rival] += bool(answers and others) and _error(answers[0]) != _error(others[0])

    def _rival_notes(self) -> list[str]:
        return [
            f"read as {rival}, {num_rows(count)} would get another label; the file is read as {self.format}, and --format {rival} "
            "changes that"
            for rival, count in self._num_other.items()
            if count
        ]

    def _origin_of(self, row: Row) -> LabelSource:
        return self._origin if self.format in _AS_THEY_ARE or is_published(row) else origin_of(row, self._origin)

    def _with_media(self, answer: Answer, row: Row, place: str) -> Answer:
        return answer if self.format in _AS_THEY_ARE else with_media(answer, row, place)

    def _plain_rows(self) -> Iterator[Row]:
        return (row for _, row in self._rows())

    def _shaped(self, placed: Iterator[tuple[str, Row]]) -> Iterator[tuple[str, Row]]:
        """The rows in the shape that the format reads."""
        if self.format in _AS_THEY_ARE:
            return placed
        return joined(_unfolded(placed)) if self.format == "step-rows" else _unfolded(placed)

    def _rows(self) -> Iterator[tuple[str, Row]]:
        rows = self._shaped(read_rows(str(self._path), dropped=_Nowhere()))
        if not self._shown:
            yield from rows
            return
        with progress("import: look at all rows", None, "rows", brief=True) as advance:
            for count, placed in enumerate(rows, start=1):
                yield placed
                if not count % _SHOWN_ROWS:
                    advance(_SHOWN_ROWS)


def _unfolded(placed: Iterator[tuple[str, Row]]) -> Iterator[tuple[str, Row]]:
    for place, row in placed:
        for shaped in unfolded(row):
            yield place, shaped
        del row, shaped  # they are not held while the next row is read


class _Mistakes:
    """Counts the rows with mistakes, and passes on why they are left out.

    Attributes:
        left_out: takes the reasons, those of rows without a mistake too.
        count: of the mistakes.
        first: of them.
        num_contradictions: rows among them of which two fields contradict each other.
        first_contradiction: the first of these.
    """

    def __init__(self, left_out: Callable[[str], None]) -> None:
        self.left_out = left_out
        self.count = self.num_contradictions = 0
        self.first: str | None = None
        self.first_contradiction: str | None = None

    def add(self, reason: str, contradicts: bool = False) -> None:
        self.count += 1
        self.first = self.first or reason
        if contradicts:
            self.num_contradictions += 1
            self.first_contradiction = self.first_contradiction or reason
        self.left_out(reason)

    def append(self, record: Dropped, /) -> None:
        """Takes a row that cannot be decoded."""
        self.add(f"{record.place}: {record.reason}; mend or delete the row")


class _Nowhere:
    """Takes rows that cannot be decoded where another pass names them."""

    def append(self, record: Dropped, /) -> None:
        pass


def _formats_of(placed: Iterable[tuple[str, Row]], origin: LabelSource) -> list[Format]:
    """The formats that the first row that can be read has signs of; else those of the first that has any. The first of them counts."""
    seen: list[Format] = []
    for place, row in placed:
        fitting = fitting_formats(row)
        seen = seen or fitting
        if fitting[:1] == ["step-rows"]:  # one row is no answer yet
            return fitting
        try:
            _, reader = _reader(fitting[0] if fitting else "auto", [row], "auto")
            for answer in reader(row, place, origin):
                check_answer(answer, place)
        except ValueError:
            continue
        return fitting
    return seen or ["auto"]


def _error(answer: Answer) -> tuple[str, Span | None] | None:
    return None if answer.label is None else (answer.label.verdict, answer.label.error)


def _reader(
    row_format: Format, rows: Iterable[Row], first_step: FirstStep, known: Counting | None = None
) -> tuple[list[str], Reader]:
    """What holds for all rows of a file, in words, and the reader that keeps to it."""
    if row_format in LAYOUTS:
        layout = replace(LAYOUTS[row_format], is_said=first_step != "auto")
        layout, evidence, has_signature, is_less_known = _step_evidence(layout, rows)
        need = 2 if has_signature else layout.need
        counted = known or counting(evidence, layout.first, row_format, first_step, need, is_less_known)
        ends = [] if layout.verdict_is_of_steps else evidence.unplaced_note()
        return [counted.sentence, *ends], lambda row, place, origin: read_step_set(
            layout, counted.first, row, place, origin
        )
    if first_step != "auto":
        counted_formats = ", ".join(LAYOUTS)
        raise ValueError(
            f"first_step is {first_step}; only {counted_formats} number their steps, and this is {row_format}; leave it out"
        )
    if row_format in ("step-labels", "step-rows"):
        return _step_label_reader(rows)
    return [], READERS[row_format]


def _step_evidence(layout: StepLayout, rows: Iterable[Row]) -> tuple[StepLayout, StepEvidence, bool, bool]:
    """The layout with the names that count in a file, what its rows say, and whether any is signed or has a less known name."""
    usual = layout.usual()
    evidence = {layout: StepEvidence(), usual: StepEvidence()}
    has_usual = is_signed = is_less_known = False
    for row in rows:
        has_usual = has_usual or not is_absent(row.get(usual.field(row)))
        is_signed = is_signed or layout.is_signed(row)
        is_less_known = is_less_known or layout.is_less_known(row)
        for each, seen in evidence.items():
            number = each.seen(row)
            if number is not None:
                seen.add(number)
    counts = usual if has_usual else layout
    return counts, evidence[counts], is_signed, is_less_known and not has_usual


def _step_label_reader(rows: Iterable[Row]) -> tuple[list[str], Reader]:
    nobody = LabelSource("", "nobody", "none")
    ratings: set[Rating] = set()
    with_minus: set[str] = set()
    for row in rows:
        with suppress(ValueError):  # the reader says why
            rated = _rated(row, "row", nobody, with_minus=with_minus)
            ratings.update(rating for rating in rated.ratings if rating is not None)
    neutral = zero_is_neutral(ratings)

    def read(row: Row, place: str, origin: LabelSource) -> Iterator[Answer]:
        yield _rated(row, place, origin, with_minus).answer(row, origin, place, neutral)

    if 0 not in ratings:
        return [], read
    meaning = (
        "neither right nor wrong, because other steps are rated -1" if neutral else "wrong, because no step is rated -1"
    )
    return [f"a step rated 0 is {meaning}"], read


def _rated(
    row: Row,
    place: str,
    origin: LabelSource,
    zero_is_neutral_in: Collection[str] = (),
    with_minus: set[str] | None = None,
) -> RatedSteps:
    if STEP_ROWS in row:
        return joined_steps(row, place, origin)
    if row.get("conversations") is not None:
        return turned_steps(row, place, origin)
    return rated_steps(row, place, origin, zero_is_neutral_in, with_minus)


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
    "replies": read_reply,
}

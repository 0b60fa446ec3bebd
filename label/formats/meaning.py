"""Files whose fields two formats share: what the whole file says of their meaning.

A number in `label` beside steps is the number of a step, or a verdict on the whole answer. A step rated 0 is neutral, or wrong. Read the
other way, every label would be false, and no row would say so. Owns these two decisions and the sentences for them. Knows no files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from draftsmith.label.formats.counting import Counting, num_rows
from draftsmith.label.formats.detection import Format
from draftsmith.label.formats.fields import Row, is_absent, unpacked, whole
from draftsmith.label.formats.step_labels import Rating, label_lists, rated_steps
from draftsmith.label.formats.step_sets import LAYOUTS, StepLayout
from draftsmith.label.store.label_source import LabelSource

_ENOUGH = 9  # different numbers are no verdicts
_MANY = 8  # rows that have no numbers but those of verdicts
_NOBODY = LabelSource("", "nobody", "none")
# Fields that PRM800K has and sets with ratings of 1 and 0 have not.
_PRM800K_FIELDS = ("tail", "problem_in_MATH", "finish_reason", "pre_generated_steps")


@dataclass(frozen=True)
class Meaning:
    """What the fields of a file mean.

    Attributes:
        format: of the rows.
        notes: sentences for the user on what was decided.
        counting: from which number steps count, where other fields of the rows say it.
    """

    format: Format
    notes: tuple[str, ...] = ()
    counting: Counting | None = None


def settled(row_format: Format, rows: Iterable[Row]) -> Meaning:
    """What the fields of a file mean, after a look at all its rows.

    Worked example: labels 1, 0, 0 beside `labels` of [1, 1], [1, 0] and [0, 0] are verdicts: where the first is 1, all steps are right. As
    numbers they would call the second step of the first row wrong. So the file is `step-labels`, and not `processbench`.

    Args:
        row_format: that the fields of the first row have.
        rows: of the file.

    Raises:
        ValueError: the rows leave it in doubt.
    """
    if row_format == "processbench":
        evidence = _LabelEvidence()
        for row in rows:
            evidence.add(row)
        return evidence.meaning()
    if row_format in ("stepwise", "mistake"):
        return Meaning(row_format, counting=_counted_by_lists(LAYOUTS[row_format], rows))
    if row_format == "prm800k" and _rates_right_or_wrong(rows):
        note = "ratings are 1 or 0, so they are read as step-labels; --format prm800k reads 0 as neutral"
        return Meaning("step-labels", (note,))
    return Meaning(row_format)


def _counted_by_lists(layout: StepLayout, rows: Iterable[Row]) -> Counting | None:
    """From which number a file counts, if lists of labels beside its numbers fit one way in all rows that have both; else None."""
    count, field, has_minus = 0, "", False
    fitting: Counter[tuple[bool, int]] = (
        Counter()
    )  # by whether a step rated 0 is neutral, and by the number of the first step
    for row in rows:
        lists = label_lists(row)
        value = row.get(layout.field(row))
        number = -1 if is_absent(value) else whole(value)
        if number is None or not lists:
            continue
        with suppress(ValueError):  # no list of ratings, so it says nothing
            ratings = rated_steps(row, "row", _NOBODY).ratings
            count, field, has_minus = count + 1, field or lists[0], has_minus or -1 in ratings
            for zero_is_neutral in (True, False):
                first = _first_wrong(ratings, zero_is_neutral)
                fitting[zero_is_neutral, 0] += number == (-1 if first is None else first)
                fitting[zero_is_neutral, 1] += number in (-1, 0) if first is None else number == first + 1
    fits = [fitting[has_minus, first] == count for first in (0, 1)]
    if count < 2 or fits[0] == fits[1]:  # a single row may be a slip
        return None
    first = int(fits[1])
    agree = f"the number and {field} then agree in {num_rows(count)} with both"
    return Counting(first, f"steps are counted from {first}: {agree}; --first_step changes that")


def _first_wrong(ratings: Sequence[Rating | None], zero_is_neutral: bool) -> int | None:
    bad = (-1, "wrong") if zero_is_neutral else (-1, 0, "wrong")
    return next((index for index, rating in enumerate(ratings) if rating in bad), None)


def _rates_right_or_wrong(rows: Iterable[Row]) -> bool:
    """Whether flat rows of ratings have 0 and never -1, and nothing else of PRM800K."""
    seen: set[int | None] = set()
    for row in rows:
        if any(name in row for name in _PRM800K_FIELDS) or isinstance(unpacked(row.get("label")), dict):
            return False
        ratings = unpacked(row.get("ratings"))
        if isinstance(ratings, list):
            seen.update(whole(rating) for rating in ratings if not is_absent(rating))
        if -1 in seen:
            return False
    return 0 in seen


class _LabelEvidence:
    """How often a whole number in `label` fits the labels of the steps beside it, as a number and as a verdict."""

    def __init__(self) -> None:
        self._num_rows = self._num_numbers = 0
        self._is_signed = False
        self._field = ""
        self._numbers: set[int] = set()
        self._has_minus = False
        # By whether a step rated 0 is neutral, which only the whole file says.
        self._fitting: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}

    def add(self, row: Row) -> None:
        number, lists = whole(row.get("label")), label_lists(row)
        if number is None:
            return
        self._num_numbers += 1
        self._is_signed = self._is_signed or LAYOUTS["processbench"].is_signed(row)
        self._numbers = {*self._numbers, number} if len(self._numbers) < _ENOUGH else self._numbers
        if not lists:
            return
        with suppress(ValueError):  # no list of ratings, so it says nothing
            ratings = rated_steps(row, "row", _NOBODY).ratings
            self._num_rows += 1
            self._field = self._field or lists[0]
            self._has_minus = self._has_minus or -1 in ratings
            for zero_is_neutral, fitting in self._fitting.items():
                first = _first_wrong(ratings, zero_is_neutral)
                fitting["from 0"] += number == (-1 if first is None else first)
                fitting["from 1"] += number in (-1, 0) if first is None else number == first + 1
                fitting["1 is right"] += (number == 1) == (first is None)
                fitting["1 is wrong"] += (number == 1) != (first is None)

    def meaning(self) -> Meaning:
        """Number or verdict, and from which number steps count where it is one.

        Raises:
            ValueError: the rows leave it in doubt.
        """
        self._check_verdicts()
        fitting = self._fitting[self._has_minus]
        as_number = max(fitting["from 0"], fitting["from 1"])
        as_verdict = max(fitting["1 is right"], fitting["1 is wrong"])
        rows = f"{num_rows(self._num_rows)} with both"
        if as_number == self._num_rows:
            first = int(fitting["from 1"] > fitting["from 0"])
            if fitting["from 0"] == fitting["from 1"] or self._num_rows < 2:  # a single row may be a slip
                return Meaning("processbench")
            sentence = f"steps are counted from {first}: label and {self._field} then agree in {rows}"
            return Meaning("processbench", counting=Counting(first, f"{sentence}; --first_step changes that"))
        # ProcessBench's own -1 is no verdict of most sets, so that a single row does not speak for it.
        may_be_verdict = (self._numbers <= {0, 1} and as_verdict >= as_number) or (
            self._numbers <= {-1, 1} and as_verdict >= as_number + 2
        )
        if not may_be_verdict:
            self._check_numbers(fitting)
            return Meaning("processbench")
        if as_verdict == self._num_rows:
            note = f"label is a verdict on the whole answer, which agrees with {self._field} in {rows}; so {self._field} is read"
            return Meaning("step-labels", (f"{note}, and --format processbench reads label as the number of a step",))
        raise ValueError(
            f"label may be the number of the first wrong step, or a verdict on the whole answer: {self._field} beside it fits the number "
            f"in {as_number} and the verdict in {as_verdict} of {num_rows(self._num_rows)}; say --format processbench if label is the "
            f"number, else --format step-labels, which reads {self._field}"
        )

    def _check_verdicts(self) -> None:
        """Refuses a file without lists whose numbers are no others than those of verdicts on whole answers.

        Raises:
            ValueError: it is such a file, in which each label may be false.
        """
        are_verdicts = self._numbers in ({0, 1}, {-1, 1})
        if self._num_rows or self._is_signed or self._num_numbers < _MANY or not are_verdicts:
            return
        low, high = sorted(self._numbers)
        raise ValueError(
            f"label is {low} or {high} in all {num_rows(self._num_numbers)}: the number of the first wrong step, or a verdict on the whole "
            "answer; say --format processbench if it is the number; a verdict places no error, and cannot be imported"
        )

    def _check_numbers(self, fitting: Counter[str]) -> None:
        """Refuses numbers that agree with the lists in some rows, and in more from 1 than from 0, which is ProcessBench's own way.

        Raises:
            ValueError: they do, so that each label may lie a step off.
        """
        from_0, from_1 = fitting["from 0"], fitting["from 1"]
        if self._num_rows < 2 or from_1 <= from_0:
            return
        raise ValueError(
            f"label and {self._field} name the same first wrong step in {from_0} of {num_rows(self._num_rows)} if steps are counted from "
            f"0, and in {from_1} if from 1; correct the other rows, or say --first_step zero or one if label is the number, else "
            f"--format step-labels, which reads {self._field}"
        )

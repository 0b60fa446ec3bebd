"""From which number a set counts its steps, and what a step's 0 means: read off the whole file.

A set names the first wrong step by a number. Read from 1 instead of 0, every label would lie one step off, and no row would say so. Owns
this decision and the sentence for it. Knows neither rows nor files.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

FirstStep = Literal["auto", "zero", "one"]


@dataclass(frozen=True)
class StepNumber:
    """What one row says of its first wrong step.

    Attributes:
        numbers: of the wrong steps; empty where the row names none by null, `N/A` or an empty list.
        num_steps: of the answer.
        is_wrong: what another field says of the whole answer; None where there is no such field.
        by_list: the row lists all wrong steps, so that 0 cannot mean that there is none.
    """

    numbers: tuple[int, ...]
    num_steps: int
    is_wrong: bool | None = None
    by_list: bool = False


@dataclass(frozen=True)
class Counting:
    """How a file counts.

    Attributes:
        first: the number of the first step, 0 or 1.
        sentence: how that is known, for the user.
    """

    first: int
    sentence: str


def counting(rows: Iterable[StepNumber], published: int, name: str, choice: FirstStep, need: int = 1) -> Counting:
    """How a file counts its steps.

    A number that equals the number of steps only fits from 1. A 0 only fits from 0, except where it means that no step is wrong.

    Worked example: labels 2, 3, 0 of three steps each, without -1 or null, count from 1, and 0 is none. With a -1 they fit neither way.

    Args:
        rows: of the file.
        published: from which number the format counts by its own description.
        name: of the format.
        choice: of the user; `auto` decides by the rows.
        need: how many numbers have to speak against a format that counts from 0.
    """
    if choice != "auto":
        return Counting(int(choice == "one"), f"steps are counted from {int(choice == 'one')}, as --first_step says")
    seen = _Seen(list(rows))
    other = seen.against_zero(need) if published == 0 else seen.against_one()
    first = published if other is None else 1 - published
    why = f": {other}" if other else f", as the format {name} says"
    if other is None and published == 0 and seen.num_last:
        why += f", but the number equals that of the steps in {_rows(seen.num_last)}"
    return Counting(first, f"steps are counted from {first}{why}; --first_step changes that")


def _rows(count: int) -> str:
    return f"{count} row{'' if count == 1 else 's'}"


class _Seen:
    """What speaks for either way of counting."""

    def __init__(self, rows: Sequence[StepNumber]) -> None:
        wrong = [row for row in rows if any(number >= 0 for number in row.numbers)]
        zeros = [row for row in wrong if 0 in row.numbers]
        self.num_last = sum(row.num_steps in row.numbers for row in wrong)
        self.num_zero = len(zeros)
        self.num_sure_zero = sum(row.by_list or row.is_wrong is True for row in zeros)
        self.num_right_zero = sum(row.is_wrong is False for row in zeros)
        self.num_none = len(rows) - len(wrong)

    def against_zero(self, need: int) -> str | None:
        """Why the file counts from 1; None where it does not."""
        zero_is_step = bool(self.num_none or self.num_sure_zero)
        if self.num_last >= need and not (self.num_zero and zero_is_step):
            none = ", and 0 means none" if self.num_zero else ", and it is never 0"
            return f"the number equals that of the steps in {_rows(self.num_last)}{none}"
        if self.num_right_zero >= 2 and self.num_right_zero == self.num_zero and not self.num_none:
            return f"the {self.num_zero} answers with 0 are right"
        return None

    def against_one(self) -> str | None:
        """Why the file counts from 0; None where it does not."""
        if self.num_last:
            return None
        if self.num_sure_zero:
            return f"{self.num_sure_zero} wrong answers have 0, and the number never equals that of the steps"
        if self.num_zero > 1 and self.num_none:
            return f"the number is 0 in {_rows(self.num_zero)}, {self.num_none} others name no step, and it never equals that of the steps"
        return None


def unplaced_note(rows: Iterable[StepNumber]) -> list[str]:
    """A sentence on answers with a wrong end and no wrong step, where there are any.

    Args:
        rows: of the file.
    """
    count = sum(row.is_wrong is True and not any(number >= 0 for number in row.numbers) for row in rows)
    sentence = (
        f"{count} answers have a wrong end, and the file names no wrong step; look at them before you train on them"
    )
    return [sentence] if count else []


def zero_is_neutral(ratings: Iterable[int]) -> bool:
    """Whether a step rated 0 is neither right nor wrong: where others are rated -1. Where none is, 0 is wrong and 1 is right.

    Args:
        ratings: of all steps of a file.
    """
    return -1 in set(ratings)

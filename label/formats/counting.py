"""From which number a set counts its steps, and what a step's 0 means: read off the whole file.

A set names the first wrong step by a number. Read from 1 instead of 0, every label would lie one step off, and no row would say so. Owns
this decision and the sentence for it. Knows neither rows nor files.
"""

from __future__ import annotations

from collections.abc import Iterable
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


def counting(
    rows: Iterable[StepNumber] | StepEvidence,
    published: int,
    name: str,
    choice: FirstStep,
    need: int = 1,
    must_be_shown: bool = False,
) -> Counting:
    """How a file counts its steps.

    A number that equals the number of steps only fits from 1. A 0 only fits from 0, except where it means that no step is wrong. Where
    both occur, or a 0 may mean either, the user has to say it.

    Worked example: labels 2, 3, 0 of three steps each count from 1 if the answers with 0, and no others, are right. If nothing
    says what 0 means, import stops. With a -1 they fit neither way, and the format's own way counts.

    Args:
        rows: of the file, or what was counted of them.
        published: from which number the format counts by its own description.
        name: of the format.
        choice: of the user; `auto` decides by the rows.
        need: how many numbers have to speak against a format that counts from 0.
        must_be_shown: the rows alone decide, whatever the format says.

    Raises:
        ValueError: the rows leave it in doubt.
    """
    if choice != "auto":
        return Counting(int(choice == "one"), f"steps are counted from {int(choice == 'one')}, as --first_step says")
    seen = rows if isinstance(rows, StepEvidence) else StepEvidence(rows)
    if must_be_shown:
        first, why = seen.shown()
    else:
        first, why = seen.from_zero_unless(need) if published == 0 else seen.from_one_unless()
    if first is None:
        raise ValueError(
            f"the file may count its steps from 0 or from 1: {why}; "
            "say --first_step zero if its first step has the number 0, else --first_step one"
        )
    reason = f": {why}" if why else f", as the format {name} says"
    if first == published == 0 and seen.num_last:
        reason += f", but the number equals that of the steps in {num_rows(seen.num_last)}"
    return Counting(first, f"steps are counted from {first}{reason}; --first_step changes that")


def num_rows(count: int) -> str:
    """A number of rows in words: `1 row`, `2 rows`.

    Args:
        count: of them.
    """
    return f"{count} row{'' if count == 1 else 's'}"


class StepEvidence:
    """What the rows of a file say of its counting: counts alone, however many rows there are.

    Attributes:
        num_last: rows with the number of the steps.
        num_zero: rows with a 0.
        num_sure_zero: those whose answer is wrong, so that a step is, too.
        num_right_zero: those whose answer is right.
        num_right_step: rows of right answers with a number above 0.
        num_none: rows that name no step by -1, null, `N/A` or an empty list.
        num_unplaced: those of them whose answer is wrong.

    Args:
        rows: that are known already; others are added.
    """

    def __init__(self, rows: Iterable[StepNumber] = ()) -> None:
        self.num_last = self.num_zero = self.num_sure_zero = self.num_right_zero = 0
        self.num_right_step = self.num_none = self.num_unplaced = 0
        for row in rows:
            self.add(row)

    def add(self, row: StepNumber) -> None:
        """Counts one more row.

        Args:
            row: of the file.
        """
        has_zero = 0 in row.numbers
        self.num_last += row.num_steps in row.numbers
        self.num_zero += has_zero
        self.num_sure_zero += has_zero and (row.by_list or row.is_wrong is True)
        self.num_right_zero += has_zero and row.is_wrong is False
        self.num_right_step += row.is_wrong is False and any(number > 0 for number in row.numbers)
        names_none = not any(number >= 0 for number in row.numbers)
        self.num_none += names_none
        self.num_unplaced += names_none and row.is_wrong is True

    def unplaced_note(self) -> list[str]:
        """A sentence on answers with a wrong end and no wrong step, where there are any."""
        if not self.num_unplaced:
            return []
        rule = "have a wrong end, and the file names no wrong step; look at them before you train on them"
        return [f"{self.num_unplaced} answers {rule}"]

    def from_zero_unless(self, need: int) -> tuple[int | None, str]:
        """The number of the first step where the format counts from 0, and why it is another or (None) in doubt.

        Args:
            need: how many numbers have to speak against 0.
        """
        last = f"the number equals that of the steps in {num_rows(self.num_last)}"
        only_right = self.num_right_zero == self.num_zero > 0 and not self.num_right_step and not self.num_none
        if only_right and self.num_last >= (1 if self.num_zero > 1 else need):
            return 1, f"{last}, and 0 means none: the answers with 0 are right, and only they ({self.num_zero})"
        if only_right and self.num_zero > 1:
            return (
                None,
                f"the answers with 0 are right, and only they ({self.num_zero}); no number equals that of the steps",
            )
        if self.num_last < need:
            return 0, ""
        if not self.num_zero:
            return 1, f"{last}, and it is never 0"
        if self.num_last > self.num_zero or not (self.num_none or self.num_sure_zero):
            return None, f"{last}, and it is 0 in {num_rows(self.num_zero)}"
        return 0, ""

    def shown(self) -> tuple[int | None, str]:
        """The number of the first step as the rows alone show it, and why; None where they do not."""
        last, zero = num_rows(self.num_last), num_rows(self.num_zero)
        if self.num_zero and self.num_none and not self.num_last:
            return 0, f"the number is 0 in {zero}, and {self.num_none} others name no step"
        if self.num_last and not self.num_zero:
            return 1, f"the number equals that of the steps in {last}, and it is never 0"
        return None, f"the number is 0 in {zero}, equals that of the steps in {last}, and {self.num_none} name no step"

    def from_one_unless(self) -> tuple[int | None, str]:
        """The number of the first step where the format counts from 1, and why it is another or (None) in doubt."""
        zeros = f"the number is 0 in {num_rows(self.num_sure_zero)} with a wrong step"
        if self.num_last:
            more = f", and equals that of the steps in {num_rows(self.num_last)}"
            return (None, zeros + more) if self.num_sure_zero > self.num_last else (1, "")
        never = ", and it never equals that of the steps"
        if self.num_sure_zero:
            return (0 if self.num_sure_zero > 1 and not self.num_right_zero else None), zeros + never
        num_unsaid = self.num_zero - self.num_right_zero
        if num_unsaid and self.num_none:
            return None, f"the number is 0 in {num_rows(num_unsaid)}, {self.num_none} others name no step{never}"
        return 1, ""


def zero_is_neutral(ratings: Iterable[int | str]) -> bool:
    """Whether a step rated 0 is neither right nor wrong: where others are rated -1. Where none is, 0 is wrong and 1 is right.

    Words such as `wrong` say nothing of numbers.

    Args:
        ratings: of all steps of a file, numbers and words.
    """
    return -1 in set(ratings)

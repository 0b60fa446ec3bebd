"""Checks any text against a sums problem: the answer it gives, whether it is right, and where the first wrong step
stands.

Owns the reading of step lines (by the phrase tables of ``wordings``). Does not know styles or models; never raises
for any text.
"""

import re
from dataclasses import dataclass
from functools import cache

from draftsmith.embedded.problems import Op, Problem, Step
from draftsmith.embedded.wordings import CLOSINGS, STEP_WORDINGS

_NUMBER = r"(?<![\d.,-])[0-9]{1,9}(?!\d|[.,]\d)"
_ANSWER = re.compile(r"\s*####\s*([0-9]{1,9})\s*\.?\s*")
_DIGITS = re.compile(r"\d+")


@dataclass(frozen=True)
class Verdict:
    """What a checked solution says, and where it first errs.

    Attributes:
        answer: the number after ``####``; None where there is none.
        correct: whether that is the problem's answer.
        error_span: (start, end) characters of the first wrong line; None where no line is wrong.
    """

    answer: int | None
    correct: bool
    error_span: tuple[int, int] | None


@dataclass(frozen=True)
class SaidStep:
    """A calculation as a line states it."""

    op: Op
    left: int
    right: int
    result: int


def check(problem: Problem, text: str) -> Verdict:
    """Judges a solution text line by line, up to and including the first ``#### answer`` line.

    A line is wrong when it

    * states a calculation whose arithmetic is wrong, or that is no step of this problem (same operation, operands and
      result; the operands of a sum or product in either order), or whose operands come from a step that no earlier
      line has stated;
    * closes with a number, or answers with one, that is not the problem's answer;
    * holds digits but can be read as none of these.

    Lines without digits are never wrong, a line may repeat a right step, independent steps may come in any order, and
    steps may be left out as long as no stated step needs them. An unfinished last line (no full stop, no line
    break) is not judged, since its numbers may still grow; an answer line at the very end is finished.
    """
    stated: set[int] = set()
    error_span: tuple[int, int] | None = None
    for start, line, finished in _lines(text):
        answered = _ANSWER.fullmatch(line)
        if answered is not None:
            answer = int(answered.group(1))
            right = answer == problem.answer
            if not right and error_span is None:
                error_span = _span(start, line)
            return Verdict(answer, right, error_span)
        if error_span is None and finished and not _line_is_right(line, problem, stated):
            error_span = _span(start, line)
    return Verdict(None, False, error_span)


def read_step(line: str) -> SaidStep | None:
    """The calculation a line states in any of the corpus's wordings, or None. The line must hold exactly its three
    numbers."""
    if len(_DIGITS.findall(line)) != 3:
        return None
    for op, form in _step_forms():
        match = form.search(line)
        if match is not None:
            return SaidStep(op, int(match["a"]), int(match["b"]), int(match["c"]))
    return None


def _lines(text: str) -> list[tuple[int, str, bool]]:
    """(start, line, finished) for each line; only line feeds end a line, so that offsets stay plain."""
    pieces = text.split("\n")
    lines = []
    start = 0
    for index, piece in enumerate(pieces):
        lines.append((start, piece, index < len(pieces) - 1 or piece.rstrip().endswith(".")))
        start += len(piece) + 1
    return lines


def _span(start: int, line: str) -> tuple[int, int]:
    """The line without the white space around it."""
    left = len(line) - len(line.lstrip())
    return start + left, start + len(line.rstrip())


def _line_is_right(line: str, problem: Problem, stated: set[int]) -> bool:
    """Whether a line is right; adds the steps that it states to ``stated``."""
    if _DIGITS.search(line) is None:
        return True
    said = read_step(line)
    if said is None:
        match = _closing_form().fullmatch(line.strip())
        return match is not None and int(match["c"]) == problem.answer
    # Two steps of a problem may state the same calculation; one line then states both.
    matches = {i for i, step in enumerate(problem.steps) if _is_step(said, step) and set(step.needs) <= stated}
    stated |= matches
    return bool(matches)


def _is_step(said: SaidStep, step: Step) -> bool:
    if (said.op, said.result) != (step.op, step.result):
        return False
    same = (said.left, said.right) == (step.left, step.right)
    return same or (said.op in "+*" and (said.right, said.left) == (step.left, step.right))


@cache
def _step_forms() -> tuple[tuple[Op, re.Pattern[str]], ...]:
    """One pattern a wording, up to and without the words that say what the result counts."""
    forms: list[tuple[Op, re.Pattern[str]]] = []
    for op, wordings in STEP_WORDINGS.items():
        for wording in wordings:
            forms.append((op, re.compile(r"(?<!\w)" + _pattern(wording.removesuffix(" {w}.")), re.IGNORECASE)))
    return tuple(forms)


@cache
def _closing_form() -> re.Pattern[str]:
    """All closings differ only in the words before the number."""
    openings = "|".join(re.escape(closing.removesuffix("{c}.")) for closing in CLOSINGS if closing)
    return re.compile(rf"(?:{openings})(?P<c>{_NUMBER})\.?", re.IGNORECASE)


def _pattern(phrase: str) -> str:
    """The phrase as a pattern with named groups for its numbers."""
    pattern = re.escape(phrase)
    for slot in "abc":
        pattern = pattern.replace(re.escape("{" + slot + "}"), f"(?P<{slot}>{_NUMBER})")
    return pattern

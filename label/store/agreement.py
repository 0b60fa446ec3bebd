"""How far two annotators agree on the answers that both have labelled.

Owns Cohen's kappa and the distance between two marks. Knows nothing of stores, and of how an answer is cut into tokens.
Dimension: N, the tokens (or words) of one response.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from draftsmith.label.schema import Answer, Span, Verdict


@dataclass(frozen=True)
class LabelComparison:
    """What two annotators said of one answer.

    Attributes:
        item_id: of the answer.
        first: the first one's verdict.
        second: the second one's verdict.
        distance: tokens from one mark to the other (0: the same token), where both marked an error.
    """

    item_id: str
    first: Verdict
    second: Verdict
    distance: int | None

    def agrees(self) -> bool:
        """Whether both say that it is correct, or both that it is not."""
        return (self.first == "correct") == (self.second == "correct")


@dataclass(frozen=True)
class Agreement:
    """Two annotators and every answer that both have labelled."""

    first: str
    second: str
    comparisons: tuple[LabelComparison, ...]

    def observed(self) -> float:
        """The share of answers with the same verdict, correct or not."""
        return sum(comparison.agrees() for comparison in self.comparisons) / len(self.comparisons)

    def kappa(self) -> float | None:
        """Cohen's kappa of correct or not; see `cohens_kappa`."""
        return cohens_kappa(
            [(comparison.first == "correct", comparison.second == "correct") for comparison in self.comparisons]
        )

    def distances(self) -> tuple[int, ...]:
        """The distances of the answers in which both marked an error, smallest first."""
        return tuple(sorted(comparison.distance for comparison in self.comparisons if comparison.distance is not None))


def are_comparable(first: Answer, second: Answer) -> bool:
    """Whether two labels were given without sight of each other, and both speak of the whole answer.

    Args:
        first: an answer with one label.
        second: the same answer with another.
    """
    if first.label is None or second.label is None:
        return False
    saw = first.label.labelled_by in second.label.replaces or second.label.labelled_by in first.label.replaces
    return not saw and speaks_of_all(first) and speaks_of_all(second)


def speaks_of_all(answer: Answer) -> bool:
    """Whether the label says of the whole answer if there is an error, and where the first one is.

    A label on `checked` characters does so if they are all of them, or lead from the start to the error.

    Args:
        answer: with its label.
    """
    label = answer.label
    if label is None:
        return False
    if label.checked is None:
        return True
    start, end = label.checked
    return start == 0 and (label.verdict == "wrong" or end == len(answer.response))


def cohens_kappa(pairs: Sequence[tuple[bool, bool]]) -> float | None:
    """Cohen's kappa (1960, eq. 1): (observed - expected) / (1 - expected), where expected is the agreement by chance.

    Args:
        pairs: both verdicts on each answer.

    Returns:
        None where it is not defined: no pairs, or both gave the same verdict throughout.
    """
    if not pairs:
        return None
    count = len(pairs)
    first = sum(by_first for by_first, _ in pairs)
    second = sum(by_second for _, by_second in pairs)
    # In whole numbers up to the last step, so that "no chance left" is recognised exactly.
    expected = first * second + (count - first) * (count - second)
    observed = sum(by_first == by_second for by_first, by_second in pairs) * count
    return None if expected == count * count else (observed - expected) / (count * count - expected)


def token_distance(first: Span, second: Span, offsets: Sequence[Span]) -> int | None:
    """How many tokens lie from the first token of one mark to that of the other.

    Worked example: with tokens (0, 2), (2, 3), (3, 7), the marks (1, 3) and (4, 5) begin in tokens 0 and 2: 2.

    Args:
        first: one mark.
        second: the other mark.
        offsets: N spans of tokens.

    Returns:
        None where a mark touches no token.
    """
    starts = [
        next((index for index, (start, end) in enumerate(offsets) if max(start, mark[0]) < min(end, mark[1])), None)
        for mark in (first, second)
    ]
    return None if starts[0] is None or starts[1] is None else abs(starts[0] - starts[1])


def compared(first: Answer, second: Answer, cut: Callable[[Answer], Sequence[Span]]) -> LabelComparison:
    """What two labels of one answer say.

    Args:
        first: the answer with one label.
        second: the same answer with another.
        cut: the N tokens of an answer; asked only where both marked an error.
    """
    assert first.label is not None
    assert second.label is not None
    distance = None
    if first.label.error is not None and second.label.error is not None:
        distance = token_distance(first.label.error, second.label.error, cut(first))
    return LabelComparison(first.id, first.label.verdict, second.label.verdict, distance)

"""What the known answers to a question say next: a draft of the next answer.

Owns the index of short runs of tokens in them. Knows no model: the caller verifies what is guessed here.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

SHORTEST_RUN = 3  # tokens of an index entry: a shorter run is repeated too often, a longer one is found too late
_LONGEST = 16  # a longer match is not compared further
_MOST = 64  # places of one run that are compared, the latest ones


@dataclass(frozen=True)
class AnswerPosition:
    """A place in a known answer.

    Attributes:
        answer: its number among the answers.
        position: of its next token.
    """

    answer: int
    position: int


class KnownAnswers:
    """Answers in the order in which they became known, in token ids."""

    def __init__(self) -> None:
        self._answers: list[list[int]] = []
        self._ends: defaultdict[tuple[int, ...], list[AnswerPosition]] = defaultdict(list)

    def add(self, tokens: list[int], first: int = 0) -> int:
        """Adds an answer.

        Args:
            tokens: of the answer.
            first: what is before this place is in the index already, from an earlier answer that begins the same.

        Returns:
            the answer's number.
        """
        number = len(self._answers)
        self._answers.append(tokens)
        for end in range(max(first + 1, SHORTEST_RUN), len(tokens) + 1):
            self._ends[tuple(tokens[end - SHORTEST_RUN : end])].append(AnswerPosition(number, end))
        return number

    def following(self, place: AnswerPosition, most: int) -> list[int]:
        """Tokens of a known answer from a place on.

        Args:
            place: where to begin.
            most: at most this many tokens.
        """
        return self._answers[place.answer][place.position : place.position + most]

    def rejoin(self, tokens: list[int], least: int = SHORTEST_RUN) -> AnswerPosition | None:
        """Where the last tokens of a growing answer are in a known answer.

        The longest match counts; of equally long ones the nearest, of those the latest. Example: with the known answer 5 6 7 8 9, the
        tokens 1 6 7 8 continue at its place 4, that is with 9.

        Args:
            tokens: an answer that is growing.
            least: shortest match that counts, SHORTEST_RUN at least.
        """
        matches = [
            (self._matching(tokens, place, max(least, _LONGEST)), -abs(place.position - len(tokens)), number, place)
            for number, place in enumerate(self._ends.get(tuple(tokens[-SHORTEST_RUN:]), ())[-_MOST:])
        ]
        longest, _, _, place = max(matches, key=lambda match: match[:3], default=(0, 0, 0, None))
        return place if longest >= least else None

    def _matching(self, tokens: list[int], place: AnswerPosition, most: int) -> int:
        answer = self._answers[place.answer]
        most = min(most, len(tokens), place.position)
        return next((back for back in range(most) if answer[place.position - 1 - back] != tokens[-1 - back]), most)

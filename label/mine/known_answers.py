"""What the known answers to a question say next: the draft of the answer that is being found.

Owns the index of short runs of tokens in them. Knows no model: what is guessed here is verified by whoever asks.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

SHORTEST_RUN = 3  # tokens of an index entry: a shorter run is repeated too often, a longer one is found too late
_LONGEST = 16  # a longer match is not compared further
_MOST = 64  # places of one run that are compared, the latest ones


@dataclass(frozen=True)
class Place:
    """Where a known answer goes on: its number among the answers, and the place of its next token."""

    answer: int
    position: int


class KnownAnswers:
    """Answers in the order in which they became known, in token ids."""

    def __init__(self) -> None:
        self._answers: list[list[int]] = []
        self._ends: defaultdict[tuple[int, ...], list[Place]] = defaultdict(list)

    def add(self, tokens: list[int], first: int = 0) -> int:
        """One more answer, and its number. What stands before `first` is in the index already, from the answer it left."""
        number = len(self._answers)
        self._answers.append(tokens)
        for end in range(max(first + 1, SHORTEST_RUN), len(tokens) + 1):
            self._ends[tuple(tokens[end - SHORTEST_RUN : end])].append(Place(number, end))
        return number

    def following(self, place: Place, most: int) -> list[int]:
        """At most so many tokens from a place on."""
        return self._answers[place.answer][place.position : place.position + most]

    def rejoin(self, tokens: list[int], least: int = SHORTEST_RUN) -> Place | None:
        """Where the last tokens of `tokens` stand in a known answer: the longest match, of those the nearest one, of those the latest.

        Example: with the known answer 5 6 7 8 9, the tokens 1 6 7 8 go on at its place 4, that is with 9.

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

    def _matching(self, tokens: list[int], place: Place, most: int) -> int:
        answer = self._answers[place.answer]
        most = min(most, len(tokens), place.position)
        return next((back for back in range(most) if answer[place.position - 1 - back] != tokens[-1 - back]), most)

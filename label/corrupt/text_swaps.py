"""Errors put into a right text: a number, an operator or a name is swapped for another, and the place is known.

Owns what can be swapped, and which characters of the swap are wrong. Knows no files and no labels. A swap makes a text wrong wherever the
number, operator or name matters; nobody checks that.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from draftsmith.label.numbers import stated_numbers
from draftsmith.label.schema import Span

SwapKind = Literal["numbers", "operators", "names"]

_OPERATOR = re.compile(
    r"(?<=[\d)\]}\w%] )[-+*/\u00d7\u00f7\u2212](?= [\d(\[{\w$\u20ac\u00a3])|(?<=\d)[+*/\u00d7\u00f7](?=\d)"
)
_OPERATORS = {"+": "-", "-": "+", "\u2212": "+", "*": "+", "\u00d7": "+", "/": "*", "\u00f7": "\u00d7"}
_WORD = re.compile(r"\b[A-Z][a-z]+(?:-[A-Z][a-z]+)*\b")
_SENTENCE_START = re.compile(r"(?:^|[.!?:\n\"\u201c(]\s*)$")
_NO_NAMES = frozenset(["I", "The", "A", "An", "He", "She", "It", "They", "We", "You", "This", "That", "These", "Those"])


@dataclass(frozen=True)
class Swap:
    """A piece of text for another.

    Attributes:
        kind: of what is swapped.
        span: of the old piece.
        new: the other piece.
    """

    kind: SwapKind
    span: Span
    new: str

    def applied(self, text: str) -> tuple[str, Span]:
        """The wrong text, and the place of its error.

        The error begins at the first character that differs: "56" for "53" goes wrong at the 6. It ends with the new piece.

        Args:
            text: the right one.
        """
        start, end = self.span
        old = text[start:end]
        shared = next(
            (at for at, (before, after) in enumerate(zip(old, self.new, strict=False)) if before != after), None
        )
        shared = min(len(old), len(self.new)) if shared is None else shared
        # A name that only lacks its end is wrong as a whole.
        first = start + (0 if shared == len(self.new) else shared)
        return text[:start] + self.new + text[end:], (first, start + len(self.new))


def swaps(text: str, prompt: str, kinds: Sequence[SwapKind], rng: random.Random) -> list[Swap]:
    """One swap for every place where one is possible, in the order of the text.

    Args:
        text: of a right answer.
        prompt: that it answers; names come from there.
        kinds: what to swap.
        rng: chooses the new pieces.
    """
    makers: dict[SwapKind, Callable[[str, random.Random], Iterator[Swap]]] = {
        "numbers": _of_numbers,
        "operators": _of_operators,
        "names": lambda text, rng: _of_names(text, prompt, rng),
    }
    every = [swap for kind in kinds for swap in makers[kind](text, rng)]
    return sorted(every, key=lambda swap: swap.span)


def _of_numbers(text: str, rng: random.Random) -> Iterator[Swap]:
    """One digit of each number becomes another; its first does not become 0."""
    for match in stated_numbers(text):
        number = match[0]
        place = rng.choice([at for at, letter in enumerate(number) if letter.isdigit()])
        others = [digit for digit in "0123456789" if digit != number[place] and (digit != "0" or place > 0)]
        yield Swap("numbers", match.span(), number[:place] + rng.choice(others) + number[place + 1 :])


def _of_operators(text: str, rng: random.Random) -> Iterator[Swap]:
    for match in _OPERATOR.finditer(text):
        yield Swap("operators", match.span(), _OPERATORS[match[0]])


def _of_names(text: str, prompt: str, rng: random.Random) -> Iterator[Swap]:
    names = _names(prompt)
    for match in _WORD.finditer(text):
        others = sorted(names - {match[0]})
        if match[0] in names and others:
            yield Swap("names", match.span(), rng.choice(others))


def _names(prompt: str) -> set[str]:
    """Words with a capital that a prompt has within a sentence, too: those are written so wherever they stand."""
    return {
        match[0]
        for match in _WORD.finditer(prompt)
        if match[0] not in _NO_NAMES and not _SENTENCE_START.search(prompt[: match.start()])
    }

"""How a response is cut into what a person points at: tokens where they are known, words where not.

Owns the cut. Spans count characters of the response, as everywhere. Knows nothing of labels, stores and pages. Dimension:
N, the pieces of one response.
"""

from __future__ import annotations

import functools
import threading
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from draftsmith.label.schema import Answer, Span, Tokens

_KEPT = 512  # responses whose tokens are remembered; one of 500 tokens takes some 100 kB


@dataclass(frozen=True)
class Segment:
    """A stretch of the response.

    Attributes:
        text: its characters.
        span: of a piece; None for text between pieces that no token covers.
    """

    text: str
    span: Span | None


class Cutter:
    """Cuts answers as one target's tokenizer does, else as the answer's own tokens say, else into words.

    Args:
        tokenize: gives the tokens of a response (`token_labels.tokenize` with a tokenizer), or None.
        name: what these tokens are called on a page.
    """

    def __init__(self, tokenize: Callable[[str], Tokens] | None = None, name: str = "") -> None:
        self._tokenize = None if tokenize is None else functools.lru_cache(_KEPT)(tokenize)
        self._name = name
        self._lock = threading.Lock()

    def pieces(self, answer: Answer) -> tuple[tuple[Span, ...], str]:
        """Cuts an answer.

        Args:
            answer: with its response, and perhaps its tokens.

        Returns:
            the pieces (N spans, ascending, none empty, none overlapping), and what they are called.
        """
        if self._tokenize is not None:
            # Two threads in one fast tokenizer can fail with "Already borrowed".
            with self._lock:
                pieces = merged(self._tokenize(answer.response).offsets)
            if pieces:  # a tokenizer may know none of these characters
                return pieces, self._name
        if answer.tokens is not None and (pieces := merged(answer.tokens.offsets)):
            return pieces, "tokens"
        return words(answer.response), "words"


def merged(offsets: Sequence[Span]) -> tuple[Span, ...]:
    """Tokens as spans that a person can tell apart: empty ones left out, those that share characters made one.

    Worked example: (0, 1), (0, 1), (0, 1), (1, 1), (1, 4), the first three being bytes of one character, give (0, 1), (1, 4).

    Args:
        offsets: each token's span, in order and never stepping back (`schema.check_answer` checks stored ones).
    """
    spans: list[Span] = []
    for start, end in offsets:
        if start == end:
            continue
        if spans and start < spans[-1][1]:
            spans[-1] = (spans[-1][0], max(end, spans[-1][1]))
        else:
            spans.append((start, end))
    return tuple(spans)


def words(response: str) -> tuple[Span, ...]:
    """Runs of letters and digits, runs of other signs, and each ideograph or kana alone; white space is between them.

    Combining marks and joiners stay with what they follow, so that no character that a person sees is cut.
    Worked example: "x=3, 好的" gives "x", "=", "3", ",", "好", "的".

    Args:
        response: text.
    """
    spans: list[Span] = []
    last = "space"
    for index, character in enumerate(response):
        kind = _kind(character)
        if kind == "joined":
            kind = "sign" if last == "space" else last
            joins = last != "space"
        else:
            joins = kind == last != "ideograph"
        if kind != "space":
            if joins:
                spans[-1] = (spans[-1][0], index + 1)
            else:
                spans.append((index, index + 1))
        last = kind
    return tuple(spans)


def segments(response: str, pieces: Sequence[Span]) -> list[Segment]:
    """The whole response in order: the pieces, and the text between them. Joined, the texts are the response.

    Args:
        response: text.
        pieces: N spans, ascending, none overlapping.
    """
    parts = []
    done = 0
    for start, end in pieces:
        if done < start:
            parts.append(Segment(response[done:start], None))
        parts.append(Segment(response[start:end], (start, end)))
        done = end
    if done < len(response):
        parts.append(Segment(response[done:], None))
    return parts


def _kind(character: str) -> str:
    category = unicodedata.category(character)
    if character.isspace():
        return "space"
    if category[0] == "M" or category == "Cf":
        return "joined"
    if category == "Lo" and unicodedata.name(character, "").startswith(("CJK", "HIRAGANA", "KATAKANA")):
        return "ideograph"
    return "word" if category[0] in "LN" else "sign"

"""Which tokens of a rendered conversation are a reply's, from where the reply lies in the text.

Owns the way from characters to a loss mask. Does not know: templates, messages.
"""

from bisect import bisect_right
from collections.abc import Collection, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Span:
    """A reply's place in a text. An empty reply has none.

    Attributes:
        start: number of its first character.
        stop: of the one behind its last.
    """

    start: int
    stop: int


@dataclass(frozen=True)
class Encoded:
    """A text in tokens.

    Attributes:
        text: the text.
        ids: of its tokens.
        offsets: the characters of each token: its first, and the one behind its last.
    """

    text: str
    ids: list[int]
    offsets: list[tuple[int, int]]


def reply_mask(encoded: Encoded, spans: Sequence[Span], eos_ids: Collection[int]) -> list[bool]:
    """True for the tokens of each reply up to its first end token, and for nothing else.

    Where the reply's own text has no end token, the next one is its end if only white space lies between. A token that reaches over
    the reply's edge is the reply's only where the rest of it is white space (` He`, `.\\n`).

    Worked example, with the end token `<e>`. The tokens are `<u>` `Hi` `<a>` `\\n` `Hello` `.\\n` `<e>` `<u>`, the reply is `Hello.`. Then
    `Hello` `.\\n` `<e>` are True.

    Args:
        encoded: the text.
        spans: the replies in it.
        eos_ids: tokens that end a reply.

    Returns:
        A flag for each token.
    """
    mask = [False] * len(encoded.ids)
    starts = [start for start, _ in encoded.offsets]
    for span in spans:
        own = _own_tokens(encoded, starts, span)
        if own is not None:
            first, last = own
            for index in range(first, _end(encoded, first, last, eos_ids) + 1):
                mask[index] = True
    return mask


def _own_tokens(encoded: Encoded, starts: Sequence[int], span: Span) -> tuple[int, int] | None:
    """First and last token of a reply; what lies between is the reply's, even where it covers no character."""
    text, own = encoded.text, []
    # Several tokens may share a character, of which the first may begin before the reply.
    index = max(0, bisect_right(starts, span.start) - 1)
    while index > 0 and encoded.offsets[index - 1][1] > span.start:
        index -= 1
    for number in range(index, len(starts)):
        start, stop = encoded.offsets[number]
        if start >= span.stop:
            break
        outside = text[start : max(start, span.start)] + text[min(stop, span.stop) : stop]
        if min(stop, span.stop) > max(start, span.start) and not outside.strip():
            own.append(number)
    return (own[0], own[-1]) if own else None


def _end(encoded: Encoded, first: int, last: int, eos_ids: Collection[int]) -> int:
    """The reply's last token to learn: its first end token, else its last token."""
    for index in range(first, len(encoded.ids)):
        if encoded.ids[index] in eos_ids:
            return index
        start, stop = encoded.offsets[index]
        if index > last and encoded.text[start:stop].strip():
            break
    return last

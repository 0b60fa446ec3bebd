"""Errors that are whole steps of an answer, and the smaller errors that they may be narrowed to.

Owns what a step is and what of it can be meant. Imports nothing heavy. Dimension: N, the pieces of one response.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from draftsmith.label.numbers import stated_numbers
from draftsmith.label.schema import Span


@dataclass(frozen=True)
class Refinements:
    """What of a wrong step may be meant, as spans of the response that begin and end with pieces.

    Attributes:
        first_number: the pieces of its first number; None where it states none.
        last_token: its last piece with a letter or digit, not the full stop or bracket behind it.
        whole: all of it.
    """

    first_number: Span | None
    last_token: Span
    whole: Span


def is_step(response: str, error: Span) -> bool:
    """Whether an error is a step: whole lines of an answer that has more than these.

    Args:
        response: the answer's text.
        error: its span.
    """
    start, end = error
    begins = start == 0 or response[start - 1] == "\n"
    ends = end == len(response) or response[end] == "\n"
    return begins and ends and (start, end) != (0, len(response))


def first_number(response: str, error: Span) -> Span | None:
    """Where the first number of a step stands that states something; None where there is none.

    Worked example: of the second line of "a\\nStep 2: 3+4=8", (2, 16), it is the 3: (10, 11).

    Args:
        response: the answer's text.
        error: the step's span.
    """
    numbers = (match.span() for match in stated_numbers(response) if error[0] <= match.start() < error[1])
    return next(numbers, None)


def refinements(response: str, error: Span, pieces: Sequence[Span]) -> Refinements | None:
    """What of a wrong step may be meant, in pieces that a person can mark.

    Args:
        response: the answer's text.
        error: the step's span.
        pieces: N spans, ascending, none empty, none overlapping.

    Returns:
        None where no piece touches the step.
    """
    inside = [piece for piece in pieces if max(piece[0], error[0]) < min(piece[1], error[1])]
    if not inside:
        return None
    seen = [piece for piece in inside if any(map(str.isalnum, response[slice(*piece)]))] or inside
    number = first_number(response, error)
    touched = (
        [] if number is None else [piece for piece in inside if max(piece[0], number[0]) < min(piece[1], number[1])]
    )
    return Refinements((touched[0][0], touched[-1][1]) if touched else None, seen[-1], (inside[0][0], inside[-1][1]))

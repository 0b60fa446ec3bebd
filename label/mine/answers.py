"""What a reply comes to, so that two replies can be compared: by name, the readers of final answers.

Owns the names. `final_answers` decides how an answer is read out of a text. Knows nothing of models and tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

from draftsmith.label.checkers.final_answers import chosen_letter, final_number

Parse = Callable[[str], str | None]
"""Gives what a text answers, so that texts with the same answer give the same string; None where it answers nothing."""
ParserName = Literal["final-number", "multiple-choice"]

_LETTERS = "ABCDE"


def answer_parser(name: str) -> Parse:
    """The reader of a final number, or of the letter (A to E) that was chosen.

    Args:
        name: `final-number` or `multiple-choice`.

    Raises:
        ValueError: there is none of this name.
    """
    parsers: dict[str, Parse] = {
        "final-number": final_number,
        "multiple-choice": lambda text: chosen_letter(text, _LETTERS),
    }
    if name not in parsers:
        raise ValueError(
            f"checker is {name!r}; mining compares answers that can be read out, by one of {', '.join(get_args(ParserName))}; "
            "choose one of them"
        )
    return parsers[name]

"""What an answer says in the end: its final number, or the letter it chose.

Owns reading both out of free text, in one written form each, so that equal answers are equal strings. Knows no questions, no
verdicts and no models.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from fractions import Fraction

# Runs of more digits than this are no numbers of a question, and would take long to compute with.
_INTEGER = r"(?:\d{1,3}(?:,\d{3}){1,9}|\d{1,30})"
_DECIMAL = rf"(?:{_INTEGER}(?:\.\d{{1,30}})?|\.\d{{1,30}})(?:[eE][-+]?\d{{1,2}})?"
_NUMBER = re.compile(
    rf"(?<![\d.,/])(?P<sign>(?<![\w)\]}}])[-\u2212])?(?:\\?[$€£]\s?)?(?P<inner>[-\u2212])?"
    rf"(?:\\[dt]?frac\{{(?P<top>{_INTEGER})\}}\{{(?P<bottom>{_INTEGER})\}}"
    rf"|(?P<whole>\d{{1,30}}) (?P<over>\d{{1,9}})/(?P<under>\d{{1,9}})"
    rf"|(?P<left>{_DECIMAL})(?:/(?P<right>{_DECIMAL}))?)"
    r"(?![\d/]|[.,]\d)"
)
# How LaTeX keeps a thousands separator from spreading: 1{,}000 and 1,\!000.
_LATEX_COMMA = re.compile(r"(?<=\d)(?:\{,\}|,\\!)(?=\d{3})")
# Numbers that a text marks as its answer. A heading such as "#### Step 2" marks none.
_MARK = re.compile(r"####\s*(?:the\s+)?(?:final\s+)?(?:answer\s*(?:is|:|=)?)?\s*|\\boxed\{\s*", re.IGNORECASE)

# Quantifiers that give nothing back (`*+`): the time for a long run of spaces would else grow with the cube of its length.
_SAID = re.compile(
    r"(?:answer|option|choice)[\s*]*+(?:is|:|=|would be|must be)?+[\s*]*+(?:option|choice)?+[\s*:=]*+(?:\\text\{)?\(?"
    r"(?P<a>[A-Z])(?![\w'])"
    r"|\\boxed\{\s*(?:\\text\{)?\(?(?P<b>[A-Z])\)?\}"
    r"|####\s*\(?(?P<c>[A-Z])(?![\w'])",
    # The letter itself must be a capital: "the answer is a matter of ..." chooses nothing.
)
_ALONE = re.compile(
    r"^[^\w\n]*+(?P<a>[A-Z])[^\w\n]*+$|^[^\S\n]*+(?:\*\*)?\(?(?P<b>[A-Z])(?:\)|\.|:)(?=\s|$)", re.MULTILINE
)


def final_number(text: str) -> str | None:
    r"""The number that a text gives as its answer, or None where it holds none.

    That is the last number marked by `####` or `\boxed{}`, or else the last number of all. Thousands separators (LaTeX's `{,}` and `,\!`,
    too), currency and per cent signs, a trailing `.0` and the kind of minus sign do not count. Fractions (`3/4`, `1 1/2`, `\frac{3}{4}`)
    and decimals are the same number where they are equal.

    Args:
        text: of an answer.

    Returns:
        an integer, or a fraction in lowest terms: "-$1,234.50" gives "-2469/2".
    """
    text = _LATEX_COMMA.sub(",", text)
    last = None
    for mark in _MARK.finditer(text):
        number = _NUMBER.match(text, mark.end())
        if number is not None and _value(number) is not None:
            last = number
    if last is None:
        for number in _NUMBER.finditer(text):
            if _value(number) is not None:
                last = number
    return None if last is None else str(_value(last))


def chosen_letter(text: str, letters: Collection[str]) -> str | None:
    r"""The letter that a text chooses, or None.

    That is the last letter that the text calls the answer ("the answer is (B)", "#### B", `\boxed{B}`). Or else it is the only letter that
    is alone on a line or begins one ("B", "(B) because ...").

    Args:
        text: of an answer.
        letters: those that can be chosen.
    """
    said = [_letter(match) for match in _SAID.finditer(_capital_words(text))]
    said = [letter for letter in said if letter in letters]
    if said:
        return said[-1]
    alone = {_letter(match) for match in _ALONE.finditer(text)} & set(letters)
    return alone.pop() if len(alone) == 1 else None


def _value(number: re.Match[str]) -> Fraction | None:
    """What the number comes to; None for a division by nothing."""
    minus = (number["sign"] is not None) != (number["inner"] is not None)
    if number["top"] is not None:
        parts = _plain(number["top"]), _plain(number["bottom"])
    elif number["whole"] is not None:
        if int(number["under"]) == 0:
            return None
        parts = Fraction(number["whole"]) + Fraction(int(number["over"]), int(number["under"])), Fraction(1)
    else:
        parts = _plain(number["left"]), _plain(number["right"] or "1")
    if parts[1] == 0:
        return None
    value = parts[0] / parts[1]
    return -value if minus else value


def _plain(written: str) -> Fraction:
    return Fraction(written.replace(",", ""))


def _letter(match: re.Match[str]) -> str:
    return next(group for group in match.groups() if group is not None)


def _capital_words(text: str) -> str:
    """The words before a letter in small letters, whatever they were, and every single letter as it was."""
    return re.sub(r"\b(?:answer|option|choice|is|would be|must be)\b", lambda word: word[0].lower(), text, flags=re.I)

"""Rules for the fields of a ``config.json`` that somebody else may have written: what each must be, in one line.

Owns the rules that several kinds of config share, the error for a field that breaks one, and which names of files are safe to open.
Knows no family.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

Rule = tuple[Callable[[Any], bool], str]
"""Whether a value will do, and what it must be, in words."""

_LARGEST = 2**31
_MOST_PARTS = 1024
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,200}")


def is_whole(value: object, least: int) -> bool:
    """Whether a value is an int (no bool) from ``least`` on, and small enough for a size.

    Args:
        value: of any type.
        least: the smallest that will do.

    Returns:
        True for ``least`` <= value < 2^31.
    """
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < _LARGEST


def is_number(value: object) -> bool:
    """Whether it is a finite int or float, and no bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


COUNT: Rule = (lambda value: is_whole(value, 1), "a whole number of at least 1")
PARTS: Rule = (lambda value: is_whole(value, 1) and value <= _MOST_PARTS, f"a whole number from 1 to {_MOST_PARTS}")
"""Of modules, which are made one by one before any tensor can contradict their number."""
COUNT_OR_ZERO: Rule = (lambda value: is_whole(value, 0), "a whole number of at least 0")
TOKEN_OR_NULL: Rule = (lambda value: value is None or is_whole(value, 0), "a token id, or null")
COUNT_OR_NULL: Rule = (lambda value: value is None or is_whole(value, 1), "a whole number of at least 1, or null")
POSITIVE: Rule = (lambda value: is_number(value) and value > 0, "a finite number above 0")
NOT_NEGATIVE: Rule = (lambda value: is_number(value) and value >= 0, "a finite number of at least 0")
FLAG: Rule = (lambda value: isinstance(value, bool), "true or false")
OBJECT: Rule = (lambda value: isinstance(value, dict), "an object")
LIST: Rule = (lambda value: isinstance(value, list), "a list")
TEXT: Rule = (lambda value: isinstance(value, str), "text")
NAMES: Rule = (
    lambda value: (
        isinstance(value, list)
        and all(isinstance(name, str) and name for name in value)
        and len(set(value)) == len(value)
    ),
    "a list of texts, each once",
)


def check_fields(
    fields: Mapping[str, Any], rules: Mapping[str, Rule], place: str, remedy: str, required: Collection[str] = ()
) -> None:
    """Check fields against their rules. A rule whose field is absent, and a field without a rule, are skipped.

    Args:
        fields: by name.
        rules: by name.
        place: what errors call the file.
        remedy: what errors advise.
        required: fields that must be there.

    Raises:
        ValueError: with place, field, value, rule and remedy.
    """
    missing = [name for name in required if name not in fields]
    if missing:
        raise ValueError(f"{place} lacks {', '.join(missing)}; {remedy}")
    for name, (fits, rule) in rules.items():
        if name in fields and not fits(fields[name]):
            raise ValueError(f"{place}: {name} is {fields[name]!r:.80}, it must be {rule}; {remedy}")


def safe_file_name(value: object, where: str) -> str:
    """Check a field that names a file inside one folder.

    Args:
        value: of the field.
        where: the file and field that it comes from.

    Returns:
        The value itself.

    Raises:
        ValueError: it is no text, it has a separator, it begins with a dot, or it has other letters than file names need.
    """
    if not isinstance(value, str) or _PLAIN_NAME.fullmatch(value) is None:
        raise ValueError(
            f"{where} is {value!r:.80}, which is no plain file name; use letters, digits, '.', '_' and '-' only, without folders"
        )
    return value

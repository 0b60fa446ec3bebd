"""Numbers in a text that state something: not those that count its lines or steps.

Owns what a number is and which ones only count. Knows no labels.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

# ASCII: "\uff15" and "5" are one number, so that one is no error in place of the other.
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*", re.ASCII)
# "2. Then ..." and "Step 2" count lines, and state nothing.
_COUNTS_LINES = re.compile(r"(?m)^[^\S\n]*\(?\d+[.):](?=\s)|\b(?i:step)\s+\d+")


def stated_numbers(text: str) -> Iterator[re.Match[str]]:
    """The numbers of a text, in order, without those that count lines or steps.

    Args:
        text: any.

    Yields:
        a match for each.
    """
    counting = [match.span() for match in _COUNTS_LINES.finditer(text)]
    for match in _NUMBER.finditer(text):
        if not any(start <= match.start() < end for start, end in counting):
            yield match

"""Drafters that do not pay: one line about each that is slower than plain decoding or than prompt lookup, and what to try.

Owns the comparison and its words, for the terminal and for reports. Does not know how speeds were measured.
"""

from __future__ import annotations

from collections.abc import Sequence

from draftsmith.evaluate.records import Row
from draftsmith.evaluate.rows import LOOKUP

SHORT_TRAINING = "A head trained for less than a minute is slower."
TUNE = "find a faster shape with `draftsmith tune`"
TRAIN = "train longer or on more replies"


def slow_drafters(rows: Sequence[Row]) -> list[str]:
    """One line for each drafter and temperature whose fastest shape is slower than plain decoding or than prompt lookup.

    Prompt lookup counts only where it was measured (`--prompt_lookup`).

    Args:
        rows: of one evaluation, at all temperatures.
    """
    fastest: dict[tuple[str, float], Row] = {}
    for row in sorted((row for row in rows if row.shape), key=lambda row: -row.speedup):
        fastest.setdefault((row.drafter, row.temperature), row)
    lines = []
    for row in fastest.values():
        lookups = [
            other.speedup
            for other in rows
            if other.drafter.startswith(LOOKUP) and other.temperature == row.temperature and other.speedup > 0
        ]
        slower_than = [f"{row.speedup:.2f} times the speed of plain decoding"] if row.speedup < 1 else []
        if lookups and row.speedup < max(lookups):
            slower_than.append(
                f"{row.speedup / max(lookups):.2f} times the speed of prompt lookup, which needs no training"
            )
        if slower_than:
            lines.append(
                f"Slow: {row.label} at T = {row.temperature:g} decodes at {' and '.join(slower_than)}. To try: {TRAIN}, or {TUNE}. "
                f"{SHORT_TRAINING}"
            )
    return lines


def slow_shapes(speedup: float) -> list[str]:
    """One line where even the fastest shape of a grid is slower than plain decoding; none otherwise.

    Args:
        speedup: predicted of that shape, over plain decoding.
    """
    if speedup >= 1:
        return []
    return [
        f"Slow: no shape of this grid is faster than plain decoding (the best reaches {speedup:.2f} times its speed). To try: {TRAIN}, or "
        f"draft less (--depths 1 2, --nodes 2 4). {SHORT_TRAINING}"
    ]

"""Drafters that do not pay: one line about each that is slower than plain decoding or than one without weights, and what to try.

Owns the comparison and its words, for the terminal and for reports. Does not know how speeds were measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from draftsmith.escapes import one_line
from draftsmith.evaluate.records import Row
from draftsmith.evaluate.report_rows import LOOKUP

SHORT_TRAINING = "A head trained for less than a minute is slower."
TUNE = "find a faster shape with `draftsmith tune`"
TRAIN = "train longer or on more replies"


def slow_drafters(rows: Sequence[Row], written: Callable[[object], str] = one_line) -> list[str]:
    """One line for each drafter and temperature whose fastest shape is slower than plain decoding, prompt lookup or one without weights.

    The last line also says what to try. Prompt lookup counts where it was measured: `evaluate` leaves it out for batches (see
    `Plan.prompt_lookup`). Drafters without weights count where they were raced; they themselves are compared with plain decoding and
    prompt lookup.

    Args:
        rows: of one evaluation, at all temperatures.
        written: how a drafter's name, which is foreign text, is written where the lines go.
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
        free = [
            other
            for other in fastest.values()
            if not other.parameters and row.parameters and other.temperature == row.temperature
        ]
        slower_than = _slower_than(row.speedup, max(lookups, default=None))
        best = max(free, key=lambda other: other.speedup, default=None)
        if best is not None and row.speedup < best.speedup:
            share = (
                f"{row.speedup / best.speedup:.2f} times the speed of {written(best.label)}, which needs no training"
            )
            slower_than = f"{slower_than} and {share}" if slower_than else share
        if slower_than:
            place = f"{written(row.label)} at T = {row.temperature:g}"
            lines.append(f"Slow: {place} decodes at {slower_than}.")
    if lines:
        lines[-1] += f" To try: {TRAIN}, or {TUNE}. {SHORT_TRAINING}"
    return lines


def slow_shapes(speedup: float, lookup: float | None = None) -> list[str]:
    """One line where even the fastest shape of a grid is slower than plain decoding or than prompt lookup; none otherwise.

    Args:
        speedup: predicted of that shape, over plain decoding.
        lookup: measured of prompt lookup, over plain decoding; None where it was not timed.
    """
    slower_than = _slower_than(speedup, lookup)
    if not slower_than:
        return []
    return [
        f"Slow: the fastest shape of this grid would decode at {slower_than}. To try: {TRAIN}, or draft less (--depths 1 2, --nodes 2 4). "
        f"{SHORT_TRAINING}"
    ]


def _slower_than(speedup: float, lookup: float | None) -> str:
    """What decodes faster, and by how much; empty where nothing does. Both numbers are over plain decoding."""
    slower_than = [f"{speedup:.2f} times the speed of plain decoding"] if speedup < 1 else []
    if lookup is not None and speedup < lookup:
        slower_than.append(f"{speedup / lookup:.2f} times the speed of prompt lookup, which needs no training")
    return " and ".join(slower_than)

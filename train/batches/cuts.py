"""Where an order of samples is cut into parts of nearly equal numbers of tokens.

Owns: the arithmetic, in whole numbers. Does not know: what the parts are.
"""

import numpy as np


def cut(ends: np.ndarray, parts: int, least: int) -> np.ndarray:
    """int64 [parts + 1]: where parts of nearly equal tokens begin and end in an order whose running sum of tokens is `ends`.

    Each has at least `least` samples.
    """
    room = least * np.arange(1, parts)
    cuts = np.maximum.accumulate(np.maximum(nearest(ends, parts) - room, 0))
    return np.concatenate([[0], np.minimum(cuts, len(ends) - least * parts) + room, [len(ends)]])


def nearest(ends: np.ndarray, parts: int) -> np.ndarray:
    """int64 [parts - 1]: how many samples come before the cut nearest to 1 / parts, 2 / parts ... of all tokens; a tie takes one more.

    In whole numbers: the same share must give the same cut, however it is written and however many tokens there are.
    """
    whole, rest = divmod(int(ends[-1]), parts)
    numbers = np.arange(1, parts)
    # wanted = below + fraction / parts
    below = numbers * whole + numbers * rest // parts
    fraction = numbers * rest % parts
    stops = np.searchsorted(ends, below + (fraction > 0))
    before = np.where(stops > 0, ends[stops - 1], 0)
    nearer = (ends[stops] + before - 2 * below) * parts <= 2 * fraction
    return stops + nearer

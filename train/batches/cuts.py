"""Where an order of samples is cut into parts of nearly equal numbers of tokens.

Owns: the arithmetic, in whole numbers. Does not know: what the parts are.
"""

import numpy as np


def cut(ends: np.ndarray, parts: int, least: int) -> np.ndarray:
    """Where parts of nearly equal tokens begin and end in an order of samples.

    Args:
        ends: int64 [N], the running sum of tokens in that order.
        parts: number of parts.
        least: samples that each part has at least.

    Returns:
        int64 [parts + 1].
    """
    room = least * np.arange(1, parts)
    cuts = np.maximum.accumulate(np.maximum(nearest(ends, parts) - room, 0))
    return np.concatenate([[0], np.minimum(cuts, len(ends) - least * parts) + room, [len(ends)]])


def nearest(ends: np.ndarray, parts: int) -> np.ndarray:
    """How many samples come before the cut nearest to 1 / parts, 2 / parts ... of all tokens. A tie takes one more sample.

    The arithmetic is in whole numbers: the same share must give the same cut, however many tokens there are.

    Args:
        ends: int64 [N], the running sum of tokens.
        parts: number of parts.

    Returns:
        int64 [parts - 1].
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

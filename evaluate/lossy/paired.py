"""Right answers of two ways of decoding over the same problems: how sure their difference is.

Owns Tango's score interval for the difference of paired proportions (Statistics in Medicine 17, 1998). A bootstrap says nothing where no
answer changed: its interval is 0 to 0, after 5 problems as after 5,000. This interval narrows with the number of problems.
"""

from __future__ import annotations

import math
from statistics import NormalDist

CONFIDENCE = 0.95
_STEPS = 60


def change_bounds(gained: int, lost: int, problems: int) -> tuple[float, float]:
    """Bounds of the change in the share of right answers: each holds by itself with 95 % confidence.

    Args:
        gained: problems that only the new way answers rightly.
        lost: problems that only the old way answers rightly.
        problems: all of them, at least 1.

    Returns:
        The lower and the upper bound, from -1 to 1.

    Example:
        no change in 500 problems bounds it between -0.0054 and 0.0054; no change in 50, between -0.0513 and 0.0513.
    """
    return _lower(gained, lost, problems), -_lower(lost, gained, problems)


def problems_needed(most_lost: float) -> int:
    """How many problems show that less than a share is lost, if none is.

    Args:
        most_lost: the share, above 0 and below 1.
    """
    return math.floor(_z() ** 2 * (1.0 - most_lost) / most_lost) + 1


def _z() -> float:
    return NormalDist().inv_cdf(CONFIDENCE)


def _lower(gained: int, lost: int, problems: int) -> float:
    """The change at which the score is z; the score falls as the change rises."""
    low, high = -1.0, (gained - lost) / problems
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if _score(gained, lost, problems, middle) > _z() else (low, middle)
    return low


def _score(gained: int, lost: int, problems: int, change: float) -> float:
    """How many standard deviations the counts are above those that a change would give."""
    b = (2 * problems - gained + lost) * change - gained - lost
    # The likeliest share of lost answers, given the change.
    share = (math.sqrt(b * b + 8 * problems * lost * change * (1.0 - change)) - b) / (4 * problems)
    variance = problems * (2 * share + change * (1.0 - change))
    above = gained - lost - problems * change
    return above / math.sqrt(variance) if variance > 0.0 else math.copysign(math.inf, above)

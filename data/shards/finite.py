"""States that are numbers: the one check for NaN and infinity of what a cache serves.

Owns how it is done cheaply. Knows nothing of files and of how states are stored.

Shape legend: T tokens, D hidden.
"""

import torch
from torch import Tensor

from draftsmith.models.files.finite import is_finite

_REMEDY = "extract the cache again, in another dtype if states overflow"


def check_finite(states: Tensor, place: str) -> None:
    """Check that states are finite.

    Args:
        states: float [T, D].
        place: what errors call them.

    Raises:
        ValueError: they hold NaN or infinity; the message has the first position.
    """
    if is_finite(states):
        return
    bad = (~torch.isfinite(states)).any(dim=-1).nonzero()
    raise ValueError(f"{place} holds NaN or infinity (first at token {int(bad[0])}); {_REMEDY}")


def check_codes(codes: Tensor, scales: Tensor, place: str) -> None:
    """Check that codes and scales are numbers. A code that is NaN would become a number where its bits are moved.

    Args:
        codes: float8_e4m3fn [T, D].
        scales: float32 [T].
        place: what errors call them.

    Raises:
        ValueError: a code is NaN, or a scale is not above 0.
    """
    if codes.numel() and int((codes.view(torch.uint8) & 0x7F).max()) == 0x7F:
        raise ValueError(f"{place} holds NaN; {_REMEDY}")
    if not bool((scales > 0).all()):
        raise ValueError(f"{place} has a scale that is not above 0; {_REMEDY}")

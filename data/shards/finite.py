"""States that are numbers: the one check for NaN and infinity of what a cache serves.

Owns how it is done cheaply. Knows nothing of files and of how states are stored.

Shape legend: T tokens, D hidden.
"""

import torch
from torch import Tensor

from draftsmith.models.files.finite import is_finite

_REMEDY = "extract the cache again, in another dtype if states overflow"


def check_finite(states: Tensor, place: str) -> None:
    """Raises ValueError for states [T, D] that hold NaN or infinity, with the first position; `place` is what errors call them."""
    if is_finite(states):
        return
    bad = (~torch.isfinite(states)).any(dim=-1).nonzero()
    raise ValueError(f"{place} holds NaN or infinity (first at token {int(bad[0])}); {_REMEDY}")


def check_codes(codes: Tensor, scales: Tensor, place: str) -> None:
    """Raises ValueError for codes float8_e4m3fn [T, D] that are NaN, and for scales float32 [T] that are not above 0.

    A code that is NaN would become a number where its bits are moved.
    """
    if codes.numel() and int((codes.view(torch.uint8) & 0x7F).max()) == 0x7F:
        raise ValueError(f"{place} holds NaN; {_REMEDY}")
    if not bool((scales > 0).all()):
        raise ValueError(f"{place} has a scale that is not above 0; {_REMEDY}")

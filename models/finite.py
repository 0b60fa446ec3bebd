"""Logits that are no numbers: what a float16 overflow or broken weights give, and what every comparison would then hide.

Owns the rule and its message. Knows nothing of how logits were made.
"""

from __future__ import annotations

import torch
from torch import Tensor


def refuse_non_finite(logits: Tensor, name: str) -> None:
    """Raise for logits of any shape, of the model `name`, that hold NaN or infinity.

    Raises:
        ValueError: they do.
    """
    if not bool(logits.isfinite().all()):
        raise not_finite(name, logits.dtype, "of its first tokens")


def not_finite(name: str, dtype: torch.dtype, place: str) -> ValueError:
    """The error that says so; `place` is where they came up, such as `at token 12 of request 3`."""
    width = str(dtype).removeprefix("torch.")
    advice = "its weights hold such numbers: give a whole checkpoint"
    if dtype in (torch.float16, torch.bfloat16):
        advice = f"{width} may be too narrow for this model: run it in bfloat16 or float32; else {advice}"
    return ValueError(f"{name}: the logits {place} hold NaN or infinity ({width}); {advice}")

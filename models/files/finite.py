"""Tensors that are no numbers: the one test for NaN and infinity, and the error about logits that hold them.

Owns how the test is done cheaply, and the message about logits. Knows nothing of how tensors were made.

Shape legend: B batch rows, N tree nodes, E path slots.
"""

from __future__ import annotations

import torch
from torch import Tensor


def is_finite(tensor: Tensor) -> bool:
    """Whether no number of a floating tensor is NaN or infinite.

    The least and the largest number tell, since both reductions hand a NaN on. They read several GB a second on one core, ten times
    what ``torch.isfinite`` does.

    Args:
        tensor: float, any shape.

    Returns:
        True where all numbers are finite, or there are none.
    """
    return tensor.numel() == 0 or all(bool(torch.isfinite(extreme)) for extreme in tensor.aminmax())


def refuse_non_finite(logits: Tensor, name: str) -> None:
    """Check the first logits of a model.

    Args:
        logits: float, any shape.
        name: of the model, for the message.

    Raises:
        ValueError: they hold NaN or infinity.
    """
    if not is_finite(logits):
        raise not_finite(name, logits.dtype, "of its first tokens")


def broken_nodes(soundness: Tensor, path: Tensor) -> Tensor:
    """Find the nodes of a path whose logits hold NaN or infinity; nothing is read back from the device.

    Args:
        soundness: float [B, N], NaN at such nodes of a tree, and any number at the others.
        path: int64 [B, E], the node that a row went through at each depth. Others may overflow.

    Returns:
        bool [B, E], True at broken nodes.
    """
    return soundness.gather(1, path).isnan()


def not_finite(name: str, dtype: torch.dtype, place: str) -> ValueError:
    """Make the error about logits that hold NaN or infinity.

    Args:
        name: of the model.
        dtype: of the logits.
        place: where they came up, such as `at token 12 of request 3`.

    Returns:
        The error, to be raised.
    """
    width = str(dtype).removeprefix("torch.")
    advice = "its weights hold such numbers: give a whole checkpoint"
    if dtype in (torch.float16, torch.bfloat16):
        advice = f"{width} may be too narrow for this model: run it in bfloat16 or float32; else {advice}"
    return ValueError(f"{name}: the logits {place} hold NaN or infinity ({width}); {advice}")

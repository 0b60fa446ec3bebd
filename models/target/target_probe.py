"""A few numbers of a target's ends, by which another model shows without reading all of its weights.

Owns which numbers those are and how they are compared. They do not show a model that differs in its trunk alone. Nor do they show one
that differs so little that the numbers round to the same; the fingerprint of the checkpoint does. Knows nothing of drafters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from draftsmith.models.target.ends import TargetEnds

NUM_PLACES = 64
"""Numbers taken of each tensor."""


def end_values(ends: TargetEnds) -> dict[str, list[float]]:
    """Take evenly spaced numbers of each tensor of embedding, final norm and head.

    Args:
        ends: the target's.

    Returns:
        ``NUM_PLACES`` numbers by the tensor's name.

    Example:
        ``{"embedding.weight": [...], "norm.weight": [...], "head.weight": [...]}``
    """
    return {name: _spots(tensor).float().tolist() for name, tensor in _tensors(ends)}


def other_ends(ends: TargetEnds, expected: Mapping[str, list[float]]) -> list[str]:
    """Name the tensors that differ from what :func:`end_values` gave, which may have been of the same model in a wider dtype.

    Tensors that are not there by that name, not in floating point, or not in memory (quantized, adapted, offloaded) are not compared.

    Args:
        ends: the target's.
        expected: what :func:`end_values` gave.

    Returns:
        Names of tensors.
    """
    different = []
    for name, tensor in _tensors(ends):
        if name in expected and len(expected[name]) == NUM_PLACES:
            rounded = torch.tensor(expected[name]).to(tensor.dtype)
            if not torch.equal(rounded, _spots(tensor)):
                different.append(name)
    return different


def _tensors(ends: TargetEnds) -> Iterator[tuple[str, Tensor]]:
    for part in ("embedding", "norm", "head"):
        for name, tensor in getattr(ends, part).named_parameters():
            if tensor.is_floating_point() and not tensor.is_meta:
                yield f"{part}.{name}", tensor.detach()


def _spots(tensor: Tensor) -> Tensor:
    """[NUM_PLACES], on the CPU; from the first to the last number, the same places for the same shape."""
    places = torch.arange(NUM_PLACES) * (tensor.numel() - 1) // (NUM_PLACES - 1)
    return tensor[torch.unravel_index(places.to(tensor.device), tensor.shape)].cpu()

"""How much keys and values a token leaves in a cache, layer by layer.

Owns the record and how it is found for a whole model: by reading one token. Knows no decoding and no speed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from draftsmith.models.target.target import Target

SLIDING = "sliding_attention"


@dataclass(frozen=True)
class KeyValues:
    """What one layer keeps.

    Attributes:
        token_bytes: bytes of keys and values of one token.
        window: the most tokens that the layer sees; None for all.
    """

    token_bytes: int
    window: int | None = None

    def read_behind(self, context: float) -> float:
        """Bytes that one step reads behind so many tokens of text."""
        return self.token_bytes * (context if self.window is None else min(context, self.window))


@torch.no_grad()
def key_values_of(target: Target) -> tuple[KeyValues, ...]:
    """Find what each layer of a model keeps, from one forward over one token: architectures differ, and so do releases of Transformers.

    A recurrent state is not among it: its size does not follow the text.

    Example: a layer with 2 key/value heads of size 8 in float32 (4 bytes) keeps 2 x 2 x 8 x 4 = 128 bytes a token.

    Args:
        target: any model that the engine decodes with.

    Returns:
        One record for each layer that keeps a cache of its own.
    """
    cache = DynamicCache(config=target.config) if target.keeps_state else DynamicCache()
    zero_B1 = torch.zeros(1, 1, dtype=torch.int64, device=target.device)
    mask_B1NS = None if target.keeps_state else torch.ones(1, 1, 1, 1, dtype=torch.bool, device=target.device)
    target.forward(zero_B1, cache=cache, positions=zero_B1, mask=mask_B1NS, key_positions=zero_B1)
    kinds = getattr(target.config, "layer_types", None) or [SLIDING] * len(cache.layers)
    return tuple(
        KeyValues(_bytes_of(layer), target.window if kind == SLIDING else None)
        for layer, kind in zip(cache.layers, kinds, strict=False)
    )


def _bytes_of(layer: object) -> int:
    """Bytes of the keys and values in a layer of a cache; 0 of one that keeps none."""
    parts = (getattr(layer, name, None) for name in ("keys", "values"))
    return sum(part.nbytes for part in parts if isinstance(part, Tensor))

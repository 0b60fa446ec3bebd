"""The attention that a model's layers run: :func:`draftsmith.models.slots.attention.attend`, under a name that Transformers knows.

Owns the registration and what is left to Transformers' own function. Knows no family.

Shape legend: B batch rows, H heads, N new tokens, S visible slots, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from draftsmith.models.slots.attention import attend

NAME = "draftsmith"
# What some families ask of attention besides; Transformers' function does it or refuses it.
_FURTHER = ("softcap", "s_aux", "position_bias", "cache")


def layer_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | BlockMask | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **further: Any,
) -> tuple[Tensor, None]:
    """Attend in a layer of a model, as Transformers' ``AttentionInterface`` asks.

    Args:
        module: the layer's attention.
        query: [B, H, N, D].
        key: [B, G, S, D].
        value: [B, G, S, D].
        attention_mask: bool [B, 1, N, S], one that skips blocks, or None for one new token that sees all slots. All others are left to
            Transformers.
        dropout: share of the scores that is dropped; 0 in a frozen model.
        scaling: of the scores.
        further: what else the family gives.

    Returns:
        [B, N, H, D], and None in place of the scores.

    Raises:
        ValueError: the family asks for more than a mask that skips blocks can do.
    """
    asks_more = dropout > 0.0 or any(further.get(name) is not None for name in _FURTHER)
    if isinstance(attention_mask, BlockMask):
        if asks_more:
            raise ValueError("attention that skips blocks of slots has no dropout, cap, sink or position bias")
    elif asks_more or not _is_plain(attention_mask, query.shape[2]):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **further)
    attended = attend(query, key, value, attention_mask, scaling)
    return attended.transpose(1, 2).contiguous(), None


def _is_plain(mask: Tensor | None, num_new: int) -> bool:
    """Whether a mask says by itself what new tokens see. None says so of one token; for several, Transformers may mean causal attention."""
    if mask is None:
        return num_new == 1
    return mask.dtype == torch.bool and mask.shape[1] == 1


AttentionInterface.register(NAME, layer_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)

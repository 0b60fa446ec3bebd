"""Attention of a few new tokens to many cached ones, under a mask that trees and ragged batches give.

Owns the one function that the target's layers and drafters' layers call alike. Keys and values are never copied for the query heads that
share them. Where all cache slots are in view, blocks of slots that nobody sees are skipped on CUDA. Knows no model.

Shape legend: B batch rows, H query heads, G key/value heads, N new tokens, S visible slots, D head size, Dv size of values.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

_BLOCK = 128
_MOST_SHAPES = 128
"""Of attention that skips blocks: one for each number of rows, nodes and slots. Torch's own limit is 8 in a process, behind which the
kernel is no longer fused, and compiled anew in each call."""


def attend(
    queries_BHND: Tensor,
    keys_BGSD: Tensor,
    values_BGSD: Tensor,
    mask: Tensor | BlockMask | None,
    scale: float | None = None,
) -> Tensor:
    """Compute the attention of new tokens to visible slots.

    Args:
        queries_BHND: float; H is a multiple of G.
        keys_BGSD: float.
        values_BGSD: float, of any head size.
        mask: bool [B or 1, 1, N, S], True where a token sees a slot; or what :func:`skipping` makes of it; None where all see all.
        scale: of the scores; None takes 1 / sqrt(D).

    Returns:
        float [B, H, N, Dv].
    """
    B, H, N, D = queries_BHND.shape
    num_groups = keys_BGSD.shape[1]
    shared = H // num_groups
    if mask is not None and not isinstance(mask, Tensor):
        return _flex(queries_BHND.device.type)(
            queries_BHND, keys_BGSD, values_BGSD, block_mask=mask, scale=scale, enable_gqa=shared > 1
        )
    if shared == 1 or mask is None or queries_BHND.device.type == "cpu":
        return F.scaled_dot_product_attention(
            queries_BHND, keys_BGSD, values_BGSD, mask, scale=scale, enable_gqa=shared > 1
        )
    # Kernels of other devices that take a mask know no shared heads: these become further queries of their keys.
    if N > 1:
        mask = mask.repeat(1, 1, shared, 1)
    packed_BGMD = queries_BHND.reshape(B, num_groups, shared * N, D)
    attended_BGMD = F.scaled_dot_product_attention(packed_BGMD, keys_BGSD, values_BGSD, mask, scale=scale)
    return attended_BGMD.reshape(B, H, N, values_BGSD.shape[-1])


def skips_blocks(device: torch.device) -> bool:
    """Whether attention over all slots of a cache should skip those that nobody sees: a kernel for it pays on CUDA."""
    return device.type == "cuda"


def skipping(mask_B1NS: Tensor, ends_B: Tensor) -> BlockMask:
    """A mask with which :func:`attend` skips the slots that no new token of a row sees. Its shapes do not depend on how many these are.

    Args:
        mask_B1NS: bool, True where a token sees a slot.
        ends_B: int64, slots from here on are seen by no token of a row.
    """
    from torch.nn.attention.flex_attention import BlockMask

    B, _, num_queries, num_slots = mask_B1NS.shape
    num_blocks = -(-num_slots // _BLOCK)
    query_block = max(16, 1 << (num_queries - 1).bit_length()) if num_queries <= _BLOCK else _BLOCK
    num_query_blocks = -(-num_queries // query_block)
    blocks_B = ((ends_B + (_BLOCK - 1)) // _BLOCK).to(torch.int32)
    index = torch.arange(num_blocks, dtype=torch.int32, device=ends_B.device)

    def sees(batch: Tensor, _head: Tensor, query: Tensor, slot: Tensor) -> Tensor:
        return mask_B1NS[batch, 0, query, slot]

    return BlockMask.from_kv_blocks(
        blocks_B[:, None, None].expand(B, 1, num_query_blocks).contiguous(),
        index.expand(B, 1, num_query_blocks, num_blocks).contiguous(),
        BLOCK_SIZE=(query_block, _BLOCK),
        mask_mod=sees,
        seq_lengths=(num_queries, num_slots),
        compute_q_blocks=False,
    )


@lru_cache(maxsize=2)
def _flex(device_type: str) -> Any:
    """flex_attention, compiled where a compiler for the device is worth its time."""
    from torch.nn.attention.flex_attention import flex_attention

    if device_type != "cuda":
        return flex_attention
    from torch._dynamo import config  # the compiler takes seconds to import

    compiled = torch.compile(flex_attention, dynamic=False)

    def attended(*arguments: Any, **named: Any) -> Any:
        with config.patch(recompile_limit=_MOST_SHAPES):
            return compiled(*arguments, **named)

    return attended

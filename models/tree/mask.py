"""Which cache slot each new token sees, as one boolean mask.

Owns the one place where tree structure meets slot numbers.

Shape legend: B batch rows, M new tokens, N tree nodes (new tokens and those before them), S visible slots.
"""

from __future__ import annotations

import torch
from torch import Tensor

from draftsmith.models.slots.constants import counting


def slot_mask(sees_BMN: Tensor, lengths_B: Tensor, window: int) -> Tensor:
    """Which slots new tokens see: every cached token of their row, and the tree nodes that are theirs to see.

    Row b's nodes lie at slots ``lengths_B[b] ..``, in order.

    Args:
        sees_BMN: bool, which nodes (its ancestors and itself) each new token sees.
        lengths_B: int64, cached tokens of each row.
        window: number of visible slots S.

    Returns:
        bool [B, 1, M, S], True where a token sees a slot.

    Example:
        two cached tokens and the nodes root, 5, 7 (both children of the root) give, over five slots,
        ``[[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 0, 1]]``.
    """
    M, N = sees_BMN.shape[1:]
    slots_BN = lengths_B[:, None] + counting(N, lengths_B.device)
    cached_BS = counting(window, lengths_B.device) < lengths_B[:, None]
    mask_BMS = cached_BS[:, None].repeat(1, M, 1)
    return mask_BMS.scatter_(2, slots_BN[:, None].expand(-1, M, -1), sees_BMN)[:, None]


def slot_positions(depths_BN: Tensor, lengths_B: Tensor, window: int) -> Tensor:
    """Which position the token of each slot has: its row's length and its own depth for a node, the slot's number for a cached token.

    Args:
        depths_BN: int64, each node's distance from the root.
        lengths_B: int64, cached tokens of each row.
        window: number of visible slots S.

    Returns:
        int64 [B, S].

    Example:
        the nodes of :func:`slot_mask` give the positions ``[0, 1, 2, 3, 3]``.
    """
    node_BS, drafted_BS = _nodes_at(lengths_B, window, depths_BN.shape[1])
    slot_S = counting(window, lengths_B.device)
    return torch.where(drafted_BS, lengths_B[:, None] + depths_BN.gather(1, node_BS), slot_S)


def _nodes_at(lengths_B: Tensor, window: int, num_nodes: int) -> tuple[Tensor, Tensor]:
    """int64 [B, S], bool [B, S]: which node lies at each slot, and whether one does."""
    offset_BS = counting(window, lengths_B.device) - lengths_B[:, None]
    return offset_BS.clamp(0, num_nodes - 1), (offset_BS >= 0) & (offset_BS < num_nodes)

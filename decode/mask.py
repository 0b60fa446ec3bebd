"""Which cache slot each new token sees, as one boolean mask.

Owns the one place where tree structure meets slot numbers.

Shape legend: B batch rows, N new tokens (tree nodes), S visible slots.
"""

from __future__ import annotations

import torch
from torch import Tensor


def tree_mask(ancestors_BNN: Tensor, depths_BN: Tensor, lengths_B: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Mask and slot positions for a packed tree written behind each row's cached tokens.

    Row b's nodes lie at slots ``lengths_B[b] ..``; a node sees every cached token, its ancestors and itself.

    Returns:
        bool [B, 1, N, S], True where a node sees a slot; int64 [B, S], the position of each slot's token.

    Example:
        two cached tokens and the nodes root, 5, 7 (both children of the root) give, over five slots,
        ``[[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 0, 1]]`` and positions ``[0, 1, 2, 3, 3]``.
    """
    N = ancestors_BNN.shape[-1]
    slot_S = torch.arange(window, device=lengths_B.device)
    offset_BS = slot_S - lengths_B[:, None]
    node_BS = offset_BS.clamp(0, N - 1)
    drafted_BS = (offset_BS >= 0) & (offset_BS < N)
    of_tree_BNS = ancestors_BNN.gather(2, node_BS[:, None, :].expand(-1, N, -1)) & drafted_BS[:, None, :]
    mask_BNS = of_tree_BNS | (offset_BS < 0)[:, None, :]
    key_positions_BS = torch.where(drafted_BS, lengths_B[:, None] + depths_BN.gather(1, node_BS), slot_S)
    return mask_BNS[:, None], key_positions_BS

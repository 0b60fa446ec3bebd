"""The target's greedy continuations from every position of a text: what local distillation is trained on (arXiv:2403.09919, section 4.2).

Owns the diagonal mask by which all positions of a text continue at once. Knows no drafter.

Shape legend: B batch rows, T tokens, G greedy tokens, S cache slots.
"""

from __future__ import annotations

import torch
from torch import Tensor

from draftsmith.models.slots.slot_cache import SlotCache
from draftsmith.models.target.target import Target


@torch.inference_mode()
def greedy_continuations(target: Target, input_ids: Tensor, num_tokens: int, read: Tensor | None = None) -> Tensor:
    """For every prefix x_<=t, the ``num_tokens`` tokens that the target would emit greedily after it.

    One forward over the text and ``num_tokens - 1`` over the growing continuations, each of which sees its own prefix and itself only
    (a diagonal mask), so that the cost is that many plain forwards, not one decode a position.

    Args:
        target: the frozen model.
        input_ids: int64 [B, T], padded on the right; the result at padding is meaningless.
        num_tokens: G, at least 1.
        read: as in :meth:`Target.prefix`. A model that reads its text again past some length continues every prefix as it reads the
            prefix itself, also where the continuation crosses that length.

    Returns:
        int64 [B, T, G]; ``[b, t, j]`` is the j-th token after the prefix that ends at t.
    """
    B, T = input_ids.shape
    read_B1 = torch.full((B, 1), T, device=input_ids.device) if read is None else read[:, None]
    first = _continued(target, input_ids, num_tokens, read_B1)
    boundary = target.rereads_past
    if read is None or boundary is None or boundary >= T:
        return first
    again = _continued(target, input_ids, num_tokens, torch.full_like(read_B1, T))
    return torch.where(torch.arange(T, device=input_ids.device)[:, None] >= boundary, again, first)


def _continued(target: Target, input_ids: Tensor, num_tokens: int, read_B1: Tensor) -> Tensor:
    """As above, in a model that never reads a text again."""
    B, T = input_ids.shape
    place_T = torch.arange(T, device=input_ids.device)
    diagonal_TT = torch.eye(T, dtype=torch.bool, device=input_ids.device)
    mask_TS = place_T[None, :] <= place_T[:, None]
    key_positions_S = place_T
    cache = SlotCache(T * num_tokens, target.config.num_hidden_layers)
    tokens_BT, greedy = input_ids, []
    for step in range(num_tokens):
        if step > 0:
            mask_TS = torch.cat([mask_TS, diagonal_TT], dim=1)
            key_positions_S = torch.cat([key_positions_S, place_T + step])
        positions_T = place_T + step
        if target.max_positions is not None:
            positions_T = positions_T.clamp(max=target.max_positions - 1)
        cache.aim((place_T + step * T).expand(B, -1), window=(step + 1) * T, first=step * T)
        output = target(
            tokens_BT,
            cache=cache,
            positions=positions_T.expand(B, -1),
            mask=mask_TS.expand(B, 1, -1, -1),
            key_positions=key_positions_S.expand(B, -1),
            text_lengths=torch.maximum(read_B1, positions_T + 1),
        )
        tokens_BT = target.logits(output.normed).argmax(-1)
        greedy.append(tokens_BT)
    return torch.stack(greedy, dim=-1)

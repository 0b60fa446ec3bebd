"""Block verification: how long a prefix of a sampled chain stays, decided over the whole chain (arXiv:2403.10444, algorithm 2).

Owns the rule and the walk. Token by token, a chain ends at its first rejection. Here a later token that the target likes can save an
earlier one, so no other rule that keeps the target's distribution accepts longer prefixes of a chain on average. Like every rejection it
needs a chain that was drawn from the draft distribution. Knows nothing of drafters and caches.

Shape legend: B batch rows, N nodes of the chain with the root, U draws (N at most), V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from draftsmith.decode.verify.verifier import Walk
from draftsmith.models.slots.constants import counting
from draftsmith.models.tree.noise import Draw, draw, uniforms
from draftsmith.models.tree.tree import DraftTree


def block_law(tokens_BN: Tensor, target_probs_BNV: Tensor, draft_probs_BNV: Tensor) -> tuple[Tensor, Tensor]:
    """How likely each prefix of a chain is kept, and what follows it.

    The prefix that ends at node i is kept with the chance of node i, unless a longer one is. With Q = 0 at a node, nothing was drawn
    below it, and the rule there is that of a chain's last node.

    Args:
        tokens_BN: int64, the root and the drafted tokens.
        target_probs_BNV: float, the target's distribution P after each node.
        draft_probs_BNV: float, the distribution Q that the next node was drawn from; zeros where none was drawn, as after the last node.

    Returns:
        float64 [B, N], the chance of each node, 1 for the root; float64 [B, N, V], the weights of the token behind a prefix that ends at
        each node.

    Example:
        P = (0.5, 0.5) and Q = (0.75, 0.25) at the root, token 0 drafted: it is kept with 0.5 / 0.75 = 2/3, else token 1 follows the root.
    """
    target_BNV, draft_BNV = target_probs_BNV.double(), draft_probs_BNV.double()
    target_BNV = target_BNV / target_BNV.sum(-1, keepdim=True)
    total_BN1 = draft_BNV.sum(-1, keepdim=True)
    # A distribution of NaN, as of a drafter whose numbers overflow, counts as none.
    draft_BNV = torch.where(total_BN1 > 0.0, draft_BNV / total_BN1, 0.0)
    next_BD1 = tokens_BN[:, 1:, None]
    chance_BD1 = draft_BNV[:, :-1].gather(-1, next_BD1)
    wanted_BD1 = target_BNV[:, :-1].gather(-1, next_BD1)
    ratio_BD = torch.where(chance_BD1 > 0.0, wanted_BD1 / chance_BD1, 0.0).squeeze(-1)
    weights = [torch.ones_like(target_BNV[:, 0, 0])]
    for ratio_B in ratio_BD.unbind(1):
        weights.append((weights[-1] * ratio_B).clamp(max=1.0))
    weight_BN = torch.stack(weights, dim=1)
    rest_BNV = (weight_BN[..., None] * target_BNV - draft_BNV).clamp(min=0.0)
    room_BN = rest_BNV.sum(-1)
    whole_BN = room_BN + 1.0 - weight_BN
    keep_BN = torch.where(whole_BN > 0.0, room_BN / whole_BN, 1.0)
    keep_BN[:, 0] = 1.0
    # Nothing is left only where P and Q are equal up to rounding.
    return keep_BN, torch.where(room_BN[..., None] > 0.0, rest_BNV, target_BNV)


def block_walk(tree: DraftTree, target_probs_BNV: Tensor, keys_BU: Tensor, draw: Draw = draw) -> Walk:
    """Keep the longest prefix whose own draw says so, and end with a draw from what the target has left there.

    Args:
        tree: a chain, sampled by :func:`~draftsmith.models.tree.sampled_search.sampled_tree`.
        target_probs_BNV: float, the target's distribution at every node, after the request's processors.
        keys_BU: int64 noise keys: one for each drafted node that the chain may have, and one for the token that ends the walk. The
            drafter saw none.
        draw: how a token is drawn by weights and a key.
    """
    assert tree.draft_probs_BMV is not None
    draft_BNV = torch.nn.functional.pad(tree.draft_probs_BMV, (0, 0, 0, 1))
    keep_BN, law_BNV = block_law(tree.tokens_BN, target_probs_BNV, draft_BNV)
    node_N = counting(tree.num_nodes, keep_BN.device)
    kept_BN = torch.nn.functional.pad(uniforms(keys_BU[:, : tree.num_nodes - 1]) < keep_BN[:, 1:], (1, 0), value=True)
    last_B1 = (kept_BN * node_N).amax(1, keepdim=True)
    law_BV = law_BNV.gather(1, last_B1[..., None].expand(-1, -1, law_BNV.shape[-1])).squeeze(1)
    final_B1 = draw(law_BV, keys_BU[:, -1:])
    path_BN = torch.where(node_N <= last_B1, node_N, 0)
    emitted_BN = tree.tokens_BN.gather(1, path_BN).roll(-1, dims=1).scatter_(1, last_B1, final_B1)
    return Walk(path_BN, emitted_BN, last_B1.squeeze(1) + 1, last_B1, final_B1)

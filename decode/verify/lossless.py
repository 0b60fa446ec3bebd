"""Verification: one walk down the tree along the target's own choices.

Owns the lossless rule. The target chooses one token at every node (its argmax, or one draw from its processed distribution); the walk
descends while the choice is a child and emits the first choice that is not. Whatever the tree holds, the emitted tokens are exactly
what the target would have chosen alone, since the tree was built without looking at the draws. Knows nothing of how choices were
drawn, of caches or drafters.

Shape legend: B batch rows, N tree nodes, E path slots (max_depth + 1).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from draftsmith.models.tree.tree import DraftTree


@dataclass(frozen=True)
class Walk:
    """Where the walk went in each row.

    Attributes:
        path_BE: int64, node index at each depth, the root first; the root's index 0 behind the end.
        emitted_BE: int64, the target's choice at each node of the path: accepted tokens, then one of the target's own.
        counts_B: int64, how many of ``emitted_BE`` are real: accepted drafts + 1.
    """

    path_BE: Tensor
    emitted_BE: Tensor
    counts_B: Tensor


def walk(tree: DraftTree, ancestors_BNN: Tensor, choices_BN: Tensor) -> Walk:
    """Follow the target's choices from the root.

    Args:
        tree: proposed nodes.
        ancestors_BNN: bool, ``tree.ancestors()``.
        choices_BN: int64, the target's chosen next token at each node.

    Example:
        root, children 5 and 7 of it, child 6 of 5; choices 5 at the root, 6 at node "5", 9 at node "6" accept 5 and 6, emit [5, 6, 9].
    """
    if tree.num_nodes == 1:
        return Walk(torch.zeros_like(choices_BN), choices_BN, torch.ones_like(choices_BN[:, 0]))
    agrees_BN = (tree.tokens_BN == choices_BN.gather(1, tree.parents_BN.clamp(min=0))) & tree.valid_BN
    agrees_BN[:, 0] = True
    accepted_BN = (agrees_BN[:, None, :] | ~ancestors_BNN).all(-1) & tree.valid_BN
    # At most one node is accepted at each depth, because siblings differ in their tokens.
    depth_BN = tree.depths_BN.masked_fill(~accepted_BN, tree.max_depth + 1)
    index_BN = torch.arange(tree.num_nodes, device=choices_BN.device).expand_as(depth_BN)
    path_BE = choices_BN.new_zeros(choices_BN.shape[0], tree.max_depth + 2).scatter_(1, depth_BN, index_BN)[:, :-1]
    return Walk(path_BE, choices_BN.gather(1, path_BE), accepted_BN.sum(1))

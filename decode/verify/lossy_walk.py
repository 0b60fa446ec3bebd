"""Verification with a LOSSY rule: one walk down the tree along what the target chooses or the rule allows.

Owns the choice of the path. The target's own choice goes first wherever it was drafted, so nothing that lossless verification accepts is
lost; where the walk ends, the target says the next token, and from there goes on from the draft's tokens. Knows no rule.

Shape legend: B batch rows, N tree nodes, E path slots (max_depth + 1).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from draftsmith.decode.verify.lossless import Walk
from draftsmith.models.tree.tree import DraftTree


@dataclass(frozen=True)
class LossyWalk(Walk):
    """A walk on which a rule had a say.

    Attributes:
        by_rule_BE: bool, which of ``emitted_BE`` are not what the target would have chosen there.
    """

    by_rule_BE: Tensor


def lossy_walk(tree: DraftTree, choices_BN: Tensor, allowed_BN: Tensor) -> LossyWalk:
    """From the root, descend to the child that is the target's choice, else to the likeliest allowed one.

    Args:
        tree: proposed nodes.
        choices_BN: int64, the target's chosen next token at each node.
        allowed_BN: bool, nodes that may stand.

    Example:
        a chain 5, 6, 7 with choices 5, 8, 7, 9 at the root and its nodes, and 6 allowed: emits [5, 6, 7, 9], of which 6 is by the rule.
    """
    matches_BN = tree.tokens_BN == choices_BN.gather(1, tree.parents_BN.clamp(min=0))
    stands_BN = (matches_BN | allowed_BN) & tree.valid_BN
    path_BE = _chain(stands_BN) if tree.chain else _descend(tree, stands_BN, matches_BN)
    counts_B = 1 + (path_BE > 0).sum(1)
    last_B1 = counts_B[:, None] - 1
    own_B1 = choices_BN.gather(1, path_BE.gather(1, last_B1))
    emitted_BE = tree.tokens_BN.gather(1, path_BE).roll(-1, dims=1).scatter_(1, last_B1, own_B1)
    by_rule_BE = (~matches_BN).gather(1, path_BE).roll(-1, dims=1)
    place_E = torch.arange(path_BE.shape[1], device=path_BE.device)
    return LossyWalk(path_BE, emitted_BE, counts_B, by_rule_BE & (place_E < last_B1))


def _chain(stands_BN: Tensor) -> Tensor:
    """int64 [B, E]: node indices of a chain as far as its nodes stand, 0 behind."""
    going_BN = stands_BN.clone()
    going_BN[:, 0] = True
    place_N = torch.arange(stands_BN.shape[1], device=stands_BN.device)
    return place_N * going_BN.long().cumprod(1)


def _descend(tree: DraftTree, stands_BN: Tensor, matches_BN: Tensor) -> Tensor:
    """int64 [B, E]: node indices of the path, 0 behind its end."""
    place_BN = torch.arange(tree.num_nodes, device=stands_BN.device).expand_as(stands_BN)
    likely_BN = -place_BN.float() if tree.scores_BN is None else tree.scores_BN.float().clamp(min=-1e30)
    rank_BN = torch.where(matches_BN, 1.0, likely_BN)  # log-probabilities are at most 0
    node_B1 = torch.zeros_like(place_BN[:, :1])
    path = [node_B1]
    for _ in range(tree.max_depth):
        child_BN = (tree.parents_BN == node_B1) & stands_BN & (place_BN > 0)
        best_B1 = rank_BN.masked_fill(~child_BN, -torch.inf).argmax(1, keepdim=True)
        # A row that has ended stays where it is: the parent index of no node.
        node_B1 = torch.where(child_BN.any(1, keepdim=True), best_B1, -2)
        path.append(node_B1.clamp(min=0))
    return torch.cat(path, dim=1)

"""Branches of a draft that come to the same tokens share what follows (graph-structured speculative decoding, arXiv:2407.16207).

While a tree is searched, a node whose last tokens are those of a node that was continued is not continued too; another takes its place.
Afterwards the continuations of the other node are copied below it. The paper calls such a pair a link. Copies are tokens like any
others to verification, so the output does not change.

Owns both halves. Knows no drafter; how a tree is searched is in :mod:`draftsmith.models.tree.search`.

Shape legend: B batch rows, M nodes of a layer, R continuations of each, A tokens that must agree, N tree nodes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from draftsmith.models.slots.constants import counting
from draftsmith.models.tree.tree import DraftTree

_BEFORE = -1  # in place of a token above the root


class Links:
    """Which nodes of a search need no continuation of their own.

    Args:
        root_B: int64, the roots.
        agreeing: A.
    """

    def __init__(self, root_B: Tensor, agreeing: int) -> None:
        before_BA = torch.full_like(root_B[:, None].expand(-1, agreeing - 1), _BEFORE)
        self._ends_BMA = torch.cat([before_BA, root_B[:, None]], dim=1)[:, None]
        self._continued_BXA = self._ends_BMA

    def unlinked(self, tokens_BMR: Tensor, scores_BMR: Tensor) -> Tensor:
        """Take those that are linked out of the competition for the next layer.

        Args:
            tokens_BMR: int64, continuations of the nodes that :meth:`take` named last, at first of the root.
            scores_BMR: float, their scores.

        Returns:
            The scores, minus infinity where the last A tokens are those of a node that was continued, or of a better one in this layer.
        """
        B, M, R = tokens_BMR.shape
        ends_BXA = self._ends_of(
            tokens_BMR.flatten(1), counting(M, tokens_BMR.device).repeat_interleave(R).expand(B, -1)
        )
        scores_BX, num_continued = scores_BMR.flatten(1), self._continued_BXA.shape[1]
        # Sorted, those with one end lie together, and the first of them is none that is linked: nothing here grows with X * X.
        ends_BYA = torch.cat([self._continued_BXA, ends_BXA], dim=1)
        order_BY = (
            F.pad(scores_BX, (num_continued, 0), value=torch.inf).sort(dim=1, descending=True, stable=True).indices
        )
        for token_BY in ends_BYA.unbind(-1):
            order_BY = order_BY.gather(1, token_BY.gather(1, order_BY).sort(dim=1, stable=True).indices)
        sorted_BYA = ends_BYA.gather(1, order_BY[..., None].expand(-1, -1, ends_BYA.shape[-1]))
        follows_BY = F.pad((sorted_BYA[:, 1:] == sorted_BYA[:, :-1]).all(-1), (1, 0))
        linked_BY = torch.zeros_like(follows_BY).scatter(1, order_BY, follows_BY)
        return scores_BX.masked_fill(linked_BY[:, num_continued:], -torch.inf).view(B, M, R)

    def take(self, tokens_BM: Tensor, above_BM: Tensor) -> None:
        """Note which nodes are continued.

        Args:
            tokens_BM: int64, their tokens.
            above_BM: int64, which node of the last call each one follows.
        """
        self._ends_BMA = self._ends_of(tokens_BM, above_BM)
        self._continued_BXA = torch.cat([self._continued_BXA, self._ends_BMA], dim=1)

    def _ends_of(self, tokens_BX: Tensor, above_BX: Tensor) -> Tensor:
        """int64 [B, X, A]: the last tokens of nodes below the current ones."""
        size = self._ends_BMA.shape[-1]
        above_BXA = self._ends_BMA.gather(1, above_BX[..., None].expand(-1, -1, size))
        return torch.cat([above_BXA[..., 1:], tokens_BX[..., None]], dim=-1)


def merged(tree: DraftTree, agreeing: int, max_depth: int) -> DraftTree:
    """Copy what follows a node below each leaf whose last tokens are the same. Of several such nodes, the best scored is copied.

    A copy scores what its original does, relative to the node that was copied, below the leaf's own score. Copies are not copied again.

    Args:
        tree: with scores.
        agreeing: A.
        max_depth: no copy is deeper.

    Returns:
        The tree with all copies, not packed: N + N * N nodes.

    Example:
        "the big dog ran" and "a big dog" below one root, two tokens agree: "ran" is copied below the second "dog".
    """
    assert tree.scores_BN is not None
    N, parent_BN = tree.num_nodes, tree.parents_BN.clamp(min=0)
    is_child_BN = tree.valid_BN & (tree.depths_BN > 0)
    children_BN = torch.zeros_like(parent_BN).scatter_add(1, parent_BN, is_child_BN.long())
    is_leaf_BN = is_child_BN & (children_BN == 0)
    is_source_BN = tree.valid_BN & (children_BN > 0)
    ends_BNA = _ends(tree, agreeing)
    same_BNN = (ends_BNA[:, :, None] == ends_BNA[:, None]).all(-1)
    scores_BN = tree.scores_BN.masked_fill(~tree.valid_BN, -torch.inf)
    best_BM, source_BM = torch.where(same_BNN & is_source_BN[:, None], scores_BN[:, None], -torch.inf).max(-1)
    is_linked_BM = is_leaf_BN & (best_BM > -torch.inf)
    # From here on [b, m, n] is the copy of node n below leaf m.
    below_BMN = tree.ancestors().transpose(1, 2).gather(1, source_BM[..., None].expand(-1, -1, N))
    depth_BMN = (tree.depths_BN - tree.depths_BN.gather(1, source_BM))[..., None] + tree.depths_BN[:, None]
    is_source_BMN = counting(N, tree.tokens_BN.device) == source_BM[..., None]
    is_copy_BMN = is_linked_BM[..., None] & below_BMN & ~is_source_BMN & tree.valid_BN[:, None]
    is_copy_BMN = is_copy_BMN & (depth_BMN <= max_depth)
    score_BMN = (scores_BN - best_BM)[..., None] + scores_BN[:, None]
    place_N = counting(N, tree.tokens_BN.device)
    copied_BMN = N * (1 + place_N[:, None]) + parent_BN[:, None]
    above_BMN = torch.where(parent_BN[:, None] == source_BM[..., None], place_N[:, None], copied_BMN)
    return DraftTree(
        tokens_BN=torch.cat([tree.tokens_BN, tree.tokens_BN[:, None].expand(-1, N, -1).flatten(1)], dim=1),
        parents_BN=torch.cat([tree.parents_BN, (above_BMN * is_copy_BMN).flatten(1)], dim=1),
        depths_BN=torch.cat([tree.depths_BN, (depth_BMN * is_copy_BMN).flatten(1)], dim=1),
        valid_BN=torch.cat([tree.valid_BN, is_copy_BMN.flatten(1)], dim=1),
        max_depth=max_depth,
        scores_BN=torch.cat([scores_BN, score_BMN.masked_fill(~is_copy_BMN, -torch.inf).flatten(1)], dim=1),
    )


def _ends(tree: DraftTree, agreeing: int) -> Tensor:
    """int64 [B, N, A]: the last tokens of every node."""
    at_BN = counting(tree.num_nodes, tree.tokens_BN.device).expand_as(tree.tokens_BN)
    parts = []
    for back in range(agreeing):
        parts.append(torch.where(tree.depths_BN >= back, tree.tokens_BN.gather(1, at_BN), _BEFORE))
        at_BN = tree.parents_BN.gather(1, at_BN).clamp(min=0)
    return torch.stack(parts[::-1], dim=-1)

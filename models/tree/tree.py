"""The draft tree: proposed tokens, their parents, and how trees are built and pruned.

Owns the one shape in which every drafter family proposes: a chain, a beam and an n-gram are all trees. Knows nothing of the
target's cache, of verification or of any drafter.

Shape legend: B batch rows, N tree nodes (the root included), M paths or beams (or nodes with children), L drafted depth, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from draftsmith.models.slots.constants import counting, lower_triangle, made_once, number, repeated


@dataclass(frozen=True)
class DraftTree:
    """Proposed tokens as a tree in topological order: a parent always has a smaller index than its children.

    Node 0 is the *root*: the last emitted token, already decided and not yet in the target's cache. Invalid nodes are padding
    behind the valid ones of a row (anywhere in a sampled or pruned tree); they are never accepted. Siblings differ in their tokens,
    except in trees sampled with replacement.

    Attributes:
        tokens_BN: target token ids, int64.
        parents_BN: index of each node's parent, int64; -1 at the root, 0 or any node before it at padding.
        depths_BN: distance from the root, int64; at padding 0 or any depth up to the largest.
        valid_BN: bool, True at real nodes.
        max_depth: largest depth that any row can have (a host number, so that shapes stay static).
        scores_BN: cumulative draft log-probability of the path to a node, float; None where the drafter gives none.
        chain: True where node i is known to be the parent of node i + 1 in every row. An accepted path then needs no compaction.
        draft_probs_BMV: of a sampled tree, float [B, M, V] over target ids: the distribution that the children of each of the first M
            nodes were drawn from. It is 0 where a node has none; the other N - M nodes are leaves. None in other trees. Such a tree is
            neither packed nor pruned: the rules of acceptance need every candidate in the order of drawing. Of a chain, the same where
            verification asked for it.
    """

    tokens_BN: Tensor
    parents_BN: Tensor
    depths_BN: Tensor
    valid_BN: Tensor
    max_depth: int
    scores_BN: Tensor | None = None
    chain: bool = False
    draft_probs_BMV: Tensor | None = None

    @property
    def num_nodes(self) -> int:
        """N, padding included."""
        return self.tokens_BN.shape[1]

    def ancestors(self) -> Tensor:
        """Mark the ancestors of every node.

        Returns:
            bool [B, N, N]: ``[b, i, j]`` is True where node j is node i itself or one of its ancestors.
        """
        if self.chain:
            return lower_triangle(self.num_nodes, self.tokens_BN.device).expand(self.tokens_BN.shape[0], -1, -1)
        reach_BNN = torch.zeros(*self.tokens_BN.shape, self.num_nodes, device=self.tokens_BN.device)
        reach_BNN.scatter_(2, self.parents_BN.clamp(min=0)[..., None], 1.0)
        reach_BNN.diagonal(dim1=1, dim2=2).fill_(1.0)
        # Each squaring doubles the reach of "self or parent"; the root's own parent entry is itself, so it adds nothing.
        for _ in range(math.ceil(math.log2(max(self.max_depth, 1)))):
            reach_BNN = (reach_BNN @ reach_BNN).clamp_(max=1.0)
        return reach_BNN.bool()

    def select_rows(self, rows: Tensor) -> DraftTree:
        """Keep some batch rows only.

        Args:
            rows: int64 [B'].

        Returns:
            The tree of these rows.
        """
        return replace(
            self,
            tokens_BN=self.tokens_BN[rows],
            parents_BN=self.parents_BN[rows],
            depths_BN=self.depths_BN[rows],
            valid_BN=self.valid_BN[rows],
            scores_BN=None if self.scores_BN is None else self.scores_BN[rows],
            draft_probs_BMV=None if self.draft_probs_BMV is None else self.draft_probs_BMV[rows],
        )


def root_tree(root_B: Tensor) -> DraftTree:
    """The tree of plain decoding: nothing proposed, one node a row.

    Args:
        root_B: int64 [B], the root tokens.

    Returns:
        A tree of N = 1 node.
    """
    parents_B1, depths_B1, valid_B1 = _lone_roots(root_B.shape[0], root_B.device)
    return DraftTree(root_B[:, None], parents_B1, depths_B1, valid_B1, max_depth=0, chain=True)


@made_once
def _lone_roots(num_rows: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Parents, depths (int64 [B, 1] both) and validity (bool [B, 1]) of trees of one node."""
    parents_1, depths_1, valid_11 = repeated((-1,), (1,), device), counting(1, device), lower_triangle(1, device)
    return parents_1.expand(num_rows, 1), depths_1.expand(num_rows, 1), valid_11.expand(num_rows, 1)


def tree_from_paths(
    root_B: Tensor, paths_BML: Tensor, scores_BML: Tensor | None = None, cut: bool | None = None
) -> DraftTree:
    """Merge paths that share a prefix into one tree (dynamic tree attention, arXiv:2403.09919 section 3.3).

    Two path elements are one node where their whole prefixes agree, that is, nodes are distinct by (parent node, token).

    Args:
        root_B: int64 [B], the root tokens.
        paths_BML: int64 [B, M, L], tokens of M drafted paths below the root.
        scores_BML: optional float [B, M, L], cumulative log-probability of each path's prefix; minus infinity marks padding.
        cut: see :func:`pack`.

    Returns:
        The tree, packed.

    Example:
        paths ``[[5, 6], [5, 7]]`` give the nodes root, 5, 6, 7 with parents -1, 0, 1, 1.
    """
    B, M, L = paths_BML.shape
    agree_BMML = (paths_BML[:, :, None, :] == paths_BML[:, None, :, :]).int().cumprod(-1)
    first_BML = agree_BMML.argmax(dim=2)  # the earliest path with the same prefix owns the node
    column_L = torch.arange(L, device=paths_BML.device)
    slot_BML = 1 + first_BML * L + column_L
    own_BML = first_BML == torch.arange(M, device=paths_BML.device)[:, None]
    if scores_BML is not None:
        own_BML = own_BML & (scores_BML > -torch.inf)
    above_BML = torch.cat([torch.zeros_like(slot_BML[..., :1]), slot_BML[..., :-1]], dim=-1)
    depths_BML = (column_L + 1).expand(B, M, L)
    tree = DraftTree(
        tokens_BN=_under(root_B[:, None], [paths_BML.flatten(1)]),
        parents_BN=_under(torch.full_like(root_B, -1)[:, None], [above_BML.flatten(1)]),
        depths_BN=_under(torch.zeros_like(root_B)[:, None], [depths_BML.flatten(1)]),
        valid_BN=_under(torch.ones_like(root_B, dtype=torch.bool)[:, None], [own_BML.flatten(1)]),
        max_depth=L,
        scores_BN=None if scores_BML is None else _under(scores_BML.new_zeros(B, 1), [scores_BML.flatten(1)]),
        chain=M == 1,
    )
    return pack(tree, cut=cut)


@dataclass(frozen=True)
class ScoredNodes:
    """Nodes of a tree whose scores alone say which of them are padding: it scores minus infinity.

    Attributes:
        tokens_BN: see :class:`DraftTree`, as the others.
        parents_BN: see there.
        depths_BN: see there.
        scores_BN: see there.
        max_depth: see there.
        chain: see there.
    """

    tokens_BN: Tensor
    parents_BN: Tensor
    depths_BN: Tensor
    scores_BN: Tensor
    max_depth: int
    chain: bool

    def all(self) -> DraftTree:
        """The tree of all nodes."""
        valid_BN = self.scores_BN > -torch.inf
        return DraftTree(
            self.tokens_BN, self.parents_BN, self.depths_BN, valid_BN, self.max_depth, self.scores_BN, self.chain
        )

    def best(self, node_budget: int, cut: bool | None = None) -> DraftTree:
        """The tree of the best nodes.

        Args:
            node_budget: see :func:`prune`.
            cut: see :func:`pack`.

        Returns:
            The tree of at most ``node_budget`` + 1 nodes.
        """
        order_BN = self.scores_BN.sort(dim=1, descending=True, stable=True).indices[:, : node_budget + 1]
        if cuts_padding(order_BN.device, cut):
            order_BN = order_BN[:, : int((self.scores_BN > -torch.inf).sum(1).max())]
        index_BK = order_BN.sort(1).values
        whole_3BN = torch.stack([self.tokens_BN, self.parents_BN, self.depths_BN])
        tokens_BK, parents_BK, depths_BK = whole_3BN.gather(2, index_BK.expand(3, -1, -1))
        scores_BK = self.scores_BN.gather(1, index_BK)
        return DraftTree(
            tokens_BN=tokens_BK,
            parents_BN=_renumbered(parents_BK, index_BK),
            depths_BN=depths_BK,
            valid_BN=scores_BK > -torch.inf,
            max_depth=min(self.max_depth, node_budget),
            scores_BN=scores_BK,
            chain=self.chain,
        )


def scored_layers(
    root_B: Tensor, tokens: Sequence[Tensor], parents_BN: Tensor, scores: Sequence[Tensor]
) -> ScoredNodes:
    """The candidates of each depth below a root; see :func:`tree_from_layers`.

    Args:
        root_B: int64 [B], the root tokens.
        tokens: of each depth from 1 on, int64 [B, C], C may differ from depth to depth.
        parents_BN: int64, of all nodes, the root's -1 first.
        scores: of each depth, float [B, C], cumulative log-probabilities.

    Returns:
        The nodes; N is 1 and the sum of all C.
    """
    B, device = root_B.shape[0], root_B.device
    sizes = tuple(layer.shape[1] for layer in tokens)
    return ScoredNodes(
        tokens_BN=_under(root_B[:, None], tokens),
        parents_BN=parents_BN,
        depths_BN=repeated(tuple(range(len(sizes) + 1)), (1, *sizes), device).expand(B, -1),
        scores_BN=_under(number(0.0, scores[0].dtype, device).expand(B, 1), scores),
        max_depth=len(sizes),
        chain=all(size == 1 for size in sizes),
    )


def tree_from_layers(
    root_B: Tensor, tokens: Sequence[Tensor], parents: Sequence[Tensor], scores: Sequence[Tensor]
) -> DraftTree:
    """A tree from the candidates of each depth; those with a score of minus infinity are padding.

    Candidates of one parent must differ in their tokens, and a candidate below padding must be padding.

    Args:
        root_B: int64 [B], the root tokens.
        tokens: of each depth from 1 on, int64 [B, C], C may differ from depth to depth.
        parents: int64 [B, ...], which together give the index of each candidate's parent among all nodes (0 is the root).
        scores: of each depth, float [B, C], cumulative log-probabilities.

    Returns:
        The tree, not packed: N is 1 and the sum of all C.
    """
    above_root_B1 = repeated((-1,), (1,), root_B.device).expand(root_B.shape[0], 1)
    return scored_layers(root_B, tokens, _under(above_root_B1, parents), scores).all()


def joined(tree: DraftTree, paths_BPL: Tensor, scores_BPL: Tensor, at_BP: Tensor | None = None) -> DraftTree:
    """Hang paths on a tree. What both hold is one node, with the better of the two scores.

    Args:
        tree: with scores.
        paths_BPL: int64 [B, P, L], tokens of paths below a node.
        scores_BPL: float [B, P, L], cumulative log-probability of each path's prefix, that of the node included; minus infinity marks
            padding. Paths of one node that share a prefix agree in its score.
        at_BP: int64 [B, P], which node each path hangs on; None for the root.

    Returns:
        The tree, not packed: N is that of the tree and P * L. No path is deeper than the tree and L together.
    """
    assert tree.scores_BN is not None
    is_root = at_BP is None
    at_BP = torch.zeros_like(paths_BPL[..., 0]) if at_BP is None else at_BP
    start_BP1 = tree.depths_BN.gather(1, at_BP)[..., None]
    _, P, L = paths_BPL.shape
    there_BPL = scores_BPL > -torch.inf
    both_BPPL = there_BPL[:, :, None] & there_BPL[:, None] & (at_BP[:, :, None] == at_BP[:, None])[..., None]
    same_BPPL = ((paths_BPL[:, :, None] == paths_BPL[:, None]) & both_BPPL).int().cumprod(-1)
    first_BPL = same_BPPL.argmax(2)  # the earliest path with the same prefix owns the node
    own_BPL = there_BPL & (first_BPL == counting(P, paths_BPL.device)[:, None])
    scores_BN, node_BP = tree.scores_BN, at_BP
    parents, valid = [], []
    for depth, token_BP in enumerate(paths_BPL.unbind(-1)):
        child_BPN = (tree.parents_BN[:, None] == node_BP[..., None]) & (tree.tokens_BN[:, None] == token_BP[..., None])
        child_BPN = child_BPN & tree.valid_BN[:, None] & there_BPL[..., depth, None]
        known_BP, child_BP = child_BPN.any(-1), child_BPN.int().argmax(-1)
        parents.append(node_BP)
        valid.append(own_BPL[..., depth] & ~known_BP)
        better_BP = scores_BPL[..., depth].to(scores_BN.dtype).masked_fill(~known_BP, -torch.inf)
        scores_BN = scores_BN.scatter_reduce(1, child_BP, better_BP, "amax")
        node_BP = torch.where(known_BP, child_BP, tree.num_nodes + first_BPL[..., depth] * L + depth)
    depth_BPL = start_BP1 + counting(L, paths_BPL.device) + 1
    return DraftTree(
        tokens_BN=_under(tree.tokens_BN, [paths_BPL.flatten(1)]),
        parents_BN=_under(tree.parents_BN, [torch.stack(parents, -1).flatten(1)]),
        depths_BN=_under(tree.depths_BN, [depth_BPL.flatten(1)]),
        valid_BN=_under(tree.valid_BN, [torch.stack(valid, -1).flatten(1)]),
        max_depth=max(tree.max_depth, L) if is_root else tree.max_depth + L,
        scores_BN=_under(scores_BN, [scores_BPL.flatten(1)]),
    )


def prune(tree: DraftTree, node_budget: int, cut: bool | None = None) -> DraftTree:
    """Keep the ``node_budget`` best drafted nodes of each row by cumulative score (the rerank of arXiv:2406.16858 section 4).

    A parent never scores below its child and precedes it, and the sort is stable. So ties go to the parent, and what is kept is
    connected. The root, whose score is 0, comes first. It is kept beside the budget.

    Args:
        tree: with scores.
        node_budget: how many drafted nodes to keep, at least 1.
        cut: see :func:`pack`.

    Returns:
        The tree of at most ``node_budget`` + 1 nodes. Where a row has fewer valid ones, padding is among them.

    Raises:
        ValueError: ``node_budget`` is below 1, or the tree carries no scores.
    """
    if node_budget < 1:
        raise ValueError(f"node_budget is {node_budget}; it must be at least 1 (or null for every node)")
    if tree.scores_BN is None:
        raise ValueError("this drafter gives no scores, so its tree cannot be pruned; set node_budget to null")
    return prune_marked(
        replace(tree, scores_BN=torch.where(tree.valid_BN, tree.scores_BN, -torch.inf)), node_budget, cut
    )


def prune_marked(tree: DraftTree, node_budget: int, cut: bool | None = None) -> DraftTree:
    """As :func:`prune`, in fewer operations, of a tree whose padding scores minus infinity.

    Args:
        tree: with such scores.
        node_budget: see there, as the next one.
        cut: see there.

    Returns:
        The tree of at most ``node_budget`` + 1 nodes.
    """
    assert tree.scores_BN is not None
    scored = ScoredNodes(tree.tokens_BN, tree.parents_BN, tree.depths_BN, tree.scores_BN, tree.max_depth, tree.chain)
    return scored.best(node_budget, cut)


def pack(tree: DraftTree, width: int | None = None, cut: bool | None = None) -> DraftTree:
    """Move the valid nodes of each row to the front, in order, and cut the padding off.

    Args:
        tree: any but a sampled one, which keeps its shape.
        width: the most nodes to keep; None for all.
        cut: True keeps only as many nodes as the fullest row has, a number that is read from the device. False keeps the shape fixed. None
            cuts on a CPU, where reading is free.

    Returns:
        The tree with N of at most ``width``.
    """
    assert tree.draft_probs_BMV is None, "a sampled tree keeps its shape"
    width = tree.num_nodes if width is None else width
    if cuts_padding(tree.tokens_BN.device, cut):
        fullest = int(tree.valid_BN.sum(1).max())
        if fullest == tree.num_nodes:
            return tree
        width = min(width, fullest)
    index_N = counting(tree.num_nodes, tree.tokens_BN.device)
    index_BN = torch.where(tree.valid_BN, index_N, tree.num_nodes)
    return _taken(tree, index_BN.topk(width, dim=1, largest=False).values)


def _taken(tree: DraftTree, index_BK: Tensor) -> DraftTree:
    """The tree of some nodes.

    Args:
        tree: any.
        index_BK: int64, which nodes, ascending; N where a row has no more of them. A node's parent is among them.
    """
    last = tree.num_nodes - 1
    valid_BK, source_BK = index_BK <= last, index_BK.clamp(max=last)
    return DraftTree(
        tokens_BN=tree.tokens_BN.gather(1, source_BK),
        parents_BN=_renumbered(tree.parents_BN.gather(1, source_BK), index_BK) * valid_BK,
        depths_BN=tree.depths_BN.gather(1, source_BK).mul_(valid_BK),
        valid_BN=valid_BK,
        max_depth=tree.max_depth,
        scores_BN=None if tree.scores_BN is None else tree.scores_BN.gather(1, source_BK),
        chain=tree.chain,
    )


def _renumbered(parents_BK: Tensor, index_BK: Tensor) -> Tensor:
    """Parents of some nodes by their new numbers, int64 [B, K].

    Args:
        parents_BK: int64, the old numbers of the parents.
        index_BK: int64, the old numbers of the new nodes, ascending.
    """
    # A node's new number is its place among the ascending old ones. The parent of the root, -1, precedes all.
    return torch.searchsorted(index_BK, parents_BK, right=True) - 1


def cuts_padding(device: torch.device, cut: bool | None) -> bool:
    """Whether shapes follow what was drafted: as ``cut`` says, and where it is None, on a CPU."""
    return device.type == "cpu" if cut is None else cut


def _under(root_B1: Tensor, layers: Sequence[Tensor]) -> Tensor:
    return torch.cat([root_B1, *(layer.to(root_B1.dtype) for layer in layers)], dim=1)


def in_batch_order(trees: Sequence[DraftTree], rows: Sequence[Tensor]) -> DraftTree:
    """Trees of several groups as one; smaller ones get padding nodes.

    Args:
        trees: of each group.
        rows: int64 [G] each, the place of a group's rows in the batch; together 0 to B - 1.
    """
    num_nodes = max(tree.num_nodes for tree in trees)
    wide = [_widened(tree, num_nodes) for tree in trees]
    order_B = torch.cat(list(rows)).argsort()
    probs = [tree.draft_probs_BMV for tree in wide if tree.draft_probs_BMV is not None]
    scores = [tree.scores_BN for tree in wide if tree.scores_BN is not None]
    return DraftTree(
        tokens_BN=torch.cat([tree.tokens_BN for tree in wide])[order_B],
        parents_BN=torch.cat([tree.parents_BN for tree in wide])[order_B],
        depths_BN=torch.cat([tree.depths_BN for tree in wide])[order_B],
        valid_BN=torch.cat([tree.valid_BN for tree in wide])[order_B],
        max_depth=max(tree.max_depth for tree in wide),
        scores_BN=torch.cat(scores)[order_B] if len(scores) == len(wide) else None,
        chain=all(tree.chain for tree in wide),
        draft_probs_BMV=_cat_probs(probs)[order_B] if len(probs) == len(wide) else None,
    )


def _widened(tree: DraftTree, num_nodes: int) -> DraftTree:
    """The tree with padding nodes up to ``num_nodes``."""
    more = (0, num_nodes - tree.num_nodes)
    return replace(
        tree,
        tokens_BN=F.pad(tree.tokens_BN, more),
        parents_BN=F.pad(tree.parents_BN, more),
        depths_BN=F.pad(tree.depths_BN, more),
        valid_BN=F.pad(tree.valid_BN, more, value=False),
        scores_BN=None if tree.scores_BN is None else F.pad(tree.scores_BN, more, value=-torch.inf),
    )


def _cat_probs(probs: Sequence[Tensor]) -> Tensor:
    """[G, M, V] each -> [B, M, V]; nodes that a group has not drew nothing."""
    most = max(probs_GMV.shape[1] for probs_GMV in probs)
    return torch.cat([F.pad(probs_GMV, (0, 0, 0, most - probs_GMV.shape[1])) for probs_GMV in probs])

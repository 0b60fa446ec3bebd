"""Sampled draft trees: children drawn at every node from the drafter's own distribution.

Owns the draws and the fixed shape of such trees. Knows neither what continues the nodes, nor the target, nor the rules by which candidates
are accepted (:mod:`draftsmith.decode.verify.candidates`, :mod:`draftsmith.decode.verify.block_walk`).

Shape legend: B batch rows, M nodes of a layer, K children of a node, N tree nodes, U draws.
V target vocabulary, Vd draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from draftsmith.models.slots.constants import lower_triangle, repeated
from draftsmith.models.tree.limits import DraftLimits, Rule, SampledChildren
from draftsmith.models.tree.noise import Draw
from draftsmith.models.tree.search import Draws, Expander, expected_acceptance
from draftsmith.models.tree.tree import DraftTree, cuts_padding


def sampled_tree(
    expander: Expander,
    stop_below_B: Tensor | None,
    limits: DraftLimits,
    draws: Draws,
    vocab_size: int,
    cut: bool | None = None,
) -> DraftTree:
    """Draw ``limits.sampled.children`` nodes below each node, layer behind layer, siblings side by side in the order of drawing.

    ``mcsd`` draws siblings without replacement, ``kseq`` with it: siblings may then hold the same token. Both stay nodes of their own,
    each with its own subtree, which keeps the rule as it is stated and the shape fixed. Padding takes the places that are not
    drawn: below padding, below nodes that the early stop stops at, and where a distribution has fewer tokens than children are drawn.

    The child in node order takes the key of its own place, so a row draws the same in any batch.

    Args:
        expander: continues nodes.
        stop_below_B: float32 [B], thresholds of the early stop, or None.
        limits: with ``sampled``, and ``early_stop`` where there are thresholds.
        draws: the keys and the distribution to draw from.
        vocab_size: V, of the target.
        cut: whether the draft ends where no row has a node left; see :func:`~draftsmith.models.tree.tree.pack`.

    Returns:
        The tree, with ``draft_probs_BMV`` and without scores.
    """
    assert limits.sampled is not None
    logits_BMV = expander.begin()
    alive_BM = lower_triangle(1, logits_BMV.device).expand(logits_BMV.shape[:2])
    tokens, alive, probs = [expander.root_B[:, None]], [alive_BM], []
    for depth, count in enumerate(limits.sampled.children):
        if depth > 0 and limits.early_stop is not None and stop_below_B is not None:
            expected_BM = expected_acceptance(expander, logits_BMV, limits.early_stop.scale)
            alive_BM = alive_BM & (expected_BM >= stop_below_B[:, None])
            if cuts_padding(alive_BM.device, cut) and not bool(alive_BM.any()):
                break
        weights_BMV = draws.probs(logits_BMV) * alive_BM[..., None]
        first, width = layer_start(limits.sampled, depth + 1), alive_BM.shape[1] * count
        keys_BMK = draws.keys_BU[:, first - 1 : first - 1 + width].unflatten(1, (-1, count))
        draft_BMK, drawn_BMK = _children(limits.sampled.rule, weights_BMV, keys_BMK, draws.draw)
        token_BC = expander.target_ids(draft_BMK).flatten(1)
        alive_BM = drawn_BMK.flatten(1)
        tokens.append(token_BC)
        alive.append(alive_BM)
        probs.append(over_target(expander, weights_BMV, vocab_size))
        if depth + 1 < len(limits.sampled.children):
            above_C = repeated(tuple(range(width // count)), (count,) * (width // count), token_BC.device)
            logits_BMV = expander.extend(token_BC, above_C.expand_as(token_BC))
    return _tree_of(limits.sampled, tokens, alive, probs)


def _tree_of(
    sampled: SampledChildren, tokens: Sequence[Tensor], alive: Sequence[Tensor], probs: Sequence[Tensor]
) -> DraftTree:
    """The tree of drawn layers, the root's first: tokens, which of them were drawn, and what the children of each node were drawn from."""
    valid_BN, device = torch.cat(list(alive), dim=1), tokens[0].device
    sizes = tuple(layer.shape[1] for layer in tokens)
    return DraftTree(
        tokens_BN=torch.cat(list(tokens), dim=1),
        parents_BN=_parents(sampled, len(sizes) - 1, device) * valid_BN,
        depths_BN=repeated(tuple(range(len(sizes))), sizes, device) * valid_BN,
        valid_BN=valid_BN,
        max_depth=len(sizes) - 1,
        chain=all(size == 1 for size in sizes),
        draft_probs_BMV=torch.cat(list(probs), dim=1),
    )


def _parents(sampled: SampledChildren, depth: int, device: torch.device) -> Tensor:
    """int64 [N]: the parent of each node of a tree of some depth, all of whose nodes were drawn."""
    nodes = tuple(range(layer_start(sampled, depth)))
    counts = [
        children for children, width in zip(sampled.children, (1, *sampled.widths), strict=False) for _ in range(width)
    ]
    return repeated((-1, *nodes), (1, *counts[: len(nodes)]), device)


def layer_start(sampled: SampledChildren, depth: int) -> int:
    """Index of the first node at a depth.

    Child i of the m-th node of a layer is the (m * children + i)-th node of the next.

    Example: children (3, 2) start their layers at nodes 0, 1 and 4. The second child of node 2 is node 4 + 1 * 2 + 1 = 7.

    Args:
        sampled: how many children each depth has.
        depth: 0 for the root.

    Returns:
        The index among all nodes; the root's is 0.
    """
    return 0 if depth == 0 else 1 + sum(sampled.widths[: depth - 1])


def _children(rule: Rule, weights_BMV: Tensor, keys_BMK: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
    """int64 [B, M, K], bool [B, M, K]: drawn draft ids, and which of them had any weight left to be drawn by."""
    if rule == "kseq":
        draft_BMK = draw(weights_BMV, keys_BMK)
        return draft_BMK, weights_BMV.gather(-1, draft_BMK) > 0.0
    draft, drawn = [], []
    for keys_BM1 in keys_BMK.split(1, dim=-1):
        draft.append(draw(weights_BMV, keys_BM1))
        drawn.append(weights_BMV.gather(-1, draft[-1]) > 0.0)
        weights_BMV = weights_BMV.scatter(-1, draft[-1], 0.0)
    return torch.cat(draft, -1), torch.cat(drawn, -1)


def over_target(expander: Expander, weights_BMV: Tensor, vocab_size: int) -> Tensor:
    """Spread weights over draft ids onto target ids. A draft vocabulary as large as the target's is the target's.

    Args:
        expander: knows which target id each draft id is.
        weights_BMV: float [B, M, Vd].
        vocab_size: V, of the target.

    Returns:
        The same dtype, [B, M, V]; 0 for target ids outside the draft vocabulary.
    """
    if weights_BMV.shape[-1] == vocab_size:
        return weights_BMV
    ids = expander.target_ids(torch.arange(weights_BMV.shape[-1], device=weights_BMV.device))
    return weights_BMV.new_zeros(*weights_BMV.shape[:2], vocab_size).index_copy_(2, ids, weights_BMV)

"""From a drafter that can continue one node after another to a draft tree: beams, dynamic trees, static trees.

Owns every manner of deterministic drafting, for all families alike (sampled trees are in `sampled_search.py`). Knows
neither what continues the nodes nor the target.

Nothing here reads a device's numbers on the host, so that shapes stay static on a GPU. On a CPU, where reading is free, an early stop
also ends the search.

Shape legend: B batch rows, M nodes continued in a layer, C candidates of a layer, L drafted depth, R ranks, Vd draft vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from draftsmith.models.slots.constants import counting, made_once, repeated
from draftsmith.models.tree.limits import DraftLimits, EarlyStop
from draftsmith.models.tree.merging import Links, merged
from draftsmith.models.tree.noise import Draw, SharedNoise, draw
from draftsmith.models.tree.shortlist import Continuations, continuations
from draftsmith.models.tree.tree import (
    DraftTree,
    ScoredNodes,
    cuts_padding,
    pack,
    prune_marked,
    scored_layers,
    tree_from_layers,
    tree_from_paths,
)

Path = tuple[int, ...]


class Expander(Protocol):
    """A drafter in the middle of one draft."""

    @property
    def root_B(self) -> Tensor:
        """int64 [B], the token that the draft hangs on."""
        ...

    def begin(self) -> Tensor:
        """Begin the draft at the root. Called first.

        Returns:
            float [B, 1, Vd], the draft logits of what follows the root.
        """
        ...

    def extend(self, tokens_BM: Tensor, above_BM: Tensor) -> Tensor:
        """Continue M new nodes.

        Args:
            tokens_BM: int64, target ids.
            above_BM: int64, which node of the last call each one continues (0 after :meth:`begin`).

        Returns:
            float [B, M, Vd], the draft logits of what follows each node.
        """
        ...

    def target_ids(self, draft_ids: Tensor) -> Tensor:
        """Map draft ids to target ids.

        Args:
            draft_ids: int64, any shape.

        Returns:
            int64, the same shape.
        """
        ...


@runtime_checkable
class ConfidentExpander(Protocol):
    """An expander that may know how likely a continuation will be accepted."""

    def acceptance(self) -> Tensor | None:
        """Say how likely the target accepts what will be drawn behind each node of the last call.

        The number may depend on what was drawn so far, and on nothing that comes behind: then it may end a draft and the output stays the
        same.

        Returns:
            float [B, M], chances; None where this expander does not know.
        """
        ...


@dataclass(frozen=True)
class Draws:
    """Randomness for sampled trees.

    Attributes:
        keys_BU: int64 noise keys, as many as a tree has drafted nodes; the verifier never sees them.
        probs: draft logits [..., Vd] -> the distribution to draw from, float32 [..., Vd], with the request's temperature.
        draw: how a token is drawn by weights and a key.
    """

    keys_BU: Tensor
    probs: Callable[[Tensor], Tensor]
    draw: Draw = draw


def search(
    expander: Expander,
    stop_below_B: Tensor | None,
    limits: DraftLimits,
    score_scale: float = 1.0,
    cut: bool | None = None,
    noise: SharedNoise | None = None,
) -> DraftTree:
    """Draft in the manner that ``limits`` ask for.

    Args:
        expander: continues nodes.
        stop_below_B: float32 [B], thresholds of the early stop, or None.
        limits: the manner and its numbers.
        score_scale: draft logits are multiplied by it before paths are compared (an inverse temperature).
        cut: whether shapes follow what was drafted; see :func:`~draftsmith.models.tree.tree.pack`.
        noise: by which the target will draw; None drafts the likeliest tokens.

    Returns:
        The tree, pruned to the limits.

    Raises:
        ValueError: more continuations are asked for than the draft vocabulary has tokens.
    """
    cut = cuts_padding(expander.root_B.device, cut)
    scorer = _Scorer(limits.early_stop, stop_below_B, score_scale, cut, expander, noise)
    if limits.paths is not None:
        tree = static_tree(expander, limits.paths, scorer)
    elif limits.node_budget is not None:
        nodes = dynamic_nodes(expander, limits.beam_width, limits.draft_length, scorer, limits.merge)
        tree = nodes.best(limits.max_nodes - 1, scorer.cut)
        if limits.merge is not None:
            # What scores below the budget's nodes has no place among them, and neither has what is copied below it.
            tree = prune_marked(merged(tree, limits.merge, limits.draft_length), limits.max_nodes - 1, scorer.cut)
    else:
        tree = beam_tree(expander, limits.beam_width, limits.draft_length, scorer)
    if limits.min_probability > 0.0 and tree.scores_BN is not None:
        scores_BN = tree.scores_BN.masked_fill(tree.scores_BN < math.log(limits.min_probability), -torch.inf)
        tree = replace(tree, valid_BN=tree.valid_BN & (scores_BN > -torch.inf), scores_BN=scores_BN)
        packed = limits.node_budget is None
        tree = pack(tree, cut=scorer.cut) if packed else prune_marked(tree, limits.max_nodes - 1, scorer.cut)
    return tree


@dataclass(frozen=True)
class _Scorer:
    """Ranks continuations by cumulative log-probability; minus infinity below a node where drafting stops.

    Attributes:
        stop: the early stop, or None.
        below_B: float32 [B], its thresholds, or None.
        scale: draft logits are multiplied by it first.
        cut: whether shapes follow what was drafted.
        expander: continues the nodes.
        noise: by which the target will draw, or None.
    """

    stop: EarlyStop | None
    below_B: Tensor | None
    scale: float
    cut: bool
    expander: Expander
    noise: SharedNoise | None

    def begin(self, count: int) -> Continuations:
        """Begin the draft, of which up to ``count`` continuations of a node will be asked for."""
        return continuations(self.expander, count, self.scale, self.noise)

    def best(self, score_BM: Tensor | None, behind: Continuations, count: int, depth: int) -> tuple[Tensor, Tensor]:
        """Find the ``count`` likeliest continuations of nodes at a depth. The root (depth 0) is always continued.

        Args:
            score_BM: float32, cumulative log-probabilities of the nodes; None for the root, whose own is 0.
            behind: what follows the nodes.
            count: R.
            depth: of the nodes.

        Returns:
            Scores float32 [B, M, R], and draft ids int64 [B, M, R].

        Raises:
            ValueError: the draft vocabulary has fewer tokens than ``count``.
        """
        top_BMR, draft_BMR = behind.best(count)
        if score_BM is not None:
            top_BMR = score_BM[..., None] + top_BMR
        if self.stop is not None and self.below_B is not None and depth > 0:
            known_BM = known_acceptance(self.expander)
            expected_BM = entropy_bound(behind.entropy(), self.stop.scale) if known_BM is None else known_BM
            top_BMR = top_BMR.masked_fill((expected_BM < self.below_B[:, None])[..., None], -torch.inf)
        return top_BMR, draft_BMR

    def standing(self, scores_BMR: Tensor, standing_BM: Tensor) -> Tensor:
        """What beams compete with, float32 [B, M, R].

        A beam that was stopped takes part with the score it has, as its own first continuation. Otherwise it would lose its place and its
        nodes.
        """
        first_BM = scores_BMR[..., 0]
        first_BM = torch.where(first_BM == -torch.inf, standing_BM, first_BM)
        return torch.cat([first_BM[..., None], scores_BMR[..., 1:]], dim=-1)

    def all_stopped(self, score_BM: Tensor) -> bool:
        """Whether no row has a node left, as far as that is free to ask."""
        return self.stop is not None and self.cut and bool((score_BM == -torch.inf).all())


def expected_acceptance(expander: Expander, logits_BMV: Tensor, scale: float) -> Tensor:
    """The chance that the target accepts a draw behind each node: what the drafter says of it, else the bound by its entropy.

    Args:
        expander: that gave the logits last.
        logits_BMV: float [B, M, Vd].
        scale: see :func:`acceptance_bound`.

    Returns:
        float [B, M].
    """
    known_BM = known_acceptance(expander)
    return acceptance_bound(logits_BMV.float().log_softmax(-1), scale) if known_BM is None else known_BM


def known_acceptance(expander: Expander) -> Tensor | None:
    """What an expander says of the acceptance behind each node of the last call, float [B, M]; None where it says nothing."""
    return expander.acceptance() if isinstance(expander, ConfidentExpander) else None


def acceptance_bound(log_probs: Tensor, scale: float) -> Tensor:
    """1 - sqrt(scale * entropy), a lower bound on the chance that the target accepts a draw (AdaEDL, arXiv:2410.18351, equation 5).

    Args:
        log_probs: float [..., Vd], the drafter's, at temperature 1.
        scale: the paper's gamma.

    Returns:
        float [...], at most 1.
    """
    return entropy_bound(torch.special.entr(log_probs.exp()).sum(-1), scale)


def entropy_bound(entropy: Tensor, scale: float) -> Tensor:
    """As :func:`acceptance_bound`, of entropies float [...]."""
    return 1.0 - (scale * entropy).clamp(min=0.0).sqrt()


def beam_tree(expander: Expander, width: int, length: int, scorer: _Scorer) -> DraftTree:
    """Beam search; the tree of the surviving beams (arXiv:2403.09919, sections 3.2 and 3.3).

    Args:
        expander: continues nodes.
        width: beams.
        length: tokens of each beam.
        scorer: ranks continuations.

    Returns:
        The tree with its scores; shared prefixes are one node.
    """
    best = [layer.best for layer in _beam_layers(expander, width, length, scorer, beams=True) if layer.best is not None]
    tokens, scores = [layer.token_BM for layer in best], [layer.score_BM for layer in best]
    if width == 1:
        parents_BL = counting(len(tokens), expander.root_B.device).expand(len(expander.root_B), -1)
        chain = tree_from_layers(expander.root_B, tokens, [parents_BL], scores)
        # Padding is behind the nodes already.
        return pack(chain, cut=True) if scorer.cut else chain
    return _surviving(expander.root_B, best, scorer.cut)


def dynamic_nodes(
    expander: Expander, width: int, length: int, scorer: _Scorer, merge: int | None = None
) -> ScoredNodes:
    """Every continuation that was scored while the best were continued (arXiv:2406.16858, section 4.1), to be pruned.

    Args:
        expander: continues nodes.
        width: nodes continued in each layer, and continuations of each.
        length: layers.
        scorer: ranks continuations.
        merge: nodes with as many last tokens in common are continued once; None continues each.

    Returns:
        All of them with their scores.
    """
    links = None if merge is None else Links(expander.root_B, merge)
    layers = list(_beam_layers(expander, width, length, scorer, beams=False, links=links))
    tokens, scores = (
        [layer.tokens_BMR.flatten(1) for layer in layers],
        [layer.scores_BMR.flatten(1) for layer in layers],
    )
    B, device = expander.root_B.shape[0], expander.root_B.device
    continued = [layer.best.flat_BM for layer in layers[:-1] if layer.best is not None]
    starts = tuple(1 + sum(layer.shape[1] for layer in tokens[:depth]) for depth in range(len(continued)))
    # A parent's number is its place in its layer behind the layer's start. Every number stands once for each of its continuations; of
    # those in front, the last is for the root, whose parent is -1.
    rows = [repeated((-1, 0), (1, 1), device).expand(B, -1), *continued]
    above_BC = torch.cat([numbers[..., None].expand(-1, -1, width) for numbers in rows], dim=1).flatten(1)
    start_C = repeated((0, *starts), (2 * width, *[width**2] * len(starts)), device)
    parents_BN = (above_BC + start_C)[:, width - 1 :]
    return scored_layers(expander.root_B, tokens, parents_BN, scores)


@dataclass(frozen=True)
class _Best:
    """The best continuations of a layer.

    Attributes:
        token_BM: int64, target ids.
        score_BM: float32, their cumulative log-probabilities.
        standing_BM: float32, what they competed with.
        flat_BM: int64, the place of each among all, in the flattened [M, R].
        above_BM: int64, which node each of them continues.
    """

    token_BM: Tensor
    score_BM: Tensor
    standing_BM: Tensor
    flat_BM: Tensor
    above_BM: Tensor


@dataclass(frozen=True)
class _Layer:
    """A layer of a beam search.

    Attributes:
        tokens_BMR: int64, target ids of all continuations.
        scores_BMR: float32, their cumulative log-probabilities.
        best: those that are continued or survive; None where nobody asks for them.
    """

    tokens_BMR: Tensor
    scores_BMR: Tensor
    best: _Best | None


def _beam_layers(
    expander: Expander, width: int, length: int, scorer: _Scorer, beams: bool, links: Links | None = None
) -> Iterator[_Layer]:
    """Beam search, layer by layer.

    Args:
        expander: continues nodes.
        width: beams.
        length: layers.
        scorer: ranks continuations.
        beams: whether the beams of the last layer are asked for. A beam that is stopped early then keeps its place among them.
        links: which nodes need no continuation of their own.
    """
    behind = scorer.begin(width)
    best: _Best | None = None
    for depth in range(length):
        scores_BMR, draft_BMR = scorer.best(None if best is None else best.score_BM, behind, width, depth)
        tokens_BMR = expander.target_ids(draft_BMR)
        is_last = depth + 1 == length
        if is_last and not beams:
            best = None
        elif scores_BMR.shape[1] == 1:
            best = _best_of_one(tokens_BMR, scores_BMR)
        else:
            competing_BMR = scores_BMR
            if beams and scorer.stop is not None and best is not None:
                competing_BMR = scorer.standing(scores_BMR, best.standing_BM)
            if links is not None:
                competing_BMR = links.unlinked(tokens_BMR, scores_BMR)
            best = _best_of(tokens_BMR, scores_BMR, competing_BMR)
        if depth > 0 and scorer.all_stopped(scores_BMR if best is None else best.score_BM):
            return
        yield _Layer(tokens_BMR, scores_BMR, best)
        if best is not None and not is_last:
            if links is not None:
                links.take(best.token_BM, best.above_BM)
            behind.extend(best.token_BM, best.above_BM)


def _best_of_one(tokens_B1R: Tensor, scores_B1R: Tensor) -> _Best:
    """All continuations of an only node, which are as many as there are beams."""
    (B, _, R), device = tokens_B1R.shape, tokens_B1R.device
    score_BM, place_M, node_M = scores_B1R[:, 0], counting(R, device), repeated((0,), (R,), device)
    return _Best(tokens_B1R[:, 0], score_BM, score_BM, place_M.expand(B, -1), node_M.expand(B, -1))


def _best_of(tokens_BMR: Tensor, scores_BMR: Tensor, competing_BMR: Tensor) -> _Best:
    """The best of all continuations, as many as each node has here. They lie among these, so that no [M * Vd] sort is needed."""
    width = tokens_BMR.shape[2]
    standing_BM, flat_BM = competing_BMR.flatten(1).topk(width, dim=-1)
    score_BM = standing_BM if competing_BMR is scores_BMR else scores_BMR.flatten(1).gather(1, flat_BM)
    return _Best(tokens_BMR.flatten(1).gather(1, flat_BM), score_BM, standing_BM, flat_BM, flat_BM // width)


def static_tree(expander: Expander, paths: tuple[Path, ...], scorer: _Scorer) -> DraftTree:
    """A tree of fixed shape, filled by rank (arXiv:2401.15077, section 4.1; arXiv:2401.10774, section 2.1.2).

    Args:
        expander: continues nodes.
        paths: every node as the ranks that lead to it, with all prefixes.
        scorer: ranks continuations.

    Returns:
        The tree with its scores.

    Raises:
        ValueError: a rank is beyond the draft vocabulary.
    """
    tokens, parents, scores = [], [], []
    plans = _plan(paths, expander.root_B.device)
    behind = scorer.begin(max(plan.num_ranks for plan in plans))
    score_BM = None
    for depth, plan in enumerate(plans):
        scores_BMR, draft_BMR = scorer.best(score_BM, behind, plan.num_ranks, depth)
        token_BC = expander.target_ids(draft_BMR.flatten(1)[:, plan.places_C])
        score_BC = scores_BMR.flatten(1)[:, plan.places_C]
        if depth > 0 and scorer.all_stopped(score_BC):
            break
        tokens.append(token_BC)
        parents.append(plan.parents_C.expand_as(token_BC))
        scores.append(score_BC)
        if len(plan.continued_M):
            above_BM = (plan.places_C[plan.continued_M] // plan.num_ranks).expand(token_BC.shape[0], -1)
            score_BM = score_BC[:, plan.continued_M]
            behind.extend(token_BC[:, plan.continued_M], above_BM)
    return pack(tree_from_layers(expander.root_B, tokens, parents, scores), cut=scorer.cut)


@dataclass(frozen=True)
class _LayerPlan:
    """One layer of a static tree.

    Attributes:
        num_ranks: R, how many continuations are ranked below every continued node.
        places_C: int64, of the layer's nodes, in the flattened [M, R].
        parents_C: int64, of the layer's nodes, as node indices.
        continued_M: int64, which of the layer's nodes have children.
    """

    num_ranks: int
    places_C: Tensor
    parents_C: Tensor
    continued_M: Tensor


@made_once
def _plan(paths: tuple[Path, ...], device: torch.device) -> tuple[_LayerPlan, ...]:
    """The layers of a static tree, made once for each device. Its nodes are numbered by depth, then as sorted."""
    index: dict[Path, int] = {(): 0}
    frontier: list[Path] = [()]
    layers = []
    continued = {path[:-1] for path in paths}
    for depth in range(1, 1 + max(map(len, paths))):
        layer = sorted(path for path in paths if len(path) == depth)
        num_ranks = 1 + max(path[-1] for path in layer)
        places = [frontier.index(path[:-1]) * num_ranks + path[-1] for path in layer]
        parents = [index[path[:-1]] for path in layer]
        index |= {path: len(index) + place for place, path in enumerate(layer)}
        onward = [place for place, path in enumerate(layer) if path in continued]
        numbers = (torch.tensor(each, dtype=torch.int64, device=device) for each in (places, parents, onward))
        layers.append(_LayerPlan(num_ranks, *numbers))
        frontier = [layer[place] for place in onward]
    return tuple(layers)


def _surviving(root_B: Tensor, layers: list[_Best], cut: bool) -> DraftTree:
    """Trace the beams back from the last layer, and merge their shared prefixes."""
    *before, last = layers
    tokens, scores, beam_BM = [last.token_BM], [last.score_BM], last.above_BM
    for layer in reversed(before):
        tokens.append(layer.token_BM.gather(1, beam_BM))
        scores.append(layer.score_BM.gather(1, beam_BM))
        beam_BM = layer.above_BM.gather(1, beam_BM)
    return tree_from_paths(root_B, torch.stack(tokens[::-1], -1), torch.stack(scores[::-1], -1), cut)

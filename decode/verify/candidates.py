"""Multi-candidate rejection: which drawn candidate the target accepts, if any, and what it emits when none.

Owns two rules, MCSD (arXiv:2401.06706, section 3.3) and SpecTr's K-SEQ (arXiv:2310.15141, algorithm 2), and the walk down a sampled tree
by either; with one child a node both are the rejection of the classic chain (arXiv:2211.17192, algorithm 1). They are exact for
candidates that were drawn from the draft distribution and are all shown, in the order of drawing. Chains can be verified as one block
instead (:mod:`draftsmith.decode.verify.block_walk`). Knows nothing of drafters and caches.

A drafter that proposes by search draws nothing, so neither rule holds for it: its trees are for :mod:`draftsmith.decode.verify.lossless`.

Shape legend: B batch rows, N tree nodes, K candidates of a node, E path slots (max_depth + 1), U draws, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from draftsmith.decode.verify.block_walk import block_walk
from draftsmith.decode.verify.lossless import LosslessVerifier
from draftsmith.decode.verify.verifier import Reading, Walk
from draftsmith.models.tree.limits import DraftLimits, Rule, SampledChildren
from draftsmith.models.tree.noise import Draw, draw, uniforms
from draftsmith.models.tree.sampled_search import layer_start
from draftsmith.models.tree.tree import DraftTree

# Points of a round that narrows rho down, and rounds: a share of 2^-30 of the interval is left.
_POINTS, _ROUNDS = 2**10, 3
# What rounding may add to sums, in the search and behind it.
_ROUNDING, _MORE_ROUNDING = 1.0 + 1e-12, 1.0 + 1e-10


class CandidateVerifier:
    """Accepts or rejects what was drawn for a sampled tree; a draft that was not drawn is verified losslessly.

    Args:
        limits: how much is drafted.
        sampled: how many children each sampled node has; ``limits.sampled``.
    """

    layers: tuple[str, ...] = ()
    reads_draft_probs = False

    def __init__(self, limits: DraftLimits, sampled: SampledChildren) -> None:
        self._sampled = sampled
        self._lossless = LosslessVerifier()
        self.num_draft_keys = limits.max_nodes - 1
        self.num_walk_keys = num_draws(sampled)

    def check_tokenizer(self, fingerprint: str) -> None:
        """Accept every tokenizer; see :class:`~draftsmith.decode.verify.verifier.Verifier`."""

    def check_temperature(self, temperature: float) -> None:
        """See :meth:`~draftsmith.decode.verify.verifier.Verifier.check_temperature`.

        Raises:
            ValueError: the temperature is 0, at which the target has no distribution.
        """
        if temperature == 0.0:
            raise ValueError(
                "temperature is 0 and the draft tree is sampled; rejection needs a distribution to sample from: give a temperature above "
                "0, or draft with beams, a dynamic or a static tree"
            )

    def walk(self, reading: Reading, keys_BU: Tensor | None) -> Walk:
        """See :meth:`~draftsmith.decode.verify.verifier.Verifier.walk`, :func:`candidate_walk` and
        :func:`~draftsmith.decode.verify.block_walk.block_walk`."""
        if reading.tree.draft_probs_BMV is None:
            return self._lossless.walk(reading, None)
        assert keys_BU is not None
        target_probs_BNV = reading.logits_BNV.softmax(-1)
        if self._sampled.rule == "block":
            return block_walk(reading.tree, target_probs_BNV, keys_BU)
        return candidate_walk(reading.tree, self._sampled, target_probs_BNV, keys_BU)


def accept_probs(rule: Rule, target_probs: Tensor, draft_probs: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
    """How likely each candidate is accepted once those before it were rejected, and what to draw from when all were.

    A candidate without draft probability (zeros throughout, or all of it drawn before) is padding and never accepted.

    Args:
        rule: ``mcsd`` for candidates drawn without replacement, ``kseq`` for independent ones.
        target_probs: float [..., V].
        draft_probs: float [..., V], what the first candidate was drawn from.
        candidates: int64 [..., K], in the order of drawing.

    Returns:
        float64 [..., K], float64 [..., V].

    Example:
        target probabilities (0.5, 0.5), draft (0.75, 0.25): candidate 0 is accepted with 2/3, the residual is all on token 1; candidate 1
        is accepted always.
    """
    target, draft = _normalised(target_probs.double()), _normalised(draft_probs.double())
    return _without_replacement(target, draft, candidates) if rule == "mcsd" else _k_seq(target, draft, candidates)


def _without_replacement(target: Tensor, draft: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
    """MCSD: accept with min(1, target / draft); else the target becomes norm(max(target - draft, 0)), and the draft loses the candidate."""
    accept = []
    for candidate in candidates.split(1, dim=-1):
        chance = draft.gather(-1, candidate)
        accept.append(torch.where(chance > 0.0, (target.gather(-1, candidate) / chance).clamp(max=1.0), 0.0))
        residual = (target - draft).clamp(min=0.0)
        # Nothing is left where the two are equal, but there a candidate is never rejected.
        going_on = (chance > 0.0) & (residual.sum(-1, keepdim=True) > 0.0)
        target = torch.where(going_on, _normalised(residual), target)
        draft = _normalised(draft.scatter(-1, candidate, 0.0))
    return torch.cat(accept, -1), target


def _k_seq(target: Tensor, draft: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
    """K-SEQ: accept each with min(1, target / (rho draft)).

    beta = sum(min(draft, target / rho)) is the chance of one candidate, so the first accepted one has the distribution
    min(draft, target / rho) / beta, and one is accepted at all with 1 - (1 - beta)^K. That many times that distribution must not exceed
    the target anywhere, which holds where (1 - (1 - beta)^K) / beta <= rho; the smallest such rho in [1, K] accepts most. The residual
    is what is missing to the target. It is exact for every rho above, too.
    """
    num_candidates = candidates.shape[-1]
    rho = torch.ones_like(target[..., :1])
    if num_candidates > 1:
        rho = _smallest_rho(target, draft, num_candidates)
    shared = torch.minimum(draft, target / rho)
    weight = _tries(shared.sum(-1, keepdim=True), num_candidates)
    chance = draft.gather(-1, candidates)
    accept = torch.where(chance > 0.0, (shared.gather(-1, candidates) / chance).clamp(max=1.0), 0.0)
    residual = (target - weight * shared).clamp(min=0.0)
    return accept, _normalised(torch.where(residual.sum(-1, keepdim=True) > 0.0, residual, target))


def _smallest_rho(target: Tensor, draft: Tensor, num_candidates: int) -> Tensor:
    """The smallest rho in [1, K] for which K-SEQ is exact, up to a share of 2^-30 on the upper side, float64 [..., 1].

    With tokens sorted by target / draft, beta(rho) is P / rho + Q between two neighbouring ratios: P is the target's mass at ratios up to
    rho, Q the draft's mass above. So one sort finds the interval, and the rest are numbers, not vocabularies.
    """
    ratio, order = torch.where(draft > 0.0, target / draft, torch.inf).sort(-1)
    of_target = target.gather(-1, order).cumsum(-1)
    of_draft = draft.sum(-1, keepdim=True) - draft.gather(-1, order).cumsum(-1)
    too_small = _tries(of_target / ratio + of_draft, num_candidates) > ratio * _ROUNDING
    below = (ratio <= 1.0) | (too_small & (ratio < num_candidates))
    passed = below.sum(-1, keepdim=True)
    last = (passed - 1).clamp(min=0)
    mass = torch.where(passed > 0, of_target.gather(-1, last), 0.0)
    rest = torch.where(passed > 0, of_draft.gather(-1, last), draft.sum(-1, keepdim=True))
    low = torch.where(passed > 0, ratio.gather(-1, last), 1.0).clamp(min=1.0)
    following = ratio.gather(-1, passed.clamp(max=ratio.shape[-1] - 1))
    high = torch.where(passed < ratio.shape[-1], following, torch.inf).clamp(max=float(num_candidates))
    step = torch.linspace(0.0, 1.0, _POINTS, dtype=target.dtype, device=target.device)
    for _ in range(_ROUNDS):
        points = low + (high - low) * step
        holds = _tries(mass / points + rest, num_candidates) <= points * _ROUNDING
        first = holds.logical_not().sum(-1, keepdim=True).clamp(max=_POINTS - 1)
        low, high = points.gather(-1, (first - 1).clamp(min=0)), points.gather(-1, first)
    # Rounding of the sums above cannot make a rule inexact: where this rho does not hold by its own sum, K does.
    shared = torch.minimum(draft, target / high).sum(-1, keepdim=True)
    holds = _tries(shared, num_candidates) <= high * _MORE_ROUNDING
    return torch.where(holds, high, float(num_candidates))


def _tries(chance: Tensor, num_candidates: int) -> Tensor:
    """(1 - (1 - beta)^K) / beta of chances beta, as the geometric sum that is also right at 0."""
    missed = 1.0 - chance
    weight = torch.ones_like(missed)
    for _ in range(num_candidates - 1):
        weight = 1.0 + missed * weight
    return weight


def _normalised(weights: Tensor) -> Tensor:
    """Weights [..., V] over their sum; zeros stay zeros."""
    total = weights.sum(-1, keepdim=True)
    return weights / torch.where(total > 0.0, total, 1.0)


def num_draws(sampled: SampledChildren) -> int:
    """How many noise keys a walk takes: one a candidate at every depth, and one for the token that ends it."""
    return sum(sampled.children) + 1


def candidate_walk(
    tree: DraftTree, sampled: SampledChildren, target_probs_BNV: Tensor, keys_BU: Tensor, draw: Draw = draw
) -> Walk:
    """From the root, try each node's candidates in order and descend on acceptance; end with a draw from the residual, at a leaf from
    the target's own distribution.

    Only one node of each depth is visited, so the nodes of a depth share their keys.

    Args:
        tree: sampled by :func:`~draftsmith.models.tree.sampled_search.sampled_tree`.
        sampled: the settings it was sampled with.
        target_probs_BNV: float, the target's distribution at every node, after the request's processors.
        keys_BU: int64 noise keys, :func:`num_draws` of them, of which the drafter saw none.
        draw: how a token is drawn by weights and a key.
    """
    assert tree.draft_probs_BMV is not None
    row_B = torch.arange(tree.tokens_BN.shape[0], device=tree.tokens_BN.device)
    node_B, going_B = torch.zeros_like(row_B), torch.ones_like(row_B, dtype=torch.bool)
    law_BV = target_probs_BNV[:, 0].double()
    path = [node_B]
    used = 0
    for depth, count in enumerate(sampled.children[: tree.max_depth]):
        place_B = (node_B - layer_start(sampled, depth)).clamp(min=0)  # negative in rows that have ended
        first_B = layer_start(sampled, depth + 1) + place_B * count
        child_BK = first_B[:, None] + torch.arange(count, device=first_B.device)
        draft_BV = tree.draft_probs_BMV[row_B, layer_start(sampled, depth) + place_B]
        accept_BK, residual_BV = accept_probs(sampled.rule, law_BV, draft_BV, tree.tokens_BN.gather(1, child_BK))
        taken_BK = uniforms(keys_BU[:, used : used + count]) < accept_BK
        used += count
        law_BV = torch.where(going_B[:, None], residual_BV, law_BV)
        going_B = going_B & taken_BK.any(1)
        node_B = torch.where(going_B, first_B + taken_BK.int().argmax(1), node_B)
        law_BV = torch.where(going_B[:, None], target_probs_BNV[row_B, node_B].double(), law_BV)
        path.append(torch.where(going_B, node_B, 0))
    path_BE = torch.stack(path, dim=1)
    counts_B = 1 + (path_BE > 0).sum(1)
    last_B1 = draw(law_BV, keys_BU[:, -1:])
    emitted_BE = tree.tokens_BN.gather(1, path_BE).roll(-1, dims=1).scatter_(1, counts_B[:, None] - 1, last_B1)
    return Walk(path_BE, emitted_BE, counts_B)

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
from torch.nn import functional as F

from draftsmith.decode.verify.block_walk import block_walk
from draftsmith.decode.verify.lossless import LosslessVerifier
from draftsmith.decode.verify.verifier import Reading, Walk
from draftsmith.models.slots.constants import counting, made_once, number
from draftsmith.models.tree.limits import DraftLimits, Rule, SampledChildren
from draftsmith.models.tree.noise import Draw, draw, uniforms
from draftsmith.models.tree.sampled_search import layer_start
from draftsmith.models.tree.tree import DraftTree

# Points of a round that narrows rho down, and rounds: a share of 2^-30 of the interval is left.
_POINTS, _ROUNDS = 2**10, 3
# What rounding may add to sums.
_ROUNDING = 1.0 + 1e-12
# The least that is divided by, less than any chance: 0 / 0 is then 0.
_TINY = 1e-300


class CandidateVerifier:
    """Accepts or rejects what was drawn for a sampled tree; a draft that was not drawn is verified losslessly.

    Args:
        limits: how much is drafted.
        sampled: how many children each sampled node has; ``limits.sampled``.
    """

    layers: tuple[str, ...] = ()
    reads_draft_probs = False
    thoughts = None

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
        accept.append(_share(torch.minimum(target.gather(-1, candidate), chance), chance))
        residual = (target - draft).clamp(min=0.0)
        total = residual.sum(-1, keepdim=True)
        # Nothing is left where the two are equal, but there a candidate is never rejected.
        goes_on = (chance > 0.0) & (total > 0.0)
        target = torch.where(goes_on, _share(residual, total), target)
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
    if num_candidates == 1:
        shared = torch.minimum(draft, target)
        missing = target - shared
    else:
        shared = torch.minimum(draft, target / _smallest_rho(target, draft, num_candidates))
        weight = _tries(1.0 - shared.sum(-1, keepdim=True), num_candidates)
        missing = torch.addcmul(target, weight, shared, value=-1.0)
    residual = missing.clamp(min=0.0)
    total = residual.sum(-1, keepdim=True)
    accept = _share(shared.gather(-1, candidates), draft.gather(-1, candidates))
    return accept, torch.where(total > 0.0, _share(residual, total), target)


def _smallest_rho(target: Tensor, draft: Tensor, num_candidates: int) -> Tensor:
    """The smallest rho in [1, K] for which K-SEQ is exact, up to a share of 2^-30 on the upper side, float64 [..., 1].

    With tokens sorted by target / draft, 1 - beta(rho) is D - P / rho between two neighbouring ratios: P and D are the masses of target and
    draft at ratios up to rho. So one sort finds the interval, and the rest are numbers, not vocabularies.
    """
    ratio, order = (target / draft.clamp(min=_TINY)).sort(-1)
    both = torch.stack([target, draft], dim=-2)
    masses = F.pad(both.gather(-1, order[..., None, :].expand_as(both)).cumsum(-1), (1, 0))
    upper = masses[..., 1:]
    # Ratios of 0 give NaN, which holds nowhere either.
    holds = _tries(upper[..., 1, :] - upper[..., 0, :] / ratio, num_candidates) <= ratio * _ROUNDING
    passed = (ratio.shape[-1] - holds.sum(-1, keepdim=True)).clamp(max=ratio.shape[-1] - 1)
    mass, drawn = masses.gather(-1, passed[..., None, :].expand(*masses.shape[:-1], 1)).unbind(-2)
    ends = counting(2, target.device)
    bounds = F.pad(ratio, (1, 0), value=1.0).gather(-1, passed + ends).clamp(1.0, float(num_candidates))
    for _ in range(_ROUNDS):
        points = torch.lerp(bounds[..., :1], bounds[..., 1:], _fractions(_POINTS, target.device))
        holds = _tries(drawn - mass / points, num_candidates) <= points * _ROUNDING
        before = (_POINTS - 1 - holds.sum(-1, keepdim=True)).clamp(0, _POINTS - 2)
        bounds = points.gather(-1, before + ends)
    return bounds[..., 1:]


@made_once
def _fractions(count: int, device: torch.device) -> Tensor:
    """float64 [count], from 0 to 1 in equal steps."""
    return torch.linspace(0.0, 1.0, count, dtype=torch.float64, device=device)


def _tries(missed: Tensor, num_candidates: int) -> Tensor:
    """(1 - (1 - beta)^K) / beta by 1 - beta, for K above 1, as the geometric sum that is also right where beta is 0."""
    weight = 1.0 + missed
    for _ in range(num_candidates - 2):
        weight = torch.addcmul(number(1.0, missed.dtype, missed.device), missed, weight)
    return weight


def _share(part: Tensor, whole: Tensor) -> Tensor:
    """Part / whole; 0 where both are."""
    return part / whole.clamp(min=_TINY)


def _normalised(weights: Tensor) -> Tensor:
    """Weights [..., V] over their sum; zeros stay zeros."""
    return _share(weights, weights.sum(-1, keepdim=True))


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
    B, device = len(tree.tokens_BN), tree.tokens_BN.device
    row_B, node_B = counting(B, device), counting(1, device).expand(B)
    going_B, residual_BV = torch.ones_like(row_B, dtype=torch.bool), target_probs_BNV[:, 0].double()
    uniforms_BU = uniforms(keys_BU[:, :-1])
    path = [node_B]
    used = 0
    for count in sampled.children[: tree.max_depth]:
        # A row that has ended stays at its node, and what is found for it there is dropped.
        child_BK = _first_children(sampled, device)[node_B][:, None] + counting(count, device)
        target_BV, draft_BV = target_probs_BNV[row_B, node_B], tree.draft_probs_BMV[row_B, node_B]
        accept_BK, rest_BV = accept_probs(sampled.rule, target_BV, draft_BV, tree.tokens_BN.gather(1, child_BK))
        is_taken_B, place_B = (uniforms_BU[:, used : used + count] < accept_BK).max(1)
        used += count
        residual_BV = torch.where(going_B[:, None], rest_BV, residual_BV)
        going_B = going_B & is_taken_B
        node_B = torch.where(going_B, child_BK.gather(1, place_B[:, None]).squeeze(1), node_B)
        path.append(node_B * going_B)
    law_BV = torch.where(going_B[:, None], target_probs_BNV[row_B, node_B].double(), residual_BV)
    path_BE = torch.stack(path, dim=1)
    counts_B = 1 + (path_BE > 0).sum(1)
    last_B1 = draw(law_BV, keys_BU[:, -1:])
    emitted_BE = tree.tokens_BN.gather(1, path_BE).roll(-1, dims=1).scatter_(1, counts_B[:, None] - 1, last_B1)
    return Walk(path_BE, emitted_BE, counts_B)


@made_once
def _first_children(sampled: SampledChildren, device: torch.device) -> Tensor:
    """int64 [M]: the first child of each node that has children."""
    first = [
        layer_start(sampled, depth + 1) + place * count
        for depth, (count, width) in enumerate(zip(sampled.children, (1, *sampled.widths), strict=False))
        for place in range(width)
    ]
    return torch.tensor(first, dtype=torch.int64, device=device)

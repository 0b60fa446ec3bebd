"""Multi-candidate rejection: which drawn candidate the target accepts, if any, and what it emits when none.

Owns two rules, MCSD (arXiv:2401.06706, section 3.3) and SpecTr's K-SEQ (arXiv:2310.15141, algorithm 2), and the walk down a sampled tree
by either; with one child a node both are the rejection of the classic chain (arXiv:2211.17192, algorithm 1). They are exact for
candidates that were drawn from the draft distribution and are all shown, in the order of drawing. Chains can be verified as one block
instead (:mod:`draftsmith.decode.verify.block_walk`). Knows nothing of drafters and caches.

A drafter that proposes by search draws nothing, so neither rule holds for it: its trees are for :mod:`draftsmith.decode.verify.lossless`.

Shape legend: B batch rows, N tree nodes, K candidates of a node, E path slots (max_depth + 1), U draws, V vocabulary.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from draftsmith.decode.verify.block_walk import block_walk
from draftsmith.decode.verify.lossless import LosslessVerifier
from draftsmith.decode.verify.verifier import Reading, Walk
from draftsmith.models.slots.constants import counting, made_once, number, repeated
from draftsmith.models.tree.limits import DraftLimits, Rule, SampledChildren
from draftsmith.models.tree.noise import Draw, draw, uniforms
from draftsmith.models.tree.sampled_search import layer_start
from draftsmith.models.tree.tree import DraftTree

# Points of a digit of rho, and how many digits: a share of 2^-30 of its range is left.
_MANY_POINTS, _FEW_POINTS = (2**15, 2), (2**10, 3)
# What rounding may add to sums.
_ROUNDING = 1.0 + 1e-12
# The least that is divided by, less than any chance: 0 / 0 is then 0.
_TINY = 1e-300
# Less than any probability but 0, also after it was multiplied by one.
_TRACE = 1e-200


class CandidateVerifier:
    """Accepts or rejects what was drawn for a sampled tree; a draft that was not drawn is verified losslessly.

    Args:
        limits: how much is drafted.
        sampled: how many children each sampled node has; ``limits.sampled``.
    """

    layers: tuple[str, ...] = ()
    reads_draft_probs = False
    shares_noise = False
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
        target_probs_BNV = reading.choices.probs()
        if self._sampled.rule == "block":
            return block_walk(reading.tree, target_probs_BNV, keys_BU)
        return candidate_walk(reading.tree, self._sampled, target_probs_BNV, keys_BU)


class Judgement(NamedTuple):
    """What a rule says of the candidates of a node.

    Attributes:
        wanted: float64 [..., K]: a candidate is accepted with the chance wanted / drawn, where it has any.
        drawn: float64 [..., K], with which chance each was drawn.
        missing: float64 [..., V], what the target still wants once all were rejected, up to a factor; below 0 where that is nothing.
    """

    wanted: Tensor
    drawn: Tensor
    missing: Tensor


def judge(rule: Rule, both: Tensor, candidates: Tensor) -> Judgement:
    """Ask a rule about the candidates of a node: each is judged once those before it were rejected.

    A candidate without draft probability (zeros throughout, or all of it drawn before) is padding and never accepted.

    Args:
        rule: ``mcsd`` for candidates drawn without replacement, ``kseq`` for independent ones.
        both: float64 [..., 2, V], the distributions of target and draft. The draft is zeros where all candidates are padding.
        candidates: int64 [..., K], in the order of drawing.

    Example:
        MCSD, target probabilities (0.5, 0.5), draft (0.75, 0.25): candidate 0 is accepted with 0.5 / 0.75, then only token 1 is missing.
    """
    return _without_replacement(both, candidates) if rule == "mcsd" else _k_seq(both, candidates)


def _without_replacement(both: Tensor, candidates: Tensor) -> Judgement:
    """MCSD: accept with min(1, target / draft); else the target becomes norm(max(target - draft, 0)), and the draft loses the candidate.

    Args:
        both: float64 [..., 2, V], the distributions of target and draft.
        candidates: int64 [..., K].
    """
    target, draft = both.unbind(-2)
    wanted, drawn = [], []
    for candidate in candidates.split(1, dim=-1):
        chance = draft.gather(-1, candidate)
        wanted.append(torch.minimum(target.gather(-1, candidate), chance))
        drawn.append(chance)
        residual = (target - draft).clamp(min=0.0)
        total = residual.sum(-1, keepdim=True)
        # Nothing is left where the two are equal, but there a candidate is never rejected.
        goes_on = (chance > 0.0) & (total > 0.0)
        target = torch.where(goes_on, _share(residual, total), target)
        draft = _normalised(draft.scatter(-1, candidate, 0.0))
    return Judgement(torch.cat(wanted, -1), torch.cat(drawn, -1), target)


def _k_seq(both: Tensor, candidates: Tensor) -> Judgement:
    """K-SEQ: accept each with min(1, target / (rho draft)).

    beta = sum(min(draft, target / rho)) is the chance of one candidate, so the first accepted one has the distribution
    min(draft, target / rho) / beta, and one is accepted at all with 1 - (1 - beta)^K. That many times that distribution must not exceed
    the target anywhere, which holds where (1 - (1 - beta)^K) / beta <= rho; the smallest such rho in [1, K] accepts most. The residual
    is what is missing to the target. It is exact for every rho above, too.

    Args:
        both: float64 [..., 2, V], the distributions of target and draft.
        candidates: int64 [..., K].
    """
    target, draft = both.unbind(-2)
    num_candidates = candidates.shape[-1]
    if num_candidates == 1:
        wanted, drawn = both.gather(-1, candidates[..., None, :].expand(*both.shape[:-1], -1)).unbind(-2)
        return Judgement(torch.minimum(wanted, drawn), drawn, target - draft)
    shared = torch.minimum(draft, target / _smallest_rho(both, num_candidates))
    weight = _tries(1.0 - shared.sum(-1, keepdim=True), num_candidates)
    missing = torch.addcmul(target, weight, shared, value=-1.0)
    return Judgement(shared.gather(-1, candidates), draft.gather(-1, candidates), missing)


def _smallest_rho(both: Tensor, num_candidates: int) -> Tensor:
    """The smallest rho in [1, K] for which K-SEQ is exact, up to a share of 2^-30 on the upper side, float64 [..., 1].

    1 - beta(rho) is D - P / rho, where P and D are the masses of target and draft on tokens with target / draft below rho. So one sort of
    these ratios tells both for every rho, and rho is found digit by digit, from above: all points of a digit are tried at once.

    Args:
        both: float64 [..., 2, V], the distributions of target and draft.
        num_candidates: K, above 1.
    """
    target, draft = both.unbind(-2)
    ratio, order = (target / draft.clamp(min=_TINY)).sort(-1)
    masses = F.pad(both.gather(-1, order[..., None, :].expand_as(both)).cumsum(-1), (1, 0))
    # No more points than tokens, so that they take no more memory.
    num_points, num_digits = _MANY_POINTS if both.shape[-1] >= _MANY_POINTS[0] else _FEW_POINTS
    steps = [(num_candidates - 1) / num_points**digit for digit in range(1, num_digits + 1)]
    # All points are multiples of 2^-30, so float64 holds them exactly, however they are added up. Those of the first digit are the same
    # in every row, and the lowest of them is 1.
    points = _points(tuple(ratio.shape[:-1]), num_points, steps[0], float(num_candidates), both.device)
    num_failing = _num_failing(ratio, masses, points, num_candidates)
    for digit, step in enumerate(steps[1:]):
        if digit == 0:
            from_lowest = _points((), num_points, step, 1.0, both.device)
        else:
            from_lowest = points[..., -1:] - _multiples(num_points, step, both.device)
        points = torch.add(from_lowest, num_failing, alpha=steps[digit])
        num_failing = _num_failing(ratio, masses, points, num_candidates)
    return torch.add(points[..., -1:], num_failing, alpha=steps[-1])


def _num_failing(ratio: Tensor, masses: Tensor, points: Tensor, num_candidates: int) -> Tensor:
    """int64 [..., 1]: at how many points, which fall, K-SEQ is not exact; these are the last ones.

    Args:
        ratio: float64 [..., V], target / draft of all tokens, sorted.
        masses: float64 [..., 2, V + 1], of target and draft, on the first tokens in this order.
        points: float64 [..., P], each a rho.
        num_candidates: K, above 1.
    """
    below = torch.searchsorted(ratio, points)
    mass, drawn = masses.gather(-1, below[..., None, :].expand(*masses.shape[:-1], -1)).unbind(-2)
    missed = torch.addcdiv(drawn, mass, points, value=-_ROUNDING)
    return (_tries(missed, num_candidates) > points).sum(-1, keepdim=True)


def _points(shape: tuple[int, ...], count: int, step: float, above: float, device: torch.device) -> Tensor:
    """float64 [*shape, count], falling by a step from below ``above``. All numbers of rows up to a power of two share their memory."""
    rows = math.prod(shape)
    return _point_rows(1 << max(rows - 1, 0).bit_length(), count, step, above, device)[:rows].view(*shape, count)


@made_once
def _point_rows(rows: int, count: int, step: float, above: float, device: torch.device) -> Tensor:
    """float64 [rows, count], each row as in :func:`_points`."""
    return (above - _multiples(count, step, device)).expand(rows, -1).contiguous()


@made_once
def _multiples(count: int, step: float, device: torch.device) -> Tensor:
    """float64 [count], the multiples of a step from 1 on."""
    return torch.arange(1, count + 1, dtype=torch.float64, device=device) * step


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
    B, device, draft_BMV = len(tree.tokens_BN), tree.tokens_BN.device, tree.draft_probs_BMV
    both_BM2V = torch.stack([target_probs_BNV[:, : draft_BMV.shape[1]], draft_BMV], dim=2)
    total_BM21 = both_BM2V.sum(-1, keepdim=True, dtype=torch.float64).clamp(min=_TINY)
    uniforms_BU, used = uniforms(keys_BU[:, :-1]), 0
    # Of each layer: its first node, and where in it a row's walk is. A row that has ended moves on to some child.
    starts, places = [0], [counting(1, device).expand(B)]
    takes = [number(True, torch.bool, device).expand(B)]
    nothing_BV = number(0.0, torch.float64, device).expand_as(both_BM2V[:, 0, 0])
    missing = [nothing_BV]
    for depth, count in enumerate(sampled.children[: tree.max_depth]):
        begin, end = layer_start(sampled, depth), layer_start(sampled, depth + 1)
        candidates_BMK = tree.tokens_BN[:, end : end + (end - begin) * count].unflatten(1, (-1, count))
        both_B2V = _at(both_BM2V[:, begin:end], places[-1]) / _at(total_BM21[:, begin:end], places[-1])
        judged = judge(sampled.rule, both_B2V, _at(candidates_BMK, places[-1]))
        is_taken_BK = uniforms_BU[:, used : used + count] * judged.drawn < judged.wanted
        used += count
        if count == 1:
            is_taken_B, place_B = is_taken_BK[:, 0], places[-1]
        else:
            is_taken_B, place_B = is_taken_BK.max(1)
            place_B = place_B if depth == 0 else torch.add(place_B, places[-1], alpha=count)
        starts.append(end)
        places.append(place_B)
        takes.append(is_taken_B)
        missing.append(judged.missing)
    # Below a leaf nothing was drafted that the target could miss.
    missing.append(nothing_BV)
    takes.append(number(False, torch.bool, device).expand(B))
    # The first layer that takes nothing. With a place before the root and one behind the leaves, the count of emitted tokens is that of
    # the last node of the path.
    counts_B1 = torch.stack(takes, dim=1).min(1, keepdim=True).indices
    place_BX = torch.stack([places[0], *places, places[0]], dim=1)
    node_BX = place_BX + repeated((0, *starts, 0), (1,) * (len(starts) + 2), device)
    end_B1 = node_BX.gather(1, counts_B1)
    own_BV = target_probs_BNV.gather(1, end_B1[..., None].expand(-1, -1, target_probs_BNV.shape[-1])).squeeze(1)
    missing_BV = _at(torch.stack(missing, dim=1), counts_B1.squeeze(1))
    final_B1 = draw(_law(missing_BV, own_BV), keys_BU[:, -1:])
    emitted_BX = tree.tokens_BN.gather(1, node_BX[:, 1:]).scatter_(1, counts_B1, final_B1)
    return Walk(node_BX[:, 1:-1], emitted_BX[:, 1:], counts_B1.squeeze(1), end_B1, final_B1)


def _at(part_BM: Tensor, place_B: Tensor) -> Tensor:
    """Of each row the entry of a layer where its walk is, [B, ...]."""
    return part_BM[:, 0] if part_BM.shape[1] == 1 else part_BM[counting(len(part_BM), part_BM.device), place_B]


def _law(missing_BV: Tensor, own_BV: Tensor) -> Tensor:
    """Weights float64 [B, V] for the token that ends a walk: of what the target misses.

    A trace of its own distribution is added, and decides where nothing is missing: at a leaf, where it equals the draft's up to rounding,
    and where the draft's holds NaN, as of a drafter whose numbers overflow.

    Args:
        missing_BV: float64, up to a factor; rounding may leave it below 0, and a draft of NaN leaves NaN.
        own_BV: float, the target's probabilities.
    """
    return torch.fmax(missing_BV, own_BV * number(_TRACE, torch.float64, own_BV.device))

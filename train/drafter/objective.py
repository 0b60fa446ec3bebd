"""From a packed batch to the sums that training adds up: rollout, teacher-forced run, loss of the chosen distillation.

Owns: which positions teach which steps, the horizon weights, the map into the draft vocabulary. Does not know:
optimisers, ranks, logging.

Shape legend: T packed tokens, A anchors, K draft steps, D hidden, V vocabulary, Vd draft vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from draftsmith.models.drafters.drafter import Drafter
from draftsmith.models.drafters.returned_shapes import checked_head_inputs, checked_heads
from draftsmith.models.drafters.rollout import (
    PackedBatch,
    Rollout,
    data_rollout,
    fewer_anchors,
    fewer_depths,
    local_rollout,
    prompt_weighted,
)
from draftsmith.models.target.target import PRE_NORM, TargetEnds
from draftsmith.train.losses.confidence import confidence_loss
from draftsmith.train.losses.cross_entropy import head_cross_entropy
from draftsmith.train.losses.distillation import head_distillation
from draftsmith.train.losses.divergences import OF_ACCEPTANCE, DivergenceLoss, HeadDivergence
from draftsmith.train.losses.features import feature_smooth_l1
from draftsmith.train.losses.selector import selector_loss
from draftsmith.train.losses.sums import OUTSIDE, StepSums, TeacherLogits, TopEmphasis

Distillation = Literal["none", "path", "local"]


@dataclass(frozen=True)
class Objective:
    """What is minimised.

    Attributes:
        num_steps: K, draft steps.
        distillation: what teaches. `none`: the tokens of the text, by cross-entropy. `path`: the target's own distribution at each
            predicted position of the text, by a divergence. `local`: the target's greedy continuation from every position, by
            cross-entropy; needs a cache made with --local-horizon.
        horizon_decay: step k weighs horizon_decay ** k.
        chunk_rows: rows of logits in memory at a time; None chooses.
        feature_weight: of smooth L1 on predicted features (arXiv 2401.15077: 1.0).
        logit_weight: of the loss on tokens (arXiv 2401.15077: 0.1).
        emphasis: HASS's top-K distillation, with `path` only.
        skip_outside: with `path`, learn nothing where the target's likeliest token is outside the draft vocabulary (arXiv 2503.01840).
        max_anchors: learn at no more positions of a batch than this; None learns at all of them.
        prompt_weight: predictions of prompts count so much, where those of replies count 1; 0 learns replies alone. What teaches is the
            same as in replies: with `none` the prompt's own next token, which others wrote.
        divergence: with `path`, how far the drafter is from the target's distribution.
        text_weight: with `path`, the share of the text's own cross-entropy in the loss on tokens, beside the divergence (DSpark,
            arXiv:2607.05147: 0.1 beside `l1`).
        d_pace: smoothing of D-PACE's row weights (arXiv:2605.18810: 0.5), which multiply the horizon's; None weighs by the horizon alone.
        confidence_weight: of the loss of a confidence head (arXiv:2607.05147: 1.0); None is 1 where the drafter has such a head.
        depth_share: where steps can be left out: in training, step k learns at this share, to the power of k, of the anchors that reach
            it, and at no less than a fifth of them (arXiv:2602.01469: 0.7). 1 learns every step of every anchor.

    Raises:
        ValueError: a setting out of range, or one that this distillation does not use.
    """

    num_steps: int
    distillation: Distillation = "none"
    horizon_decay: float = 1.0
    chunk_rows: int | None = None
    feature_weight: float = 0.0
    logit_weight: float = 1.0
    emphasis: TopEmphasis | None = None
    skip_outside: bool = False
    max_anchors: int | None = None
    prompt_weight: float = 0.0
    divergence: HeadDivergence = "forward_kl"
    text_weight: float = 0.0
    d_pace: float | None = None
    confidence_weight: float | None = None
    depth_share: float = 1.0

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ValueError(f"num_steps is {self.num_steps}; a drafter needs at least 1 step")
        if not 0.0 < self.horizon_decay <= 1.0:
            raise ValueError(f"horizon_decay is {self.horizon_decay}; it must be above 0 and at most 1")
        if self.chunk_rows is not None and self.chunk_rows < 1:
            raise ValueError(f"chunk_rows is {self.chunk_rows}; it must be at least 1, or null to choose")
        if not 0.0 < self.depth_share <= 1.0:
            raise ValueError(
                f"depth_share is {self.depth_share}; it must be above 0, and at most 1, which keeps all steps"
            )
        if self.max_anchors is not None and self.max_anchors < 1:
            raise ValueError(f"max_anchors is {self.max_anchors}; it must be at least 1, or null for all")
        if self.feature_weight < 0.0 or self.logit_weight < 0.0 or self.feature_weight + self.logit_weight == 0.0:
            raise ValueError(
                f"feature_weight is {self.feature_weight} and logit_weight {self.logit_weight}; they must be at least 0, one above"
            )
        if not 0.0 <= self.prompt_weight < math.inf:
            raise ValueError(
                f"prompt_weight is {self.prompt_weight}; it must be at least 0, which learns replies alone"
            )
        self._check_distillation()

    def _check_distillation(self) -> None:
        """Check that settings of the loss fit each other.

        Raises:
            ValueError: naming those that do not.
        """
        reads_target = {
            "top-K distillation": self.emphasis is not None,
            "skip_outside": self.skip_outside,
            f"divergence {self.divergence}": self.divergence != "forward_kl",
            "text_weight": self.text_weight > 0.0,
        }
        asked = " and ".join(name for name, is_set in reads_target.items() if is_set)
        if self.distillation != "path" and asked:
            raise ValueError(
                f"{asked} asks for the target's distribution, which distillation {self.distillation!r} has not; use 'path'"
            )
        if self.emphasis is not None and self.divergence != "forward_kl":
            raise ValueError(
                f"top-K distillation adds terms of forward KL, and divergence is {self.divergence}; set top_k_weight to 0, or divergence "
                "to forward_kl"
            )
        if not 0.0 <= self.text_weight < 1.0:
            raise ValueError(
                f"text_weight is {self.text_weight}; it must be at least 0 and below 1; distillation none learns the text alone"
            )
        if self.d_pace is not None and not 0.0 <= self.d_pace < 1.0:
            raise ValueError(f"d_pace is {self.d_pace}; it must be at least 0 and below 1, or null for no such weights")
        if self.confidence_weight is not None and not 0.0 < self.confidence_weight < math.inf:
            raise ValueError(
                f"confidence_weight is {self.confidence_weight}; it must be above 0, or null for the usual 1"
            )
        if self.emphasis is not None and (self.emphasis.weight <= 0.0 or self.emphasis.count < 1):
            raise ValueError(
                f"top-K distillation has weight {self.emphasis.weight} and K {self.emphasis.count}; both must be positive"
            )

    def horizon_weights(self, device: torch.device) -> Tensor:
        """1, decay, decay^2, ...: float32 [K].

        Args:
            device: where to put them.
        """
        return self.horizon_decay ** torch.arange(self.num_steps, dtype=torch.float32, device=device)

    def rollout(self, batch: PackedBatch, eos_token_ids: tuple[int, ...] = (), draw_anchors: bool = False) -> Rollout:
        """What the drafter is fed and must predict.

        Args:
            batch: packed samples.
            eos_token_ids: with `local`, tokens that end the target's continuation.
            draw_anchors: with `max_anchors`, draw the anchors at random; otherwise they are spread evenly. With a `depth_share` below 1,
                draw which of them keep their deeper steps; otherwise all do.
        """
        roll_out: Callable[[PackedBatch], Rollout] = partial(data_rollout, num_steps=self.num_steps)
        if self.distillation == "local":
            roll_out = partial(local_rollout, num_steps=self.num_steps, eos_token_ids=eos_token_ids)
        rollout = prompt_weighted(roll_out, batch, self.prompt_weight) if self.prompt_weight > 0.0 else roll_out(batch)
        if self.max_anchors is not None:
            rollout = fewer_anchors(rollout, self.max_anchors, draw_anchors)
        return fewer_depths(rollout, self.depth_share) if draw_anchors and self.depth_share < 1.0 else rollout

    @property
    def reads_features(self) -> bool:
        """Whether the target's last states are read whatever the drafter reads: for its distribution, or as what is predicted."""
        return self.distillation == "path" or self.feature_weight > 0.0

    def check(self, drafter: Drafter) -> None:
        """Checks that this drafter can learn the objective.

        Args:
            drafter: to be trained.

        Raises:
            ValueError: the drafter has too few heads, predicts no features, or has a confidence head that the objective does not fit.
        """
        most = drafter.max_draft_steps
        if most is not None and self.num_steps > most:
            raise ValueError(
                f"{self.num_steps} draft steps are asked for, this {type(drafter).__name__} has heads for {most}; lower num_steps or "
                "val_steps, or train a drafter with more heads"
            )
        if self.feature_weight > 0.0 and not drafter.predicts_features:
            raise ValueError(
                f"feature_weight is {self.feature_weight}, but {type(drafter).__name__} predicts tokens only, no features; set it to 0"
            )
        if self.depth_share < 1.0 and not drafter.skips_steps:
            raise ValueError(
                f"depth_share is {self.depth_share}, and {type(drafter).__name__} computes every step; set it to 1, or train a "
                "drafter that can leave steps out (its page says so)"
            )
        if self.confidence_weight is not None and not drafter.has_confidence:
            raise ValueError(
                f"confidence_weight is {self.confidence_weight}, and this {type(drafter).__name__} has no confidence head; leave it null, "
                "or train a drafter that has one (confidence: true)"
            )
        if drafter.has_confidence and self.distillation == "local":
            raise ValueError(
                f"this {type(drafter).__name__} has a confidence head, which learns the acceptance along the text, and distillation is "
                "'local'; use 'path' or 'none', or train it without the head"
            )


@dataclass(frozen=True)
class PreparedBatch:
    """One batch made ready for the loss.

    Attributes:
        batch: packed samples.
        rollout: what the drafter is fed and must predict.
        draft_targets: int64 [A, K], targets as draft ids, OUTSIDE where the draft vocabulary lacks them.
        loss_rows: [K], rows of each step in the loss, each as much as its weight.
    """

    batch: PackedBatch
    rollout: Rollout
    draft_targets: Tensor
    loss_rows: Tensor


def prepare(
    objective: Objective,
    batch: PackedBatch,
    to_draft: Tensor,
    eos_token_ids: tuple[int, ...] = (),
    draw_anchors: bool = False,
) -> PreparedBatch:
    """Rolls out a batch, and counts its rows without running the drafter.

    Args:
        objective: whose rollout.
        batch: packed samples.
        to_draft: int64 [V], maps target ids to draft ids.
        eos_token_ids: tokens that end the target's continuation.
        draw_anchors: see Objective.rollout.
    """
    rollout = objective.rollout(batch, eos_token_ids, draw_anchors)
    draft_targets = to_draft[rollout.targets]
    counted = rollout.valid if objective.distillation == "path" else rollout.valid & (draft_targets != OUTSIDE)
    loss_rows = counted.sum(0) if rollout.weights is None else (counted * rollout.weights).sum(0)
    return PreparedBatch(batch, rollout, draft_targets, loss_rows)


def run(
    objective: Objective,
    prepared: PreparedBatch,
    drafter: Drafter,
    ends: TargetEnds,
    step_weights: Tensor,
    metrics: bool,
    entropy: bool = True,
    acceptance: bool = False,
) -> StepSums:
    """Runs the drafter over a batch and sums its losses.

    Args:
        objective: which losses.
        prepared: the batch.
        drafter: in training, or evaluated.
        ends: the target's.
        step_weights: float32 [K], multiply each step's summed loss.
        metrics: count top-1 and top-5 too.
        entropy: with `path`, subtract the target's entropy from the loss; see head_distillation.
        acceptance: return the chance that each row is accepted at temperature 1, where the batch holds the target's distribution.
    """
    head_inputs = checked_head_inputs(drafter, prepared.batch, prepared.rollout)
    weights = objective.logit_weight * step_weights
    is_known = prepared.rollout.on_text and PRE_NORM in prepared.batch.hidden
    acceptance = is_known and (acceptance or drafter.has_confidence)
    sums = _token_loss(objective, prepared, drafter, ends, head_inputs, weights, metrics, entropy, acceptance)
    if drafter.num_candidates is not None:
        sums = _with_selector(objective, prepared, drafter, head_inputs, weights, sums)
    if acceptance and drafter.has_confidence:
        sums = _with_confidence(objective, prepared, drafter, head_inputs, step_weights, sums)
    if objective.feature_weight == 0.0:
        return sums
    features = feature_smooth_l1(
        head_inputs,
        ends.final_norm(prepared.batch.hidden[PRE_NORM]),
        path_teacher_rows(prepared.rollout, len(prepared.batch.input_ids)),
        prepared.rollout.valid,
        objective.feature_weight * step_weights,
        prepared.rollout.weights,
    )
    return replace(sums, total=sums.total + features.total, feature_sum=features.loss_sum)


def _token_loss(
    objective: Objective,
    prepared: PreparedBatch,
    drafter: Drafter,
    ends: TargetEnds,
    head_inputs: Tensor,
    step_weights: Tensor,
    metrics: bool,
    entropy: bool,
    acceptance: bool,
) -> StepSums:
    """The loss on tokens of all steps, with one head or with that of each step."""
    heads = checked_heads(drafter, objective.num_steps, head_inputs.shape[-1])
    given = (prepared.draft_targets, prepared.rollout.valid, step_weights, objective.chunk_rows)
    correction = drafter.correction_weight
    if correction is not None and drafter.num_candidates is not None:  # it has a loss of its own
        head_inputs, correction = head_inputs[..., : -correction.shape[1]], None
    further = (prepared.rollout.weights, correction)
    if objective.distillation != "path":
        sums = head_cross_entropy(head_inputs, heads, *given, metrics, *further, objective.d_pace)
        if not acceptance:
            return sums
    draft_ids = None if drafter.d2t is None else drafter.draft_ids()
    needs_mass = acceptance or objective.d_pace is not None or objective.divergence in OF_ACCEPTANCE
    teacher = path_teacher(prepared.batch, ends, draft_ids, objective.skip_outside, needs_mass)
    teacher_rows = path_teacher_rows(prepared.rollout, len(prepared.batch.input_ids))
    distil = partial(head_distillation, head_inputs, heads, teacher, teacher_rows, *given)
    if objective.distillation != "path":
        with torch.no_grad():
            measured = distil(metrics=False, entropy=False, correction=correction, keep_accepted=True)
        return replace(sums, accepted=measured.accepted)
    return distil(
        metrics,
        objective.emphasis,
        entropy,
        *further,
        divergence=DivergenceLoss(objective.divergence),
        text_weight=objective.text_weight,
        d_pace=objective.d_pace,
        keep_accepted=acceptance,
    )


def _with_selector(
    objective: Objective,
    prepared: PreparedBatch,
    drafter: Drafter,
    head_inputs: Tensor,
    step_weights: Tensor,
    sums: StepSums,
) -> StepSums:
    """The sums with the loss of a drafter that chooses among a few candidates of each step."""
    assert drafter.num_candidates is not None
    assert drafter.correction_weight is not None
    rollout = prepared.rollout
    selector = selector_loss(
        head_inputs,
        drafter.head_weight,
        drafter.correction_weight,
        prepared.draft_targets,
        rollout.valid,
        step_weights,
        drafter.num_candidates,
        objective.chunk_rows,
        rollout.weights,
    )
    return replace(sums, total=sums.total + selector.total, recalled=selector.recalled)


def _with_confidence(
    objective: Objective,
    prepared: PreparedBatch,
    drafter: Drafter,
    head_inputs: Tensor,
    step_weights: Tensor,
    sums: StepSums,
) -> StepSums:
    """The sums with the loss of the confidence head, which learns the acceptances among them."""
    assert sums.accepted is not None
    rollout = prepared.rollout
    logits = drafter.confidence(head_inputs, rollout.tokens.T)
    weight = 1.0 if objective.confidence_weight is None else objective.confidence_weight
    confidence = confidence_loss(logits, sums.accepted, rollout.valid, weight * step_weights, rollout.weights)
    return replace(sums, total=sums.total + confidence.total, chances=confidence.chances)


def path_teacher_rows(rollout: Rollout, num_tokens: int) -> Tensor:
    """The packed position whose state holds the target's distribution for what step k predicts.

    At anchor t, step k predicts position t + 2 + k, and the state that predicts position u is the one at u - 1.
    Example: anchor 3 with two steps -> 4 and 5. Rows past the end are never valid; they are clamped.

    Args:
        rollout: its anchors [A] and steps K.
        num_tokens: T, of the packed batch.

    Returns:
        int64 [A, K].
    """
    steps = torch.arange(rollout.tokens.shape[1], device=rollout.anchors.device)
    return (rollout.anchors[:, None] + 1 + steps).clamp(max=num_tokens - 1)


def path_teacher(
    batch: PackedBatch, ends: TargetEnds, draft_ids: Tensor | None, skip_outside: bool = False, mass: bool = False
) -> Callable[[Tensor], TeacherLogits]:
    """A function from packed positions [n] to what the target says there, over the draft vocabulary.

    Args:
        batch: with the target's states before the final norm.
        ends: the target's.
        draft_ids: int64 [Vd], the draft vocabulary; None for the whole one.
        skip_outside: keep no position whose likeliest token is outside the draft vocabulary.
        mass: give how much of the target's probability the draft vocabulary holds, too. That takes its whole head.
    """

    def normed(positions: Tensor) -> Tensor:
        return ends.final_norm(batch.hidden[PRE_NORM][positions])

    if draft_ids is None:
        return lambda positions: TeacherLogits(ends.logits(normed(positions)))
    if not (skip_outside or mass):
        logits_of_drafted = ends.logits_of(draft_ids)
        return lambda positions: TeacherLogits(logits_of_drafted(normed(positions)))
    inside = torch.zeros(ends.vocab_size, dtype=torch.bool, device=draft_ids.device)
    inside[draft_ids] = True

    def teach(positions: Tensor) -> TeacherLogits:
        logits = ends.logits(normed(positions))
        drafted = logits[:, draft_ids]
        kept = inside[logits.argmax(-1)] if skip_outside else None
        log_mass = drafted.float().logsumexp(-1) - logits.float().logsumexp(-1) if mass else None
        return TeacherLogits(drafted, kept, log_mass)

    return teach


def inverse_draft_ids(draft_ids: Tensor, vocab_size: int) -> Tensor:
    """The draft id of each target id, OUTSIDE where the draft vocabulary lacks it.

    Example: draft ids (1, 3) of a vocabulary of 4 -> (-1, 0, -1, 1).

    Args:
        draft_ids: int64 [Vd].
        vocab_size: V.

    Returns:
        int64 [V].
    """
    to_draft = torch.full((vocab_size,), OUTSIDE, dtype=torch.int64, device=draft_ids.device)
    to_draft[draft_ids] = torch.arange(len(draft_ids), device=draft_ids.device)
    return to_draft

"""From a packed batch to the sums that training adds up: rollout, teacher-forced run, loss of the chosen distillation.

Owns: which positions teach which steps, the horizon weights, the map into the draft vocabulary. Does not know:
optimisers, ranks, logging.

Shape legend: T packed tokens, A anchors, K draft steps, D hidden, V vocabulary, Vd draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from draftsmith.models.drafters.drafter import Drafter
from draftsmith.models.drafters.rollout import PackedBatch, Rollout, data_rollout, local_rollout
from draftsmith.models.target.target import PRE_NORM, TargetEnds
from draftsmith.train.drafter.losses import (
    OUTSIDE,
    StepSums,
    Taught,
    TopEmphasis,
    feature_smooth_l1,
    head_cross_entropy,
    head_distillation,
)

Distillation = Literal["none", "path", "local"]


@dataclass(frozen=True)
class Objective:
    """What is minimised.

    distillation: `none`: cross-entropy on the tokens of the text; `path`: KL to the target's own distribution at each
    predicted position of the text; `local`: cross-entropy on the target's greedy continuation from every position
    (needs a cache made with --local-horizon). num_steps K; horizon_decay: step k weighs horizon_decay ** k;
    feature_weight, logit_weight: weights of smooth L1 on predicted features and of the loss on tokens (arXiv
    2401.15077: 1.0 and 0.1); emphasis: HASS's top-K distillation, with `path` only; skip_outside: with `path`, learn nothing where the
    target's likeliest token is outside the draft vocabulary (arXiv 2503.01840); chunk_rows: rows of logits in memory at a time,
    None chooses.
    """

    num_steps: int
    distillation: Distillation = "none"
    horizon_decay: float = 1.0
    chunk_rows: int | None = None
    feature_weight: float = 0.0
    logit_weight: float = 1.0
    emphasis: TopEmphasis | None = None
    skip_outside: bool = False

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ValueError(f"num_steps is {self.num_steps}; a drafter needs at least 1 step")
        if not 0.0 < self.horizon_decay <= 1.0:
            raise ValueError(f"horizon_decay is {self.horizon_decay}; it must be above 0 and at most 1")
        if self.chunk_rows is not None and self.chunk_rows < 1:
            raise ValueError(f"chunk_rows is {self.chunk_rows}; it must be at least 1, or null to choose")
        if self.feature_weight < 0.0 or self.logit_weight < 0.0 or self.feature_weight + self.logit_weight == 0.0:
            raise ValueError(
                f"feature_weight is {self.feature_weight} and logit_weight {self.logit_weight}; they must be at least 0, one above"
            )
        if self.distillation != "path" and (self.emphasis is not None or self.skip_outside):
            raise ValueError(
                "top-K distillation and skip_outside read the target's distribution, which distillation "
                f"{self.distillation!r} has not; use 'path'"
            )
        if self.emphasis is not None and (self.emphasis.weight <= 0.0 or self.emphasis.count < 1):
            raise ValueError(
                f"top-K distillation has weight {self.emphasis.weight} and K {self.emphasis.count}; both must be positive"
            )

    def horizon_weights(self, device: torch.device) -> Tensor:
        """[K] float32: 1, decay, decay^2, ..."""
        return self.horizon_decay ** torch.arange(self.num_steps, dtype=torch.float32, device=device)

    def rollout(self, batch: PackedBatch, eos_token_ids: tuple[int, ...] = ()) -> Rollout:
        """What the drafter is fed and must predict."""
        if self.distillation == "local":
            return local_rollout(batch, self.num_steps, eos_token_ids)
        return data_rollout(batch, self.num_steps)

    @property
    def reads_features(self) -> bool:
        """Whether the target's last states are read whatever the drafter reads: for its distribution, or as what is predicted."""
        return self.distillation == "path" or self.feature_weight > 0.0

    def check(self, drafter: Drafter) -> None:
        """Refuses what this drafter cannot be taught. Raises ValueError."""
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


@dataclass(frozen=True)
class Lesson:
    """One batch made ready: its rollout, the targets as draft ids [A, K] (OUTSIDE: no such), rows per step [K]."""

    batch: PackedBatch
    rollout: Rollout
    draft_targets: Tensor
    loss_rows: Tensor


def prepare(objective: Objective, batch: PackedBatch, to_draft: Tensor, eos_token_ids: tuple[int, ...] = ()) -> Lesson:
    """Rolls out a batch; to_draft int64 [V] maps target ids to draft ids. Counts rows without running the drafter."""
    rollout = objective.rollout(batch, eos_token_ids)
    draft_targets = to_draft[rollout.targets]
    counted = rollout.valid if objective.distillation == "path" else rollout.valid & (draft_targets != OUTSIDE)
    return Lesson(batch, rollout, draft_targets, counted.sum(0))


def run(
    objective: Objective, lesson: Lesson, drafter: Drafter, ends: TargetEnds, step_weights: Tensor, metrics: bool
) -> StepSums:
    """Runs the drafter over a lesson; step_weights float32 [K] multiply each step's summed loss."""
    head_inputs = drafter.teacher_forced(lesson.batch, lesson.rollout)
    sums = _token_loss(objective, lesson, drafter, ends, head_inputs, objective.logit_weight * step_weights, metrics)
    if objective.feature_weight == 0.0:
        return sums
    features = feature_smooth_l1(
        head_inputs,
        ends.final_norm(lesson.batch.hidden[PRE_NORM]),
        path_teacher_rows(lesson.rollout, len(lesson.batch.input_ids)),
        lesson.rollout.valid,
        objective.feature_weight * step_weights,
    )
    return replace(sums, total=sums.total + features.total, feature_sum=features.loss_sum)


def _token_loss(
    objective: Objective,
    lesson: Lesson,
    drafter: Drafter,
    ends: TargetEnds,
    head_inputs: Tensor,
    step_weights: Tensor,
    metrics: bool,
) -> StepSums:
    """The loss on tokens of all steps, with one head or with that of each step."""
    heads = (
        drafter.head_weight
        if drafter.has_one_head
        else [drafter.step_weight(step) for step in range(objective.num_steps)]
    )
    given = (lesson.draft_targets, lesson.rollout.valid, step_weights, objective.chunk_rows, metrics)
    if objective.distillation != "path":
        return head_cross_entropy(head_inputs, heads, *given)
    draft_ids = None if drafter.d2t is None else drafter.draft_ids()
    teacher = path_teacher(lesson.batch, ends, draft_ids, objective.skip_outside)
    teacher_rows = path_teacher_rows(lesson.rollout, len(lesson.batch.input_ids))
    return head_distillation(head_inputs, heads, teacher, teacher_rows, *given, objective.emphasis)


def path_teacher_rows(rollout: Rollout, num_tokens: int) -> Tensor:
    """int64 [A, K]: the packed position whose state holds the target's distribution for what step k predicts.

    At anchor t step k predicts position t + 2 + k, and the state that predicts position u is the one at u - 1.
    Example: anchor 3 with two steps -> 4 and 5. Rows past the end are never valid; they are clamped.
    """
    steps = torch.arange(rollout.tokens.shape[1], device=rollout.anchors.device)
    return (rollout.anchors[:, None] + 1 + steps).clamp(max=num_tokens - 1)


def path_teacher(
    batch: PackedBatch, ends: TargetEnds, draft_ids: Tensor | None, skip_outside: bool = False
) -> Callable[[Tensor], Taught]:
    """A function from packed positions [n] to what the target says there, over the draft vocabulary (int64 [Vd], or None)."""
    inside = None
    if skip_outside and draft_ids is not None:
        inside = torch.zeros(ends.vocab_size, dtype=torch.bool, device=draft_ids.device)
        inside[draft_ids] = True

    def teach(positions: Tensor) -> Taught:
        logits = ends.logits(ends.final_norm(batch.hidden[PRE_NORM][positions]))
        if draft_ids is None:
            return Taught(logits)
        return Taught(logits[:, draft_ids], None if inside is None else inside[logits.argmax(-1)])

    return teach


def inverse_draft_ids(draft_ids: Tensor, vocab_size: int) -> Tensor:
    """int64 [V]: the draft id of each target id, OUTSIDE where the draft vocabulary lacks it; draft_ids int64 [Vd].

    Example: draft ids (1, 3) of a vocabulary of 4 -> (-1, 0, -1, 1).
    """
    to_draft = torch.full((vocab_size,), OUTSIDE, dtype=torch.int64, device=draft_ids.device)
    to_draft[draft_ids] = torch.arange(len(draft_ids), device=draft_ids.device)
    return to_draft

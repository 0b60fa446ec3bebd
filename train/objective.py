"""From a packed batch to the sums that training adds up: rollout, teacher-forced run, loss of the chosen distillation.

Owns: which positions teach which steps, the horizon weights, the map into the draft vocabulary. Does not know:
optimisers, ranks, logging.

Shape legend: T packed tokens, A anchors, K draft steps, D hidden, V vocabulary, Vd draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from draftsmith.models.drafter import Drafter, PackedBatch, Rollout, data_rollout, local_rollout
from draftsmith.models.target import PRE_NORM, TargetEnds
from draftsmith.train.losses import OUTSIDE, StepSums, head_cross_entropy, head_distillation

Distillation = Literal["none", "path", "local"]


@dataclass(frozen=True)
class Objective:
    """What is minimised.

    distillation: `none`: cross-entropy on the tokens of the text; `path`: KL to the target's own distribution at each
    predicted position of the text; `local`: cross-entropy on the target's greedy continuation from every position
    (needs a cache made with --local-horizon). num_steps K; horizon_decay: step k weighs horizon_decay ** k;
    chunk_rows: rows of logits in memory at a time, None chooses.
    """

    num_steps: int
    distillation: Distillation = "none"
    horizon_decay: float = 1.0
    chunk_rows: int | None = None

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ValueError(f"num_steps is {self.num_steps}; a drafter needs at least 1 step")
        if not 0.0 < self.horizon_decay <= 1.0:
            raise ValueError(f"horizon_decay is {self.horizon_decay}; it must be above 0 and at most 1")
        if self.chunk_rows is not None and self.chunk_rows < 1:
            raise ValueError(f"chunk_rows is {self.chunk_rows}; it must be at least 1, or null to choose")

    def horizon_weights(self, device: torch.device) -> Tensor:
        """[K] float32: 1, decay, decay^2, ..."""
        return self.horizon_decay ** torch.arange(self.num_steps, dtype=torch.float32, device=device)

    def rollout(self, batch: PackedBatch) -> Rollout:
        """What the drafter is fed and must predict."""
        roll = local_rollout if self.distillation == "local" else data_rollout
        return roll(batch, self.num_steps)


@dataclass(frozen=True)
class Lesson:
    """One batch made ready: its rollout, the targets as draft ids [A, K] (OUTSIDE: no such), rows per step [K]."""

    batch: PackedBatch
    rollout: Rollout
    draft_targets: Tensor
    loss_rows: Tensor


def prepare(objective: Objective, batch: PackedBatch, to_draft: Tensor) -> Lesson:
    """Rolls out a batch; to_draft int64 [V] maps target ids to draft ids. Counts rows without running the drafter."""
    rollout = objective.rollout(batch)
    draft_targets = to_draft[rollout.targets]
    counted = rollout.valid if objective.distillation == "path" else rollout.valid & (draft_targets != OUTSIDE)
    return Lesson(batch, rollout, draft_targets, counted.sum(0))


def run(
    objective: Objective, lesson: Lesson, drafter: Drafter, ends: TargetEnds, step_weights: Tensor, metrics: bool
) -> StepSums:
    """Runs the drafter over a lesson; step_weights float32 [K] multiply each step's summed loss."""
    head_inputs = drafter.teacher_forced(lesson.batch, lesson.rollout)
    if objective.distillation != "path":
        return head_cross_entropy(
            head_inputs,
            drafter.head_weight,
            lesson.draft_targets,
            lesson.rollout.valid,
            step_weights,
            objective.chunk_rows,
            metrics,
        )
    return head_distillation(
        head_inputs,
        drafter.head_weight,
        path_teacher(lesson.batch, ends, None if drafter.d2t is None else drafter.draft_ids()),
        path_teacher_rows(lesson.rollout, len(lesson.batch.input_ids)),
        lesson.draft_targets,
        lesson.rollout.valid,
        step_weights,
        objective.chunk_rows,
        metrics,
    )


def path_teacher_rows(rollout: Rollout, num_tokens: int) -> Tensor:
    """int64 [A, K]: the packed position whose state holds the target's distribution for what step k predicts.

    At anchor t step k predicts position t + 2 + k, and the state that predicts position u is the one at u - 1.
    Example: anchor 3 with two steps -> 4 and 5. Rows past the end are never valid; they are clamped.
    """
    steps = torch.arange(rollout.tokens.shape[1], device=rollout.anchors.device)
    return (rollout.anchors[:, None] + 1 + steps).clamp(max=num_tokens - 1)


def path_teacher(batch: PackedBatch, ends: TargetEnds, draft_ids: Tensor | None) -> Callable[[Tensor], Tensor]:
    """A function from packed positions [n] to the target's logits there, over the draft vocabulary [n, Vd]."""

    def logits(positions: Tensor) -> Tensor:
        all_logits = ends.logits(ends.final_norm(batch.hidden[PRE_NORM][positions]))
        return all_logits if draft_ids is None else all_logits[:, draft_ids]

    return logits


def inverse_draft_ids(draft_ids: Tensor, vocab_size: int) -> Tensor:
    """int64 [V]: the draft id of each target id, OUTSIDE where the draft vocabulary lacks it; draft_ids int64 [Vd].

    Example: draft ids (1, 3) of a vocabulary of 4 -> (-1, 0, -1, 1).
    """
    to_draft = torch.full((vocab_size,), OUTSIDE, dtype=torch.int64, device=draft_ids.device)
    to_draft[draft_ids] = torch.arange(len(draft_ids), device=draft_ids.device)
    return to_draft

"""Cross-entropy of draft steps with the tokens of the text.

Owns: which rows are in the loss, and its gradient. Does not know: drafters, batches, how chunks are multiplied and added up
(`chunked_head.py`).

Shape legend: K draft steps, A anchors, E head inputs, Vd draft vocabulary, r columns of a correction, C rows of one chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from draftsmith.train.losses.chunk_rows import default_chunk_rows
from draftsmith.train.losses.chunked_head import Chunk, Job, RowLosses, checked_weights, run_job
from draftsmith.train.losses.d_pace import DPace
from draftsmith.train.losses.sums import OUTSIDE, Heads, StepSums


def head_cross_entropy(
    head_inputs: Tensor,
    heads: Heads,
    targets: Tensor,
    valid: Tensor,
    step_weights: Tensor,
    chunk_rows: int | None = None,
    metrics: bool = True,
    row_weights: Tensor | None = None,
    correction: Tensor | None = None,
    d_pace: float | None = None,
) -> StepSums:
    """Teacher-forced cross-entropy of every draft step (arXiv 2403.09919, section 4; Apple's training loss).

    A target outside the draft vocabulary adds nothing to the loss, and counts as a miss in top-1 and top-5: a drafter can never propose it.

    Args:
        head_inputs: float [K, A, E], or [K, A, E + r] with a correction.
        heads: float [Vd, E], the head of all steps; or K of them, the head of each step.
        targets: int64 [A, K], draft ids, OUTSIDE where the draft vocabulary lacks the token.
        valid: bool [A, K], rows that count.
        step_weights: float [K].
        chunk_rows: C; None chooses.
        metrics: count top-1 and top-5 too.
        row_weights: float [A, K], of each row's loss; accuracies count all rows alike. None is 1 everywhere.
        correction: float [Vd, r], added at all steps: logits are head_inputs[..., :E] @ head.T + head_inputs[..., E:] @ correction.T.
        d_pace: smoothing of D-PACE's weights, with the draft's probability of the text's token as its chance; None weighs without it.

    Raises:
        ValueError: shapes that do not fit.
    """
    weights = checked_weights(head_inputs, heads, correction, targets, valid, step_weights, row_weights)
    flat_targets = targets.T.reshape(-1)
    in_loss = valid.T.reshape(-1) & (flat_targets != OUTSIDE)
    job = _CrossEntropyJob(
        flat_targets=flat_targets,
        in_loss=in_loss,
        chunk_rows=chunk_rows or default_chunk_rows(weights[0].shape[0]),
        num_anchors=head_inputs.shape[1],
        metrics=metrics,
        grad_enabled=torch.is_grad_enabled(),
        row_weights=None if row_weights is None else row_weights.T.reshape(-1),
        d_pace=None if d_pace is None else DPace(d_pace, valid.T),
    )
    return run_job(job, head_inputs, weights, correction, valid, step_weights)


@dataclass(frozen=True, kw_only=True)
class _CrossEntropyJob(Job):
    """Tokens of the text: flat_targets int64 [K * A] draft ids, in_loss bool [K * A]."""

    flat_targets: Tensor
    in_loss: Tensor
    chunk_rows: int

    def chunks(self) -> Iterator[Chunk]:
        if self.d_pace is None:
            for row_ids in torch.nonzero(self.in_loss).squeeze(1).split(self.chunk_rows):
                yield Chunk(row_ids, None, self.flat_targets[row_ids])
            return
        for row_ids in self.d_pace.chunks(self.chunk_rows):
            yield Chunk(row_ids, self.in_loss[row_ids], self.flat_targets[row_ids])

    def targets_of(self, chunk: Chunk) -> Tensor:
        return chunk.payload

    def row_losses(self, chunk: Chunk, log_probs: Tensor) -> RowLosses:
        """d(loss)/d(logits) = draft_probs - one_hot(target)."""
        picked = chunk.payload.clamp(min=0)[:, None]
        loss = -log_probs.gather(1, picked).squeeze(1)
        # A token that the draft vocabulary lacks is never accepted.
        accepted = None if self.d_pace is None else torch.where(chunk.payload == OUTSIDE, 0.0, (-loss).exp())
        if self.grad_enabled:
            log_probs.exp_().scatter_add_(1, picked, log_probs.new_full((), -1.0).expand(picked.shape))
        return RowLosses(loss, log_probs, accepted)

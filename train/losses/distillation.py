"""Distillation of draft steps from the target's distributions along the text.

Owns: rows that share a teacher, the loss and its gradient, for each divergence. Does not know: drafters, batches, where teachers'
probabilities come from, how chunks are multiplied and added up (`chunked_head.py`). Local distillation (arXiv 2403.09919, section 4.2) is
cross-entropy on another rollout.

Shape legend: K draft steps, A anchors, E head inputs, Vd draft vocabulary, r columns of a correction, R rows = (step, anchor) pairs, C rows
of one chunk, U distinct predicted positions, G rows that share one position.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from draftsmith.train.losses.chunk_rows import default_chunk_rows
from draftsmith.train.losses.chunked_head import Chunk, Job, RowLosses, checked_weights, run_job
from draftsmith.train.losses.d_pace import DPace
from draftsmith.train.losses.divergences import OF_ACCEPTANCE, DivergenceLoss, acceptance
from draftsmith.train.losses.sums import OUTSIDE, Heads, StepSums, TeacherLogits, TopEmphasis

FORWARD_KL = DivergenceLoss("forward_kl")


def head_distillation(
    head_inputs: Tensor,
    heads: Heads,
    teacher: Callable[[Tensor], TeacherLogits],
    teacher_rows: Tensor,
    targets: Tensor,
    valid: Tensor,
    step_weights: Tensor,
    chunk_rows: int | None = None,
    metrics: bool = True,
    emphasis: TopEmphasis | None = None,
    entropy: bool = True,
    row_weights: Tensor | None = None,
    correction: Tensor | None = None,
    divergence: DivergenceLoss = FORWARD_KL,
    text_weight: float = 0.0,
    d_pace: float | None = None,
    keep_accepted: bool = False,
) -> StepSums:
    """KL(target_probs || draft_probs) of every draft step, or another divergence, with the target's distribution along its own path.

    The softmax of the teacher's logits is the target's distribution renormalised over the draft vocabulary. KL divergences are with respect
    to it. The acceptance, and what is made of it, takes the target's probabilities as they are. Rows whose teacher is not kept add nothing
    and still count in the mean. (arXiv 2503.01840 leaves out rows whose likeliest token is outside the draft vocabulary.)

    Args:
        head_inputs, heads, targets, valid, step_weights, chunk_rows, metrics, row_weights, correction: see head_cross_entropy. The targets
            are read for the accuracies and the text_weight.
        teacher: TeacherLogits of n teacher rows, from their ids int64 [n]; each row is asked for once.
        teacher_rows: int64 [A, K], which teacher row (a, k) is to match.
        emphasis: adds its weight times forward KL's terms of the target's top tokens, whose sum may be negative.
        entropy: of forward KL, subtract the target's entropy, which changes no gradient. Without it the loss is the soft cross-entropy.
        divergence: what is minimised; an emphasis goes with forward KL alone.
        text_weight: w; the loss is (1 - w) times the divergence and w times the cross-entropy of the text's token, 0 for one OUTSIDE.
        d_pace: smoothing of D-PACE's weights, with the acceptance of each row as its chance; None weighs without it.
        keep_accepted: return the acceptance of each row.

    Raises:
        ValueError: shapes that do not fit.
    """
    weights = checked_weights(head_inputs, heads, correction, targets, valid, step_weights, row_weights)
    job = _DistillationJob(
        teacher=teacher,
        divergence=divergence,
        emphasis=emphasis,
        entropy=entropy,
        text_weight=text_weight,
        flat_rows=teacher_rows.T.reshape(-1),
        flat_targets=targets.T.reshape(-1),
        flat_valid=valid.T.reshape(-1),
        chunk_rows=chunk_rows or default_chunk_rows(weights[0].shape[0]),
        num_anchors=head_inputs.shape[1],
        metrics=metrics,
        grad_enabled=torch.is_grad_enabled(),
        row_weights=None if row_weights is None else row_weights.T.reshape(-1),
        d_pace=None if d_pace is None else DPace(d_pace, valid.T),
        keep_accepted=keep_accepted,
    )
    return run_job(job, head_inputs, weights, correction, valid, step_weights)


def group_by_teacher(teacher_rows: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Gathers the rows that share a teacher.

    Example: teacher_rows (7, 8, 7), all valid -> ids (7, 8), grid ((0, 2), (1, -1)).

    Args:
        teacher_rows: int64 [R].
        valid: bool [R].

    Returns:
        teacher ids [U], and grid [U, G]: grid[u, g] is the g-th valid row whose teacher is ids[u], -1 where there are fewer than G.
    """
    row_ids = torch.nonzero(valid).squeeze(1)
    sorted_rows, order = torch.sort(teacher_rows[row_ids], stable=True)
    teacher_ids, group_sizes = torch.unique_consecutive(sorted_rows, return_counts=True)
    starts = group_sizes.cumsum(0) - group_sizes
    group_of_row = torch.repeat_interleave(torch.arange(len(teacher_ids), device=row_ids.device), group_sizes)
    slots = torch.arange(len(row_ids), device=row_ids.device) - starts[group_of_row]
    width = int(group_sizes.max()) if len(teacher_ids) else 0
    grid = torch.full((len(teacher_ids), width), -1, dtype=torch.int64, device=row_ids.device)
    grid[group_of_row, slots] = row_ids[order]
    return teacher_ids, grid


@dataclass(frozen=True, kw_only=True)
class _DistillationJob(Job):
    """The target's distributions: flat_rows int64 [K * A] teacher rows, flat_targets int64 [K * A], flat_valid bool [K * A]."""

    teacher: Callable[[Tensor], TeacherLogits]
    divergence: DivergenceLoss
    emphasis: TopEmphasis | None
    entropy: bool
    text_weight: float
    flat_rows: Tensor
    flat_targets: Tensor
    flat_valid: Tensor
    chunk_rows: int

    def chunks(self) -> Iterator[Chunk]:
        """Rows with one teacher together; with D-PACE whole anchors, whose rows have a teacher each."""
        if self.d_pace is not None:
            for row_ids in self.d_pace.chunks(self.chunk_rows):
                yield Chunk(row_ids, self.flat_valid[row_ids], self.flat_rows[row_ids])
            return
        teacher_ids, grid = group_by_teacher(self.flat_rows, self.flat_valid)
        num_positions = max(1, self.chunk_rows // max(1, grid.shape[1]))
        for ids, rows in zip(teacher_ids.split(num_positions), grid.split(num_positions), strict=True):
            flat = rows.reshape(-1)
            yield Chunk(flat.clamp(min=0), flat >= 0, ids)

    def targets_of(self, chunk: Chunk) -> Tensor:
        return self.flat_targets[chunk.row_ids]

    def row_losses(self, chunk: Chunk, log_probs: Tensor) -> RowLosses:
        """log_probs [U * G, Vd] are those of G rows for each of U teachers."""
        teacher, share = self._teacher_of(chunk), self.text_weight
        grouped = log_probs.view(len(chunk.payload), -1, log_probs.shape[-1])
        text = self._text(chunk, teacher, log_probs) if share > 0.0 else None
        accepted = None
        if self.keep_accepted or self.d_pace is not None or self.divergence.name in OF_ACCEPTANCE:
            accepted = acceptance(_whole_log_probs(teacher, log_probs.dtype)[:, None], grouped)
        of_divergence = self._forward_kl if self.divergence.name == "forward_kl" else self._divergence
        loss, grad = of_divergence(teacher, grouped, accepted)
        loss, grad = loss.reshape(-1), grad.view_as(log_probs)
        if text is not None:
            loss = (1.0 - share) * loss + share * text.loss
            grad = grad.mul_(1.0 - share).add_(text.grad_logits, alpha=share) if self.grad_enabled else grad
        return RowLosses(loss, grad, None if accepted is None else accepted.reshape(-1))

    def _teacher_of(self, chunk: Chunk) -> TeacherLogits:
        """What the target says for the chunk; where rows repeat a position, it is computed once."""
        if self.d_pace is None:
            return self.teacher(chunk.payload)
        ids, places = chunk.payload.unique(return_inverse=True)
        once = self.teacher(ids)
        kept = None if once.kept is None else once.kept[places]
        log_mass = None if once.log_mass is None else once.log_mass[places]
        return TeacherLogits(once.logits[places], kept, log_mass)

    def _text(self, chunk: Chunk, teacher: TeacherLogits, log_probs: Tensor) -> RowLosses:
        """The cross-entropy of the text's tokens, and its gradient in a tensor of its own."""
        targets = self.flat_targets[chunk.row_ids]
        learned, picked = targets != OUTSIDE, targets.clamp(min=0)[:, None]
        if teacher.kept is not None:
            learned = learned & teacher.kept.repeat_interleave(len(targets) // len(teacher.kept))
        loss = torch.where(learned, -log_probs.gather(1, picked).squeeze(1), 0.0)
        if not self.grad_enabled:
            return RowLosses(loss, log_probs)
        ones = log_probs.new_full((), -1.0).expand(picked.shape)
        return RowLosses(loss, log_probs.exp().scatter_add_(1, picked, ones).mul_(learned[:, None]))

    def _divergence(self, teacher: TeacherLogits, grouped: Tensor, accepted: Tensor | None) -> tuple[Tensor, Tensor]:
        """Any other than forward KL: grouped [U, G, Vd] -> loss [U, G], d(loss)/d(logits) [U, G, Vd]."""
        target = torch.log_softmax(teacher.logits, dim=-1, dtype=grouped.dtype)[:, None]
        labels = torch.empty(0)  # no divergence reads them
        loss, grad = self.divergence.value(target, grouped, labels, accepted), grouped
        if self.grad_enabled:
            log_mass = None if teacher.log_mass is None else teacher.log_mass[:, None, None].to(grouped.dtype)
            grad = self.divergence.gradient(target, grouped, labels, log_mass)
        if teacher.kept is not None:
            loss, grad = loss * teacher.kept[:, None], grad.mul_(teacher.kept[:, None, None])
        return loss, grad

    def _forward_kl(self, teacher: TeacherLogits, grouped: Tensor, accepted: Tensor | None) -> tuple[Tensor, Tensor]:
        """grouped [U, G, Vd], overwritten -> loss [U, G], d(loss)/d(logits) [U, G, Vd].

        The loss is sum(w * (log target_probs - log draft_probs)) with weights w whose sum is s. Its gradient is s draft_probs - w.
        Without emphasis, w is target_probs and s is 1. Without entropy, the loss is -sum(w * log draft_probs).
        """
        target_probs = torch.softmax(teacher.logits, dim=-1, dtype=grouped.dtype)
        weights = target_probs
        if self.emphasis is not None:
            top, places = target_probs.topk(min(self.emphasis.count, target_probs.shape[-1]), dim=-1)
            weights = target_probs.scatter_add(1, places, self.emphasis.weight * top)
        if teacher.kept is not None:
            weights = weights * teacher.kept[:, None]
        loss = torch.bmm(grouped, weights[:, :, None]).squeeze(-1).neg()
        if self.entropy:
            loss = loss + _certainty(target_probs, weights)[:, None]
        if self.grad_enabled:
            grouped.exp_()
            if weights is not target_probs:
                grouped.mul_(weights.sum(-1)[:, None, None])
            grouped.sub_(weights[:, None])
        return loss, grouped


def _whole_log_probs(teacher: TeacherLogits, dtype: torch.dtype) -> Tensor:
    """The target's log-probabilities of the draft vocabulary as they are, [U, Vd]."""
    log_probs = torch.log_softmax(teacher.logits, dim=-1, dtype=dtype)
    return log_probs if teacher.log_mass is None else log_probs + teacher.log_mass[:, None]


def _certainty(target_probs: Tensor, weights: Tensor) -> Tensor:
    """The sum of w * log target_probs over tokens: [U, Vd] each -> [U]. With the weights target_probs it is the negative entropy."""
    # A token that the target can never say (a logit of -inf) adds nothing, not 0 * -inf.
    if weights is target_probs:
        return torch.special.entr(target_probs).sum(-1).neg()
    return torch.where(weights > 0, weights * target_probs.log(), 0.0).sum(-1)

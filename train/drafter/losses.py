"""Losses of draft heads: plain functions from tensors to sums, with an eager twin beside each fast one.

Owns: smooth L1 on predicted features; the output head's matrix product and what follows it (cross-entropy, Kullback-Leibler
divergence, top-k counts). These are computed chunk by chunk: no tensor is larger than chunk x draft vocabulary, forward or backward.
Does not know: drafters, batches, devices of a run, Lightning, where teachers' probabilities come from.

Why gradients are computed in the forward pass: the loss is a weighted sum over rows, and the weights are known beforehand. So
d(loss)/d(logits) of a chunk is known as soon as its logits are. Keeping the logits for a backward pass would cost K x A x Vd floats
(64 GB for 5 steps of 25k anchors at a vocabulary of 128k).

Shape legend: T packed tokens, K draft steps, A anchors, D hidden, E head inputs, V target vocabulary, Vd draft vocabulary, r columns of a
correction, R rows = (step, anchor) pairs that count, C rows of one chunk, U distinct predicted positions, G rows that share one position.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from draftsmith.train.drafter.chunk_rows import default_chunk_rows

Heads = Tensor | Sequence[Tensor]
"""Output heads: one [Vd, E] for all draft steps, or one for each of the K."""

OUTSIDE = -1
"""Draft id of a target token that the draft vocabulary does not hold."""


@dataclass(frozen=True)
class TeacherLogits:
    """What a target says at n positions.

    Attributes:
        logits: [n, Vd], over the draft vocabulary.
        kept: bool [n], False where nothing is to be learned from a position; None keeps all.
    """

    logits: Tensor
    kept: Tensor | None = None


@dataclass(frozen=True)
class TopEmphasis:
    """HASS's top-K distillation (arXiv 2408.15766, section 3.1): an extra loss beside the whole divergence.

    Attributes:
        weight: of the extra loss.
        count: K; the extra loss is the cross-entropy restricted to this many of the target's likeliest tokens.
    """

    weight: float
    count: int = 10


@dataclass(frozen=True)
class StepSums:
    """Sums over the rows of each draft step. Divide by the counts of all ranks to get means.

    Attributes:
        total: [] differentiable, the sum over k of step_weights[k] * loss_sum[k].
        loss_sum: [K] detached, in nats; of a divergence without the target's entropy, the soft cross-entropy.
        loss_rows: [K], rows in the loss, each as much as its weight.
        rows: [K], valid rows, those outside the draft vocabulary included. Accuracies are relative to these.
        top1: [K], rows whose target is the best token; None when not asked for.
        top5: [K], rows whose target is among the 5 best tokens; None when not asked for.
        feature_sum: [K], summed smooth L1; None where features are not learned.
    """

    total: Tensor
    loss_sum: Tensor
    loss_rows: Tensor
    rows: Tensor
    top1: Tensor | None
    top5: Tensor | None
    feature_sum: Tensor | None = None


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

    Raises:
        ValueError: shapes that do not fit.
    """
    weights = _checked_weights(head_inputs, heads, correction, targets, valid, step_weights, row_weights)
    flat_targets, flat_valid = targets.T.reshape(-1), valid.T.reshape(-1)
    row_ids = torch.nonzero(flat_valid & (flat_targets != OUTSIDE)).squeeze(1)
    job = _CrossEntropyJob(
        row_ids=row_ids,
        row_targets=flat_targets[row_ids],
        num_anchors=head_inputs.shape[1],
        chunk_rows=chunk_rows or default_chunk_rows(weights[0].shape[0]),
        metrics=metrics,
        grad_enabled=torch.is_grad_enabled(),
        row_weights=None if row_weights is None else row_weights.T.reshape(-1),
    )
    return _run(job, head_inputs, weights, correction, valid, step_weights)


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
) -> StepSums:
    """KL(target_probs || draft_probs) of every draft step, with the target's distribution along its own path.

    The softmax of the teacher's logits is the target's distribution renormalised over the draft vocabulary. The divergence is exact with
    respect to it; probability outside is not counted. Rows whose teacher is not kept add nothing and still count in the mean. (arXiv
    2503.01840 leaves out rows whose likeliest token is outside the draft vocabulary.) Rows with the same teacher row are computed
    together, so each teacher distribution is computed once.

    Local distillation (arXiv 2403.09919, section 4.2) is head_cross_entropy on another rollout.

    Args:
        head_inputs: float [K, A, E], or [K, A, E + r] with a correction.
        heads: float [Vd, E], the head of all steps; or K of them, the head of each step.
        teacher: TeacherLogits of n teacher rows, from their ids int64 [n].
        teacher_rows: int64 [A, K], which teacher row (a, k) is to match.
        targets: int64 [A, K], draft ids, for the accuracies only.
        valid: bool [A, K], rows that count.
        step_weights: float [K].
        chunk_rows: C; None chooses.
        metrics: count top-1 and top-5 too.
        emphasis: adds its weight times the divergence's terms of the target's top tokens, whose sum may be negative.
        entropy: subtract the target's entropy, which changes no gradient. Without it the loss is the soft cross-entropy.
        row_weights: float [A, K], of each row's loss; accuracies count all rows alike. None is 1 everywhere.
        correction: float [Vd, r]; see head_cross_entropy.

    Raises:
        ValueError: shapes that do not fit.
    """
    weights = _checked_weights(head_inputs, heads, correction, targets, valid, step_weights, row_weights)
    flat_targets, flat_valid = targets.T.reshape(-1), valid.T.reshape(-1)
    teacher_ids, grid = group_by_teacher(teacher_rows.T.reshape(-1), flat_valid)
    num_grouped = max(1, grid.shape[1])
    job = _DistillationJob(
        teacher=teacher,
        emphasis=emphasis,
        teacher_ids=teacher_ids,
        grid=grid,
        flat_targets=flat_targets,
        num_anchors=head_inputs.shape[1],
        chunk_positions=max(1, (chunk_rows or default_chunk_rows(weights[0].shape[0])) // num_grouped),
        metrics=metrics,
        grad_enabled=torch.is_grad_enabled(),
        entropy=entropy,
        row_weights=None if row_weights is None else row_weights.T.reshape(-1),
    )
    return _run(job, head_inputs, weights, correction, valid, step_weights)


@dataclass(frozen=True)
class FeatureSums:
    """Sums over the rows of each draft step.

    Attributes:
        total: [] differentiable, the sum over k of step_weights[k] times the weighted loss of its rows.
        loss_sum: [K] detached, all rows alike.
    """

    total: Tensor
    loss_sum: Tensor


def feature_smooth_l1(
    predicted: Tensor,
    features: Tensor,
    feature_rows: Tensor,
    valid: Tensor,
    step_weights: Tensor,
    row_weights: Tensor | None = None,
) -> FeatureSums:
    """Smooth L1 between predicted and true features, averaged over their entries (arXiv 2401.15077, eq. 3).

    Args:
        predicted: float [K, A, D].
        features: float [T, D], the target's.
        feature_rows: int64 [A, K], which feature row (a, k) predicts.
        valid: bool [A, K], rows that count.
        step_weights: float [K].
        row_weights: float [A, K], of each row; None is 1 everywhere.
    """
    true = features[feature_rows.T].to(predicted.dtype)
    distance = torch.nn.functional.smooth_l1_loss(predicted, true, reduction="none").mean(-1)
    distance = torch.where(valid.T, distance, 0.0)
    weighted = distance if row_weights is None else distance * row_weights.T.to(distance.dtype)
    total = (step_weights.to(distance.dtype) * weighted.sum(1)).sum()
    return FeatureSums(total, distance.sum(1).detach())


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


@dataclass(frozen=True)
class _Chunk:
    """row_ids [C] flat rows (step * A + anchor), row_mask [C] bool | None: rows that count (None: all do)."""

    row_ids: Tensor
    row_mask: Tensor | None
    payload: Tensor


@dataclass(frozen=True)
class _CrossEntropyJob:
    row_ids: Tensor
    row_targets: Tensor
    num_anchors: int
    chunk_rows: int
    metrics: bool
    grad_enabled: bool
    row_weights: Tensor | None

    def chunks(self) -> Iterator[_Chunk]:
        pairs = zip(self.row_ids.split(self.chunk_rows), self.row_targets.split(self.chunk_rows), strict=True)
        return (_Chunk(ids, None, row_targets) for ids, row_targets in pairs)

    def targets_of(self, chunk: _Chunk) -> Tensor:
        return chunk.payload

    def loss_and_grad(self, chunk: _Chunk, log_probs: Tensor) -> tuple[Tensor, Tensor]:
        """log_probs [C, Vd], overwritten -> loss [C], d(loss)/d(logits) [C, Vd] = draft_probs - one_hot(target)."""
        picked = chunk.payload[:, None]
        loss = -log_probs.gather(1, picked).squeeze(1)
        if self.grad_enabled:
            log_probs.exp_().scatter_add_(1, picked, log_probs.new_full((), -1.0).expand(picked.shape))
        return loss, log_probs


@dataclass(frozen=True)
class _DistillationJob:
    teacher: Callable[[Tensor], TeacherLogits]
    emphasis: TopEmphasis | None
    teacher_ids: Tensor
    grid: Tensor
    flat_targets: Tensor
    num_anchors: int
    chunk_positions: int
    metrics: bool
    grad_enabled: bool
    entropy: bool
    row_weights: Tensor | None

    def chunks(self) -> Iterator[_Chunk]:
        for ids, grid in zip(
            self.teacher_ids.split(self.chunk_positions), self.grid.split(self.chunk_positions), strict=True
        ):
            flat = grid.reshape(-1)
            yield _Chunk(flat.clamp(min=0), flat >= 0, ids)

    def targets_of(self, chunk: _Chunk) -> Tensor:
        return self.flat_targets[chunk.row_ids]

    def loss_and_grad(self, chunk: _Chunk, log_probs: Tensor) -> tuple[Tensor, Tensor]:
        """log_probs [U * G, Vd], overwritten -> loss [U * G], d(loss)/d(logits) [U * G, Vd].

        The loss is sum(w * (log target_probs - log draft_probs)) with weights w whose sum is s. Its gradient is s draft_probs - w.
        Without emphasis, w is target_probs and s is 1. Without entropy, the loss is -sum(w * log draft_probs).
        """
        teacher = self.teacher(chunk.payload)
        target_probs = torch.softmax(teacher.logits, dim=-1, dtype=log_probs.dtype)
        weights = target_probs
        if self.emphasis is not None:
            top, places = target_probs.topk(min(self.emphasis.count, target_probs.shape[-1]), dim=-1)
            weights = target_probs.scatter_add(1, places, self.emphasis.weight * top)
        if teacher.kept is not None:
            weights = weights * teacher.kept[:, None]
        grouped = log_probs.view(len(chunk.payload), -1, log_probs.shape[-1])
        cross_entropy = torch.bmm(grouped, weights[:, :, None]).squeeze(-1).neg()
        loss = (cross_entropy + _certainty(target_probs, weights)[:, None] if self.entropy else cross_entropy).reshape(
            -1
        )
        if self.grad_enabled:
            grouped.exp_()
            if weights is not target_probs:
                grouped.mul_(weights.sum(-1)[:, None, None])
            grouped.sub_(weights[:, None])
        return loss, log_probs


def _certainty(target_probs: Tensor, weights: Tensor) -> Tensor:
    """The sum of w * log target_probs over tokens: [U, Vd] each -> [U]. With the weights target_probs it is the negative entropy."""
    # A token that the target can never say (a logit of -inf) adds nothing, not 0 * -inf.
    if weights is target_probs:
        return torch.special.entr(target_probs).sum(-1).neg()
    return torch.where(weights > 0, weights * target_probs.log(), 0.0).sum(-1)


_Job = _CrossEntropyJob | _DistillationJob


@dataclass(frozen=True)
class _Factor:
    """One matrix of the output head: the rows of a chunk and the columns of its inputs that go through it."""

    rows: Tensor | slice
    columns: slice
    weight: Tensor
    grad: Tensor | None


class _ChunkedHead(torch.autograd.Function):
    """Sums over chunks of rows; gradients are made beside the loss and only scaled in backward."""

    @staticmethod
    def forward(
        ctx: Any, head_inputs: Tensor, step_weights: Tensor, job: _Job, is_corrected: bool, *heads: Tensor
    ) -> tuple:
        num_steps, num_anchors, width = head_inputs.shape
        device_type = head_inputs.device.type
        compute_dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
        flat_inputs = head_inputs.reshape(num_steps * num_anchors, width)
        compute_dtype = compute_dtype or torch.promote_types(head_inputs.dtype, heads[0].dtype)
        weights = [head.to(compute_dtype) for head in heads]
        sum_dtype = torch.promote_types(torch.float32, heads[0].dtype)
        sums = torch.zeros(4, num_steps, dtype=sum_dtype, device=head_inputs.device)
        grad_inputs = torch.zeros_like(flat_inputs) if job.grad_enabled and head_inputs.requires_grad else None
        grad_weights = [
            torch.zeros_like(head, dtype=sum_dtype) if job.grad_enabled and head.requires_grad else None
            for head in heads
        ]
        with torch.autocast(device_type, enabled=False):
            for chunk in job.chunks():
                if not len(chunk.row_ids):  # splitting nothing gives one empty piece
                    continue
                inputs = flat_inputs.index_select(0, chunk.row_ids).to(compute_dtype)
                steps = torch.div(chunk.row_ids, job.num_anchors, rounding_mode="floor")
                factors = _factors(steps, weights, grad_weights, is_corrected)
                _one_chunk(job, chunk, steps, inputs, factors, step_weights.to(sum_dtype), sums, grad_inputs)
        total = (step_weights.to(sum_dtype) * sums[0]).sum()
        ctx.shape = head_inputs.shape
        ctx.head_dtypes = [head.dtype for head in heads]
        ctx.save_for_backward(grad_inputs, *grad_weights)
        ctx.mark_non_differentiable(sums)
        return total, sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, _grad_sums: Tensor) -> tuple:
        inputs_grad, *weight_grads = ctx.saved_tensors
        grad_inputs = None if inputs_grad is None else (inputs_grad * grad_total).view(ctx.shape)
        grad_weights = [
            None if grad is None else (grad * grad_total).to(dtype)
            for grad, dtype in zip(weight_grads, ctx.head_dtypes, strict=True)
        ]
        return grad_inputs, None, None, None, *grad_weights


def _factors(
    steps: Tensor, weights: Sequence[Tensor], grads: Sequence[Tensor | None], is_corrected: bool
) -> list[_Factor]:
    """The matrices of a chunk; the last weight is the correction where there is one, which every row goes through."""
    num_heads, width = len(weights) - is_corrected, weights[0].shape[1]
    rows_of_heads = _rows_of_heads(steps, num_heads)
    given = zip(rows_of_heads, weights[:num_heads], grads[:num_heads], strict=True)
    factors = [_Factor(rows, slice(width), weight, grad) for rows, weight, grad in given]
    if is_corrected:
        factors.append(_Factor(slice(None), slice(width, None), weights[-1], grads[-1]))
    return factors


def _one_chunk(
    job: _Job,
    chunk: _Chunk,
    steps: Tensor,
    inputs: Tensor,
    factors: Sequence[_Factor],
    step_weights: Tensor,
    sums: Tensor,
    grad_inputs: Tensor | None,
) -> None:
    """Adds one chunk to sums [4, K] (loss, loss rows, top-1, top-5) and, scaled by step weights, to the gradients."""
    # Softmax in float32 (or better) whatever the matrix product's dtype: bf16 has 8 bits and a vocabulary has 2^17.
    log_probs = torch.log_softmax(_logits(inputs, factors), dim=-1, dtype=sums.dtype)
    keep = torch.ones_like(steps, dtype=sums.dtype) if chunk.row_mask is None else chunk.row_mask.to(sums.dtype)
    if job.metrics:
        ranks = _ranks(log_probs, job.targets_of(chunk))
        sums[2].index_add_(0, steps, keep * (ranks < 1))
        sums[3].index_add_(0, steps, keep * (ranks < 5))
    if job.row_weights is not None:
        keep = keep * job.row_weights[chunk.row_ids]
    loss, grad_logits = job.loss_and_grad(chunk, log_probs)
    sums[0].index_add_(0, steps, loss * keep)
    sums[1].index_add_(0, steps, keep)
    scales = (keep * step_weights[steps])[:, None]
    for factor in factors:
        if grad_inputs is None and factor.grad is None:
            continue
        rows, weight = factor.rows, factor.weight
        rows_grad = grad_logits[rows].to(weight.dtype)
        if factor.grad is not None:
            own_inputs = inputs[rows][:, factor.columns]
            _add_product(factor.grad, rows_grad.T, own_inputs * scales[rows].to(inputs.dtype))
        if grad_inputs is not None:
            # Masked slots add exact zeros to row 0.
            own_grad = ((rows_grad @ weight) * scales[rows]).to(grad_inputs.dtype)
            grad_inputs[:, factor.columns].index_add_(0, chunk.row_ids[rows], own_grad)


def _rows_of_heads(steps: Tensor, num_heads: int) -> list[Tensor | slice]:
    """Which rows of a chunk each head is for: all of them for the only one, else those of its step; steps int64 [C]."""
    if num_heads == 1:
        return [slice(None)]
    sizes = torch.bincount(steps, minlength=num_heads).tolist()
    return list(steps.argsort(stable=True).split(sizes))


def _logits(inputs: Tensor, factors: Sequence[_Factor]) -> Tensor:
    """inputs [C, E + r] -> [C, Vd], each row by its own head, and by the correction."""
    first = factors[0]
    if isinstance(first.rows, slice):
        logits = inputs[:, first.columns] @ first.weight.T
        for factor in factors[1:]:
            logits.addmm_(inputs[:, factor.columns], factor.weight.T)
        return logits
    logits = inputs.new_zeros(len(inputs), first.weight.shape[0])
    for factor in factors:
        logits[factor.rows] += inputs[factor.rows][:, factor.columns] @ factor.weight.T
    return logits


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, without a tensor between where the dtypes allow."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def _ranks(log_probs: Tensor, targets: Tensor) -> Tensor:
    """How many draft ids come before the target: log_probs [C, Vd], targets [C] -> [C] int64; OUTSIDE -> Vd.

    Ties go to the smaller id, as argmax does; without that a head of zeros would score 100 %.
    """
    picked = targets.clamp(min=0)[:, None]
    target_scores = log_probs.gather(1, picked)
    better = (log_probs > target_scores).sum(-1)
    tied = (log_probs == target_scores).sum(-1) > 1
    if bool(tied.any()):
        ids = torch.arange(log_probs.shape[-1], device=log_probs.device)
        better[tied] += ((log_probs[tied] == target_scores[tied]) & (ids < picked[tied])).sum(-1)
    return torch.where(targets == OUTSIDE, log_probs.shape[-1], better)


def _run(
    job: _Job,
    head_inputs: Tensor,
    weights: Sequence[Tensor],
    correction: Tensor | None,
    valid: Tensor,
    step_weights: Tensor,
) -> StepSums:
    matrices = weights if correction is None else [*weights, correction]
    total, sums = _ChunkedHead.apply(head_inputs, step_weights, job, correction is not None, *matrices)
    top1, top5 = (sums[2], sums[3]) if job.metrics else (None, None)
    return StepSums(total, sums[0], sums[1], valid.sum(0).to(sums.dtype), top1, top5)


def _checked_weights(
    head_inputs: Tensor,
    heads: Heads,
    correction: Tensor | None,
    targets: Tensor,
    valid: Tensor,
    step_weights: Tensor,
    row_weights: Tensor | None,
) -> list[Tensor]:
    """The heads as a list of one or K, and all shapes checked."""
    num_steps, num_anchors, width = head_inputs.shape
    expected = {"targets": (num_anchors, num_steps), "valid": (num_anchors, num_steps), "step_weights": (num_steps,)}
    given = {"targets": targets.shape, "valid": valid.shape, "step_weights": step_weights.shape}
    if row_weights is not None:
        expected["row_weights"], given["row_weights"] = expected["valid"], row_weights.shape
    for name, shape in expected.items():
        if tuple(given[name]) != shape:
            raise ValueError(f"{name} has shape {tuple(given[name])}; head_inputs {num_steps, num_anchors} ask {shape}")
    weights = [heads] if isinstance(heads, Tensor) else list(heads)
    if len(weights) not in (1, num_steps):
        raise ValueError(f"{len(weights)} heads are given for {num_steps} draft steps; give one, or one for each step")
    if correction is not None:
        width -= correction.shape[1]
        if correction.shape[0] != weights[0].shape[0]:
            raise ValueError(
                f"a correction of {correction.shape[0]} rows is given beside a head of {weights[0].shape[0]}; both need one row a token"
            )
    for weight in weights:
        if weight.shape != (weights[0].shape[0], width):
            raise ValueError(
                f"a head has shape {tuple(weight.shape)}; head_inputs of width {width} need {(weights[0].shape[0], width)}"
            )
    return weights

"""The output head's matrix product, chunk by chunk, and the gradients of whatever loss follows it.

Owns: the loop over chunks, sums and top-k counts, the gradients of head inputs and heads. No tensor is larger than chunk x draft
vocabulary, forward or backward. Does not know: which loss it is, where teachers' probabilities come from.

Why gradients are computed in the forward pass: the loss is a weighted sum over rows, and the weights are known as soon as the logits of a
chunk are. So d(loss)/d(logits) of a chunk is known then, too. Keeping the logits for a backward pass would cost K x A x Vd floats
(64 GB for 5 steps of 25k anchors at a vocabulary of 128k).

Shape legend: K draft steps, A anchors, E head inputs, Vd draft vocabulary, r columns of a correction, C rows of one chunk; a row is a
(step, anchor) pair.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from draftsmith.train.losses.d_pace import DPace
from draftsmith.train.losses.sums import OUTSIDE, Heads, StepSums


@dataclass(frozen=True)
class Chunk:
    """Rows that are computed together.

    Attributes:
        row_ids: int64 [C], flat rows (step * A + anchor).
        row_mask: bool [C], rows that are in the loss; None where all are.
        payload: what the loss needs of them.
    """

    row_ids: Tensor
    row_mask: Tensor | None
    payload: Tensor


@dataclass(frozen=True)
class RowLosses:
    """What a loss makes of a chunk.

    Attributes:
        loss: float [C].
        grad_logits: float [C, Vd], its derivative by the logits.
        accepted: float [C], the chance that each row is accepted; None where nobody asks.
    """

    loss: Tensor
    grad_logits: Tensor
    accepted: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Job(ABC):
    """One loss over one batch.

    Attributes:
        num_anchors: A.
        metrics: count top-1 and top-5 too.
        grad_enabled: whether gradients are asked for.
        row_weights: float [K * A], of each row's loss; None is 1 everywhere.
        d_pace: weighs rows by their acceptance too; None does not.
        keep_accepted: return the acceptance of each row.
    """

    num_anchors: int
    metrics: bool
    grad_enabled: bool
    row_weights: Tensor | None
    d_pace: DPace | None = None
    keep_accepted: bool = False

    @abstractmethod
    def chunks(self) -> Iterator[Chunk]:
        """The rows, in chunks."""

    @abstractmethod
    def targets_of(self, chunk: Chunk) -> Tensor:
        """int64 [C], draft ids of the text's tokens, OUTSIDE where there is none."""

    @abstractmethod
    def row_losses(self, chunk: Chunk, log_probs: Tensor) -> RowLosses:
        """The loss of a chunk from the drafter's log_probs [C, Vd], which it may overwrite."""


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
        ctx: Any, head_inputs: Tensor, step_weights: Tensor, job: Job, is_corrected: bool, *heads: Tensor
    ) -> tuple:
        num_steps, num_anchors, width = head_inputs.shape
        device_type = head_inputs.device.type
        compute_dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
        flat_inputs = head_inputs.reshape(num_steps * num_anchors, width)
        compute_dtype = compute_dtype or torch.promote_types(head_inputs.dtype, heads[0].dtype)
        weights = [head.to(compute_dtype) for head in heads]
        sum_dtype = torch.promote_types(torch.float32, heads[0].dtype)
        sums = torch.zeros(4, num_steps, dtype=sum_dtype, device=head_inputs.device)
        accepted = sums.new_zeros(num_steps * num_anchors if job.keep_accepted else 0)
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
                _one_chunk(job, chunk, steps, inputs, factors, step_weights.to(sum_dtype), sums, accepted, grad_inputs)
        total = (step_weights.to(sum_dtype) * sums[0]).sum()
        ctx.shape = head_inputs.shape
        ctx.head_dtypes = [head.dtype for head in heads]
        ctx.save_for_backward(grad_inputs, *grad_weights)
        ctx.mark_non_differentiable(sums, accepted)
        return total, sums, accepted

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, _grad_sums: Tensor, _grad_accepted: Tensor) -> tuple:
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
    job: Job,
    chunk: Chunk,
    steps: Tensor,
    inputs: Tensor,
    factors: Sequence[_Factor],
    step_weights: Tensor,
    sums: Tensor,
    accepted: Tensor,
    grad_inputs: Tensor | None,
) -> None:
    """Adds one chunk to sums [4, K] (loss, loss rows, top-1, top-5) and, scaled by step weights, to the gradients; fills in accepted."""
    # Softmax in float32 (or better) whatever the matrix product's dtype: bf16 has 8 bits and a vocabulary has 2^17.
    log_probs = torch.log_softmax(_logits(inputs, factors), dim=-1, dtype=sums.dtype)
    keep = torch.ones_like(steps, dtype=sums.dtype) if chunk.row_mask is None else chunk.row_mask.to(sums.dtype)
    if job.metrics:
        ranks = _ranks(log_probs, job.targets_of(chunk))
        sums[2].index_add_(0, steps, keep * (ranks < 1))
        sums[3].index_add_(0, steps, keep * (ranks < 5))
    losses = job.row_losses(chunk, log_probs)
    if job.keep_accepted and losses.accepted is not None:
        # Masked slots of a chunk add zeros to row 0.
        accepted.index_add_(0, chunk.row_ids, losses.accepted * keep)
    if job.row_weights is not None:
        keep = keep * job.row_weights[chunk.row_ids]
    sums[1].index_add_(0, steps, keep)
    if job.d_pace is not None and losses.accepted is not None:
        keep = keep * job.d_pace.weights(chunk.row_ids, losses.accepted)
    sums[0].index_add_(0, steps, losses.loss * keep)
    scales = (keep * step_weights[steps])[:, None]
    _add_gradients(factors, inputs, losses.grad_logits, scales, chunk.row_ids, grad_inputs)


def _add_gradients(
    factors: Sequence[_Factor],
    inputs: Tensor,
    grad_logits: Tensor,
    scales: Tensor,
    row_ids: Tensor,
    grad_inputs: Tensor | None,
) -> None:
    """Adds what a chunk gives to the gradients of the heads and of the head inputs; scales float [C, 1] multiply its rows."""
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
            grad_inputs[:, factor.columns].index_add_(0, row_ids[rows], own_grad)


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


def run_job(
    job: Job,
    head_inputs: Tensor,
    weights: Sequence[Tensor],
    correction: Tensor | None,
    valid: Tensor,
    step_weights: Tensor,
) -> StepSums:
    """Sums a loss over the rows of a batch.

    Args:
        job: the loss.
        head_inputs: float [K, A, E], or [K, A, E + r] with a correction.
        weights: float [Vd, E], one head or K of them.
        correction: float [Vd, r], or None.
        valid: bool [A, K], rows that count.
        step_weights: float [K].
    """
    matrices = weights if correction is None else [*weights, correction]
    total, sums, accepted = _ChunkedHead.apply(head_inputs, step_weights, job, correction is not None, *matrices)
    top1, top5 = (sums[2], sums[3]) if job.metrics else (None, None)
    kept = accepted.view(head_inputs.shape[:2]) if job.keep_accepted else None
    return StepSums(total, sums[0], sums[1], valid.sum(0).to(sums.dtype), top1, top5, accepted=kept)


def checked_weights(
    head_inputs: Tensor,
    heads: Heads,
    correction: Tensor | None,
    targets: Tensor,
    valid: Tensor,
    step_weights: Tensor,
    row_weights: Tensor | None,
) -> list[Tensor]:
    """The heads as a list of one or K, and all shapes checked.

    Args:
        head_inputs: float [K, A, E], or [K, A, E + r] with a correction.
        heads: one or K of [Vd, E].
        correction: float [Vd, r], or None.
        targets: int64 [A, K].
        valid: bool [A, K].
        step_weights: float [K].
        row_weights: float [A, K], or None.

    Raises:
        ValueError: shapes that do not fit.
    """
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

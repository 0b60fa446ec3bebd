"""Plain twins of the losses in `losses.py`: the same sums in a few lines each, with every logit in memory at once.

Owns: the definitions that the chunked losses must equal, for reading and for small problems. Tests compare both.
Does not know: chunks, hand-written gradients, anything of training.

Shape legend: K draft steps, A anchors, D hidden, E head inputs, T packed tokens, Vd draft vocabulary, R teacher rows.
"""

import torch
from torch import Tensor

from draftsmith.train.drafter.losses import OUTSIDE, StepSums, TeacherLogits, TopEmphasis


def head_cross_entropy_eager(
    head_inputs: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    valid: Tensor,
    step_weights: Tensor,
    correction: Tensor | None = None,
) -> StepSums:
    """Twin of losses.head_cross_entropy, which explains the arguments.

    Args:
        head_inputs: float [K, A, E], or [K, A, E + r].
        head_weight: float [Vd, E].
        targets: int64 [A, K].
        valid: bool [A, K].
        step_weights: float [K].
        correction: float [Vd, r], or None.
    """
    log_probs = _log_probs(head_inputs, head_weight, correction)
    step_targets, step_valid = targets.T, valid.T  # [K, A]
    in_loss = step_valid & (step_targets != OUTSIDE)
    picked = log_probs.gather(-1, step_targets.clamp(min=0)[..., None]).squeeze(-1)
    loss_sum = torch.where(in_loss, -picked, 0.0).sum(1)
    return _sums(loss_sum, in_loss, log_probs, step_targets, step_valid, step_weights)


def head_distillation_eager(
    head_inputs: Tensor,
    head_weight: Tensor,
    teacher: TeacherLogits,
    teacher_rows: Tensor,
    targets: Tensor,
    valid: Tensor,
    step_weights: Tensor,
    emphasis: TopEmphasis | None = None,
    correction: Tensor | None = None,
) -> StepSums:
    """Twin of losses.head_distillation, which explains the arguments.

    Args:
        head_inputs: float [K, A, E].
        head_weight: float [Vd, E].
        teacher: of all R teacher rows.
        teacher_rows: int64 [A, K], rows of `teacher`.
        targets: int64 [A, K].
        valid: bool [A, K].
        step_weights: float [K].
        emphasis: the extra loss, or None.
        correction: float [Vd, r], or None.
    """
    log_probs = _log_probs(head_inputs, head_weight, correction)
    target_probs = torch.softmax(teacher.logits, dim=-1)[teacher_rows.T]  # [K, A, Vd]
    terms = torch.xlogy(target_probs, target_probs) - target_probs * log_probs
    loss = terms.sum(-1)
    if emphasis is not None:
        top = target_probs.topk(min(emphasis.count, target_probs.shape[-1]), dim=-1).indices
        loss = loss + emphasis.weight * terms.gather(-1, top).sum(-1)
    if teacher.kept is not None:
        loss = loss * teacher.kept[teacher_rows.T]
    loss_sum = torch.where(valid.T, loss, 0.0).sum(1)
    return _sums(loss_sum, valid.T, log_probs, targets.T, valid.T, step_weights)


def feature_smooth_l1_eager(
    predicted: Tensor, features: Tensor, feature_rows: Tensor, valid: Tensor, step_weights: Tensor
) -> Tensor:
    """Twin of losses.feature_smooth_l1's total, row by row like the paper's formula.

    Args:
        predicted: float [K, A, D].
        features: float [T, D].
        feature_rows: int64 [A, K].
        valid: bool [A, K].
        step_weights: float [K].
    """
    total = predicted.new_zeros(())
    for anchor in range(valid.shape[0]):
        for step in range(valid.shape[1]):
            if valid[anchor, step]:
                gap = (predicted[step, anchor] - features[feature_rows[anchor, step]]).abs()
                total = total + step_weights[step] * torch.where(gap < 1, 0.5 * gap**2, gap - 0.5).mean()
    return total


def _log_probs(head_inputs: Tensor, head_weight: Tensor, correction: Tensor | None) -> Tensor:
    """[K, A, Vd]."""
    weight = head_weight if correction is None else torch.cat([head_weight, correction], dim=1)
    return torch.log_softmax(head_inputs @ weight.T, dim=-1)


def _sums(
    loss_sum: Tensor,
    in_loss: Tensor,
    log_probs: Tensor,
    step_targets: Tensor,
    step_valid: Tensor,
    step_weights: Tensor,
) -> StepSums:
    best = log_probs.topk(min(5, log_probs.shape[-1]), dim=-1).indices  # [K, A, 5]
    hits = (best == step_targets[..., None]) & (step_valid & (step_targets != OUTSIDE))[..., None]
    return StepSums(
        total=(step_weights * loss_sum).sum(),
        loss_sum=loss_sum.detach(),
        loss_rows=in_loss.sum(1).to(loss_sum.dtype),
        rows=step_valid.sum(1).to(loss_sum.dtype),
        top1=hits[..., 0].sum(1).to(loss_sum.dtype),
        top5=hits.any(-1).sum(1).to(loss_sum.dtype),
    )

"""Plain twins of the chunked losses: the same sums in a few lines each, with every logit in memory at once.

Owns: the definitions that the chunked losses must equal, for reading and for small problems. Tests compare both.
Does not know: chunks, hand-written gradients, anything of training.

Shape legend: K draft steps, A anchors, D hidden, E head inputs, T packed tokens, Vd draft vocabulary, R teacher rows.
"""

from dataclasses import replace

import torch
from torch import Tensor

from draftsmith.train.losses.d_pace import d_pace_weights
from draftsmith.train.losses.distillation import FORWARD_KL
from draftsmith.train.losses.divergences import DivergenceLoss
from draftsmith.train.losses.sums import OUTSIDE, StepSums, TeacherLogits, TopEmphasis


def head_cross_entropy_eager(
    head_inputs: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    valid: Tensor,
    step_weights: Tensor,
    correction: Tensor | None = None,
    d_pace: float | None = None,
) -> StepSums:
    """Twin of head_cross_entropy, which explains the arguments.

    Args:
        head_inputs: float [K, A, E], or [K, A, E + r].
        head_weight: float [Vd, E].
        targets: int64 [A, K].
        valid: bool [A, K].
        step_weights: float [K].
        correction: float [Vd, r], or None.
        d_pace: smoothing, or None.
    """
    log_probs = _log_probs(head_inputs, head_weight, correction)
    step_targets, step_valid = targets.T, valid.T  # [K, A]
    in_loss = step_valid & (step_targets != OUTSIDE)
    picked = log_probs.gather(-1, step_targets.clamp(min=0)[..., None]).squeeze(-1)
    loss = torch.where(in_loss, -picked, 0.0)
    if d_pace is not None:
        chance = torch.where(step_targets == OUTSIDE, 0.0, picked.exp())
        loss = loss * d_pace_weights(chance.detach(), step_valid, d_pace)
    return _sums(loss.sum(1), in_loss, log_probs, step_targets, step_valid, step_weights)


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
    divergence: DivergenceLoss = FORWARD_KL,
    text_weight: float = 0.0,
    d_pace: float | None = None,
) -> StepSums:
    """Twin of head_distillation, which explains the arguments.

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
        divergence: what is minimised.
        text_weight: of the cross-entropy of the text.
        d_pace: smoothing, or None.
    """
    log_probs, rows, step_targets = _log_probs(head_inputs, head_weight, correction), teacher_rows.T, targets.T
    target = torch.log_softmax(teacher.logits, dim=-1)[rows]  # [K, A, Vd]
    whole = target if teacher.log_mass is None else target + teacher.log_mass[rows][..., None]
    accepted = torch.minimum(whole.exp(), log_probs.exp()).sum(-1)
    loss = divergence.value(target, log_probs, step_targets, accepted)
    if emphasis is not None:
        terms = torch.xlogy(target.exp(), target.exp()) - target.exp() * log_probs
        top = target.topk(min(emphasis.count, target.shape[-1]), dim=-1).indices
        loss = loss + emphasis.weight * terms.gather(-1, top).sum(-1)
    if text_weight > 0.0:
        picked = log_probs.gather(-1, step_targets.clamp(min=0)[..., None]).squeeze(-1)
        loss = (1.0 - text_weight) * loss + text_weight * torch.where(step_targets == OUTSIDE, 0.0, -picked)
    if teacher.kept is not None:
        loss = loss * teacher.kept[rows]
    if d_pace is not None:
        loss = loss * d_pace_weights(accepted.detach(), valid.T, d_pace)
    loss_sum = torch.where(valid.T, loss, 0.0).sum(1)
    sums = _sums(loss_sum, valid.T, log_probs, step_targets, valid.T, step_weights)
    return replace(sums, accepted=torch.where(valid.T, accepted, 0.0).detach())


def feature_smooth_l1_eager(
    predicted: Tensor, features: Tensor, feature_rows: Tensor, valid: Tensor, step_weights: Tensor
) -> Tensor:
    """Twin of feature_smooth_l1's total, row by row like the paper's formula.

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

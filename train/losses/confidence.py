"""The loss of a confidence head: binary cross-entropy with the acceptance that was measured (arXiv:2607.05147, section 3).

Owns: the loss. Does not know: drafters, where acceptances come from.

Shape legend: K draft steps, A anchors.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ConfidenceSums:
    """Sums over the rows of each draft step.

    Attributes:
        total: [] differentiable, the sum over k of step_weights[k] times the weighted loss of its rows.
        chances: [K] detached, the summed chances that the head gives, all rows alike.
    """

    total: Tensor
    chances: Tensor


def confidence_loss(
    logits: Tensor, accepted: Tensor, valid: Tensor, step_weights: Tensor, row_weights: Tensor | None = None
) -> ConfidenceSums:
    """Binary cross-entropy of each row; least where the chances equal the acceptances.

    Args:
        logits: float [K, A], of the chances.
        accepted: float [K, A], constant.
        valid: bool [A, K], rows that count.
        step_weights: float [K].
        row_weights: float [A, K], of each row; None is 1 everywhere.
    """
    logits = logits.to(accepted.dtype)
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, accepted, reduction="none")
    loss = torch.where(valid.T, loss, 0.0)
    weighted = loss if row_weights is None else loss * row_weights.T.to(loss.dtype)
    total = (step_weights.to(loss.dtype) * weighted.sum(1)).sum()
    return ConfidenceSums(total, torch.where(valid.T, logits.detach().sigmoid(), 0.0).sum(1))

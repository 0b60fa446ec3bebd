"""The loss on features that a draft head predicts.

Owns: smooth L1. Does not know: drafters, tokens, batches.

Shape legend: T packed tokens, K draft steps, A anchors, D hidden.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


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

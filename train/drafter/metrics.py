"""From the sums of a batch or a validation to the numbers that are logged, step by step. Pure functions."""

from __future__ import annotations

import torch
from torch import Tensor

from draftsmith.train.drafter.objective import Objective
from draftsmith.train.losses.sums import StepSums


def pool(sums: StepSums) -> Tensor:
    """The sums as one tensor.

    Args:
        sums: with top-1 and top-5.

    Returns:
        float [7, K]: loss_sum, loss_rows, rows, top1, top5, feature_sum and recalled (zeros where there is no such loss); or [9, K], where
        the acceptance is known: its sum, and the sum of the chance that a step and all before it are accepted; or [10, K] with the sum of
        a confidence head's chances.
    """
    assert sums.top1 is not None
    assert sums.top5 is not None
    none = torch.zeros_like(sums.loss_sum)
    features, recalled = (none if part is None else part.to(none.dtype) for part in (sums.feature_sum, sums.recalled))
    rows = [sums.loss_sum, sums.loss_rows, sums.rows, sums.top1, sums.top5, features, recalled]
    if sums.accepted is not None:
        rows += [sums.accepted.sum(1), sums.accepted.cumprod(0).sum(1)]
        rows += [] if sums.chances is None else [sums.chances]
    return torch.stack(rows)


def means(pooled: Tensor, objective: Objective, stage: str) -> dict[str, float]:
    """Means by name, with the usual proxy for tokens per step.

    Args:
        pooled: float [7 to 10, K], as `pool` makes it, summed over batches and processes.
        objective: whose steps these are.
        stage: `train` or `val`, which every name begins with.
    """
    loss_sum, loss_rows, rows, top1, top5, feature_sum, recalled = pooled[:7]
    losses, accuracies = loss_sum / loss_rows.clamp(min=1), top1 / rows.clamp(min=1)
    horizon = objective.horizon_weights(losses.device)
    named = {f"{stage}/loss": float((losses * horizon).sum() / horizon.sum())}
    for step in range(len(losses)):
        named[f"{stage}/step{step}/loss"] = float(losses[step])
        named[f"{stage}/step{step}/top1"] = float(accuracies[step])
        named[f"{stage}/step{step}/top5"] = float(top5[step] / rows[step].clamp(min=1))
        if objective.feature_weight > 0.0:
            named[f"{stage}/step{step}/feature_loss"] = float(feature_sum[step] / rows[step].clamp(min=1))
        if bool(recalled.any()):
            named[f"{stage}/step{step}/candidate_recall"] = float(recalled[step] / rows[step].clamp(min=1))
    named[f"{stage}/proxy_tokens_per_step"] = proxy_tokens_per_step(accuracies)
    if len(pooled) > 7:
        accepted, reached, *chances = (each / rows.clamp(min=1) for each in pooled[7:])
        named |= {f"{stage}/step{step}/acceptance": float(share) for step, share in enumerate(accepted)}
        named |= {f"{stage}/step{step}/confidence": float(share) for each in chances for step, share in enumerate(each)}
        named[f"{stage}/expected_tokens_per_step"] = 1.0 + float(reached.sum())
    return named


def proxy_tokens_per_step(accuracies: Tensor) -> float:
    """Tokens per step as if draft steps were right independently: 1 + the sum of products of top-1 accuracies.

    Everybody reports it; real decoding differs. Example: (0.5, 0.5) -> 1 + 0.5 + 0.25.

    Args:
        accuracies: float [K], teacher-forced top-1.
    """
    return 1.0 + float(accuracies.cumprod(0).sum())

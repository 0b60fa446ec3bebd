"""The optimiser, its groups and the course of the learning rate that all trained modules here share.

Owns: AdamW as fast as the device allows, which weights decay, warm-up and cosine. Does not know: what the weights are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DeepSpeedStrategy, Strategy
from pytorch_lightning.utilities.rank_zero import rank_zero_info
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import nn

from draftsmith.train.run.averaging import AveragingAdamW


def weight_groups(weights: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Groups of the trained weights for an optimiser: decay on matrices only, no empty groups.

    Args:
        weights: of a module.
        weight_decay: of the matrices.
    """
    trained = [weight for weight in weights if weight.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [weight for weight in trained if weight.ndim > 1], "weight_decay": weight_decay},
        {"params": [weight for weight in trained if weight.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]  # an adapter has no vectors


def adamw(
    groups: Sequence[dict[str, Any]],
    strategy: Strategy,
    lr: float,
    betas: tuple[float, float],
    average_decay: float | None = None,
) -> torch.optim.AdamW:
    """AdamW, fused on CUDA: one kernel updates many weights. Elsewhere, and under DeepSpeed, torch chooses.

    Args:
        groups: as torch.optim.AdamW takes them.
        strategy: of the run.
        lr: peak learning rate.
        betas: AdamW's.
        average_decay: of a running average of the weights; None keeps none.
    """
    kind = torch.optim.AdamW if average_decay is None else partial(AveragingAdamW, decay=average_decay)
    if strategy.root_device.type != "cuda":
        return kind(groups, lr=lr, betas=betas)
    if isinstance(
        strategy, DeepSpeedStrategy
    ):  # it keeps the count of steps on the CPU, where the kernel does not read it
        rank_zero_info("AdamW is not fused: DeepSpeed divides its states")
        return kind(groups, lr=lr, betas=betas)
    try:
        optimizer = kind(groups, lr=lr, betas=betas, fused=True)
    except RuntimeError as error:  # what torch raises for weights that it cannot update in one kernel
        rank_zero_info(f"AdamW is not fused, so its steps take longer: {error}")
        return kind(groups, lr=lr, betas=betas)
    # Lightning clips no gradients of an optimiser that unscales them itself. This one need not: torch's scaler does it as well.
    optimizer._step_supports_amp_scaling = False
    return optimizer


def warm_up_then_cosine(
    trainer: pl.Trainer, optimizer: torch.optim.Optimizer, warmup_ratio: float, min_lr_ratio: float
) -> OptimizerLRSchedulerConfig:
    """What configure_optimizers returns: the rate rises linearly over warmup_ratio of all steps, then falls to min_lr_ratio of its peak.

    Args:
        trainer: of the run.
        optimizer: whose rate.
        warmup_ratio: share of the steps.
        min_lr_ratio: share of the peak.

    Raises:
        ValueError: a run without an end.
    """
    total = trainer.estimated_stepping_batches
    if math.isinf(total):
        raise ValueError("the schedule needs an end: set trainer.max_steps or trainer.max_epochs")
    share = lambda step: lr_share(step, int(total), warmup_ratio, min_lr_ratio)  # noqa: E731
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def lr_share(step: int, total: int, warmup_ratio: float, min_lr_ratio: float) -> float:
    """Share of the peak rate at a step. Example: 10 steps, warm-up 0.2: 0.5, 1, then the cosine from 1.

    Args:
        step: from 0.
        total: steps of the run.
        warmup_ratio: share of the steps.
        min_lr_ratio: share of the peak.
    """
    warmup = max(1, round(warmup_ratio * total))
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return min_lr_ratio + (1.0 - min_lr_ratio) * 0.5 * (1.0 + math.cos(math.pi * progress))


def check_ratios(**ratios: float) -> None:
    """Checks shares of the run's steps or of the learning rate.

    Args:
        ratios: by the names of their settings.

    Raises:
        ValueError: one of them is not between 0 and 1.
    """
    for name, value in ratios.items():
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{name} is {value}; it must be between 0 and 1")

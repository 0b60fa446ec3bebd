"""A loss that is not finite ends the run, on all processes together.

Owns: when the loss is looked at, and what the error says. Does not know: how a loss is made.
"""

from __future__ import annotations

from collections.abc import Callable

import pytorch_lightning as pl
import torch
from torch import Tensor

from draftsmith.train.batches.cache_subset import CacheBatch
from draftsmith.train.run.collectives import start_sum


class FiniteLoss:
    """Looks at a step's loss after the backward pass. To look earlier would be to wait for the loss."""

    def __init__(self) -> None:
        self._pending: tuple[Callable[[], Tensor], Callable[[], ValueError]] | None = None

    def watch(self, module: pl.LightningModule, loss: Tensor, error: Callable[[], ValueError]) -> None:
        """Starts the sum over processes of how many have a loss that is not finite. Collective.

        Args:
            module: of the run.
            loss: of this process's batch, detached.
            error: what to raise, made only where it is needed.
        """
        self._pending = start_sum(module, (~torch.isfinite(loss)).float()), error

    def check(self) -> None:
        """Ends the run on every process if any has a loss that is not finite. One alone would leave the others waiting."""
        assert self._pending is not None
        (unsound, error), self._pending = self._pending, None
        if bool(unsound()):
            raise error()


def not_finite(loss: Tensor, batch: CacheBatch, step: int) -> ValueError:
    """The error of a step whose loss is not finite, on this process or on another.

    Args:
        loss: of this process's batch, detached.
        batch: this process's.
        step: the number of the step.

    Returns:
        What to raise.
    """
    bad = torch.zeros_like(batch.packed.loss_mask)
    for states in batch.packed.hidden.values():
        bad |= ~torch.isfinite(states).all(-1)
    samples = [batch.sample_ids[number] for number in batch.packed.document_ids[bad].unique().tolist()[:8]]
    if bool(torch.isfinite(loss)):
        cause = "the batch of another process, which says more"
    elif samples:
        cause = f"features of {', '.join(samples)} hold NaN or infinity"
    else:
        cause = f"samples: {', '.join(batch.sample_ids[:8])}"
    return ValueError(
        f"the loss is {loss.item()} at step {step}; {cause}; if the features are sound, lower lr or set trainer.gradient_clip_val"
    )

"""A loss that is not finite ends the run, on all processes together.

Owns: when the loss is looked at. Does not know: batches, or why a loss is not finite.
"""

from __future__ import annotations

from collections.abc import Callable

import pytorch_lightning as pl
import torch
from torch import Tensor

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

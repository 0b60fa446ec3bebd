"""How fast a run trains.

Owns: the clock, tokens per second. Does not know: losses, validation.
"""

from __future__ import annotations

import time
from typing import Any

import pytorch_lightning as pl
import torch

from draftsmith.train.batches.cache_subset import CacheBatch
from draftsmith.train.run.collectives import sum_over_ranks


class Throughput(pl.Callback):
    """Shows and logs labelled (assistant) tokens trained on per second, over all ranks, without validation time.

    Args:
        every: report after this many batches.

    Raises:
        ValueError: `every` is below 1.
    """

    def __init__(self, every: int = 10) -> None:
        if every < 1:
            raise ValueError(f"every is {every}; it must be at least 1")
        self.every = every
        self._tokens: torch.Tensor | int = 0
        self._started = 0.0

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Starts the clock, unless it still runs from the last batch: the time to load a batch counts too."""
        if not self._started:
            self._started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: CacheBatch, batch_idx: int
    ) -> None:
        """Adds the batch, and reports once enough have come together."""
        # Left on the device until it is reported: reading it would wait for the step at every batch.
        self._tokens = self._tokens + batch.packed.loss_mask.sum()
        if (batch_idx + 1) % self.every:
            return
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        now = time.perf_counter()
        tokens = sum_over_ranks(pl_module, torch.as_tensor(self._tokens, device=pl_module.device))
        rate = int(tokens) / max(1e-9, now - self._started)
        pl_module.log("train/tokens_per_second", rate, prog_bar=True, batch_size=1)
        self._tokens, self._started = 0, now

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Drops a window that validation would fall into."""
        self._tokens, self._started = 0, 0.0

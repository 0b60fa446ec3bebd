"""Progress of a training run: one bar for the whole run in a terminal, a line every 30 seconds in a log file.

Owns the metrics beside the bar. Does not know what is trained. Lightning's own bars begin anew in every epoch and fill log files.
"""

from __future__ import annotations

import math
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ProgressBar
from pytorch_lightning.utilities.rank_zero import rank_zero_info

from draftsmith.data.progress import ProgressMeter


class RunProgress(ProgressBar):
    """Shows optimiser steps done, steps a second, time left and the latest metrics; prints a line for every validation.

    `draftsmith train fit` adds it, unless the YAML names another bar or sets `trainer.enable_progress_bar: false`.
    """

    def __init__(self) -> None:
        super().__init__()
        self._meter: ProgressMeter | None = None
        self._is_enabled = True
        self._step = 0

    def disable(self) -> None:
        """Called by Lightning in all processes but the first."""
        self._is_enabled = False

    def enable(self) -> None:
        """The opposite of `disable`."""
        self._is_enabled = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Shows the bar; a resumed run begins where it was."""
        self._step = trainer.global_step
        if self._is_enabled:
            steps = trainer.estimated_stepping_batches
            total = int(steps) if 0 <= steps < math.inf else None
            self._meter = ProgressMeter("train", total, "steps", done=self._step)
            self._meter.start()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Several batches may make one step."""
        if self._meter is not None and trainer.global_step > self._step:
            self._meter.advance(trainer.global_step - self._step, self._metrics(trainer, pl_module, validation=False))
            self._step = trainer.global_step

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Says why the bar stands still."""
        if self._meter is not None:
            self._meter.advance(0, "validating")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """One line, which stays on the screen."""
        if self._meter is not None and (metrics := self._metrics(trainer, pl_module, validation=True)):
            rank_zero_info(f"validation at step {trainer.global_step}: {metrics}")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leaves the bar as it is."""
        self._stop()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leaves the bar as it is, and gives the cursor back."""
        self._stop()

    def _stop(self) -> None:
        if self._meter is not None:
            self._meter.stop()
        self._meter = None

    def _metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule, validation: bool) -> str:
        """The metrics logged for the bar, those of validation or the others. Example: `loss 1.28`."""
        shown = {name: value for name, value in self.get_metrics(trainer, pl_module).items() if name != "v_num"}
        chosen = {name: value for name, value in shown.items() if name.startswith("val/") is validation}
        numbers = {name: value for name, value in chosen.items() if isinstance(value, int | float)}
        return ", ".join(f"{_plain(name)} {value:.4g}" for name, value in numbers.items())


def _plain(metric: str) -> str:
    """A metric's name as a person reads it: `val/tokens_per_step` -> `tokens per step`."""
    return metric.removeprefix("train/").removeprefix("val/").replace("_", " ")

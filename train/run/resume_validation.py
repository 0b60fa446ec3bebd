"""A validation that was due when a checkpoint was written comes first when a run resumes from it.

Owns which checkpoints lie before such a validation, and how they mark it. Does not know who writes them, or why.

Only public hooks of Lightning are used. Lightning itself would skip the validation, and with it what may have been the best drafter.
It reads from the counts in a checkpoint where the run was: a checkpoint between a batch and its validation is made to look like one in
the middle of that validation, which Lightning does run again.
"""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.utilities.rank_zero import rank_zero_info

from draftsmith.train.run.accumulation import validation_follows

_TRAINING = "epoch_loop.batch_progress"
_VALIDATION = "epoch_loop.val_loop.batch_progress"


class ResumeValidation(pl.Callback):
    """Notes in every checkpoint whether a validation was due, and lets a resumed run begin with it."""

    def __init__(self) -> None:
        self._batch_idx = 0
        self._has_validated = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Says where a resumed run begins."""
        if trainer.ckpt_path and trainer.global_step:
            rank_zero_info(f"resumed from {trainer.ckpt_path} at step {trainer.global_step}")

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Which batch of the epoch it is decides whether a validation follows."""
        self._batch_idx = batch_idx

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """From here to the end of its epoch, a validation is due."""
        self._has_validated = False

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """All that is to be measured has been."""
        self._has_validated = True

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Called for every checkpoint that can be resumed from, whoever writes it."""
        checkpoint["validation_due"] = self._is_due(trainer)
        if checkpoint["validation_due"]:
            # A batch that is not complete would tell Lightning that the validation is to be skipped.
            for counts in _counts(checkpoint, _TRAINING):
                counts["completed"] = counts["processed"]

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Called before Lightning reads the counts. Checkpoints written without this callback resume the way Lightning does by itself."""
        if "validation_due" not in checkpoint:
            return
        for counts in _counts(checkpoint, _VALIDATION):
            done = 0 if checkpoint["validation_due"] else counts["completed"]
            begun = done + int(checkpoint["validation_due"])
            counts.update(ready=begun, started=begun, processed=done, completed=done)

    def _is_due(self, trainer: pl.Trainer) -> bool:
        """Whether a checkpoint made now lies between a training batch and the end of the validation that follows it."""
        if trainer.validating:
            return not self._has_validated
        progress = trainer.fit_loop.epoch_loop.batch_progress.current
        # Between those two counts lies on_train_batch_end, where checkpoints every so many steps are written.
        return progress.processed == progress.completed + 1 and validation_follows(trainer, self._batch_idx)  # type: ignore[attr-defined]


def _counts(checkpoint: dict[str, Any], progress: str) -> list[dict[str, int]]:
    """Lightning's counts of batches, of the whole run and of the epoch."""
    of = checkpoint["loops"]["fit_loop"][progress]
    return [of["total"], of["current"]]

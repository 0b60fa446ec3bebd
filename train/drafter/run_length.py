"""How long a run is, said at its start, and whether its validations can tell anything.

Owns: the count of steps and validations, the warnings. Does not know: losses, data, what a validation measures.
"""

from __future__ import annotations

import math

import pytorch_lightning as pl
from pytorch_lightning.utilities.rank_zero import rank_zero_info, rank_zero_warn

from draftsmith.train.drafter.module import DraftModule
from draftsmith.train.run.accumulation import validates

FEW_STEPS = 100


class RunLength(pl.Callback):
    """Prints how many optimiser steps a run has; warns where a new drafter gets too few of them, or no validation comes.

    `draftsmith train fit` adds it.
    """

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Once the loaders are there to be counted."""
        steps = trainer.estimated_stepping_batches
        if not 0 <= steps < math.inf:
            rank_zero_info("this run has no last step: it ends by time, or when it is stopped")
            return
        batches, processes = trainer.num_training_batches, trainer.world_size
        shared = f" on each of {processes} processes" if processes > 1 else ""
        rank_zero_info(f"this run has {steps} optimiser steps; an epoch has {batches} batches{shared}")
        if isinstance(pl_module, DraftModule) and pl_module.beginning.folder is None and steps < FEW_STEPS:
            rank_zero_warn(
                f"{steps} optimiser steps are too few for a new drafter (fewer than {FEW_STEPS}): val/tokens_per_step may stay near 1 "
                "and tell nothing about the recipe; lower data.init_args.tokens_per_batch, raise trainer.max_epochs, or cache more replies"
            )
        first = _first_validation(trainer)
        if first > steps:
            rank_zero_warn(
                f"no validation comes: the first would follow step {first:.0f}, and the run has {steps}; lower trainer.val_check_interval "
                "or trainer.check_val_every_n_epoch"
            )


def _first_validation(trainer: pl.Trainer) -> float:
    """The optimiser step behind which the first validation comes; 0 where none is wanted, or where the clock decides.

    Example: 10 batches an epoch, 4 of them a step: after every 2 epochs that is step 6, after every 8 batches step 2.
    """
    every, epochs, batches = trainer.val_check_batch, trainer.check_val_every_n_epoch, trainer.num_training_batches
    if every is None or not math.isfinite(batches) or not validates(trainer):
        return 0
    if epochs is None:
        return every / trainer.accumulate_grad_batches
    return (epochs - 1) * math.ceil(batches / trainer.accumulate_grad_batches) + math.ceil(
        min(every, batches) / trainer.accumulate_grad_batches
    )

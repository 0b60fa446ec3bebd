"""What a callback of drafter training works with: the module and the data of its run."""

from __future__ import annotations

import pytorch_lightning as pl

from draftsmith.train.batches.data_module import CacheDataModule
from draftsmith.train.drafter.module import DraftModule


def module_and_data(trainer: pl.Trainer, pl_module: pl.LightningModule) -> tuple[DraftModule, CacheDataModule]:
    """The drafter's module and data of a run.

    Args:
        trainer: of the run.
        pl_module: the module in training.

    Raises:
        ValueError: the run trains something else, or from other data.
    """
    data = getattr(trainer, "datamodule", None)
    if not isinstance(pl_module, DraftModule) or not isinstance(data, CacheDataModule):
        raise ValueError(
            f"this callback serves DraftModule with CacheDataModule, not {type(pl_module).__name__} with "
            f"{type(data).__name__}; remove it from trainer.callbacks"
        )
    return pl_module, data

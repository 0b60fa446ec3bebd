"""The precision of a run where its configuration leaves that open, and what its checkpoints keep of it.

Owns: the choice by device, the change to it before a run begins, the line that says it. Does not know: which modules can train in bf16
(they say so), what autocast does to a product.
"""

from __future__ import annotations

from typing import Any, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins import DeepSpeedPrecision, MixedPrecision, Precision
from pytorch_lightning.strategies import DeepSpeedStrategy
from pytorch_lightning.utilities.rank_zero import rank_zero_info

Chosen = Literal["32-true", "bf16-mixed"]
FLOAT32: Chosen = "32-true"
BFLOAT16: Chosen = "bf16-mixed"
_KEPT = "precision"  # the field of a checkpoint


def precision_for(device: torch.device) -> Chosen:
    """What a device trains in by default: bf16-mixed on CUDA devices that multiply bf16, float32 elsewhere.

    Args:
        device: of the run, one that is there.
    """
    if device.type != "cuda":
        return FLOAT32
    with torch.cuda.device(device):
        return BFLOAT16 if torch.cuda.is_bf16_supported(including_emulation=False) else FLOAT32


def set_precision(trainer: pl.Trainer, precision: Chosen) -> None:
    """Gives a trainer another precision than it was made with.

    Args:
        trainer: not yet training.
        precision: from now on.
    """
    strategy = trainer.strategy
    if isinstance(strategy, DeepSpeedStrategy):
        strategy.precision_plugin = DeepSpeedPrecision(precision)
    elif precision == BFLOAT16:
        strategy.precision_plugin = MixedPrecision("bf16-mixed", strategy.root_device.type)
    else:
        strategy.precision_plugin = Precision()


class RunPrecision(pl.Callback):
    """Chooses the precision where nobody has; a resumed run keeps the one that it began with. `draftsmith train fit` adds it.

    Args:
        is_open: neither the configuration nor a plugin sets the precision.
    """

    def __init__(self, is_open: bool) -> None:
        self.is_open = is_open

    def choose(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Sets the precision by the device, for modules that can train in bf16.

        Args:
            trainer: not yet training.
            module: to be trained.
        """
        self.is_open = self.is_open and getattr(module, "trains_in_bf16", False)
        if self.is_open:
            set_precision(trainer, precision_for(trainer.strategy.root_device))

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keeps the precision."""
        checkpoint[_KEPT] = str(trainer.precision)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Takes the precision of the interrupted run, unless the configuration sets another.

        Args:
            trainer: of the run.
            pl_module: in training.
            checkpoint: what Lightning has read, before the strategy is set up. Earlier versions trained in float32 where nobody chose,
                and kept nothing.
        """
        began = checkpoint.get(_KEPT, FLOAT32 if self.is_open else str(trainer.precision))
        if began == trainer.precision:
            return
        if not self.is_open or began not in (FLOAT32, BFLOAT16):
            rank_zero_info(
                f"the run began with precision {began} and resumes with {trainer.precision}, which it is set to"
            )
            return
        set_precision(trainer, began)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prints what the run trains in, and with which kind of optimiser."""
        chosen = " (chosen for this device; set trainer.precision to change it)" if self.is_open else ""
        rank_zero_info(f"it trains with precision {trainer.precision}{chosen}{_optimizers(trainer)}")


def _optimizers(trainer: pl.Trainer) -> str:
    """The optimisers whose step is one kernel for all weights. Example: ` and fused AdamW`."""
    fused = {type(optimizer).__name__ for optimizer in trainer.optimizers if _is_fused(optimizer)}
    return "".join(f" and fused {name}" for name in sorted(fused))


def _is_fused(optimizer: torch.optim.Optimizer) -> bool:
    return any(group.get("fused") for group in optimizer.param_groups)

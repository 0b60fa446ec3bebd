"""What a run will do, in a few lines at its start: steps, text, validations; and whether its validations can show anything.

Owns: the counts and the warnings. Does not know: losses, how samples are read, what a validation measures.
"""

from __future__ import annotations

import math

import pytorch_lightning as pl
from pytorch_lightning.utilities.rank_zero import rank_zero_info, rank_zero_warn

from draftsmith.train.batches.labelled_text import HasLabelledText, LabelledText
from draftsmith.train.drafter.module import DraftModule
from draftsmith.train.drafter_callbacks.decode_validation import DecodeValidation
from draftsmith.train.drafter_callbacks.keep_best_drafter import KeepBestDrafter
from draftsmith.train.run.accumulation import validates

FEW_STEPS = 100


class RunLength(pl.Callback):
    """Prints what a run will do: optimiser steps, epochs, labelled tokens, validations and their share of the time.

    It says how many of the tokens are distinct, and what a draft vocabulary would save. It warns where a new drafter gets too few steps, or
    where no validation comes. `draftsmith train fit` adds this callback.
    """

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Once the loaders are there to be counted."""
        steps = trainer.estimated_stepping_batches
        if not 0 <= steps < math.inf:
            rank_zero_info("this run has no last step: it ends by time, or when it is stopped")
            return
        batches, processes = trainer.num_training_batches, trainer.world_size
        shared = f" on each of {processes} processes" if processes > 1 else ""
        rank_zero_info(
            f"this run has {steps} optimiser steps{_epochs(trainer)}; an epoch has {batches} batches{shared}"
        )
        if trainer.is_global_zero:
            text = _text(pl_module)
            for line in [*([] if text is None else text.lines()), *_validations(trainer, text)]:
                rank_zero_info(line)
        if isinstance(pl_module, DraftModule) and pl_module.starting_drafter.folder is None and steps < FEW_STEPS:
            rank_zero_warn(
                f"{steps} optimiser steps are too few for a new drafter (fewer than {FEW_STEPS}): val/tokens_per_step may stay near 1 "
                "and tell nothing about the recipe; lower data.init_args.tokens_per_batch, raise trainer.max_epochs, or cache more replies"
            )
        if isinstance(pl_module, DraftModule) and not any(
            isinstance(callback, KeepBestDrafter) for callback in _callbacks(trainer)
        ):
            rank_zero_warn(
                "nothing keeps this run's drafter; add draftsmith.train.KeepBestDrafter to trainer.callbacks, with `callbacks+:` in a "
                "file that has a base"
            )
        first = _first_validation(trainer)
        if first > steps:
            rank_zero_warn(
                f"no validation comes: the first would follow step {first:.0f}, and the run has {steps}; lower trainer.val_check_interval "
                "or trainer.check_val_every_n_epoch"
            )


def _callbacks(trainer: pl.Trainer) -> list[pl.Callback]:
    return trainer.callbacks  # type: ignore[attr-defined]


def _epochs(trainer: pl.Trainer) -> str:
    epochs = trainer.max_epochs
    return "" if epochs is None or epochs < 1 else f" in at most {epochs} epoch{'s' * (epochs > 1)}"


def _text(module: pl.LightningModule) -> LabelledText | None:
    return module.labelled_text() if isinstance(module, HasLabelledText) else None


def _validations(trainer: pl.Trainer, text: LabelledText | None) -> list[str]:
    """When validations come, what they read, and how much of the time they may take by decoding."""
    every = trainer.val_check_batch
    if not validates(trainer) or every is None or not math.isfinite(every):
        return []
    epochs = trainer.check_val_every_n_epoch or 1
    share = None if text is None else text.validation_share
    if share is None:
        share = sum(trainer.num_val_batches) / (epochs * every)
    period = f"{epochs} epochs" if epochs > 1 else f"{every:g} batch{'es' * (every > 1)}"
    reading = f"it reads held-out text, {_percent(share)} of what training reads in between"
    return [f"a validation comes every {period}: {reading}, and {_decoding(trainer)}"]


def _decoding(trainer: pl.Trainer) -> str:
    shares = [callback.budget.share for callback in _callbacks(trainer) if isinstance(callback, DecodeValidation)]
    if not shares:
        return "decodes no prompts"
    [share, *_] = shares
    if share is None:
        return "decodes all its prompts, however long that takes (time_share is null)"
    return f"decodes for at most {100 * share:g} % of the training time, one batch of prompts at least"


def _percent(share: float) -> str:
    return "under 1 %" if share < 0.01 else f"{100 * share:.0f} %"


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

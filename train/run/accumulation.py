"""Which validations go with accumulated gradients: those whose checkpoint has no half-made step in it."""

import math

import pytorch_lightning as pl
from pytorch_lightning.callbacks import GradientAccumulationScheduler


def accumulations(trainer: pl.Trainer) -> set[int]:
    """How many batches an optimiser step may have in this run, now or in a later epoch.

    Args:
        trainer: of the run.
    """
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    schedules = [callback.scheduling for callback in callbacks if isinstance(callback, GradientAccumulationScheduler)]
    return {trainer.accumulate_grad_batches, *(number for schedule in schedules for number in schedule.values())}


def check_accumulation(trainer: pl.Trainer, num_accumulated: int) -> None:
    """Checks that no checkpoint of a validation would hold part of an accumulation.

    The batches of that part count as done in the checkpoint, and their gradients are in no checkpoint. So a resumed run would end with
    other weights. Lightning steps at the end of an epoch with the gradients so far, so a validation there fits any accumulation. DeepSpeed
    carries them into the next epoch, and from there both count steps differently.

    Worked example: 10 batches an epoch and 4 of them a step. Steps follow batches 4, 8 and 10, or with DeepSpeed 4, 8, 12, ... Validation
    is
    right after every 8 or 10 batches, and wrong after every 5. With DeepSpeed only steps of 1, 2, 5 or 10 batches are right.

    Args:
        trainer: of a run about to make its first step.
        num_accumulated: batches of one optimiser step.

    Raises:
        ValueError: a checkpoint could hold part of an accumulation.
    """
    batches = trainer.num_training_batches
    accumulated = f"trainer.accumulate_grad_batches is {num_accumulated}"
    if trainer.strategy.handles_gradient_accumulation and math.isfinite(batches) and batches % num_accumulated:
        raise ValueError(
            f"{accumulated}, and DeepSpeed would carry the gradients of the last {batches % num_accumulated} of an epoch's {batches} "
            "batches into the next epoch, past a checkpoint between them; set it to a number that divides these batches, or "
            f"trainer.limit_train_batches to a multiple of {num_accumulated}"
        )
    if num_accumulated == 1 or not validates(trainer):
        return
    when, remedy = _validation_between_steps(trainer, num_accumulated)
    if when:
        raise ValueError(
            f"{accumulated}, and validation comes {when}: a checkpoint made there could lack the gradients of an unfinished step, "
            f"and a run resumed from it would end with other weights; {remedy}"
        )


def _validation_between_steps(trainer: pl.Trainer, num_accumulated: int) -> tuple[str, str]:
    """In words, when a validation between the batches of a step would come, and what to set; empty where none can."""
    batches, every = trainer.num_training_batches, trainer.val_check_batch
    remedy = "set trainer.val_check_interval to 1.0, the end of every epoch"
    if num_accumulated < batches:
        remedy += f", or to a number of batches that {num_accumulated} divides"
    if every is None:
        return "by the clock (trainer.val_check_interval), after any batch", remedy
    over_epochs = trainer.check_val_every_n_epoch is None and trainer.max_epochs != 1 and math.isfinite(batches)
    if over_epochs:
        # They come at every multiple of the common divisor of both, in one epoch or another.
        distance: float = math.gcd(int(every), int(batches))
        counted = ", counted over epochs (trainer.check_val_every_n_epoch is null)"
        remedy = "set trainer.check_val_every_n_epoch to 1; then " + remedy.removeprefix("set ")
    else:
        distance, counted = every, ""
        remedy += f", or trainer.accumulate_grad_batches to a number that divides {every}"
    if distance >= batches or distance % num_accumulated == 0:
        return "", ""
    return f"after every {every} batches of {batches} in an epoch{counted}", remedy


def validates(trainer: pl.Trainer) -> bool:
    """Whether there is anything to validate on; True while the loaders do not exist yet.

    Args:
        trainer: of the run.
    """
    return trainer.enable_validation and (trainer.val_dataloaders is None or sum(trainer.num_val_batches) > 0)


def validation_follows(trainer: pl.Trainer, batch_idx: int) -> bool:
    """Whether a validation comes right after a training batch. One that comes by the clock does not count.

    Example: 10 batches an epoch and `val_check_interval: 0.5` -> after the batches 4 and 9, counted from 0.

    Args:
        trainer: in the middle of a fit.
        batch_idx: of the batch, in its epoch.
    """
    every, epochs = trainer.val_check_batch, trainer.check_val_every_n_epoch
    if every is None or not validates(trainer) or (epochs is not None and (trainer.current_epoch + 1) % epochs):
        return False
    if math.isinf(every):  # an epoch of unknown length
        limit = trainer.limit_train_batches
        return (batch_idx + 1) % limit == 0 if isinstance(limit, int) else trainer.is_last_batch
    return ((trainer.fit_loop.total_batch_idx if epochs is None else batch_idx) + 1) % every == 0

"""What a checkpoint keeps of the data, and what a resumed run must have in common with it.

Owns the words of that error. Knows no data module, and nothing of weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl


def saved_place(trainer: pl.Trainer, layout: Mapping[str, Any]) -> dict[str, Any]:
    """Where in the data a run is, for its checkpoint.

    Args:
        trainer: of the run.
        layout: what a resumed run must agree in.

    Returns:
        The batches trained on so far, the batches of an epoch, and the layout.
    """
    return {
        "batches_done": trainer.fit_loop.epoch_loop.batch_progress.total.processed,  # type: ignore[attr-defined]
        "batches_per_epoch": trainer.num_training_batches,
        "layout": dict(layout),
    }


def check_same(own: Mapping[str, Any], saved: Mapping[str, Any], remedy: str) -> None:
    """Checks that a resumed run has what its checkpoint was made with.

    Args:
        own: values of this run, by name.
        saved: those of the checkpoint; it may have more.
        remedy: what the error advises, such as "resume with the same data".

    Raises:
        ValueError: a value differs.
    """
    for name, value in own.items():
        if saved[name] != value:
            raise ValueError(
                f"the checkpoint was made with {name} = {saved[name]!r}, this run has {value!r}; {remedy}, or start a new run without "
                "--ckpt_path"
            )

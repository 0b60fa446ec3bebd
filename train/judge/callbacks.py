"""What training of a judge keeps and shows: the best judge as a folder, and figures beside the curves.

Owns: when, and where to. Does not know: how a judge is fitted, how figures are drawn.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

import pytorch_lightning as pl
from pytorch_lightning.loggers import TensorBoardLogger

from draftsmith import provenance
from draftsmith.files import atomic_directory
from draftsmith.models.judge import load_judge
from draftsmith.train.drafter_callbacks.keep_best_drafter import KeepBestDrafter
from draftsmith.train.judge.figures import Image, draw_precision_recall, draw_reliability, draw_roc
from draftsmith.train.judge.held_out import HeldOutTokens
from draftsmith.train.judge.module import AUC, JudgeModule


class KeepJudge(KeepBestDrafter):
    """Keeps the best judge so far as a folder of `config.json`, `model.safetensors` and `provenance.json`, replaced as a whole.

    Args:
        directory: where; null takes `judge` in the trainer's default_root_dir.
        monitor: a logged metric.
        mode: whether more of it is better.
        replace: as in KeepBestDrafter.
    """

    stage: ClassVar[str] = "draftsmith train (best judge)"
    name: ClassVar[str] = "judge"

    def __init__(
        self,
        directory: Path | None = None,
        monitor: str = AUC,
        mode: Literal["max", "min"] = "max",
        replace: bool = False,
    ) -> None:
        super().__init__(directory, monitor, mode, replace)

    def _save(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        module = _expect(pl_module)
        if not trainer.is_global_zero:
            return
        judge = module.judge()
        data = module.data()
        config = {**module.settings(), **self._moment(trainer), "labels": judge.config.labels, "data": data.settings()}
        caches = [*data.caches, *data.draft_caches]
        inputs = {str(cache.path): cache.manifest.identity.source for cache in caches}
        inputs[module.target] = judge.config.target_fingerprint
        with atomic_directory(self._folder(trainer), self.stage) as partial:
            judge.save_pretrained(partial)
            load_judge(partial)  # what is kept can be used
            provenance.write(partial, provenance.record(provenance.command_line(), config, inputs))


class JudgeFigures(pl.Callback):
    """Adds ROC, precision and recall, and calibration over the held-out tokens to TensorBoard, as images.

    Args:
        every: draw at the first of so many validations, and at the end of training.

    Raises:
        ValueError: `every` is below 1.
    """

    def __init__(self, every: int = 5) -> None:
        if every < 1:
            raise ValueError(f"every is {every}; it must be at least 1")
        self.every = every
        self._num_validations = 0

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draws if it is time."""
        if trainer.sanity_checking:
            return
        if self._num_validations % self.every == 0:
            self._draw(trainer, _expect(pl_module))
        self._num_validations += 1

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draws what training ended with."""
        self._draw(trainer, _expect(pl_module))

    def _draw(self, trainer: pl.Trainer, module: JudgeModule) -> None:
        if not trainer.is_global_zero or module.held_out is None:
            return
        images = _images(module.held_out, "")
        differing = module.held_out.differing()
        if differing is not None:
            images |= _images(differing, "_differing")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                for name, image in images.items():
                    logger.experiment.add_image(name, image, trainer.global_step, dataformats="HWC")


def _images(tokens: HeldOutTokens, ending: str) -> dict[str, Image]:
    """By name, with an ending that tells which tokens are meant."""
    probabilities, labels, _ = tokens.arrays
    return {
        f"val/roc{ending}": draw_roc(probabilities, labels),
        f"val/precision_recall_wrong{ending}": draw_precision_recall(probabilities, labels),
        f"val/reliability{ending}": draw_reliability(probabilities, labels),
    }


def _expect(pl_module: pl.LightningModule) -> JudgeModule:
    if not isinstance(pl_module, JudgeModule):
        raise ValueError(
            f"this callback serves JudgeModule, not {type(pl_module).__name__}; remove it from trainer.callbacks"
        )
    return pl_module

"""The training command: Lightning's own CLI over this project's modules.

Owns: which base classes a run's YAML may name, and how the command reports mistakes in it. Does not know: any one run.

Model and data are named by class_path in the YAML (`draftsmith.train.drafter.module.DraftModule`, or just
`DraftModule`), so the same command trains drafters and language models.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from jsonargparse._deprecated import JsonargparseDeprecationWarning
from lightning_fabric.plugins import TorchCheckpointIO
from pytorch_lightning.callbacks import ProgressBar
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from pytorch_lightning.plugins import Precision
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from pytorch_lightning.utilities.rank_zero import rank_zero_info

from draftsmith import train
from draftsmith.arguments import Suggesting
from draftsmith.files import atomic_write
from draftsmith.train.config_files import KEY as BASE
from draftsmith.train.config_files import already_read, with_bases
from draftsmith.train.drafter_callbacks.keep_best_drafter import KeepBestDrafter
from draftsmith.train.drafter_callbacks.run_length import RunLength
from draftsmith.train.help import PROG, lightnings_words
from draftsmith.train.precision import RunPrecision
from draftsmith.train.recipe import KEY as RECIPE
from draftsmith.train.recipe import RECORD, Recipe, applied
from draftsmith.train.run.checkpoints import AtomicCheckpointIO
from draftsmith.train.run.preemption import Preemption, ResumeValidation
from draftsmith.train.run.progress_bar import RunProgress


class TrainingParser(Suggesting, LightningArgumentParser):
    """Lightning's parser, which answers a misspelt key or class with the nearest known one."""

    @property
    def class_names(self) -> tuple[str, ...]:  # type: ignore[override]
        """Those of `draftsmith.train`, with every family's settings."""
        return tuple(dir(train))


class SaveConfig(SaveConfigCallback):
    """Saves the configuration once training starts. A run that stops with an error before leaves that of an earlier run alone.

    Args:
        args: as Lightning has it.
        recipe: what chose some of the settings, saved beside the configuration.
        kwargs: as Lightning has it.
    """

    def __init__(self, *args: Any, recipe: Recipe | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.recipe = recipe

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Not yet; the other subcommands change nothing in the folder."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """After the callbacks of the YAML have agreed to the run. A precision that was left open is saved as what it became."""
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if any(isinstance(callback, RunPrecision) and callback.is_open for callback in callbacks):
            self.config["trainer"]["precision"] = trainer.precision
        super().setup(trainer, pl_module, "fit")
        folder = trainer.log_dir  # asked for by every process: Lightning sends it from the first one to the others
        if trainer.is_global_zero and folder is not None:
            self._save_recipe(Path(folder) / RECORD)

    def _save_recipe(self, file: Path) -> None:
        """The record of this run's recipe; none may stay from an earlier run."""
        if self.recipe is None:
            file.unlink(missing_ok=True)
        else:
            atomic_write(file, json.dumps(self.recipe.record(), indent=2) + "\n")


class TrainingCLI(LightningCLI):
    """LightningCLI with the parser above, and without its remarks about how it was written or called."""

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Called by LightningCLI for itself and for each of its subcommands."""
        kwargs.setdefault("dump_header", [f"pytorch_lightning=={pl.__version__}"])
        # Without this, a misspelt flag that happens to be the start of a real one is taken for it.
        parser = TrainingParser(allow_abbrev=False, **kwargs)
        parser.add_argument("-c", "--config", action="config", help="Path to a configuration file in YAML.")
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """What this command has beyond Lightning's own."""
        parser.add_argument(
            "--replace_best",
            type=bool,
            default=False,
            help="let this run replace the best drafter, judge or draft LM that another run left in the same folder",
        )
        parser.add_argument(
            f"--{RECIPE}",
            type=str | None,
            default=None,
            help="auto: choose epochs, rate and draft vocabulary by the size of the cache; your own settings win",
        )
        parser.add_argument(
            f"--{BASE}", type=already_read, default=None, help="in a file: the configuration beside it that it changes"
        )

    def _parse_ckpt_path(self) -> None:
        """Lightning lets a checkpoint name its own module and settings here, and imports what it names. The YAML names them."""

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Lightning warns when arguments are passed on by a program that has arguments itself; ours does that."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
            warnings.simplefilter("ignore", JsonargparseDeprecationWarning)
            super().parse_arguments(parser, args)

    def before_instantiate_classes(self) -> None:
        """A RunLogger without a folder writes into the run's."""
        trainer = self.config[self.subcommand]["trainer"]
        logger = trainer["logger"]
        if getattr(logger, "class_path", "").endswith(".RunLogger") and logger["init_args"]["save_dir"] is None:
            logger["init_args"]["save_dir"] = trainer["default_root_dir"]

    def instantiate_classes(self) -> None:
        """Lightning calls functions that jsonargparse will rename; no user can do anything about it."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", JsonargparseDeprecationWarning)
            super().instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Lightning's, with one bar for the whole run where the YAML leaves the bar to Lightning."""
        wanted = self.config_init[self.subcommand]["trainer"]
        chosen = wanted["callbacks"] or []
        chosen = chosen if isinstance(chosen, list) else [chosen]
        if wanted["enable_progress_bar"] is not False and not any(
            isinstance(callback, ProgressBar) for callback in chosen
        ):
            kwargs.setdefault("callbacks", [*chosen, RunProgress()])
        return super().instantiate_trainer(**kwargs)

    def before_validate(self) -> None:
        """Checkpoints are read without running code, and written whole. A precision that was left open is chosen by the device."""
        strategy = self.trainer.strategy
        if type(strategy.checkpoint_io) is TorchCheckpointIO:
            strategy.checkpoint_io = AtomicCheckpointIO()
        is_open = self.config[self.subcommand]["trainer"]["precision"] is None
        precision = RunPrecision(is_open and type(self.trainer.precision_plugin) is Precision)
        precision.choose(self.trainer, self.model)
        self.trainer.callbacks.append(precision)  # type: ignore[attr-defined]

    before_test = before_predict = before_validate

    def before_fit(self) -> None:
        """Makes checkpoints safe against kills and full disks, and lets the run end well on a signal.

        A YAML that chooses another way to write checkpoints keeps it.
        """
        self.before_validate()
        # Behind the checkpoint callbacks, which Lightning has sorted to the end.
        present: list[pl.Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        for callback in present:
            if isinstance(callback, KeepBestDrafter):
                callback.replace = callback.replace or self.config["fit"]["replace_best"]
        kinds = {type(callback) for callback in present}
        present.extend(kind() for kind in (RunLength, ResumeValidation, Preemption) if kind not in kinds)


def import_public_names() -> None:
    """Imports the classes that a YAML may name without their path, every family's settings included: the parser finds what is imported."""
    for name in dir(train):
        getattr(train, name)


def main(arguments: Sequence[str] | None = None) -> TrainingCLI:
    """Runs `fit`, `validate` or another of Lightning's subcommands.

    A mistake in the arguments or in the YAML ends the process with code 2.

    Args:
        arguments: of the command; None reads the process's.

    Raises:
        ValueError: settings that do not work together, or not on this machine (a device that is not there); a recipe that does not exist
            or does not fit the run.
    """
    import_public_names()
    given = with_bases(lightnings_words(sys.argv[1:] if arguments is None else arguments))
    recipe = applied(given)
    for line in [] if recipe is None else recipe.lines():
        rank_zero_info(line)
    try:
        return TrainingCLI(
            pl.LightningModule,
            pl.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=SaveConfig,
            # A resumed run writes the same folder again.
            save_config_kwargs={"overwrite": True, "recipe": recipe},
            # A table of modules, which says nothing about a drafter that its card does not.
            trainer_defaults={"enable_model_summary": False},
            args=given if recipe is None else [*given, *recipe.arguments()],
            parser_kwargs={"prog": PROG},
        )
    except MisconfigurationException as error:
        raise ValueError(str(error)) from error

"""The best drafter of a run on disk.

Owns: when a drafter is the best so far, its folder, and whether this run may write there. Does not know: losses, optimisers, decoding.
"""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytorch_lightning as pl
from pytorch_lightning.utilities.rank_zero import rank_zero_warn

from draftsmith import provenance
from draftsmith.files import atomic_directory
from draftsmith.models.drafters.drafter_folder import load_drafter
from draftsmith.models.drafters.other_layouts import TargetBond
from draftsmith.ownership import check_replaceable
from draftsmith.train.batches.data_module import CacheDataModule
from draftsmith.train.drafter.module import DraftModule
from draftsmith.train.drafter_callbacks.acceptance_metrics import TOKENS_PER_STEP
from draftsmith.train.drafter_callbacks.drafter_run import module_and_data


class KeepBestDrafter(pl.Callback):
    """Keeps the best drafter so far as an ordinary saved model, ready for `draftsmith export`.

    The folder holds `config.json`, `model.safetensors` and `provenance.json`. With `lora` it holds the adapter instead:
    `adapter_config.json`, `adapter_model.safetensors`, `bond.json`. It is replaced as a whole. `monitor` decides which drafter is best;
    where no such metric is logged, the latest one is.

    Args:
        directory: where; null takes `drafter` in the trainer's default_root_dir.
        monitor: a logged metric.
        mode: whether more of it is better.
        replace: may replace what another run kept there. `draftsmith train fit --replace_best true` sets it.

    Raises:
        ValueError: at the start of training, if the folder holds what another run kept, or anything else.
    """

    stage: ClassVar[str] = "draftsmith train (best drafter)"
    name: ClassVar[str] = "drafter"

    def __init__(
        self,
        directory: Path | None = None,
        monitor: str = TOKENS_PER_STEP,
        mode: Literal["max", "min"] = "max",
        replace: bool = False,
    ) -> None:
        self.directory, self.monitor, self.mode, self.replace = directory, monitor, mode, replace
        self.best: float | None = None
        self.run = secrets.token_hex(8)

    def state_dict(self) -> dict[str, Any]:
        """The best value, so that a resumed run keeps a better drafter; and the run's name, so that it may replace its own."""
        return {"best": self.best, "run": self.run}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See state_dict."""
        self.best = state_dict["best"]
        self.run = state_dict.get("run", self.run)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Checks the folder before anything is trained. All processes stop together.

        Args:
            trainer: of the run.
            pl_module: in training.

        Raises:
            ValueError: the folder is not this run's own.
        """
        state = self._folder_state(trainer, pl_module) if trainer.is_global_zero else ("", False)
        problem, is_own = trainer.strategy.broadcast(state)
        if problem:
            raise ValueError(problem)
        if self.best is not None and not is_own:
            rank_zero_warn(
                f"{self._folder(trainer)} no longer holds the best {self.name} of this run ({self.monitor} {self.best:.4g}); "
                "the best from now on is kept there"
            )
            self.best = None

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Saves if the metric has improved."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        value = trainer.callback_metrics.get(self.monitor)
        if value is None:
            self._keep(trainer, pl_module)
            return
        sign = 1.0 if self.mode == "max" else -1.0
        # The first process decides: a metric may differ between them, and all must come to _save or none.
        measured = trainer.strategy.broadcast(float(value))
        if self.best is None or sign * measured > sign * self.best:
            self.best = measured
            self._keep(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Saves the last weights of a run that never validated or has no metric."""
        if self.best is None:
            self._keep(trainer, pl_module)

    def _folder_state(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> tuple[str, bool]:
        """Why the best must not go to its folder, or nothing; and whether this run's own best is there."""
        folder = self._folder(trainer)
        try:
            check_replaceable(folder, self.stage, self._inputs(pl_module))
            is_free = not folder.is_dir() or not any(folder.iterdir())
            is_own = not is_free and _run_of(folder) == self.run
        except (ValueError, OSError) as error:
            return str(error), False
        if is_free or is_own or self.replace:
            return "", is_own
        return (
            f"{folder} holds the best {self.name} of another run. To resume that run, give --ckpt_path last; to keep it, give "
            "another --trainer.default_root_dir; to replace it, give --replace_best true"
        ), False

    def _inputs(self, pl_module: pl.LightningModule) -> list[Path]:
        """Folders that this run must never replace, because its drafter needs them."""
        return pl_module.starting_drafter.needed() if isinstance(pl_module, DraftModule) else []

    def _folder(self, trainer: pl.Trainer) -> Path:
        return Path(self.directory or Path(trainer.default_root_dir) / self.name)

    def _keep(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._save(trainer, pl_module)
        # No process continues, and perhaps reads the folder, before the first one has written it.
        trainer.strategy.barrier("the kept folder is written")

    def _save(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        module, data = module_and_data(trainer, pl_module)
        module.whole_drafter()  # on every process, since each may hold a share of it
        if not trainer.is_global_zero:
            return
        config = {**module.settings(), **self._moment(trainer), **_data_settings(data)}
        identity = data.open_cache().manifest.identity
        inputs = {str(data.cache_path): identity.source, module.target: identity.target_fingerprint}
        with atomic_directory(self._folder(trainer), self.stage) as partial:
            module.save_drafter(partial)
            # What is kept can be used: a training that diverged leaves NaN.
            load_drafter(partial, target=TargetBond(module.ends_of(partial), identity.tokenizer_fingerprint))
            provenance.write(partial, provenance.record(provenance.command_line(), config, inputs))

    def _moment(self, trainer: pl.Trainer) -> dict[str, Any]:
        """For provenance: which run, in which precision, at which step, and how good."""
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        return {
            "run": self.run,
            "precision": str(trainer.precision),
            "step": trainer.global_step,
            "metrics": metrics,
        }


def _run_of(folder: Path) -> str | None:
    """The run that kept what is in a folder."""
    config = provenance.read(folder).get("config")
    return config.get("run") if isinstance(config, dict) else None


def _data_settings(data: CacheDataModule) -> dict[str, Any]:
    manifest = data.open_cache().manifest
    return {
        "data": {
            "cache": str(data.cache_path),
            "samples": manifest.num_samples,
            "tokens": manifest.num_tokens,
            "labelled_tokens": manifest.num_labelled,
            "prompt_tokens": data.num_prompt_tokens(),
            "tokens_per_batch": data.tokens_per_batch,
            "seed": data.seed,
        }
    }

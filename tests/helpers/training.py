"""What several tests of training share: a module, a trainer and a YAML of runs that are over in a second."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from draftsmith.models.families.redrafter import ReDrafterFamily
from draftsmith.train.drafter.module import DraftModule

VOCAB, HIDDEN, PROMPT = 37, 16, 3
MakeCache = Callable[..., Path]


def make_module(target_dir: Path, **settings: object) -> DraftModule:
    torch.manual_seed(1)
    chosen = {"drafter": ReDrafterFamily(), "num_steps": 3, "lr": 3e-3, "metrics_every": 1} | settings
    return DraftModule(str(target_dir), **chosen)  # type: ignore[arg-type]


def make_trainer(root: Path, **settings: object) -> pl.Trainer:
    chosen: dict[str, object] = {
        "default_root_dir": root,
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return pl.Trainer(**(chosen | settings))  # type: ignore[arg-type]


class KeepLosses(pl.Callback):
    """Notes the loss of every training batch."""

    def __init__(self, losses: list[float]) -> None:
        self.losses = losses

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self.losses.append(float(args[2]["loss"]))


def tiny_config(folder: Path, target_dir: Path, cache: Path, extra: str = "") -> Path:
    """A YAML of a run over in seconds."""
    path = folder / "run.yaml"
    path.write_text(
        f"""
seed_everything: 0
trainer:
  accelerator: cpu
  devices: 1
  max_epochs: 2
  default_root_dir: {folder}/run
  enable_progress_bar: false
  enable_model_summary: false
  num_sanity_val_steps: 0
  log_every_n_steps: 1
  logger:
    class_path: pytorch_lightning.loggers.TensorBoardLogger
    init_args: {{save_dir: {folder}/run, name: null, version: ""}}
  callbacks:
    - class_path: TreeDecodeValidation
      init_args: {{num_prompts: 2, max_new_tokens: 8}}
    - class_path: Throughput
      init_args: {{every: 1}}
    - class_path: KeepBestDrafter
    - class_path: pytorch_lightning.callbacks.ModelCheckpoint
      init_args: {{dirpath: {folder}/run/checkpoints, save_top_k: 0, save_last: true, every_n_train_steps: 1}}
model:
  class_path: DraftModule
  init_args:
    target: {target_dir}
    drafter:
      class_path: draftsmith.train.ReDrafterFamily
    num_steps: 3
    metrics_every: 1
{extra}
data:
  class_path: CacheDataModule
  init_args:
    cache: {cache}
    val_fraction: 0.2
    tokens_per_batch: 40
"""
    )
    return path

"""Training as a whole on a tiny random target: losses, schedules, refusals, precision."""

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from draftsmith.train.data_module import CacheDataModule
from draftsmith.train.draft_module import DraftModule
from draftsmith.train.families import ReDrafterFamily
from tests.train.conftest import MakeCache


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


def test_training_on_text_lowers_its_loss_at_every_step_of_the_draft(
    target_dir: Path, make_cache: MakeCache, tmp_path: Path
) -> None:
    data = CacheDataModule(make_cache([12] * 40), val_cache=make_cache([12] * 8, seed=1), tokens_per_batch=60)
    module = make_module(target_dir, lr=1e-2)
    trainer = make_trainer(tmp_path, max_epochs=12)
    before = trainer.validate(module, data, verbose=False)[0]
    trainer.fit(module, data)
    for step in range(3):
        name = f"val/step{step}/loss"
        assert trainer.callback_metrics[name] < before[name] - 1.0
    assert trainer.callback_metrics["val/proxy_tokens_per_step"] > before["val/proxy_tokens_per_step"]


def test_path_distillation_lowers_the_divergence_from_the_target(
    target_dir: Path, make_cache: MakeCache, tmp_path: Path
) -> None:
    data = CacheDataModule(make_cache([12] * 40), tokens_per_batch=60)
    module = make_module(target_dir, distillation="path", lr=1e-2)
    losses: list[float] = []
    trainer = make_trainer(tmp_path, max_epochs=8, callbacks=[KeepLosses(losses)])
    trainer.fit(module, data)
    assert sum(losses[-8:]) < 0.7 * sum(losses[:8])

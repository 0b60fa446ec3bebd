"""What the benchmarks train: one recipe a family, for a number of steps or for a time.

Each run's outcome is kept in its folder (`trained.json`), so that a benchmark that you start again resumes.
"""

import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.utilities.types import STEP_OUTPUT

from draftsmith.files import atomic_write
from draftsmith.models.drafters.family import DrafterFamily
from draftsmith.models.families.block import BlockFamily
from draftsmith.models.families.eagle import EagleFamily
from draftsmith.models.families.eagle3 import Eagle3Family
from draftsmith.models.families.heads import HeadsFamily
from draftsmith.models.families.redrafter import ReDrafterFamily
from draftsmith.models.families.riders.chimera import ChimeraFamily
from draftsmith.models.families.riders.mtp import MtpFamily
from draftsmith.models.families.riders.rider_drafter import RiderFamily
from draftsmith.train.batches.cache_subset import CacheBatch
from draftsmith.train.batches.data_module import CacheDataModule
from draftsmith.train.drafter.module import DraftModule
from draftsmith.train.drafter_callbacks.keep_best_drafter import KeepBestDrafter

QUIET: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_model_summary": False,
    "enable_progress_bar": False,
}
"""A trainer that prints and writes nothing."""
PILOT_STEPS = 40  # a short run first, since the schedule must know how many steps fit into the time


@dataclass(frozen=True)
class Recipe:
    """How a family is trained: its own settings and those of the training module."""

    family: Callable[..., DrafterFamily]
    module: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    tokens_per_batch: int = 512


_EAGLE: dict[str, Any] = {"distillation": "path", "feature_weight": 1.0, "logit_weight": 0.1}
RECIPES = {
    "redrafter": Recipe(ReDrafterFamily, {"num_steps": 5, "distillation": "path", "lr": 2e-3}),
    "eagle": Recipe(EagleFamily, {**_EAGLE, "num_steps": 1, "lr": 3e-3}),
    "hass": Recipe(EagleFamily, {**_EAGLE, "num_steps": 3, "top_k_weight": 1.0, "lr": 3e-3}, {"detach_steps": True}),
    "eagle3": Recipe(
        Eagle3Family,
        {"distillation": "path", "num_steps": 5, "horizon_decay": 0.8, "skip_outside": True, "lr": 3e-3},
    ),
}
_HEADS: dict[str, Any] = {"num_steps": 4, "distillation": "path", "lr": 2e-3}
_BLOCK: dict[str, Any] = {"num_steps": 7, "horizon_decay": 0.78, "max_anchors": 128, "lr": 2e-3}
_TWO_LAYERS: dict[str, Any] = {"num_draft_layers": 2}
BLOCKWISE_RECIPES = {
    "blockwise": Recipe(HeadsFamily, _HEADS, {"network": "blockwise"}),
    "medusa": Recipe(HeadsFamily, _HEADS),
    "hydra": Recipe(HeadsFamily, _HEADS, {"network": "hydra"}),
    "hydra++": Recipe(HeadsFamily, _HEADS, {"network": "hydra", "prefix_layer": True}),
    "mlp": Recipe(HeadsFamily, _HEADS, {"network": "mlp"}),
    "block": Recipe(BlockFamily, {**_BLOCK, "num_steps": 5, "horizon_decay": 0.8, "distillation": "path"}, _TWO_LAYERS),
    "dflash": Recipe(BlockFamily, _BLOCK, _TWO_LAYERS),
    "jetspec": Recipe(BlockFamily, {**_BLOCK, "distillation": "path"}, {**_TWO_LAYERS, "mask": "causal"}),
    "dspark": Recipe(
        BlockFamily,
        {**_BLOCK, "distillation": "path"},
        {**_TWO_LAYERS, "correction": "vanilla", "correction_rank": 32, "sample_from_anchor": True},
    ),
    "domino": Recipe(
        BlockFamily, _BLOCK, {**_TWO_LAYERS, "correction": "gru", "correction_rank": 32, "correction_state": 128}
    ),
}
"""Heads that draft all tokens at once or step by step, and block drafters, in the sizes of small targets.

`block` is a DFlash that learns the target's distribution and drafts five tokens."""
ALL_RECIPES = {**RECIPES, **BLOCKWISE_RECIPES}
_RIDING: dict[str, Any] = {"num_steps": 3, "distillation": "path", "horizon_decay": 0.8, "max_anchors": 128}
RIDER_RECIPES = {
    "prompt_tokens": Recipe(RiderFamily, {**_RIDING, "lr": 1e-2}, {"riders": "prompt"}),
    "hidden_transfer": Recipe(RiderFamily, {**_RIDING, "lr": 2e-3}, {"riders": "hidden_transfer"}),
    "firp": Recipe(RiderFamily, {**_RIDING, "lr": 2e-3}, {"riders": "firp"}),
}
"""Drafters that ride through the target, whose training runs its blocks."""
CLOSE_RECIPES = {
    "chimera": Recipe(ChimeraFamily, RECIPES["eagle"].module),
    "mtp": Recipe(MtpFamily, {"num_steps": 3, "distillation": "path", "horizon_decay": 0.6, "lr": 3e-3}),
}
"""Heads of one layer beside EAGLE's."""


@dataclass(frozen=True)
class Trained:
    """What one training run did: optimiser steps, assistant tokens seen, seconds from call to saved weights, parameters."""

    steps: int
    assistant_tokens: int
    seconds: float
    parameters: int = 0

    @property
    def rate(self) -> float:
        """Assistant tokens a second."""
        return self.assistant_tokens / self.seconds


class Counter(pl.Callback):
    """Counts steps and assistant tokens."""

    def __init__(self) -> None:
        self.tokens = self.parameters = 0
        self.ends: list[float] = []

    @property
    def steps(self) -> int:
        """Steps done."""
        return len(self.ends)

    @property
    def pace(self) -> float:
        """Median seconds of a step, the first ones left out: they warm up."""
        return statistics.median(later - sooner for sooner, later in itertools.pairwise(self.ends[10:]))

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: STEP_OUTPUT,
        batch: CacheBatch,
        batch_idx: int,
    ) -> None:
        """Adds a batch."""
        self.tokens += batch.num_labelled
        self.ends.append(time.perf_counter())

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Notes the size of what was trained."""
        self.parameters = sum(weight.numel() for weight in pl_module.parameters() if weight.requires_grad)


def train(
    recipe: Recipe, target: str, cache: Path, out: Path, *, steps: int | None = None, seconds: float | None = None
) -> Trained:
    """Train for `steps`, or for `seconds` of wall-clock with a schedule that ends there; `out/drafter` is the result."""
    if (out / "trained.json").is_file():
        return Trained(**json.loads((out / "trained.json").read_text()))
    limit = None
    if steps is None:
        assert seconds is not None
        with tempfile.TemporaryDirectory(prefix="pilot-") as folder:
            pilot = _fit(recipe, target, cache, Path(folder), PILOT_STEPS, None)
        steps, limit = max(1, int(0.95 * seconds / pilot.pace)), seconds
    started = time.perf_counter()
    counted = _fit(recipe, target, cache, out, steps, limit)
    result = Trained(counted.steps, counted.tokens, time.perf_counter() - started, counted.parameters)
    atomic_write(out / "trained.json", json.dumps(asdict(result)))
    return result


def _fit(recipe: Recipe, target: str, cache: Path, out: Path, steps: int, seconds: float | None) -> Counter:
    pl.seed_everything(0)
    counter = Counter()
    module = DraftModule(target, recipe.family(**recipe.options), **recipe.module, val_steps=1)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=-1,
        max_steps=steps,
        max_time=None if seconds is None else {"seconds": max(1, int(seconds))},
        default_root_dir=out,
        gradient_clip_val=1.0,
        # Only to fit the score scale, from a few held-out replies.
        check_val_every_n_epoch=None,
        val_check_interval=max(1, steps // 4),
        num_sanity_val_steps=0,
        callbacks=[counter, KeepBestDrafter(out / "drafter", replace=True)],
        **QUIET,
    )
    trainer.fit(
        module, CacheDataModule(cache, val_fraction=0.01, tokens_per_batch=recipe.tokens_per_batch, check="lazy")
    )
    return counter

"""What the table of refinements compares, made from rows of a target: caches, block drafters, n-gram tables and a small LM.

Every head learns for the same seconds from the same replies, and so does the LM, which begins as the target's first layers. The tables
count those replies. What was made is kept in a folder and used again.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.utilities.types import STEP_OUTPUT

from benchmarks.drafters.recipes import ALL_RECIPES, PILOT_STEPS, QUIET, Counter, train
from draftsmith.data.cache.extract import extract
from draftsmith.data.cache.extraction import StorageOptions
from draftsmith.data.replies.ngrams_command import ngrams
from draftsmith.files import atomic_write
from draftsmith.models.families.block import default_layers
from draftsmith.models.target.target import PRE_NORM, TargetEnds
from draftsmith.train.draft_lm.callbacks import KeepBestDraftLM
from draftsmith.train.draft_lm.data import DistilDataModule
from draftsmith.train.draft_lm.module import DraftLMModule

CORRECTIONS = {"none": "none", "Markov": "vanilla", "look-around": "lookaround"}
"""The block drafters of the table, by their correction."""
RANK = 32
ORDERS = (2, 4)


@dataclass(frozen=True)
class Plan:
    """What is made, and from what.

    Attributes:
        target: its directory or hub id.
        rows: JSONL of its replies to learn from.
        tests: JSONL of its greedy replies to held-out prompts.
        work: where everything is kept.
        seconds: of each training.
        draft_layers: of each block drafter.
        lm_layers: of the target that the LM keeps.
    """

    target: str
    rows: Path
    tests: Path
    work: Path
    seconds: float
    draft_layers: int = 1
    lm_layers: int = 1


@dataclass(frozen=True)
class Made:
    """Folders of what was made: the cache of the test replies, heads and tables by name, and the LM."""

    cache: Path
    heads: dict[str, Path]
    tables: dict[int, Path]
    lm: Path


def made(plan: Plan) -> Made:
    """Make what is missing.

    Args:
        plan: what, and from what.

    Returns:
        Its folders.
    """
    plan.work.mkdir(parents=True, exist_ok=True)
    layers = default_layers(TargetEnds.load(plan.target).config.num_hidden_layers, plan.draft_layers)
    caches = {}
    for name, source in (("cache", plan.rows), ("test-cache", plan.tests)):
        caches[name] = plan.work / name
        extract(
            plan.target,
            source,
            caches[name],
            storage=StorageOptions(layers=tuple({PRE_NORM: 0} | dict.fromkeys(layers))),
        )
    heads = {}
    for name, correction in CORRECTIONS.items():
        rank = {} if correction == "none" else {"correction_rank": RANK}
        options = {"num_draft_layers": plan.draft_layers, "correction": correction, **rank}
        recipe = replace(ALL_RECIPES["block"], options=options)
        out = plan.work / f"head-{correction}"
        print(f"{name}: {train(recipe, plan.target, caches['cache'], out, seconds=plan.seconds)}", flush=True)
        heads[name] = out / "drafter"
    tables = {order: plan.work / f"{order}-gram" for order in ORDERS}
    for order, folder in tables.items():
        ngrams(plan.rows, plan.target, folder, order)
    return Made(caches["test-cache"], heads, tables, lm_of(plan))


def lm_of(plan: Plan) -> Path:
    """The target's first layers, which learn its replies.

    Args:
        plan: what, and from what.

    Returns:
        Its folder.
    """
    out = plan.work / "lm"
    if not (out / "trained.json").is_file():
        pilot = _distil(plan, out / "pilot", PILOT_STEPS, None)
        started = time.perf_counter()
        steps = _distil(plan, out, max(1, int(0.95 * plan.seconds / pilot.pace)), plan.seconds).steps
        atomic_write(out / "trained.json", json.dumps({"steps": steps, "seconds": time.perf_counter() - started}))
    print(f"LM: {(out / 'trained.json').read_text()}", flush=True)
    return out / "draft_lm"


class StepTimes(Counter):
    """Counts the steps of a training whose batches are texts."""

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        """Adds a batch."""
        self.ends.append(time.perf_counter())


def _distil(plan: Plan, out: Path, steps: int, seconds: float | None) -> Counter:
    pl.seed_everything(0, verbose=False)
    counter = StepTimes()
    module = DraftLMModule(plan.target, plan.target, num_layers=plan.lm_layers, divergence="cross_entropy", lr=1e-3)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=-1,
        max_steps=steps,
        max_time=None if seconds is None else {"seconds": max(1, int(seconds))},
        default_root_dir=out,
        gradient_clip_val=1.0,
        callbacks=[counter, KeepBestDraftLM(replace=True)],
        **QUIET,
    )
    trainer.fit(module, DistilDataModule(plan.rows, on_policy=0.0, batch_size=8, val_fraction=0.0))
    return counter

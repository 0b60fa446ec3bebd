"""What two processes give over one, and what is lost on the way: to the machine, to waiting for one another, to the gradients.

A ladder, climbed several times, of processes with one thread each:

    one        one process
    apart      two that train side by side, each for itself: what the machine gives
    in step    two that go step by step together but keep their gradients: what waiting for the slower one takes
    together   two that train one drafter: what sending the gradients takes

`python -m torch.distributed.run --nproc-per-node=N -m benchmarks.train.pairs KIND RUNGS ...` is one launch; `speed.py` makes them all.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy
from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook

from benchmarks.drafters.recipes import QUIET, RECIPES
from draftsmith.data.cache.extract import HiddenStateCache
from draftsmith.data.cache.features import features
from draftsmith.data.chat_template import ChatTemplate
from draftsmith.data.corpus import Corpus
from draftsmith.models.files.loading import load_tokenizer
from draftsmith.models.target.target import Target
from draftsmith.train.batches.data_module import CacheDataModule
from draftsmith.train.drafter.module import DraftModule

LADDER = ("one", "apart", "in step", "together")
LONE = ("bare", "extract")
"""Work that needs no word between processes: two rungs are enough."""


def pair_rows(families: tuple[str, ...], target: str, rows: Path, work: Path, scale: float) -> list[dict[str, Any]]:
    """Rates of two processes over that of one; for training also the ladder between, and a larger batch."""
    jobs = [(kind, 0, ("one", "apart")) for kind in LONE]
    jobs += [(family, 512, LADDER) for family in families] + [(family, 2048, LADDER) for family in families]
    measured = []
    for kind, tokens, rungs in jobs:
        ratios: dict[str, list[float]] = {rung: [] for rung in rungs}
        for _ in range(max(1, round(3 * scale))):
            rates = _rates(kind, rungs[:1], tokens, target, rows, work, 10 * scale)
            rates |= _rates(kind, rungs[1:], tokens, target, rows, work, 10 * scale)
            for rung, rate in rates.items():
                ratios[rung].append(rate / rates["one"])
        measured.append(
            {
                "table": "two processes",
                "kind": kind,
                "tokens_per_batch": tokens,
                "ratio": statistics.median(ratios[rungs[-1]]),
                **{rung: statistics.median(values) for rung, values in ratios.items()},
                "ratios": ratios[rungs[-1]],
            }
        )
        print(json.dumps(measured[-1]), flush=True)
    return measured


def _rates(
    kind: str, rungs: tuple[str, ...], tokens: int, target: str, rows: Path, work: Path, seconds: float
) -> dict[str, float]:
    """Tokens a second (for bare products: repetitions a second) of all processes together, on some rungs in one launch."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={1 if rungs == ('one',) else 2}"]
    words = [
        "-m",
        "benchmarks.train.pairs",
        kind,
        ",".join(rungs),
        str(tokens),
        target,
        str(rows),
        str(work),
        str(seconds),
    ]
    command = [sys.executable, *launcher, *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=900)
    rates = dict.fromkeys(rungs, 0.0)
    lines = [line.split("\t") for line in done.stdout.splitlines() if line.startswith("rate\t")]
    if done.returncode or len(lines) < len(rungs):
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    for _, rung, rate in lines:
        rates[rung] += float(rate)
    return rates


def worker(options: argparse.Namespace) -> None:
    """One process of a launch: prints its share of the rate."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    for rung in options.rungs.split(","):
        rate = lone_rate(options) if options.kind in LONE else train_rate(options, rung)
        # In one write: the lines of two processes must not run into one another.
        sys.stdout.write(f"rate\t{rung}\t{rate}\n")
        sys.stdout.flush()
        torch.distributed.barrier()
    # Nobody leaves while another still listens: gloo ends such a process by a signal.
    torch.distributed.destroy_process_group()


def lone_rate(options: argparse.Namespace) -> float:
    """Work that processes do side by side without a word between them; they begin together."""
    if options.kind == "bare":
        left, right = torch.randn(512, 512), torch.randn(512, 2048)
        size, job = 1.0, lambda: left @ right
    else:
        target, tokenizer = Target.load(options.target), load_tokenizer(options.target)
        samples = list(Corpus(options.rows, lambda: ChatTemplate(tokenizer), None, target.max_positions or 4096))
        own = samples[int(os.environ["RANK"]) :: int(os.environ["WORLD_SIZE"])][:20]
        identity = HiddenStateCache(options.work / "cache", check="off").manifest.identity
        size, job = float(sum(len(sample.input_ids) for sample in own)), lambda: features(target, own, identity)
    job()
    torch.distributed.barrier()
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < options.seconds:
        job()
        count += 1
    return count * size / (time.perf_counter() - started)


class Rate(pl.Callback):
    """Assistant tokens a second of this process, the first steps left out."""

    def __init__(self, seconds: float, linked: bool, warm: int = 4) -> None:
        self.seconds, self.linked, self.warm = seconds, linked, warm
        self._tokens, self._since, self.rate = 0, 0.0, 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """All begin together, linked or not."""
        torch.distributed.barrier()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts, and stops linked processes at the same step."""
        if trainer.global_step == self.warm:
            self._since = time.perf_counter()
        if trainer.global_step <= self.warm:
            return
        self._tokens += batch.num_labelled
        elapsed = time.perf_counter() - self._since
        self.rate = self._tokens / elapsed
        over = torch.tensor(float(elapsed > self.seconds))
        if self.linked:
            torch.distributed.all_reduce(over)
        trainer.should_stop = bool(over)


def train_rate(options: argparse.Namespace, rung: str) -> float:
    """A share of data-parallel training; the joint batch grows with the processes, as it does on more devices."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    linked = rung in ("in step", "together")
    strategy: Any = SingleDeviceStrategy(torch.device("cpu"))
    if linked:
        hook = noop_hook if rung == "in step" else None
        strategy = DDPStrategy(gradient_as_bucket_view=True, ddp_comm_hook=hook)  # as in configs/engines/ddp.yaml
    recipe, clock = RECIPES[options.kind], Rate(options.seconds, linked)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=torch.distributed.get_world_size() if linked else 1,
        strategy=strategy,
        max_epochs=-1,
        max_steps=1_000_000,
        gradient_clip_val=1.0,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        callbacks=[clock],
        **QUIET,
    )
    data = CacheDataModule(options.work / "cache", val_fraction=0.01, tokens_per_batch=options.tokens, check="lazy")
    trainer.fit(DraftModule(options.target, recipe.family(**recipe.options), **recipe.module), data)
    return clock.rate


def main() -> None:
    """One process of a launch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind")
    parser.add_argument("rungs", help="with commas between")
    parser.add_argument("tokens", type=int)
    parser.add_argument("target")
    parser.add_argument("rows", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("seconds", type=float)
    worker(parser.parse_args())


if __name__ == "__main__":
    main()

"""Where the time of training goes: against bare matrix products, against the bare target forward, and over two processes.

    python -m benchmarks.train.speed                 # = make bench-train
    python -m benchmarks.train.speed --scale 0.1     # tries it out

Trains ReDrafter, EAGLE-1, EAGLE-3 and a judge from one cache of chat-6m's states (of the embedded target's where --data is absent).
Steps and the very products that they compute, run bare, alternate. The judge's labels are random: only its speed is measured. Writes
runs/bench-train/report.json and report.md. Ratios are medians over rounds of one part. A run that was stopped resumes with the next part;
`rm -r runs/bench-train` starts anew.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import logging
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.data.hidden_state_cache import bare_forward
from benchmarks.drafters.families import make_rows
from benchmarks.drafters.families_plan import Bench
from benchmarks.drafters.recipes import QUIET, RECIPES
from benchmarks.machine import machine_section
from benchmarks.train.cost import LLAMA_3_8B, LLAMA_3_70B, Cluster, DrafterPlan, TargetShape, bill
from benchmarks.train.pairs import pair_rows
from benchmarks.train.products import Recorder, Replay
from benchmarks.train.step_clock import PhaseProfiler, Round, StepClock
from draftsmith import provenance
from draftsmith.data.cache.extract import HiddenStateCache, extract
from draftsmith.data.cache.extraction import StorageOptions
from draftsmith.data.cache.features import features
from draftsmith.data.chat_template import ChatTemplate
from draftsmith.data.corpus import Corpus
from draftsmith.data.shards.shards import write_shard
from draftsmith.files import atomic_write, read_jsonl
from draftsmith.label.token_rows import LabelledRow, write_rows
from draftsmith.models.drafters.rollout import PackedBatch
from draftsmith.models.families.eagle3 import default_layers
from draftsmith.models.files.loading import load_tokenizer
from draftsmith.models.target.target import PRE_NORM, Target
from draftsmith.train.batches.data_module import CacheDataModule
from draftsmith.train.drafter.module import DraftModule
from draftsmith.train.drafter.objective import Objective, inverse_draft_ids, prepare, run
from draftsmith.train.judge.data import JudgeDataModule
from draftsmith.train.judge.module import JudgeModule

FAMILIES = ("redrafter", "eagle", "eagle3")
PLANS = {"redrafter": DrafterPlan("redrafter", 5), "eagle": DrafterPlan("eagle", 1), "eagle3": DrafterPlan("eagle3", 5)}
LENGTHS, VOCABULARIES = (512, 2048, 8192), (32 * 1024, 128 * 1024)


def prepare_cache(target: str, options: argparse.Namespace) -> tuple[Path, Path]:
    """The cache of all layers that any family reads, and labelled rows of the same samples; made once."""
    work = options.work
    work.mkdir(parents=True, exist_ok=True)
    name = "embedded" if target == "embedded:target" else "chat-6m"
    replies, _ = make_rows(Bench(name, target, 0, 0, 1, replies=400), work, options.data)
    rows = work / "rows.jsonl"
    if not rows.is_file():
        write_rows(rows, random_labels(replies, options.samples))
    cache = work / "cache"
    layers = tuple(dict.fromkeys((*default_layers(Target.load(target).config.num_hidden_layers), PRE_NORM)))
    extract(target, rows, cache, storage=StorageOptions(layers=layers))
    return cache, rows


def random_labels(replies: Path, count: int) -> Iterator[LabelledRow]:
    """Replies with a random label on every token."""
    chance = random.Random(0)
    for number, (_, row) in enumerate(read_jsonl(replies)):
        if number == count:
            return
        labels = [int(chance.random() < 0.8) for _ in row["reply_ids"]]
        yield LabelledRow(str(number), str(number), "random", "rule", row["prompt_ids"], row["reply_ids"], labels)


def clocked(
    module: pl.LightningModule, data: pl.LightningDataModule, count: Callable[[Any], int], steps: int, **timing: int
) -> list[Round]:
    """Rounds of a training that goes through Lightning as any run does."""
    profiler = PhaseProfiler()
    clock = StepClock(profiler, count, **timing)
    pl.seed_everything(0)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=-1,
        max_steps=steps,
        gradient_clip_val=None if isinstance(module, JudgeModule) else 1.0,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        profiler=profiler,
        callbacks=[clock],
        **QUIET,
    )
    trainer.fit(module, data)
    return clock.rounds


def train_rows(target: str, cache: Path, rows: Path, num_rounds: int) -> list[dict[str, Any]]:
    """Speed of every family and of the judge, from cache."""
    measured = []
    for family in FAMILIES:
        recipe = RECIPES[family]
        module = DraftModule(target, recipe.family(**recipe.options), **recipe.module, metrics_every=10)
        data = CacheDataModule(cache, val_fraction=0.01, tokens_per_batch=recipe.tokens_per_batch, check="lazy")
        rounds = clocked(module, data, lambda batch: batch.num_labelled, 8 + 5 * num_rounds)
        measured.append(speed_row(family, "assistant tokens", rounds))
        print(json.dumps(measured[-1]), flush=True)
    judge = JudgeModule(target, tolerance=0.0, num_replicates=2)
    rounds = clocked(judge, JudgeDataModule(cache, rows, check="lazy"), len, 1 + 2 * num_rounds, timed=1, warm=1)
    measured.append(speed_row("judge", "labelled tokens, 10 iterations of L-BFGS over 6 penalties", rounds))
    print(json.dumps(measured[-1]), flush=True)
    return measured


def speed_row(name: str, unit: str, rounds: list[Round]) -> dict[str, Any]:
    """Medians over rounds."""
    shares = {
        phase: statistics.median(measured.phases.get(phase, 0.0) / measured.real for measured in rounds)
        for phase in ("loading", "to device", "forward", "backward")
    }
    return {
        "table": "training",
        "drafter": name,
        "unit": unit,
        "tokens_per_second": 1.0 / statistics.median(measured.real for measured in rounds),
        "bare_share": statistics.median(measured.bare / measured.real for measured in rounds),
        "bare_share_range": [
            min(measured.bare / measured.real for measured in rounds),
            max(measured.bare / measured.real for measured in rounds),
        ],
        **{f"share_{phase}": share for phase, share in shares.items()},
        "share_rest": 1.0 - sum(shares.values()),
        "flops_per_token": statistics.median(measured.flops for measured in rounds),
        "bare_gflops_per_second": statistics.median(measured.flops / measured.bare for measured in rounds) / 1e9,
        "rounds": len(rounds),
    }


def extraction_row(target_name: str, rows: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Extraction, its write included, against the target's forward on the same batches, in turns."""
    target, tokenizer = Target.load(target_name), load_tokenizer(target_name)
    corpus = Corpus(rows, lambda: ChatTemplate(tokenizer), None, target.max_positions or 4096)
    samples = list(corpus)[: max(40, int(300 * options.scale))]
    identity = HiddenStateCache(options.work / "cache", check="off").manifest.identity
    ratios, rates = [], []
    for number in range(2 + options.rounds // 2):
        started = time.perf_counter()
        bare_forward(target, samples, identity.batch_tokens)
        between = time.perf_counter()
        write_shard(options.work / "shard.safetensors", features(target, samples, identity))
        ended = time.perf_counter()
        if number:
            ratios.append((between - started) / (ended - between))
            rates.append(sum(len(sample.input_ids) for sample in samples) / (ended - between))
    row = {"table": "extraction", "layers": len(identity.layers), "of_bare_forward": statistics.median(ratios)}
    row |= {"of_bare_forward_range": [min(ratios), max(ratios)], "tokens_per_second": statistics.median(rates)}
    print(json.dumps(row), flush=True)
    return row


def memory_rows(scale: float) -> list[dict[str, Any]]:
    """Peak memory of one forward and backward above that of the loaded weights, each in a process of its own."""
    rows = []
    lengths = LENGTHS if scale >= 0.5 else LENGTHS[:2]
    for family in FAMILIES:
        for vocabulary in VOCABULARIES:
            for length in lengths:
                command = [
                    sys.executable,
                    "-m",
                    "benchmarks.train.speed",
                    "--memory",
                    family,
                    str(vocabulary),
                    str(length),
                ]
                done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
                row = {"table": "memory", "drafter": family, "vocabulary": vocabulary, "tokens": length}
                rows.append(row | {"peak_mib": float(done.stdout.split()[-1])})
                print(json.dumps(rows[-1]), flush=True)
    return rows


def memory_of(family: str, vocabulary: int, length: int) -> float:
    """MiB that a step over one text of `length` tokens adds; hidden size 256, float32, distillation `path`."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=max(LENGTHS),
        tie_word_embeddings=False,
    )
    target = Target.from_model(LlamaForCausalLM(config))
    recipe = RECIPES[family]
    drafter = recipe.family(**recipe.options).build(target.ends, None, recipe.module["num_steps"], "").train()
    hidden = {name: torch.randn(length, 256) for name in {PRE_NORM, *drafter.features}}
    batch = PackedBatch(
        input_ids=torch.randint(0, vocabulary, (length,)),
        loss_mask=torch.ones(length, dtype=torch.bool),
        document_ids=torch.zeros(length, dtype=torch.int64),
        positions=torch.arange(length),
        hidden=hidden,
    )
    objective = Objective(recipe.module["num_steps"], "path", feature_weight=recipe.module.get("feature_weight", 0.0))
    lesson = prepare(objective, batch, inverse_draft_ids(drafter.draft_ids(), vocabulary))
    weights = torch.full((objective.num_steps,), 1.0 / length)
    before = forget_peak()
    run(objective, lesson, drafter, target.ends, weights, metrics=True).total.backward()
    return resident("VmHWM") - before


def forget_peak() -> float:
    """Gives freed memory back to the system and starts the peak anew; MiB resident now."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def resident(name: str) -> float:
    """MiB resident: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def model_rows(speeds: list[dict[str, Any]], target: str, cache: Path) -> list[dict[str, Any]]:
    """The cost model's operations against those counted, and its seconds against those measured."""
    manifest = HiddenStateCache(cache, check="off").manifest
    share, length = manifest.num_labelled / manifest.num_tokens, manifest.num_tokens / manifest.num_samples
    shape = TargetShape.from_config(Target.load(target).config)
    with Recorder() as recorder:
        torch.randn(1024, 1024) @ torch.randn(1024, 1024)
    square = Replay(recorder.products)
    square.run()
    rate = recorder.flops / statistics.median(square.run() for _ in range(9))
    rows = []
    for row in speeds:
        if row.get("table") != "training" or row["drafter"] not in PLANS:
            continue
        predicted = PLANS[row["drafter"]].step_flops(shape, length, share) / share
        rows.append(
            {
                "table": "cost model",
                "drafter": row["drafter"],
                "flops_predicted_over_counted": predicted / row["flops_per_token"],
                "seconds_at_square_rate_over_measured": predicted / rate * row["tokens_per_second"],
                "square_gflops_per_second": rate / 1e9,
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def bills() -> list[dict[str, Any]]:
    """Large targets on paper: 100 M tokens, 2 epochs, texts of 2,048 tokens, 60 % of them labelled, 8 devices, 3 GB/s of disk."""
    cluster = Cluster(8, 989e12, 0.4, disk_rate=3e9)
    plans = {
        "redrafter": DrafterPlan("redrafter", 5, 32000),
        "eagle": PLANS["eagle"],
        "eagle3": DrafterPlan("eagle3", 7, 32000),
    }
    rows = []
    for target in (LLAMA_3_8B, LLAMA_3_70B):
        for name, plan in plans.items():
            for way, settings in {
                "bf16 cache": {},
                "8-bit cache": {"item_bytes": 1},
                "online": {"online": True},
            }.items():
                cost = bill(target, plan, cluster, tokens=1e8, epochs=2, length=2048, labelled_share=0.6, **settings)
                rows.append({"table": "paper", "target": target.name, "drafter": name, "way": way, **asdict(cost)})
    return rows


def page(record: dict[str, Any], rows: list[dict[str, Any]], load: float) -> str:
    """The report for people."""
    by = lambda table: [row for row in rows if row["table"] == table]  # noqa: E731
    lines = [
        f"# Training speed, {record['time'][:10]}",
        f"`{record['command']}`",
        f"Load average at the start: {load:.1f} (above 0.5, something else was running: mistrust speeds).",
        "## From cache\n\n"
        "*Of bare*: what the step's own matrix products, run alone in the same run, take of the step. Parts are shares of a step.",
        "| | tokens/s | of bare (range) | loading | forward | backward | optimiser, clipping, loop |\n|---|---|---|---|---|---|---|\n"
        + "\n".join(
            f"| {row['drafter']} | {row['tokens_per_second']:,.0f} | {row['bare_share']:.2f} ({row['bare_share_range'][0]:.2f} to "
            f"{row['bare_share_range'][1]:.2f}) | {row['share_loading']:.1%} | {row['share_forward']:.0%} | {row['share_backward']:.0%} "
            f"| {row['share_rest']:.0%} |"
            for row in by("training")
        ),
        "Tokens are the assistant's; the judge's are labelled tokens times 1 step of 10 iterations over 6 penalties.",
    ]
    for row in by("extraction"):
        low, high = row["of_bare_forward_range"]
        lines.append(
            f"## Extraction\n\n{row['of_bare_forward']:.2f} ({low:.2f} to {high:.2f}) of the bare forward on the same batches, with "
            f"{row['layers']} layers kept and the shard written: {row['tokens_per_second']:,.0f} tokens/s."
        )
    lines.append(
        "## Two processes of one thread against one\n\n"
        "| | tokens a process and step | apart | in step | together |\n|---|---|---|---|---|\n"
        + "\n".join(
            f"| {row['kind']} | {row['tokens_per_batch'] or ''} | {row['apart']:.2f} | "
            + " | ".join(f"{row[rung]:.2f}" if rung in row else "" for rung in ("in step", "together"))
            + " |"
            for row in by("two processes")
        )
        + "\n\nTokens/s of two over one. *Apart*: side by side, each for itself, which is what the machine gives (*bare*: a matrix "
        "product). *In step*: they wait for the slower one at every step, and keep their gradients. *Together*: they send them "
        "too, which is training."
    )
    lines.append(memory_section(by("memory")))
    lines.append(
        "## The cost model against this run\n\n| | operations, model / counted | seconds, model / measured |\n|---|---|---|\n"
        + "\n".join(
            f"| {row['drafter']} | {row['flops_predicted_over_counted']:.2f} | {row['seconds_at_square_rate_over_measured']:.2f} |"
            for row in by("cost model")
        )
        + "\n\nSeconds of the model are its operations at the rate of a 1,024-square product on this machine: the share of that rate that "
        "a step reaches."
    )
    return "\n\n".join([*lines, machine_section()]) + "\n"


def memory_section(rows: list[dict[str, Any]]) -> str:
    """The table of a step's peak memory, a column for each length of the text."""
    lengths = sorted({row["tokens"] for row in rows})
    lines = [
        "## Peak memory of a step\n\nMiB above the loaded weights; hidden size 256, float32, one text, full draft vocabulary.\n",
        "| | vocabulary | " + " | ".join(f"{length:,} tokens" for length in lengths) + " |",
        "|---|---|" + "---|" * len(lengths),
    ]
    for family in FAMILIES:
        for vocabulary in VOCABULARIES:
            own = [row for row in rows if (row["drafter"], row["vocabulary"]) == (family, vocabulary)]
            peaks = " | ".join(f"{row['peak_mib']:,.0f}" for row in own)
            lines.append(f"| {family} | {vocabulary:,} | {peaks} |")
    return "\n".join(lines)


def main() -> int:
    """Runs all parts and writes the report."""
    options = _options()
    if options.memory:
        family, vocabulary, length = options.memory
        print(memory_of(family, int(vocabulary), int(length)))
        return 0
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    load = os.getloadavg()[0]
    known = options.data / "models" / "chat-6m"
    target = str(known) if known.is_dir() else "embedded:target"
    options.rounds, options.samples = max(2, int(12 * options.scale)), max(80, int(1401 * options.scale))
    cache, labelled = prepare_cache(target, options)
    parts: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "training": lambda: train_rows(target, cache, labelled, options.rounds),
        "extraction": lambda: [extraction_row(target, labelled, options)],
        "pairs": lambda: pair_rows(FAMILIES, target, labelled, options.work, options.scale),
        "memory": lambda: memory_rows(options.scale),
    }
    rows = [row for name, job in parts.items() for row in once(options.work / f"{name}.json", job)]
    rows += model_rows(rows, target, cache)
    rows += bills()
    record = provenance.record(provenance.command_line(), {}, {})
    facts = {key: record[key] for key in ("command", "machine", "versions")} | {"target": target, "load_at_start": load}
    atomic_write(options.work / "report.json", json.dumps(facts | {"rows": rows}, indent=1) + "\n")
    atomic_write(options.work / "report.md", page(record, rows, load))
    print(options.work / "report.md")
    return 0


def once(path: Path, job: Callable[[], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The rows of a part, measured unless an earlier run has."""
    if not path.is_file():
        atomic_write(path, json.dumps(job()))
    rows: list[dict[str, Any]] = json.loads(path.read_text())
    return rows


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--work", type=Path, default=Path("runs/bench-train"))
    parser.add_argument("--scale", type=float, default=1.0, help="of rounds, samples and seconds; 0.1 tries it out")
    parser.add_argument("--memory", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())

"""What eight bits cost a drafter: tokens per step after training from a bfloat16 and from a float8 cache of the same replies.

    python -m benchmarks.data.cache_dtype                    # the embedded target: nine minutes beside other work, one thread
    python -m benchmarks.data.cache_dtype --scale small      # about a minute: tries the script out
    python -m benchmarks.data.cache_dtype --target chat-6m --data ../shared/data --write

The same seed, steps and order of batches for both caches, ReDrafter and EAGLE-1, then the same held-out prompts. Differences are paired
by prompt. Since two trainings that differ in anything drift apart, several seeds are run, and what another seed alone changes stands
beside what eight bits change. Tokens per step do not depend on how busy the machine is. `--write` makes `<date>-cache-dtype.md`.
"""

import argparse
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch

from benchmarks.drafters.families import embedded_prompts, own_replies, write_rows
from benchmarks.drafters.families_plan import REPLY_TOKENS, Bench
from benchmarks.drafters.recipes import QUIET, RECIPES, Recipe
from benchmarks.machine import machine_section
from draftsmith import provenance
from draftsmith.data.cache.extract import extract
from draftsmith.data.cache.extraction import StorageOptions
from draftsmith.data.cache.reader import HiddenStateCache
from draftsmith.data.shards.packing import packed_batches
from draftsmith.decode import Engine, GenerationSettings
from draftsmith.evaluate.strata.acceptance import bootstrap_interval, ratio_interval
from draftsmith.files import atomic_write, read_jsonl
from draftsmith.models.drafters.drafter_folder import load_drafter
from draftsmith.models.target.target import PRE_NORM, Target
from draftsmith.models.tree.shapes import parse_shape
from draftsmith.train.batches.data_module import CacheDataModule
from draftsmith.train.drafter.module import DraftModule
from draftsmith.train.drafter_callbacks.keep_best_drafter import KeepBestDrafter

DTYPES = ("bfloat16", "float8_e4m3")
FAMILIES = ("redrafter", "eagle")
SHAPE = "4x5n15"
PROMPTS = 120


@dataclass(frozen=True)
class Scale:
    """How much is done: replies to train on, steps of each training, seeds."""

    replies: int
    steps: int
    seeds: int


SCALES = {"small": Scale(200, 40, 1), "full": Scale(1600, 600, 3)}


@dataclass(frozen=True)
class Decoded:
    """By prompt: tokens emitted in cycles, and cycles."""

    tokens: np.ndarray
    cycles: np.ndarray

    @property
    def tokens_per_step(self) -> float:
        """Over all prompts."""
        return float(self.tokens.sum() / self.cycles.sum())


def make_rows(name: str, target: str, scale: Scale, data: Path, work: Path) -> tuple[Path, list[list[int]]]:
    """A file of replies to train on, and held-out prompts."""
    replies = work / "replies.jsonl"
    if name == "embedded":
        bench = Bench(name, target, 0, 0.0, PROMPTS, scale.replies)
        prompts, held_out = embedded_prompts(bench, work)
        write_rows(replies, own_replies(bench, prompts))
        return replies, held_out
    rows = [row for _, row in read_jsonl(data / "replies" / f"{name}_train.jsonl")]
    tests = [row["prompt_ids"] for _, row in read_jsonl(data / "replies" / f"{name}_test.jsonl")]
    last = max(0, PROMPTS - len(tests))  # the test file is short of prompts: the last training rows are held out too
    rows, held_out_rows = rows[: len(rows) - last], rows[len(rows) - last :]
    write_rows(replies, ({"id": str(i), **row} for i, row in enumerate(rows[: scale.replies])))
    return replies, [*tests, *(row["prompt_ids"] for row in held_out_rows)]


def train(recipe: Recipe, target: str, cache: Path, out: Path, steps: int, seed: int) -> Path:
    """Trains for so many steps; the last weights are the result."""
    pl.seed_everything(seed)
    module = DraftModule(target, recipe.family(**recipe.options), **recipe.module, val_steps=1)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=-1,
        max_steps=steps,
        default_root_dir=out,
        gradient_clip_val=1.0,
        # One validation, after the last step: it fits the score scale, and nothing is picked.
        check_val_every_n_epoch=None,
        val_check_interval=steps,
        num_sanity_val_steps=0,
        callbacks=[KeepBestDrafter(out / "drafter", replace=True)],
        **QUIET,
    )
    trainer.fit(module, CacheDataModule(cache, val_fraction=0.02, tokens_per_batch=recipe.tokens_per_batch, seed=seed))
    return out / "drafter"


def decode(target: Target, drafter: Path, prompts: Sequence[list[int]]) -> Decoded:
    """Greedy replies to the prompts; batches change no reply and no count."""
    engine = Engine(target, load_drafter(drafter), parse_shape(SHAPE))
    settings = GenerationSettings(max_new_tokens=REPLY_TOKENS, eos_token_ids=target.eos_token_ids)
    generations = [
        generation
        for start in range(0, len(prompts), 40)
        for generation in engine.generate(list(prompts[start : start + 40]), settings)
    ]
    tokens = np.array([max(0, len(reply.token_ids) - 1) for reply in generations])
    return Decoded(tokens, np.array([len(reply.accepted) for reply in generations]))


def states_line(target: Target, caches: dict[str, Path]) -> str:
    """How far the two caches' states lie apart, and whether the target's next token stays the same."""
    errors, same = [], []
    pair = [HiddenStateCache(caches[dtype]) for dtype in DTYPES]
    with torch.no_grad():
        for wide, narrow in zip(*pair, strict=True):
            wide_states, narrow_states = wide.hidden[PRE_NORM].float(), narrow.hidden[PRE_NORM].float()
            errors.append((narrow_states - wide_states).norm(dim=-1) / wide_states.norm(dim=-1))
            wide_tokens, narrow_tokens = (
                target.ends.logits(target.ends.final_norm(states)).argmax(-1) for states in (wide_states, narrow_states)
            )
            same.append(wide_tokens == narrow_tokens)
    sizes = [sum(shard.num_bytes for shard in cache.manifest.shards) / cache.manifest.num_tokens for cache in pair]
    return (
        f"Bytes a token: {sizes[0]:.1f} as bfloat16, {sizes[1]:.1f} as float8_e4m3. A state of eight bits lies "
        f"{float(torch.cat(errors).mean()):.3f} of its length from the bfloat16 one (largest {float(torch.cat(errors).max()):.3f}); the "
        f"target's likeliest next token, read from it, is the same at {float(torch.cat(same).float().mean()):.2%} of the positions."
    )


def reading_line(caches: dict[str, Path]) -> str:
    """How fast one thread reads and packs each cache, in turns and by the processor's clock."""
    opened = {dtype: HiddenStateCache(cache, check="off") for dtype, cache in caches.items()}
    lengths = opened[DTYPES[0]].sample_lengths
    seconds: dict[str, list[float]] = {dtype: [] for dtype in DTYPES}
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for _ in range(8):
        for dtype, cache in opened.items():
            started = time.process_time()
            for _batch in packed_batches(cache, lengths, 4096):
                pass
            seconds[dtype].append(time.process_time() - started)
    torch.set_num_threads(num_threads)
    rates = {dtype: sum(lengths) / statistics.median(taken[1:]) for dtype, taken in seconds.items()}
    return (
        "Read from memory-mapped files and packed by one thread: "
        + " and ".join(f"{rate:,.0f} tokens/s as {dtype}" for dtype, rate in rates.items())
        + f", the float8 ones turned into bfloat16 (ratio {rates[DTYPES[1]] / rates[DTYPES[0]]:.2f})."
    )


def rows_of(family: str, by_dtype: dict[str, list[Decoded]]) -> list[str]:
    """The table's rows on one family: pooled over seeds, intervals over prompts."""
    tokens = {dtype: np.sum([decoded.tokens for decoded in runs], axis=0) for dtype, runs in by_dtype.items()}
    cycles = {dtype: np.sum([decoded.cycles for decoded in runs], axis=0) for dtype, runs in by_dtype.items()}
    rates = {dtype: float(tokens[dtype].sum() / cycles[dtype].sum()) for dtype in DTYPES}
    columns = [column for dtype in reversed(DTYPES) for column in (tokens[dtype], cycles[dtype])]
    low, high = bootstrap_interval(
        np.stack(columns, axis=1).tolist(), lambda sums: sums[:, 0] / sums[:, 1] - sums[:, 2] / sums[:, 3]
    )
    lines = []
    for dtype in DTYPES:
        below, above = ratio_interval(tokens[dtype].tolist(), cycles[dtype].tolist())
        difference = "" if dtype == DTYPES[0] else f"{rates[dtype] - rates[DTYPES[0]]:+.3f} ({low:+.3f} to {high:+.3f})"
        seeds = ", ".join(f"{decoded.tokens_per_step:.3f}" for decoded in by_dtype[dtype])
        lines.append(
            f"| {family} | {dtype} | {rates[dtype]:.3f} ({below:.2f} to {above:.2f}) | {difference} | {seeds} |"
        )
    return lines


def page(options: argparse.Namespace, work: Path) -> Iterator[str]:
    """The page's paragraphs, each as soon as it is measured."""
    scale = SCALES[options.scale]
    name = "embedded:target" if options.target == "embedded" else str(options.data / "models" / options.target)
    target = Target.load(name)
    replies, prompts = make_rows(options.target, name, scale, options.data, work)
    caches = {dtype: work / dtype for dtype in DTYPES}
    for dtype, cache in caches.items():
        extract(name, replies, cache, storage=StorageOptions(dtype=dtype))  # type: ignore[arg-type]
    yield f"# A cache of eight bits, {date.today().isoformat()}"
    yield f"`{provenance.command_line()}`"
    yield (
        f"{options.target}, its own replies to {scale.replies} prompts at most, {scale.steps} steps, seeds 0 to {scale.seeds - 1}; "
        f"{len(prompts)} held-out prompts, at most {REPLY_TOKENS} new tokens, T = 0, shape {SHAPE}. Intervals: 95 % bootstrap over "
        "prompts, seeds pooled; the difference is paired by prompt."
    )
    yield states_line(target, caches)
    yield reading_line(caches)
    yield (
        "| drafter | cache | tokens per step (95 %) | difference (95 %) | by seed |\n|---|---|---|---|---|\n"
        + "\n".join(
            line for family in FAMILIES for line in family_rows(family, name, target, caches, prompts, scale, work)
        )
    )
    yield machine_section()


def family_rows(
    family: str,
    name: str,
    target: Target,
    caches: dict[str, Path],
    prompts: Sequence[list[int]],
    scale: Scale,
    work: Path,
) -> list[str]:
    """Trains one family from both caches under each seed, and decodes."""
    by_dtype: dict[str, list[Decoded]] = {dtype: [] for dtype in DTYPES}
    for seed in range(scale.seeds):
        for dtype, cache in caches.items():
            drafter = train(RECIPES[family], name, cache, work / f"{family}-{dtype}-{seed}", scale.steps, seed)
            by_dtype[dtype].append(decode(target, drafter, prompts))
            print(
                f"{family}, {dtype}, seed {seed}: {by_dtype[dtype][-1].tokens_per_step:.3f}",
                file=sys.stderr,
                flush=True,
            )
    return rows_of(family, by_dtype)


def main() -> None:
    """Prints the page, and writes it where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=("embedded", "chat-6m"), default="embedded")
    parser.add_argument("--scale", choices=tuple(SCALES), default="full")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--write", action="store_true", help="write the page into --out")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/data"))
    options = parser.parse_args()
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    paragraphs = []
    with tempfile.TemporaryDirectory() as folder:
        for paragraph in page(options, Path(folder)):
            print(paragraph, end="\n\n", flush=True)
            paragraphs.append(paragraph)
    if options.write:
        suffix = "" if options.target == "embedded" else f"-{options.target}"
        path = options.out / f"{date.today().isoformat()}-cache-dtype{suffix}.md"
        atomic_write(path, "\n\n".join(paragraphs) + "\n")
        print(path)


if __name__ == "__main__":
    main()

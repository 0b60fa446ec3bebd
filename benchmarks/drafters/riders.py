"""Riders and heads close to the target beside an EAGLE-1 and Medusa heads on the embedded target: the same text, the same processor time.

    python -m benchmarks.drafters.riders

Caches the target's states over its own replies, trains each drafter for the same seconds of processor time, decodes held-out prompts with
the engine at T = 0 and 1, and compares each reply at T = 0 with plain decoding. Prints a table; it measures no speed, so a machine that
others use serves too. The same command resumes a run that was stopped.
"""

import argparse
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.drafters.families import cached, make_rows
from benchmarks.drafters.families_plan import REPLY_TOKENS, Bench
from benchmarks.drafters.recipes import CLOSE_RECIPES, RECIPES, RIDER_RECIPES, Recipe, Trained, train
from draftsmith.decode import Engine, GenerationSettings
from draftsmith.files import read_jsonl
from draftsmith.models.drafters.drafter_folder import load_drafter
from draftsmith.models.families.heads import HeadsFamily
from draftsmith.models.target.target import Target
from draftsmith.models.tree.shapes import parse_shape

PILOTS = (10, 110)
STEPS = 3
CONTENDERS = {
    "EAGLE-1": RECIPES["eagle"],
    "Medusa": Recipe(HeadsFamily, {"num_steps": STEPS, "distillation": "path", "lr": 2e-3}),
    "Chimera": CLOSE_RECIPES["chimera"],
    "MTP head": CLOSE_RECIPES["mtp"],
    "prompt tokens": RIDER_RECIPES["prompt_tokens"],
    "Hidden Transfer": RIDER_RECIPES["hidden_transfer"],
    "FIRP": RIDER_RECIPES["firp"],
}
SHAPES = ("1x3", "4x3n8")


@dataclass(frozen=True)
class Counted:
    """What one drafter gained in one shape: tokens a cycle, the share of replies that equal plain decoding's, rows a cycle."""

    tokens_per_step: float
    equal: float
    rows: int


def steps_for(recipe: Recipe, target: str, cache: Path, seconds: float) -> int:
    """Optimiser steps that take so many seconds of processor time, by two short runs behind one that warms up."""
    spent = []
    for steps in (1, *PILOTS):
        with tempfile.TemporaryDirectory(prefix="pilot-") as folder:
            before = time.process_time()
            train(recipe, target, cache, Path(folder), steps=steps)
            spent.append(time.process_time() - before)
    return max(PILOTS[1], int(seconds * (PILOTS[1] - PILOTS[0]) / max(spent[2] - spent[1], 1e-3)))


def count(target: Target, folder: Path, shape: str, prompts: list[list[int]], temperature: float) -> Counted:
    """Decode the prompts with one drafter and without."""
    settings = GenerationSettings(
        max_new_tokens=REPLY_TOKENS, temperature=temperature, eos_token_ids=target.eos_token_ids
    )
    plain = Engine(target).generate(prompts, settings, num_rows=8)
    limits, drafter = parse_shape(shape), load_drafter(folder)
    replies = Engine(target, drafter, limits).generate(prompts, settings, num_rows=8)
    emitted = sum(len(reply.token_ids) - 1 for reply in replies)
    equal = sum(reply.token_ids == own.token_ids for reply, own in zip(replies, plain, strict=True)) / len(prompts)
    riders = 0 if drafter.riders is None else limits.draft_length
    return Counted(emitted / sum(len(reply.accepted) for reply in replies), equal, limits.max_nodes * (1 + riders))


def table(done: dict[str, tuple[Trained, list[Counted]]]) -> str:
    """Markdown: a row for each drafter."""
    lines = [
        "| drafter | trained weights | steps | labelled tokens | shape | rows a forward | T = 0 | T = 1 | replies equal at T = 0, 1 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, (trained, counted) in done.items():
        for number, shape in enumerate(SHAPES):
            cold, warm = counted[2 * number : 2 * number + 2]
            lines.append(
                f"| {name} | {trained.parameters:,} | {trained.steps} | {trained.assistant_tokens:,} | `{shape}` | {cold.rows} | "
                f"{cold.tokens_per_step:.2f} | {warm.tokens_per_step:.2f} | {cold.equal:.3f}, {warm.equal:.3f} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Train and count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/riders"))
    parser.add_argument("--seconds", type=float, default=75.0, help="of processor time, for each training")
    parser.add_argument("--replies", type=int, default=2400)
    parser.add_argument("--prompts", type=int, default=48)
    options = parser.parse_args()
    bench = Bench("embedded", "embedded:target", 0, options.seconds, options.prompts, replies=options.replies)
    options.work.mkdir(parents=True, exist_ok=True)
    replies, tests = make_rows(bench, options.work, options.work)
    cache = cached(bench, replies, options.work / "cache")
    target = Target.load(bench.target)
    prompts = [row["prompt_ids"] for _, row in read_jsonl(tests)]
    done = {}
    for name, recipe in CONTENDERS.items():
        folder = options.work / name.replace(" ", "-")
        is_trained = (folder / "trained.json").is_file()
        steps = 0 if is_trained else steps_for(recipe, bench.target, cache, options.seconds)
        before = time.process_time()
        trained = train(recipe, bench.target, cache, folder, steps=steps)
        spent = time.process_time() - before
        counted = [
            count(target, folder / "drafter", shape, prompts, temperature)
            for shape in SHAPES
            for temperature in (0.0, 1.0)
        ]
        done[name] = (trained, counted)
        print(f"{name}: {spent:.0f} s of processor time", flush=True)
        print(table(done), flush=True)


if __name__ == "__main__":
    main()

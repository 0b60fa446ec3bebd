"""Every family on one target at equal training time, and what its papers claim about it.

    python -m benchmarks.drafters.race                          # all families on chat-6m, about an hour on one core
    python -m benchmarks.drafters.race --target embedded:target --rows ROWS.jsonl --tests TESTS.jsonl

It trains every family for the same seconds on the same replies of the target. It counts tokens per step at temperatures 0 and 1, which do
not depend on what else the machine does; intervals are bootstraps over prompts. Then it times each drafter's chain with `evaluate`. What it
trained and counted is kept in `--work` and used again.

Rows and tests are JSONL with `prompt_ids` and `reply_ids`; without them, those of chat-6m in the folder that `--data` names.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import replace
from datetime import date
from pathlib import Path

from benchmarks.drafters.counting import Counted, KeptCounts, count, paired_ratio
from benchmarks.drafters.recipes import ALL_RECIPES, Trained, train
from benchmarks.machine import machine_section
from draftsmith import provenance
from draftsmith.data.cache.extract import extract
from draftsmith.data.cache.extraction import StorageOptions
from draftsmith.data.prompts import PromptSelection
from draftsmith.decode.engine import Engine
from draftsmith.decode.sampling import ReplyOptions
from draftsmith.evaluate.evaluate_command import evaluate
from draftsmith.evaluate.measure import Plan
from draftsmith.files import atomic_write, read_jsonl
from draftsmith.models.drafters.drafter import Drafter
from draftsmith.models.drafters.drafter_folder import drafter_folder, load_drafter
from draftsmith.models.families import block, eagle3
from draftsmith.models.target.target import PRE_NORM, Target
from draftsmith.models.tree.shapes import parse_shape

UNTRAINED = {"suffix": "embedded:suffix"}
"""Drafters without training that run beside the others."""


def shapes_of(depth: int) -> dict[float, list[str]]:
    """What a drafter of so many steps is counted with, for each temperature: a chain, trees of 24 and 60 nodes; and drawn drafts."""
    ones = ".".join("1" * depth)
    return {
        0.0: [f"1x{depth}", f"10x{depth}n24", f"10x{depth}n60"],
        1.0: [f"10x{depth}n24", f"b{ones}", "k3." + ".".join("1" * (min(depth, 4) - 1))],
    }


CLAIMS: tuple[tuple[str, tuple[str, int], tuple[str, int]], ...] = (
    ("Hydra drafts better than Medusa", ("hydra", 1), ("medusa", 1)),
    ("Hydra++ drafts better than Hydra", ("hydra++", 1), ("hydra", 1)),
    ("The MLP speculator drafts better than Medusa", ("mlp", 1), ("medusa", 1)),
    ("DSpark's bigram correction drafts better than DFlash", ("dspark", 1), ("dflash", 1)),
    ("Domino's recurrent correction drafts better than DFlash", ("domino", 1), ("dflash", 1)),
    ("JetSpec: a causal mask and distillation draft better than DFlash", ("jetspec", 1), ("dflash", 1)),
    ("A tree of 24 nodes gives 20 % more than a chain (DFlash)", ("dflash", 1), ("dflash", 0)),
    ("The best block drafter has 1.15 times the tokens of EAGLE-1, 60 nodes", ("dspark", 2), ("eagle", 2)),
    ("ReDrafter drafts better than Medusa", ("redrafter", 1), ("medusa", 1)),
)
"""What papers say, and which drafter and shape (0 the chain, 1 the tree of 24 nodes, 2 that of 60) to compare with which, at T = 0."""


class Race:
    """The target, its texts, and what was counted so far."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.target = Target.load(options.target)
        rows = [row for _, row in read_jsonl(options.tests)][: options.prompts]
        self.prompts = [row["prompt_ids"] for row in rows]
        self.kept = KeptCounts(options.work / "counts.json")

    def cache(self) -> Path:
        """The target's states over the training rows, with every layer that a family reads; made once."""
        out, num_layers = self.options.work / "cache", self.target.config.num_hidden_layers
        layers = {*eagle3.default_layers(num_layers), *block.default_layers(num_layers, 2)}
        extract(self.options.target, self.options.rows, out, storage=StorageOptions(layers=(PRE_NORM, *sorted(layers))))
        return out

    def trained(self, name: str, cache: Path) -> Trained:
        """One family's training, for the seconds asked for."""
        recipe = ALL_RECIPES[name]
        recipe = replace(recipe, options={**recipe.options, "draft_vocab_size": self.options.draft_vocab})
        done = train(recipe, self.options.target, cache, self.options.work / name, seconds=self.options.seconds)
        print(f"{time.strftime('%H:%M')} {name}: {done}", flush=True)
        return done

    def folder(self, name: str) -> str:
        """Of a drafter, or its name where it needs no training."""
        return UNTRAINED.get(name) or str(self.options.work / name / "drafter")

    def counted(self, name: str, shape: str, temperature: float) -> Counted:
        """Emitted tokens and cycles of every prompt; counted once."""

        def decoded() -> Counted:
            engine = Engine(self.target, self.drafter(name), parse_shape(shape))
            return count(engine, self.prompts, temperature, self.options.tokens, self.options.seeds)

        return self.kept.counted(f"{name} {shape} {temperature:g}", decoded)

    def drafter(self, name: str) -> Drafter:
        """Loaded and attached."""
        return load_drafter(drafter_folder(self.folder(name))).attach(self.target.ends)

    def depth(self, name: str) -> int:
        """How many steps a drafter was trained for; five where it drafts any depth: without training, or trained for three or fewer."""
        return (
            int(ALL_RECIPES[name].module["num_steps"])
            if name in ALL_RECIPES and ALL_RECIPES[name].module["num_steps"] > 3
            else 5
        )


def count_table(race: Race, names: list[str], temperature: float) -> list[str]:
    """Tokens per step of every drafter and shape."""
    columns = (
        ("chain", "24 nodes", "60 nodes")
        if temperature == 0.0
        else ("guesses, 24 nodes", "block verification", "K-SEQ")
    )
    lines = ["| drafter | " + " | ".join(columns) + " |", "|---" * (1 + len(columns)) + "|"]
    for name in names:
        cells = []
        for shape in shapes_of(race.depth(name))[temperature]:
            if name in UNTRAINED and shape[0] in "bk":
                cells.append("draws nothing")
                continue
            cells.append(f"{race.counted(name, shape, temperature).cell()} `{shape}`")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def claim_table(race: Race, names: list[str]) -> list[str]:
    """Each claim with the ratio of tokens per step on the same prompts, and whether its interval lies on one side."""
    lines = ["| claim | ratio (95 %) | here |", "|---|---|---|"]
    for claim, (ours, our_shape), (theirs, their_shape) in CLAIMS:
        if ours not in names or theirs not in names:
            continue
        shapes = [
            shapes_of(race.depth(name))[0.0][number] for name, number in ((ours, our_shape), (theirs, their_shape))
        ]
        ratio, low, high = paired_ratio(race.counted(ours, shapes[0], 0.0), race.counted(theirs, shapes[1], 0.0))
        wanted = 1.2 if "20 %" in claim else 1.15 if "1.15" in claim else 1.0
        verdict = "holds" if low > wanted else "does not hold" if high < wanted else "not decided"
        lines.append(f"| {claim} | {ratio:.2f} ({low:.2f} to {high:.2f}) | {verdict} |")
    return lines


def training_table(trained: dict[str, Trained]) -> list[str]:
    """Parameters, steps and rates."""
    lines = ["| drafter | trained parameters | steps | seconds | labelled tokens/s |", "|---|---|---|---|---|"]
    return lines + [
        f"| {name} | {run.parameters:,} | {run.steps:,} | {run.seconds:.0f} | {run.rate:,.0f} |"
        for name, run in trained.items()
    ]


def time_table(race: Race, names: list[str]) -> list[str]:
    """Speed-up and the draft's share of a cycle, of each drafter's chain."""
    options = race.options
    out = options.work / "timed"
    if not (out / "report.json").is_file():
        drafters = [f"{name}={race.folder(name)}@1x{race.depth(name)}" for name in names]
        plan = Plan(transformers_prompts=0, prompt_lookup=0, ledger_prompts=4)
        reply, selection = ReplyOptions(max_new_tokens=options.tokens), PromptSelection(limit=options.timed_prompts)
        evaluate(options.target, options.tests, out, drafters, reply=reply, plan=plan, selection=selection)
    rows = json.loads((out / "report.json").read_text())["rows"]
    lines = ["| drafter | shape | speed-up (95 %) | drafting, share of a cycle | identical |", "|---|---|---|---|---|"]
    for row in rows:
        if row["drafter"] == "plain":
            continue
        low, high = row["speedup_interval"]
        phases = row["stage_seconds"]
        whole = sum(phases.values()) if phases else 0.0
        share = f"{phases.get('draft', 0.0) / whole:.0%}" if whole else "-"
        lines.append(
            f"| {row['drafter']} | {row['shape']} | {row['speedup']:.2f} ({low:.2f} to {high:.2f}) | {share} | {row['exact_share']:.1%} |"
        )
    return lines


def main() -> int:
    """Runs what is missing and writes the page."""
    options = _options()
    if not Path(options.rows).is_file() or not Path(options.tests).is_file():
        print(
            f"skipped: {options.rows} or {options.tests} is not there; name the data with --data, or --rows and --tests"
        )
        return 0
    options.work.mkdir(parents=True, exist_ok=True)
    load, race = os.getloadavg()[0], Race(options)
    names = [name for name in ALL_RECIPES if name in options.drafters]
    cache = race.cache()
    trained = {name: race.trained(name, cache) for name in names}
    names += [name for name in UNTRAINED if name in options.drafters]
    page = [f"# Families at equal training time, {date.today().isoformat()}", f"`{provenance.command_line()}`"]
    page.append(
        f"{options.seconds:g} seconds of training each on one core, {len(race.prompts)} test prompts, {options.tokens} new tokens, "
        f"{options.seeds} seeds at temperature 1. Load average at the start: {load:.1f}."
    )
    page += ["## Training", "\n".join(training_table(trained))]
    page += ["## Tokens per step at temperature 0", "\n".join(count_table(race, names, 0.0))]
    page += ["## What the papers say", "\n".join(claim_table(race, names))]
    page += ["## Tokens per step at temperature 1", "\n".join(count_table(race, names, 1.0))]
    page += ["## Speed", "\n".join(time_table(race, names))]
    atomic_write(options.work / "page.md", "\n\n".join([*page, machine_section()]) + "\n")
    print(options.work / "page.md")
    return 0


def _options() -> argparse.Namespace:
    def names(text: str) -> list[str]:
        return text.split(",")

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--target")
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--tests", type=Path)
    parser.add_argument("--work", type=Path, default=Path("runs/race"))
    parser.add_argument("--drafters", type=names, default=[*ALL_RECIPES, *UNTRAINED], help="joined by commas")
    parser.add_argument("--draft-vocab", type=int, default=1024)
    parser.add_argument("--seconds", type=float, default=120.0, help="of each training")
    parser.add_argument("--prompts", type=int, default=60)
    parser.add_argument("--timed-prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--seeds", type=int, default=1)
    options = parser.parse_args()
    options.target = options.target or str(options.data / "models" / "chat-6m")
    options.rows = options.rows or options.data / "replies" / "chat-6m_train.jsonl"
    options.tests = options.tests or options.data / "replies" / "chat-6m_test.jsonl"
    return options


if __name__ == "__main__":
    sys.exit(main())

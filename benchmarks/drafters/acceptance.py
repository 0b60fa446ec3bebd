"""What one trains for sampling: losses made of the acceptance.

    python -m benchmarks.drafters.acceptance --cache CACHE      # on chat-6m, about half an hour on one core
    python -m benchmarks.drafters.acceptance --cache CACHE --target TARGET --tests TESTS.jsonl --shapes 1:s1.1.1.1.1

It trains draft heads for the same number of steps with each loss, and counts tokens per step at temperature 0 and above it. They do not
depend on what else the machine does. Intervals are bootstraps over prompts.

Data: a cache of the target that `draftsmith data extract` made, and prompts as JSONL with `prompt_ids`; without `--target` and `--tests`,
models/chat-6m and replies/chat-6m_test.jsonl in the folder that `--data` names. What it trained and counted is kept in `--work` and used
again.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.drafters.counting import Counted, KeptCounts, count
from benchmarks.drafters.recipes import ALL_RECIPES, train
from benchmarks.machine import machine_section
from draftsmith import provenance
from draftsmith.decode.engine import Engine
from draftsmith.files import atomic_write, read_jsonl
from draftsmith.models.drafters.drafter_folder import load_drafter
from draftsmith.models.target.target import Target
from draftsmith.models.tree.shapes import parse_shape

LOSSES: dict[str, dict[str, Any]] = {
    "forward_kl": {},
    "total_variation": {"divergence": "total_variation"},
    "l1, text 0.1": {"divergence": "l1", "text_weight": 0.1},
    "negative_log_acceptance": {"divergence": "negative_log_acceptance"},
    "lk_hybrid": {"divergence": "lk_hybrid"},
    "forward_kl, d_pace 0.5": {"d_pace": 0.5},
    "negative_log_acceptance, d_pace 0.5": {"divergence": "negative_log_acceptance", "d_pace": 0.5},
}
LOSS_SHAPES = ("0:1x5", "0:10x5n24", "1:10x5n24", "1:s1.1.1.1.1", "1:s4.1.1.1.1")
"""What each loss is judged by, TEMPERATURE:SHAPE: trees of guesses and, where there is sampling, rejection along chains and trees."""


class Counts:
    """The target, its prompts, and what was counted so far."""

    def __init__(self, options: argparse.Namespace, target: Target, prompts: list[list[int]]) -> None:
        self.options, self.target, self.prompts = options, target, prompts
        self._kept = KeptCounts(options.work / "counts.json")

    def cell(self, drafter: Path, shape: str, temperature: float) -> str:
        """A figure with its interval, as a cell of a table."""

        def decoded() -> Counted:
            engine = Engine(self.target, load_drafter(drafter), parse_shape(shape))
            return count(engine, self.prompts, temperature, self.options.tokens, self.options.seeds)

        return self._kept.counted(f"{drafter.parent.name} {shape} {temperature}", decoded).cell()


def folder_of(family: str, loss: str) -> str:
    """The name of a run's folder."""
    return f"{family}-{loss}".replace(" ", "").replace(",", "-")


def train_all(options: argparse.Namespace) -> dict[str, dict[str, Path]]:
    """The drafter of every family and loss, each trained for the same number of steps."""
    drafters: dict[str, dict[str, Path]] = {}
    for family in options.families:
        for loss in options.losses:
            recipe = ALL_RECIPES[family]
            own = {} if options.draft_vocab is None else {"draft_vocab_size": options.draft_vocab}
            recipe = replace(recipe, module={**recipe.module, **LOSSES[loss]}, options={**recipe.options, **own})
            out = options.work / folder_of(family, loss)
            done = train(recipe, str(options.target), options.cache, out, steps=options.steps)
            drafters.setdefault(family, {})[loss] = out / "drafter"
            print(f"{time.strftime('%H:%M')} {out.name}: {done}", flush=True)
    return drafters


def loss_table(counts: Counts, drafters: dict[str, Path]) -> list[str]:
    """Tokens per step by loss, for one family."""
    columns = [
        (float(temperature), shape) for temperature, shape in (each.split(":") for each in counts.options.shapes)
    ]
    lines = ["| loss | " + " | ".join(f"T = {temperature:g}, `{shape}`" for temperature, shape in columns) + " |"]
    lines.append("|---" * (1 + len(columns)) + "|")
    for loss, drafter in drafters.items():
        cells = [counts.cell(drafter, shape, temperature) for temperature, shape in columns]
        lines.append(f"| `{loss}` | " + " | ".join(cells) + " |")
    return lines


def main() -> int:
    options = _options()
    if not Path(options.target).exists() or not options.tests.is_file():
        print(
            f"skipped: {options.target} or {options.tests} is not there; name the data with --data, or --target and --tests"
        )
        return 0
    options.work.mkdir(parents=True, exist_ok=True)
    prompts = [row["prompt_ids"] for _, row in read_jsonl(options.tests)]
    load = os.getloadavg()[0]
    drafters = train_all(options)
    counts = Counts(options, Target.load(str(options.target)), prompts[: options.prompts])
    page = [
        f"# Losses for sampling, {Path(options.target).stem}, {date.today().isoformat()}",
        f"`{provenance.command_line()}`",
    ]
    page.append(
        f"{options.steps} steps for each head, {len(counts.prompts)} prompts, {options.tokens} new tokens, {options.seeds} seeds where "
        f"tokens are drawn. Load average at the start: {load:.1f}."
    )
    for family, of_family in drafters.items():
        page += [f"## Losses: {family}", "\n".join(loss_table(counts, of_family))]
    atomic_write(options.work / "page.md", "\n\n".join([*page, machine_section()]) + "\n")
    print(options.work / "page.md")
    return 0


def _options() -> argparse.Namespace:
    def names(text: str) -> list[str]:
        return [part for part in text.split(";") if part]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument(
        "--cache",
        type=Path,
        required=True,
        help="of the target, with last.pre_norm and the layers that block drafters read",
    )
    parser.add_argument("--target", help="a folder or a GGUF file")
    parser.add_argument("--tests", type=Path)
    parser.add_argument(
        "--draft-vocab", type=int, help="size of the draft vocabularies; by default all of the target's"
    )
    parser.add_argument("--shapes", nargs="+", default=LOSS_SHAPES, metavar="TEMPERATURE:SHAPE")
    parser.add_argument("--work", type=Path, default=Path("runs/acceptance"))
    parser.add_argument("--families", type=names, default=["eagle", "redrafter"], help="joined by semicolons")
    parser.add_argument("--losses", type=names, default=list(LOSSES), help="joined by semicolons")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--prompts", type=int, default=60)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args()
    options.target = options.target or str(options.data / "models" / "chat-6m")
    options.tests = options.tests or options.data / "replies" / "chat-6m_test.jsonl"
    return options


if __name__ == "__main__":
    sys.exit(main())

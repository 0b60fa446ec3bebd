"""Every lossless rule at equal nodes: tokens per step where tokens are drawn, and what each gains over a tree of the likeliest tokens.

    python -m benchmarks.drafters.rules --target TARGET --tests TESTS.jsonl --heads eagle=FOLDER --work FOLDER

TESTS is JSONL with `prompt_ids`. Tokens per step do not depend on what else the machine does. Intervals are 95 % bootstraps over prompts;
a ratio is of the same prompts. A cell is empty where a rule has no such shape, or the head drafts no such depth. What it counted is kept
in `--work` and used again.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Iterator
from datetime import date
from pathlib import Path

from benchmarks.drafters.counting import Counted, KeptCounts, count, paired_ratio
from benchmarks.machine import machine_section
from draftsmith import provenance
from draftsmith.decode.engine import Engine
from draftsmith.evaluate.drafters import parse_entries
from draftsmith.files import atomic_write, read_jsonl
from draftsmith.models.drafters.drafter import Drafter
from draftsmith.models.drafters.drafter_folder import load_drafter
from draftsmith.models.target.target import Target
from draftsmith.models.tree.shapes import parse_shape

WALK = "likeliest tokens, dynamic tree"
RULES = {
    "likeliest tokens, chain": {6: "1x6l", 12: "1x12l"},
    WALK: {6: "6x4n6l", 12: "10x4n12l", 24: "10x5n24l", 60: "20x8n60l"},
    "guesses, chain": {6: "1x6", 12: "1x12"},
    "guesses, dynamic tree": {6: "6x4n6", 12: "10x4n12", 24: "10x5n24", 60: "20x8n60"},
    "p/q, sampled chain": {length: "s" + ".".join("1" * length) for length in (6, 12, 24)},
    "block verification": {length: "b" + ".".join("1" * length) for length in (6, 12, 24)},
    "MCSD": {6: "s2.1.1", 12: "s3.1.1.1", 24: "s6.1.1.1", 60: "s12.1.1.1.1"},
    "MCSD, shallow": {6: "s3.1", 12: "s4.1.1", 24: "s8.1.1", 60: "s20.1.1"},
    "K-SEQ": {6: "k2.1.1", 12: "k3.1.1.1", 24: "k6.1.1.1", 60: "k12.1.1.1.1"},
}
"""A shape for each rule and number of drafted nodes."""


class Rules:
    """The target, its prompts, and what was counted so far."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.target = Target.load(options.target)
        self.prompts = [row["prompt_ids"] for _, row in read_jsonl(options.tests)][: options.prompts]
        self._kept = KeptCounts(options.work / "counts.json")

    def counted(self, name: str, drafter: Drafter, shape: str, temperature: float) -> Counted:
        """Emitted tokens and cycles of every prompt; counted once."""

        def decoded() -> Counted:
            engine = Engine(self.target, drafter, parse_shape(shape))
            return count(engine, self.prompts, temperature, self.options.tokens, self.options.seeds)

        return self._kept.counted(f"{name} {shape} {temperature:g}", decoded)

    def table(self, name: str, drafter: Drafter, temperature: float) -> Iterator[str]:
        """The lines of one drafter's table, at one temperature."""
        sizes = self.options.nodes
        walks = {size: self.counted(name, drafter, RULES[WALK][size], temperature) for size in sizes}
        yield "| rule | " + " | ".join(f"{size} nodes | over the likeliest" for size in sizes) + " |"
        yield "|---" * (1 + 2 * len(sizes)) + "|"
        for rule, shapes in RULES.items():
            cells = []
            for size in sizes:
                if size not in shapes or parse_shape(shapes[size]).draft_length > (drafter.max_draft_steps or math.inf):
                    cells += ["", ""]
                    continue
                counted = self.counted(name, drafter, shapes[size], temperature)
                ratio, low, high = paired_ratio(counted, walks[size])
                cells += [f"{counted.cell()} `{shapes[size]}`", f"{ratio:.2f} ({low:.2f} to {high:.2f})"]
            yield f"| {rule} | " + " | ".join(cells) + " |"


def main() -> int:
    """Counts what is missing and writes the page."""
    options = _options()
    options.work.mkdir(parents=True, exist_ok=True)
    rules = Rules(options)
    page = [f"# Lossless rules at equal nodes, {date.today().isoformat()}", f"`{provenance.command_line()}`"]
    load = os.getloadavg()[0]
    page.append(
        f"{len(rules.prompts)} prompts, {options.tokens} new tokens, {options.seeds} seeds. Load average at the start: {load:.1f}."
    )
    for entry in parse_entries(options.heads, ["1x1"]):
        drafter = load_drafter(entry.path).attach(rules.target.ends)
        for temperature in options.temperatures:
            page.append(f"## {entry.name}, T = {temperature:g}")
            page.append("\n".join(rules.table(entry.name, drafter, temperature)))
    atomic_write(options.work / "page.md", "\n\n".join([*page, machine_section()]) + "\n")
    print(options.work / "page.md")
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True)
    parser.add_argument("--tests", type=Path, required=True)
    parser.add_argument("--heads", nargs="+", required=True, metavar="NAME=FOLDER")
    parser.add_argument("--work", type=Path, default=Path("runs/rules"))
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.7, 1.0])
    parser.add_argument("--nodes", type=int, nargs="+", choices=list(RULES[WALK]), default=list(RULES[WALK]))
    parser.add_argument("--prompts", type=int, default=60)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--seeds", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())

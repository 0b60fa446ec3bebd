"""What `make bench` does, and how long: which drafters are trained on which target, for how many seconds, and what it decodes with.

The default gives each training as many seconds as fit into the minutes asked for, beside what the rest takes. The rest is estimated from
figures of two cores (results/families/2026-11-21-families.md, results/race/2026-11-29-chat6m.md), slowest first: a loaded machine takes
longer. Owns the lists and the arithmetic. Trains nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmarks.drafters.recipes import ALL_RECIPES, CLOSE_RECIPES, RIDER_RECIPES, Recipe

REPLY_TOKENS = 128
FAMILY_RECIPES = {**ALL_RECIPES, **CLOSE_RECIPES, **RIDER_RECIPES}
PILOT_SECONDS = 20.0
"""The short run before a training, of the family with the slowest steps, and its validations."""
FEWEST_SECONDS = 20.0
"""A training shorter than this says nothing of its family."""
MARGIN = 0.9
"""Of the minutes asked for, so much is planned."""


@dataclass(frozen=True)
class Bench:
    """One target and how much is done on it.

    Attributes:
        name: what the tables call it.
        target: its directory or hub id.
        steps: of each training in the second table, that of equal steps.
        seconds: of each training in the first table, that of equal time.
        prompts: how many for testing.
        replies: how many for training.
        draft_vocab: tokens in the draft vocabulary of every drafter; None for all.
        draft_lm: an ordinary LM with the target's tokenizer, or None.
        rate: tokens a second of plain decoding, for the estimates.
        preparation: seconds for replies, caches and held-out figures, for the estimates.
    """

    name: str
    target: str
    steps: int
    seconds: float
    prompts: int
    replies: int = 2400
    draft_vocab: int | None = None
    draft_lm: str | None = None
    rate: float = 126.0
    preparation: float = 240.0


@dataclass(frozen=True)
class Entry:
    """A drafter of the comparison.

    Attributes:
        name: of its recipe, or of what it is without one.
        shapes: what it decodes with at temperature 0, the first also after equal steps.
        warm: at temperature 1.
        folder: of a drafter that needs no training; empty for a recipe.
    """

    name: str
    shapes: str
    warm: str
    folder: str = ""

    @property
    def recipe(self) -> Recipe | None:
        """How it is trained."""
        return None if self.folder else FAMILY_RECIPES[self.name]


OTHER_TARGETS: dict[str, str] = {}
"""Families that none of these targets can have, by their record's name: why."""
FULL_ALONE = ("chimera", "mtphead")
"""Families, by their record's name, that are trained with --full alone: one layer as EAGLE's, which the hour has already."""
SUFFIX = Entry("suffix", "1x8,4x8n15", "1x8", "embedded:suffix")


def _entry(name: str, wide: str = "") -> Entry:
    """A recipe with a chain and a small tree as deep as it was trained for; any depth serves those trained for one or three steps."""
    steps = int(FAMILY_RECIPES[name].module["num_steps"])
    depth = 5 if name in ("eagle", "hass", *CLOSE_RECIPES) else min(steps, 7)
    small = f"4x{depth}n{15 if depth > 3 else 8}"
    return Entry(name, ",".join([small, f"1x{min(depth, 7 if steps == 7 else 4)}", *wide.split()]), small)


DEFAULT = (
    *map(
        _entry,
        ("redrafter", "eagle", "hass", "eagle3", "medusa", "hydra", "mlp", "dflash", "dspark", "hidden_transfer"),
    ),
    SUFFIX,
)
"""One drafter or two of each kind: recurrent, EAGLE's, heads with and without the tokens before, blocks, riders, and the text alone."""
_WIDE = {
    "redrafter": "10x7n60",
    "eagle": "tree:{static} 10x5n16 10x5n24 10x6n24 10x7n60",
    "hass": "10x6n24 10x7n60",
    "eagle3": "10x7n60",
}
DRAWN = "t3.2.1.1,s1.1.1.1,s3.2.1.1,k3.2.1.1"
FULL = (
    *(
        replace(entry, warm=f"{entry.warm},1x4,{DRAWN}") if entry.name == "hass" else entry
        for entry in (_entry(name, _WIDE.get(name, "")) for name in FAMILY_RECIPES)
    ),
    SUFFIX,
)
"""Every recipe, with wide trees and EAGLE's best static one."""


@dataclass(frozen=True)
class Job:
    """A part of the run: on which target, what, and about how many seconds."""

    target: str
    what: str
    seconds: float


def jobs(benches: Sequence[Bench], entries: Sequence[Entry], full: bool) -> list[Job]:
    """List what a run does.

    Args:
        benches: the targets.
        entries: the drafters.
        full: equal steps and EAGLE's static tree too.

    Returns:
        Its parts, in order.
    """
    listed = []
    for bench in benches:
        trained = [entry for entry in entries if entry.recipe is not None]
        listed.append(Job(bench.name, "replies and caches", bench.preparation))
        listed += [Job(bench.name, f"train {entry.name}", bench.seconds + PILOT_SECONDS) for entry in trained]
        if full:
            listed += [Job(bench.name, f"train {entry.name}, equal steps", bench.steps / 2.0) for entry in trained]
            listed.append(Job(bench.name, "static tree", 300.0))
        cold, warm = (
            sum(len(shapes.split(",")) for shapes in of_entries) + 2  # plain decoding and the draft LM
            for of_entries in ([entry.shapes for entry in entries], [entry.warm for entry in entries])
        )
        row = bench.prompts * REPLY_TOKENS / bench.rate  # as slow as plain decoding, which most drafts are not
        listed.append(Job(bench.name, "decode at T = 0", cold * row))
        listed.append(Job(bench.name, "decode at T = 1", warm * row / 2))
        if full:
            listed.append(Job(bench.name, "decode after equal steps", (len(trained) + 1) * row))
    return listed


def fitted(benches: Sequence[Bench], entries: Sequence[Entry], minutes: float) -> list[Bench]:
    """Give each training as many seconds as fit: all of one target the same, in the ratio of the targets' own seconds.

    Args:
        benches: the targets.
        entries: the drafters.
        minutes: of the whole run.

    Returns:
        The targets with their seconds.

    Raises:
        ValueError: the time is too short for that many trainings.
    """
    idle = [replace(bench, seconds=0.0) for bench in benches]
    left = 60.0 * minutes * MARGIN - sum(job.seconds for job in jobs(idle, entries, full=False))
    num_trained = sum(entry.recipe is not None for entry in entries)
    share = left / max(1.0, num_trained * sum(bench.seconds for bench in benches))
    shortest = min((share * bench.seconds for bench in benches), default=FEWEST_SECONDS)
    if shortest < FEWEST_SECONDS:
        raise ValueError(
            f"{minutes:g} minutes leave {shortest:.0f} s for each of {num_trained} trainings on a target, which must have "
            f"{FEWEST_SECONDS:g}; give more --minutes, fewer --targets or fewer --drafters"
        )
    return [replace(bench, seconds=min(bench.seconds, share * bench.seconds)) for bench in benches]

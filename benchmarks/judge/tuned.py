"""The judge's settings, chosen by answers to questions of the training split: for each drafter, and for the shape of the price table.

Owns which settings are tried. Does not know how a setting is tried, or what is measured with the chosen ones.
"""

import json
from dataclasses import replace
from pathlib import Path

from benchmarks.judge.lanes import Stage
from benchmarks.judge.stages import DRAFT, TARGET
from draftsmith.data.prompts import PromptSelection
from draftsmith.decode.sampling import DrawOptions
from draftsmith.evaluate.lossy.tune_command import SweepOptions, tune_judge
from draftsmith.models.judge import NO_GATE, load_judge

SHAPE = "1x32"
"""Of the price table: a chain long enough for a rule to gain."""
HEAD_SHAPES = {"redrafter": "1x5", "eagle": "1x8"}
TUNED = "tuned-for-price"
"""The folder with the judge at the best setting for `SHAPE`."""
THRESHOLDS = (0.5, 0.6, 0.7)
SWEEP = SweepOptions(thresholds=THRESHOLDS, batch_rows=64)
"""Without gates: heads draft less than a line, so a gate of lines would accept nothing under them."""


def tuning(work: Path, judge: Path, scale: float) -> list[Stage]:
    """Tunes the judge of the last round for the draft LM and each head."""
    few = max(12, int(scale * 400))
    heads = [
        tuned(work, name, judge, "rounds", (shape,), drafter=str(work / name / "drafter"), problems=few)
        for name, shape in HEAD_SHAPES.items()
    ]
    return [
        tuned(work, "draft_lm", judge, "rounds", ("1x16", SHAPE)),
        Stage("tune-price", lambda: keep_best(work, judge), ("tune-draft_lm",)),
        *heads,
    ]


def tuned(
    work: Path,
    name: str,
    judge: Path,
    after: str,
    shapes: tuple[str, ...],
    thresholds: tuple[float, ...] = THRESHOLDS,
    drafter: str = DRAFT,
    problems: int | None = None,
) -> Stage:
    """Tunes a judge by its answers to the tuning problems, or to the first of them; into the folder `tuned-NAME`."""

    def make() -> None:
        tune_judge(
            TARGET,
            drafter,
            judge,
            work / "tuning.jsonl",
            work / f"tuned-{name}",
            checker="final-number",
            shapes=shapes,
            sweep=replace(SWEEP, thresholds=thresholds),
            draw=DrawOptions(max_new_tokens=200),
            selection=PromptSelection(limit=problems),
        )

    return Stage(f"tune-{name}", make, (after,))


def keep_best(work: Path, judge: Path) -> None:
    """Writes the judge at the setting with the largest gain among those of `SHAPE` that hold; shut where none does."""
    trials = json.loads((work / "tuned-draft_lm" / "tuning.json").read_text())["trials"]
    good = [
        trial
        for trial in trials
        if trial["setting"]["shape"] == SHAPE
        and not trial["stopped"]
        and trial["change_bounds"][0] > -SWEEP.most_lost / 100
        and trial["per_cycle"] > trial["lossless_per_cycle"]
    ]
    threshold = max(good, key=lambda trial: trial["per_cycle"])["setting"]["threshold"] if good else 1.0
    head = load_judge(judge).with_threshold(threshold).with_gate(NO_GATE)
    head.save_pretrained(work / TUNED / "judge")

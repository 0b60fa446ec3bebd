"""What is measured on the test problems: `draftsmith judge evaluate` for the price, for each drafter, for each judge, and the races.

Owns which reports there are and how they are run. Does not know the page.

Reports count answers, so they run side by side, each on one thread. Beside them the compiler fills its cache for a race. Races come last
and alone, on all cores.
"""

import json
import os
import sys
from pathlib import Path

from benchmarks.judge.stages import DRAFT, TARGET, Child, Judged, Stages, with_operation
from benchmarks.judge.tuned import HEAD_SHAPES, SHAPE, TUNED
from draftsmith.models.judge import load_judge

THRESHOLDS = (0.1, 0.5, 0.9)
RIVALS = (
    *("top-k@2", "typical@0.3", "typical@0.09", "kl@1", "kl-unsure@1", "ensemble@0.9", "ensemble@0.7", "fly@0.3"),
    *("margin@0.3", "margin@1", "everything"),
)
RACED = 25
"""Problems of a race."""
DIVISION = {"division": True, "other": False}
"""Test problems with and without division, by the name of their report."""
LONGEST = 200


def measure(stages: Stages, judges: dict[str, Judged], first_errors: bool, out_of_domain: bool) -> None:
    """All reports, then all races."""
    work = stages.work
    children = {
        # The longest first, so that none runs alone at the end.
        "compiler": _race(work, "compiler", "draft_lm", compile="on", problems=2),
        "compare": _report(work, "report", DRAFT, SHAPE, _priced(work), labelled=True),
        "judges": _report(
            work,
            "report-judges",
            DRAFT,
            SHAPE,
            ["lossless", *(f"{name}=judge:{judge.folder}" for name, judge in judges.items() if name != NARROW)],
            labelled=True,
        ),
    }
    for name in ("draft_lm", *HEAD_SHAPES):
        children[name] = _report(work, f"report-{name}", *_drafter(work, name))
    if out_of_domain:
        rules = ["lossless", *(f"{name}=judge:{judges[name].folder}" for name in ("+ corrupted", NARROW))]
        for name, wanted in DIVISION.items():
            with_operation(work / "test.jsonl", work / f"test-{name}.jsonl", "/", wanted)
            children[name] = _report(work, f"report-{name}", DRAFT, SHAPE, rules, problems=f"test-{name}")
    if first_errors:
        words = [sys.executable, "-m", "benchmarks.judge.first_errors", "--work", str(work)]
        children["first-errors"] = Child(words, work / "first-errors.log")
    stages.together("reports", children)
    for name in ("draft_lm", *HEAD_SHAPES):
        stages.once(f"race-{name}", _race(work, f"race-{name}", name).run)
    stages.once("race-compiled", _race(work, "race-compiled", "draft_lm", compile="on").run)


NARROW = "no division"
"""The judge that learnt from problems without division."""


def _priced(work: Path) -> list[str]:
    """The tuned judge, lossless decoding and every rule without training, each with several settings."""
    folder = work / TUNED / "judge"
    own = load_judge(folder).config.threshold
    rules = ["lossless", *RIVALS, f"judge, tuned=judge:{folder}"]
    return rules + [f"judge, other thresholds=judge:{folder}@{each:g}" for each in THRESHOLDS if each != own]


def _drafter(work: Path, name: str) -> tuple[str, str, list[str]]:
    """A drafter's folder, the shape that was kept for it, and the rules that decode with it."""
    folder = work / f"tuned-{name}"
    kept = json.loads((folder / "tuning.json").read_text())["kept"]
    shape = str(kept.get("shape", HEAD_SHAPES.get(name, SHAPE)))
    drafter = DRAFT if name == "draft_lm" else str(work / name / "drafter")
    return drafter, shape, ["lossless", f"judge, tuned=judge:{folder / 'judge'}"]


def _race(work: Path, report: str, name: str, compile: str = "off", problems: int = RACED) -> Child:
    """Decodes a few problems against the clock. The compiler keeps what it made on disk, for the same number of threads."""
    words = _words(work, report, *_drafter(work, name), "test")
    words += [f"--limit={problems}", f"--timed_problems={problems}", f"--compile={compile}"]
    return Child(words, work / f"{report}.log", threads=os.cpu_count() or 1)


def _report(
    work: Path, report: str, drafter: str, shape: str, rules: list[str], problems: str = "test", labelled: bool = False
) -> Child:
    """Counts answers over the problems of a file."""
    words = [*_words(work, report, drafter, shape, rules, problems), "--timed_problems=0", "--batch_rows=64"]
    words += [f"--labelled_rows={work / 'held' / 'rows.jsonl'}"] if labelled else []
    return Child(words, work / f"{report}.log")


def _words(work: Path, report: str, drafter: str, shape: str, rules: list[str], problems: str) -> list[str]:
    settings = {
        "target": TARGET,
        "drafter": drafter,
        "prompts": work / f"{problems}.jsonl",
        "checker": "final-number",
        "rules": json.dumps(rules),
        "shape": shape,
        "out": work / report,
        "max_new_tokens": LONGEST,
    }
    command = [sys.executable, "-c", "import draftsmith.cli; draftsmith.cli.main()", "judge", "evaluate"]
    return command + [f"--{key}={value}" for key, value in settings.items()]

"""Judges by how many questions they learn from, and the judge of mined labels: each tuned by its answers, and measured as tuned.

Owns which of these judges there are and the stages that `--ablations` adds. Does not know the page.
"""

from pathlib import Path

from benchmarks.judge.lanes import Stage
from benchmarks.judge.reports import count_answers
from benchmarks.judge.stages import DRAFT, checked, judge_folder, new_problems, trained, write_rows
from benchmarks.judge.tuned import SHAPE, tuned

SIZES = (50, 150)
"""Questions of the default run's smaller judges."""
PARTS = ("checker", "corrupted")
"""What every judge but the mined one learns from."""
LARGEST = 1500
"""Questions of the largest judge, which take more training problems."""
MORE = 4000
"""Training problems besides: about a quarter gives both a right and a wrong answer."""
THRESHOLDS, MINED_THRESHOLDS = (0.3, 0.5, 0.7, 0.9), (0.5, 0.8, 0.95, 0.98, 0.99, 0.997)
"""Of the drafts' tokens that the target would not have chosen, the mined judge gives nearly all correct ones more than 0.9."""
LARGEST_NAME = f"{LARGEST} questions"
REPORT = "report-ablations"


def compared(work: Path) -> dict[str, Path]:
    """The folders of the judges, by the name that the page gives them."""
    names = {f"{size} questions": f"corrupted-{size}" for size in SIZES} | {"all questions": "corrupted"}
    names |= {LARGEST_NAME: f"corrupted-{LARGEST}", "mined": "mined"}
    return {said: judge_folder(work, name) for said, name in names.items()}


def ablations(work: Path, scale: float) -> list[Stage]:
    """The stages besides those of the default run."""

    def draw() -> None:
        known = ("train", "mine", "rounds", "tuning")
        write_rows(work / "more.jsonl", new_problems(work, known, max(8, int(scale * MORE)), seed=2))

    def measure() -> None:
        # The others at the threshold of their training are in a report of the default run.
        rules = ["lossless", f"{LARGEST_NAME}=judge:{judges[LARGEST_NAME]}"]
        rules += [f"{said}, tuned=judge:{tuned_folder(work, folder) / 'judge'}" for said, folder in judges.items()]
        count_answers(work, REPORT, DRAFT, SHAPE, rules, labelled=True)

    judges, both = compared(work), [*PARTS, *(f"{part}-more" for part in PARTS)]
    tunings = [
        tuned(work, name, folder, f"train-{name}", (SHAPE,), MINED_THRESHOLDS if said == "mined" else THRESHOLDS)
        for said, folder in judges.items()
        for name in [folder.parent.name]
    ]
    return [
        Stage("problems-more", draw, ("problems",)),
        *checked(work, "more", "-more"),
        trained(work, f"corrupted-{LARGEST}", both, max(6, int(scale * LARGEST))),
        *tunings,
        Stage(REPORT, measure, ("cache-held", *(stage.name for stage in tunings))),
    ]


def tuned_folder(work: Path, judge: Path) -> Path:
    """Where a judge lies as tuned, and what was tried."""
    return work / f"tuned-{judge.parent.name}"

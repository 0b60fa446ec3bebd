"""What is measured on the test problems: `draftsmith judge evaluate` for the price, for each drafter, for each judge, and the races.

Owns which reports there are and what each needs. Does not know the page, or which stages run side by side.

Reports count answers, so they may run beside other stages, each on one thread. Beside them the compiler fills its cache for a race. Races
come last and alone, on all cores.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.judge.first_errors import first_errors
from benchmarks.judge.lanes import Stage
from benchmarks.judge.stages import DRAFT, TARGET, with_operation
from benchmarks.judge.tuned import HEAD_SHAPES, SHAPE, TUNED
from draftsmith.decode.sampling import DrawOptions
from draftsmith.evaluate.lossy.lossy_command import WorkloadOptions, evaluate_rules
from draftsmith.models.judge import load_judge

THRESHOLDS = (0.1, 0.5, 0.9)
RIVALS = (
    *("top-k@2", "typical@0.3", "typical@0.09", "kl@1", "kl-unsure@1", "ensemble@0.7", "fly@0.3", "margin@1"),
    "everything",
)
"""Of the ensemble and of the margin one setting: a meeker one accepts no token that this one does not."""
RACED = 25
"""Problems of a race."""
DIVISION = {"division": True, "other": False}
"""Test problems with and without division, by the name of their report."""
NARROW = "no division"
"""The judge that learnt from problems without division."""
LONGEST = 200


def reports(
    work: Path, judges: Mapping[str, Path], trained: Sequence[str], errors: bool, out_of_domain: bool
) -> list[Stage]:
    """The longest first; `trained` are the stages that make the judges, by name."""

    def priced() -> None:
        count_answers(work, "report", DRAFT, SHAPE, _priced(work), labelled=True)

    def learnt() -> None:
        rules = [f"{name}=judge:{folder}" for name, folder in judges.items() if name != NARROW]
        count_answers(work, "report-judges", DRAFT, SHAPE, rules, labelled=True)

    def drafted(name: str) -> Stage:
        return Stage(
            f"report-{name}", lambda: count_answers(work, f"report-{name}", *_drafter(work, name)), (f"tune-{name}",)
        )

    def divided(name: str, wanted: bool) -> Stage:
        def make() -> None:
            with_operation(work / "test.jsonl", work / f"test-{name}.jsonl", "/", wanted)
            rules = [f"{each}=judge:{judges[each]}" for each in ("+ corrupted", NARROW)]
            count_answers(work, f"report-{name}", DRAFT, SHAPE, ["lossless", *rules], problems=f"test-{name}")

        return Stage(f"report-{name}", make, ("train-corrupted", "train-no-division"))

    stages = [
        Stage("report", priced, ("tune-price", "cache-held")),
        Stage("compiler", lambda: _race(work, "compiler", "draft_lm", compile="on", problems=2), ("tune-draft_lm",)),
        Stage("report-judges", learnt, (*trained, "cache-held")),
        *map(drafted, ("draft_lm", *HEAD_SHAPES)),
    ]
    stages += [Stage("first-errors", lambda: first_errors(work), ("tune-price",))] if errors else []
    return stages + ([divided(*each) for each in DIVISION.items()] if out_of_domain else [])


def races(work: Path) -> list[Stage]:
    """To be run one at a time, after everything else."""

    def raced(name: str) -> Stage:
        return Stage(f"race-{name}", lambda: _race(work, f"race-{name}", name))

    compiled = Stage("race-compiled", lambda: _race(work, "race-compiled", "draft_lm", compile="on"))
    return [*map(raced, ("draft_lm", *HEAD_SHAPES)), compiled]


def _priced(work: Path) -> list[str]:
    """The tuned judge, lossless decoding and every rule without training; the judge with other thresholds, too."""
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


def count_answers(
    work: Path, report: str, drafter: str, shape: str, rules: list[str], problems: str = "test", labelled: bool = False
) -> None:
    """Counts answers over the problems of a file."""
    evaluate_rules(
        TARGET,
        drafter,
        work / f"{problems}.jsonl",
        "final-number",
        rules,
        work / report,
        shape=shape,
        labelled_rows=work / "held" / "rows.jsonl" if labelled else None,
        draw=DrawOptions(max_new_tokens=LONGEST),
        workload=WorkloadOptions(batch_rows=64, timed_problems=0),
    )


def _race(work: Path, report: str, name: str, compile: str = "off", problems: int = RACED) -> None:
    """Decodes a few problems against the clock, in a fresh process that computes on all cores.

    The compiler keeps what it made on disk, for the same number of threads. It takes minutes for a rule: the judge's is compiled alone.
    """
    drafter, shape, rules = _drafter(work, name)
    settings = {
        "target": TARGET,
        "drafter": drafter,
        "prompts": work / "test.jsonl",
        "checker": "final-number",
        "rules": json.dumps(rules if compile == "off" else rules[-1:]),
        "shape": shape,
        "out": work / report,
        "max_new_tokens": LONGEST,
        "limit": problems,
        "timed_problems": problems,
        "compile": compile,
    }
    command = [sys.executable, "-c", "import draftsmith.cli; draftsmith.cli.main()", "judge", "evaluate"]
    environment = os.environ | {"OMP_NUM_THREADS": str(os.cpu_count() or 1)}
    subprocess.run([*command, *(f"--{key}={value}" for key, value in settings.items())], env=environment, check=True)

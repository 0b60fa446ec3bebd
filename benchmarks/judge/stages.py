"""Stages of the judge's benchmark: each runs once, and its result and its time are kept.

Owns where a resumed run continues, how judges are trained, and the files of problems. Does not know which judges are compared.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from draftsmith import provenance
from draftsmith.data.cache.extract import extract
from draftsmith.embedded import write_prompts
from draftsmith.files import atomic_write, read_jsonl
from draftsmith.label.checkers.sums_answers import problem_of
from draftsmith.label.commands.rows_command import rows as label_rows
from draftsmith.models.judge import load_judge
from draftsmith.train.cli import main as train_command

TARGET, DRAFT = "embedded:target", "embedded:draft_lm"
STATE, STATE_AND_OPINION = "last.pre_norm", "last.pre_norm + opinion"


@dataclass(frozen=True)
class Judged:
    """One trained judge: where it is, and how well it tells held-out tokens apart; `differing` where the target would differ."""

    folder: Path
    questions: int
    auc: float
    differing: float | None
    threshold: float


@dataclass
class Child:
    """A command of its own process; what it prints goes into a file, which an error quotes.

    Attributes:
        words: of the command.
        log: the file.
        threads: that it computes on.
        processor_seconds: what it has used; 0.0 before it ended.
    """

    words: Sequence[str]
    log: Path
    threads: int = 1
    processor_seconds: float = 0.0

    def run(self) -> None:
        """Runs it to its end."""
        environment = os.environ | {"OMP_NUM_THREADS": str(self.threads)}
        with self.log.open("wb") as log:
            process = subprocess.Popen(self.words, stdout=log, stderr=subprocess.STDOUT, env=environment)
            _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        self.processor_seconds = usage.ru_utime + usage.ru_stime
        if process.returncode:
            sys.exit(f"{' '.join(self.words)} ended with {process.returncode}:\n{self.log.read_text()[-2000:]}")


@dataclass(frozen=True)
class Stages:
    """Runs each stage once, and notes how long it took."""

    work: Path

    def once(self, name: str, make: Callable[[], object], child: Child | None = None) -> None:
        """Makes it unless an earlier run did. Its processor seconds are the child's where there is one, else this process's."""
        busy_now = _processor_seconds if child is None else lambda: child.processor_seconds
        stamp = self.work / ".done" / name
        if stamp.is_file():
            return
        # A stage that was stopped resumes where it was, so the seconds of its earlier starts are its own too.
        begun = self.work / ".begun" / name
        spent = json.loads(begun.read_text()) if begun.is_file() else {"seconds": 0.0, "processor_seconds": 0.0}
        started, busy = time.perf_counter(), busy_now()
        try:
            make()
        finally:
            spent["seconds"] += time.perf_counter() - started
            spent["processor_seconds"] += busy_now() - busy
            begun.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(begun, json.dumps(spent) + "\n")
        stamp.parent.mkdir(parents=True, exist_ok=True)
        begun.rename(stamp)
        print(f"{name}: {spent['seconds']:.0f} s, {spent['processor_seconds']:.0f} s of a processor", flush=True)

    def together(self, name: str, children: Mapping[str, Child]) -> None:
        """Runs several commands, as many at once as there are cores. Each is a part of the stage, and runs once."""
        done = self.work / ".done"
        if (done / name).is_file() and not all((done / f"{name}.{part}").is_file() for part in children):
            (done / name).rename(self.work / ".begun" / name)  # an earlier run left a part out

        def run(part: str) -> None:
            self.once(f"{name}.{part}", children[part].run, children[part])

        def run_all() -> None:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                list(pool.map(run, children))

        self.once(name, run_all)

    def check_plan(self, plan: dict[str, Any]) -> None:
        """Refuses a folder that was begun with another plan; its stages would not fit together."""
        file, text = self.work / "plan.json", json.dumps(plan, indent=1) + "\n"
        if not file.is_file():
            atomic_write(file, text)
        elif file.read_text() != text:
            sys.exit(
                f"{self.work} was begun with another scale, other counts or other thresholds ({file}); remove it, or name another --work"
            )

    def spent(self) -> dict[str, dict[str, float]]:
        """Seconds of all stages done so far, by the clock and of the processors. A name with a dot is part of the stage before the dot."""
        return {stamp.name: json.loads(stamp.read_text()) for stamp in sorted((self.work / ".done").iterdir())}


def _processor_seconds() -> float:
    own = os.times()
    return own.user + own.system + own.children_user + own.children_system


def cached(
    stages: Stages, name: str, answers: Path | None = None, store: Path | None = None, target: str = TARGET
) -> Path:
    """Labelled answers, or a store of them -> rows and the target's states over them, in the folder that is returned."""
    folder = stages.work / name

    def make() -> None:
        # Spoiled answers may all be wrong from their first token on: others are learnt from beside them.
        label_rows(
            target,
            folder / "rows.jsonl",
            answers=answers,
            store=None if store is None else str(store),
            one_class=True,
        )
        extract(target, folder / "rows.jsonl", folder / "cache")

    stages.once(f"cache-{name}", make)
    return folder


def trained(
    stages: Stages,
    name: str,
    folders: Sequence[Path],
    max_questions: int | None = None,
    target: str = TARGET,
    feature: str = STATE_AND_OPINION,
) -> Judged:
    """A judge from rows and caches, by the same command as anybody's."""
    root = stages.work / "judges" / name
    settings = {
        "model.init_args.target": target,
        "model.init_args.feature": feature,
        "data.init_args.cache": json.dumps([str(folder / "cache") for folder in folders]),
        "data.init_args.rows": json.dumps([str(folder / "rows.jsonl") for folder in folders]),
        "data.init_args.max_questions": "null" if max_questions is None else str(max_questions),
        "trainer.default_root_dir": str(root),
        "trainer.enable_progress_bar": "false",
        "replace_best": "true",  # a stage that was interrupted begins anew
    }
    words = [f"--{key}={value}" for key, value in settings.items()]
    callbacks = [f"--trainer.callbacks+={json.dumps(callback)}" for callback in judge_callbacks()]
    config = Path(__file__).parents[2] / "configs" / "judge.yaml"
    stages.once(
        f"train-{name}",
        lambda: train_command(["fit", "--config", str(config), "--trainer.callbacks=[]", *callbacks, *words]),
    )
    return judged(root / "judge")


def judged(folder: Path) -> Judged:
    """What is known of a trained judge."""
    metrics = provenance.read(folder)["config"]["metrics"]
    config = load_judge(folder).config
    return Judged(
        folder,
        int(config.labels["questions"]["train"]),
        metrics["val/auc"],
        metrics.get("val/auc_differing"),
        config.threshold,
    )


def judge_callbacks() -> list[dict[str, Any]]:
    """As in configs/judge.yaml, but for the checkpoints: nobody resumes a run of seconds."""
    return [
        {"class_path": "draftsmith.train.KeepJudge"},
        {"class_path": "draftsmith.train.JudgeFigures", "init_args": {"every": 50}},
        {
            "class_path": "pytorch_lightning.callbacks.EarlyStopping",
            "init_args": {"monitor": "val/auc", "mode": "max", "patience": 5, "min_delta": 1e-4},
        },
    ]


def write_problems(work: Path, counts: dict[str, int]) -> None:
    """Files of problems: test and held from their own splits; train, mine, rounds and tuning from the training split, apart."""
    write_prompts(work / "test.jsonl", "test", counts["test"])
    write_prompts(work / "held.jsonl", "validation", counts["held"])
    write_prompts(work / "train.jsonl", "train", counts["train"])
    known = {row["id"] for _, row in read_jsonl(work / "train.jsonl")}
    others = ("mine", "rounds", "tuning")
    write_prompts(work / "others.jsonl", "train", 2 * sum(counts[name] for name in others), seed=1)
    left = [row for _, row in read_jsonl(work / "others.jsonl") if row["id"] not in known]
    for name in others:
        part, left = left[: counts[name]], left[counts[name] :]
        _write_rows(work / f"{name}.jsonl", part)


def with_operation(path: Path, out: Path, operation: str, wanted: bool) -> Path:
    """The rows whose problem has, or has not, a step of one operation."""

    def has(row: dict[str, Any]) -> bool:
        problem = problem_of(question_of(row))
        assert problem is not None
        return any(step.op == operation for step in problem.steps)

    return _write_rows(out, [row for _, row in read_jsonl(path) if has(row) == wanted])


def asked_in(path: Path, answers: Path, out: Path) -> Path:
    """The problems that some answer of a file is about."""
    asked = {question_of(row) for _, row in read_jsonl(answers)}
    return _write_rows(out, [row for _, row in read_jsonl(path) if question_of(row) in asked])


def question_of(row: dict[str, Any]) -> str:
    """The user's words."""
    return str(next(message["content"] for message in row["messages"] if message["role"] == "user"))


def _write_rows(out: Path, rows: Sequence[dict[str, Any]]) -> Path:
    atomic_write(out, "".join(json.dumps(row) + "\n" for row in rows))
    return out

"""What several stages of the judge's benchmark do: rows with their states, trained judges, files of problems.

Does not know which judges are compared, or when a stage runs.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.judge.lanes import Stage
from draftsmith import provenance
from draftsmith.data.cache.extract import extract
from draftsmith.embedded import write_prompts
from draftsmith.files import atomic_write, read_jsonl
from draftsmith.label.checkers.sums_answers import problem_of
from draftsmith.label.commands.entry_options import EntryOptions
from draftsmith.label.commands.generate_command import generate
from draftsmith.label.commands.rows_command import rows as label_rows
from draftsmith.label.corrupt.corrupt_command import corrupt
from draftsmith.models.judge import load_judge
from draftsmith.train.cli import main as train_command

TARGET, DRAFT = "embedded:target", "embedded:draft_lm"
STATE, STATE_AND_OPINION = "last.pre_norm", "last.pre_norm + opinion"
LICENCE = EntryOptions(licence="Apache-2.0")


@dataclass(frozen=True)
class Judged:
    """One trained judge: where it is, and how well it tells held-out tokens apart; `differing` where the target would differ."""

    folder: Path
    questions: int
    auc: float
    differing: float | None
    threshold: float


def checked(work: Path, problems: str = "train", suffix: str = "") -> list[Stage]:
    """Answers of target and draft LM to a file of problems with the checker's labels, spoiled answers, and the states of both."""
    answers, corrupted = work / f"answers{suffix}" / "answers.jsonl", work / f"corrupted{suffix}.jsonl"

    def answer() -> None:
        generate(work / f"{problems}.jsonl", (TARGET, DRAFT), "embedded", answers.parent, entry=LICENCE, pairs=True)

    def spoil() -> None:
        asked = asked_in(work / f"{problems}.jsonl", answers, work / f"asked{suffix}.jsonl")
        corrupt(asked, corrupted, "embedded", licence="Apache-2.0")

    return [
        Stage(f"answers-{problems}", answer, (f"problems{suffix}",)),
        Stage(f"corrupt{suffix}", spoil, (f"answers-{problems}",)),
        cached(work, f"checker{suffix}", f"answers-{problems}", answers),
        cached(work, f"corrupted{suffix}", f"corrupt{suffix}", corrupted),
    ]


def cached(
    work: Path,
    name: str,
    after: str,
    answers: Path | None = None,
    store: Path | None = None,
    target: str = TARGET,
) -> Stage:
    """Labelled answers, or a store of them -> rows and the target's states over them, in the folder of this name."""
    folder = work / name

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

    return Stage(f"cache-{name}", make, (after,))


def trained(
    work: Path,
    name: str,
    parts: Sequence[str],
    max_questions: int | None = None,
    target: str = TARGET,
    feature: str = STATE_AND_OPINION,
) -> Stage:
    """A judge from the rows and caches of `cached`, by the same command as anybody's; in `judge_folder`."""
    root, folders = judge_folder(work, name).parent, [work / part for part in parts]
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
    return Stage(
        f"train-{name}",
        lambda: train_command(["fit", "--config", str(config), "--trainer.callbacks=[]", *callbacks, *words]),
        tuple(f"cache-{part}" for part in parts),
    )


def judge_folder(work: Path, name: str) -> Path:
    """Where `trained` leaves the judge of this name."""
    return work / "judges" / name / "judge"


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
    others = ("mine", "rounds", "tuning")
    left = new_problems(work, ["train"], 2 * sum(counts[name] for name in others), seed=1)
    for name in others:
        part, left = left[: counts[name]], left[counts[name] :]
        write_rows(work / f"{name}.jsonl", part)


def new_problems(work: Path, known: Sequence[str], count: int, seed: int) -> list[dict[str, Any]]:
    """Those of `count` problems of the training split that are in none of the known files."""
    file = work / f"drawn-{seed}.jsonl"
    write_prompts(file, "train", count, seed=seed)
    ids = {row["id"] for name in known for _, row in read_jsonl(work / f"{name}.jsonl")}
    return [row for _, row in read_jsonl(file) if row["id"] not in ids]


def with_operation(path: Path, out: Path, operation: str, wanted: bool) -> Path:
    """The rows whose problem has, or has not, a step of one operation."""

    def has(row: dict[str, Any]) -> bool:
        problem = problem_of(question_of(row))
        assert problem is not None
        return any(step.op == operation for step in problem.steps)

    return write_rows(out, [row for _, row in read_jsonl(path) if has(row) == wanted])


def asked_in(path: Path, answers: Path, out: Path) -> Path:
    """The problems that some answer of a file is about."""
    asked = {question_of(row) for _, row in read_jsonl(answers)}
    return write_rows(out, [row for _, row in read_jsonl(path) if question_of(row) in asked])


def question_of(row: dict[str, Any]) -> str:
    """The user's words."""
    return str(next(message["content"] for message in row["messages"] if message["role"] == "user"))


def write_rows(out: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Writes a file of JSON lines."""
    atomic_write(out, "".join(json.dumps(row) + "\n" for row in rows))
    return out

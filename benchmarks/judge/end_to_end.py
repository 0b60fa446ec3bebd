"""The judge on the embedded pair, from nothing to the table: labelled by a checker, by mining, by both; against rules without training.

    python -m benchmarks.judge.end_to_end                 # everything; `make judge` is this
    python -m benchmarks.judge.end_to_end --people        # and a fit to people's labels, which --data must hold; three minutes more
    python -m benchmarks.judge.end_to_end --scale 0.05    # tries the script out

Questions of the training split: the target and the draft LM answer them, the corpus's exact checker says where a wrong answer goes wrong,
and pairs of a right and a wrong answer train judges of several sizes; other questions are mined. Shares of wrong tokens are counted on
answers to the validation split, everything else on problems of the test split. Then out of domain: a judge trained without division
judges division. With `--people`, a judge is also fitted to people's labels with a real model's states.
Writes `<date>-judge.md`, `.json` and charts into benchmarks/results/judge/, and the rows into `runs/judge/report.json`. The same command
resumes a run that was stopped; `rm -r runs/judge` starts again.
"""

import argparse
import json
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from benchmarks.drafters.recipes import RECIPES
from benchmarks.drafters.recipes import train as train_head
from draftsmith import provenance
from draftsmith.data.cache.extract import extract
from draftsmith.data.prompts import PromptSelection
from draftsmith.data.replies.reply_plan import BatchOptions
from draftsmith.data.replies.respond import respond
from draftsmith.decode import Engine, Generation, GenerationSettings
from draftsmith.decode.sampling import DrawOptions, ReplyOptions
from draftsmith.decode.verify.rule_text import parse_rule
from draftsmith.embedded import write_prompts
from draftsmith.evaluate.lossy.lossy_command import WorkloadOptions, evaluate_rules
from draftsmith.evaluate.samples import read_samples
from draftsmith.files import atomic_write, read_jsonl
from draftsmith.label.checkers.sums_answers import judge as check_sums
from draftsmith.label.checkers.sums_answers import problem_of
from draftsmith.label.commands.entry_options import EntryOptions
from draftsmith.label.commands.generate_command import generate
from draftsmith.label.commands.rows_command import rows as label_rows
from draftsmith.label.commands.store_commands import import_answers
from draftsmith.label.mine.mine_command import MiningOptions, mine
from draftsmith.models import Target, load_tokenizer
from draftsmith.models.drafters.draft_lm import load_draft_lm
from draftsmith.models.judge import load_judge
from draftsmith.models.tree.shapes import parse_shape
from draftsmith.train.cli import main as train_command

TARGET, DRAFT = "embedded:target", "embedded:draft_lm"
SIZES = (50, 150, 500, 1500)
PAPER_SIZE = 500
SHAPE = "1x32"
THRESHOLDS = (0.3, 0.7, 0.95)
LONG_SHAPES = ("1x8", "1x16", "1x32e0.4")
HEAD_SHAPES = ("1x8", "10x6n24")
RIVALS = ("top-k@2", "top-k@3", "kl@1", "kl@3", "typical@0.09", "everything")


@dataclass(frozen=True)
class Judged:
    """One trained judge: where it is, and how well it tells held-out tokens apart."""

    folder: Path
    questions: int
    auc: float
    threshold: float


@dataclass(frozen=True)
class Stages:
    """Runs each stage once, and notes how long it took."""

    work: Path

    def once(self, name: str, make: Callable[[], object]) -> None:
        """Makes it unless an earlier run did."""
        stamp = self.work / ".done" / name
        if stamp.is_file():
            return
        started = time.perf_counter()
        make()
        stamp.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(stamp, f"{time.perf_counter() - started:.1f}\n")

    def seconds(self) -> dict[str, float]:
        """Of all stages done so far."""
        return {stamp.name: float(stamp.read_text()) for stamp in sorted((self.work / ".done").iterdir())}


def cached(stages: Stages, name: str, answers: Path, target: str = TARGET) -> Path:
    """Labelled answers -> rows and the target's states over them, in the folder that is returned."""
    folder = stages.work / name

    def make() -> None:
        label_rows(target, folder / "rows.jsonl", answers=answers)
        extract(target, folder / "rows.jsonl", folder / "cache")

    stages.once(f"cache-{name}", make)
    return folder


def trained(
    stages: Stages, name: str, folders: list[Path], max_questions: int | None = None, target: str = TARGET
) -> Judged:
    """A judge from rows and caches, by the same command as anybody's."""
    root = stages.work / "judges" / name
    settings = {
        "model.init_args.target": target,
        "data.init_args.cache": json.dumps([str(folder / "cache") for folder in folders]),
        "data.init_args.rows": json.dumps([str(folder / "rows.jsonl") for folder in folders]),
        "data.init_args.join_kinds": "true",  # `both` joins mined labels to the checker's
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
    metrics = provenance.read(root / "judge")["config"]["metrics"]
    head = load_judge(root / "judge")
    return Judged(
        root / "judge", int(head.config.labels["questions"]["train"]), metrics["val/auc"], head.config.threshold
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


def with_operation(path: Path, out: Path, operation: str, wanted: bool) -> Path:
    """The rows whose problem has, or has not, a step of one operation."""

    def has(row: dict[str, Any]) -> bool:
        problem = problem_of(question_of(row))
        assert problem is not None
        return any(step.op == operation for step in problem.steps)

    kept = [row for _, row in read_jsonl(path) if has(row) == wanted]
    atomic_write(out, "".join(json.dumps(row) + "\n" for row in kept))
    return out


def without(path: Path, others: Path, out: Path) -> Path:
    """The prompts of one file that are not in another."""
    known = {row["id"] for _, row in read_jsonl(others)}
    atomic_write(out, "".join(json.dumps(row) + "\n" for _, row in read_jsonl(path) if row["id"] not in known))
    return out


def run(options: argparse.Namespace) -> None:
    """All stages, then the page."""
    work, stages = options.work, Stages(options.work)
    work.mkdir(parents=True, exist_ok=True)
    count = {name: max(8, int(options.scale * full)) for name, full in (("train", 6000), ("mine", 400), ("test", 500))}
    for split, name in (("train", "train"), ("validation", "held"), ("test", "test")):
        amount = count["test"] if name == "held" else count[name]
        stages.once(
            f"prompts-{name}",
            lambda split=split, name=name, amount=amount: write_prompts(work / f"{name}.jsonl", split, amount),
        )  # type: ignore[misc]
    # Few mined tokens are wrong, and each judge must find some of these: fewer questions would be too few.
    stages.once("prompts-mine", lambda: mining_prompts(work, max(200, count["mine"])))
    stages.once(
        "answers-train",
        lambda: generate(
            work / "train.jsonl",
            (TARGET, DRAFT),
            "embedded",
            work / "answers",
            entry=EntryOptions(licence="Apache-2.0"),
            pairs=True,
        ),
    )
    stages.once(
        "answers-held",
        lambda: generate(
            work / "held.jsonl", (DRAFT,), "embedded", work / "held-answers", entry=EntryOptions(licence="Apache-2.0")
        ),
    )

    pairs, held = (
        cached(stages, "checker", work / "answers" / "answers.jsonl"),
        cached(stages, "held", work / "held-answers" / "answers.jsonl"),
    )
    stages.once(
        "mine",
        lambda: mine(
            TARGET, DRAFT, work / "mine.jsonl", work / "mined", mining=MiningOptions(max_new_tokens=160, batch_rows=32)
        ),
    )
    stages.once("cache-mined", lambda: extract(TARGET, work / "mined" / "rows.jsonl", work / "mined" / "cache"))

    judges = {
        f"checker-{size}": trained(stages, f"checker-{size}", [pairs], int(max(6, options.scale * size)))
        for size in SIZES
    }
    judges["mined"] = trained(stages, "mined", [work / "mined"])
    judges["both"] = trained(stages, "both", [pairs, work / "mined"])
    stages.once("evaluate", lambda: compare(work, judges, held / "rows.jsonl", options))
    stages.once("first-errors", lambda: first_errors(work, judges[f"checker-{PAPER_SIZE}"].folder))
    drafters(stages, judges, options)
    out_of_domain(stages, judges, options)
    human = people(stages, options) if options.people else None
    publish(stages, judges, human, options)


def mining_prompts(work: Path, count: int) -> None:
    """Questions of the training split that no judge sees otherwise."""
    write_prompts(work / "mine-all.jsonl", "train", 2 * count, seed=1)
    without(work / "mine-all.jsonl", work / "train.jsonl", work / "mine-left.jsonl")
    lines = (work / "mine-left.jsonl").read_text().splitlines(keepends=True)[:count]
    atomic_write(work / "mine.jsonl", "".join(lines))


def compare(work: Path, judges: dict[str, Judged], held: Path, options: argparse.Namespace) -> None:
    """Every rule on the test problems."""
    paper = judges[f"checker-{PAPER_SIZE}"].folder
    rules = ["lossless", *RIVALS]
    rules += [f"judge {name}=judge:{judge.folder}" for name, judge in judges.items()]
    rules += [f"judge checker-{PAPER_SIZE}=judge:{paper}@{threshold}" for threshold in THRESHOLDS]
    rules += [f"judge mined=judge:{judges['mined'].folder}@{THRESHOLDS[0]}"]
    evaluate_rules(
        TARGET,
        DRAFT,
        work / "test.jsonl",
        "final-number",
        rules,
        work / "report",
        shape=SHAPE,
        labelled_rows=held,
        draw=DrawOptions(max_new_tokens=200),
        workload=WorkloadOptions(timed_problems=max(2, int(options.scale * 30))),
    )


def first_errors(work: Path, judge: Path) -> None:
    """Who said the first wrong token of each wrong answer: the target itself, or the draft by the rule."""
    target, tokenizer, drafter = Target.load(TARGET), load_tokenizer(TARGET), load_draft_lm(DRAFT)
    rows = [row for _, row in read_jsonl(work / "test.jsonl")]
    samples = read_samples(work / "test.jsonl", tokenizer)
    settings = GenerationSettings(200, eos_token_ids=target.eos_token_ids)
    by_judge = {}
    for name, rule in (("lossless", "lossless"), ("judge", f"judge:{judge}"), ("judge, strict", f"judge:{judge}@0.99")):
        engine, counts = Engine(target, drafter, parse_shape(SHAPE), rule=parse_rule(rule)[1]), Counter[str]()
        for start in range(0, len(rows), 50):
            replies = engine.generate([list(sample.prompt_ids) for sample in samples[start : start + 50]], settings)
            for row, reply in zip(rows[start : start + 50], replies, strict=True):
                counts[who_erred(row, reply, tokenizer)] += 1
        by_judge[name] = counts
    atomic_write(work / "first-errors.json", json.dumps(by_judge))


def who_erred(row: dict[str, Any], reply: Generation, tokenizer: PreTrainedTokenizerBase) -> str:
    """`nobody`, `rule`, `target`, or `unplaced` where no token is the first wrong one."""
    text = str(tokenizer.decode(reply.token_ids, skip_special_tokens=True))
    problem = problem_of(question_of(row))
    assert problem is not None
    span = check_sums(problem, text).error_span
    if span is None:
        return "nobody"
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    place = next((place for place, (start, end) in enumerate(offsets) if start <= span[0] < end), None)
    return "unplaced" if place is None else "rule" if place in reply.by_rule else "target"


def question_of(row: dict[str, Any]) -> str:
    """The user's words."""
    return str(next(message["content"] for message in row["messages"] if message["role"] == "user"))


def errors_table(work: Path) -> str:
    """Answers by who said their first wrong token."""
    lines = [
        "| decoded | no wrong line | first wrong token by the rule | first wrong token by the target itself |",
        "|---|---|---|---|",
    ]
    for name, counts in json.loads((work / "first-errors.json").read_text()).items():
        lines.append(f"| {name} | {counts.get('nobody', 0)} | {counts.get('rule', 0)} | {counts.get('target', 0)} |")
    return "\n".join(lines)


def out_of_domain(stages: Stages, judges: dict[str, Judged], options: argparse.Namespace) -> None:
    """Trained without division, tested on it."""
    work = stages.work
    answers = work / "answers" / "answers.jsonl"
    stages.once("ood-answers", lambda: with_operation(answers, work / "no-division.jsonl", "/", False))
    narrow = cached(stages, "no-division", work / "no-division.jsonl")
    judges["no division"] = trained(stages, "no-division", [narrow], int(max(6, options.scale * PAPER_SIZE)))
    for name, wanted in (("division", True), ("other", False)):
        stages.once(
            f"ood-prompts-{name}",
            lambda name=name, wanted=wanted: with_operation(
                work / "test.jsonl", work / f"test-{name}.jsonl", "/", wanted
            ),
        )  # type: ignore[misc]
        rules = [
            "lossless",
            f"judge of all=judge:{judges[f'checker-{PAPER_SIZE}'].folder}",
            f"judge without division=judge:{judges['no division'].folder}",
        ]
        stages.once(
            f"ood-evaluate-{name}",
            lambda name=name, rules=rules: evaluate_rules(  # type: ignore[misc]
                TARGET,
                DRAFT,
                work / f"test-{name}.jsonl",
                "final-number",
                rules,
                work / f"report-{name}",
                shape=SHAPE,
                draw=DrawOptions(max_new_tokens=200),
                workload=WorkloadOptions(timed_problems=max(2, int(options.scale * 15))),
            ),
        )


def drafters(stages: Stages, judges: dict[str, Judged], options: argparse.Namespace) -> None:
    """Longer chains, an early stop, and a trained head: with the judge and without."""
    work = stages.work
    few = max(64, int(options.scale * 1200))

    def replies() -> None:
        respond(
            TARGET,
            work / "train.jsonl",
            work / "replies",
            selection=PromptSelection(limit=few),
            reply=ReplyOptions(max_new_tokens=160),
            batches=BatchOptions(batch_rows=64),
        )
        extract(TARGET, work / "replies", work / "replies-cache")

    stages.once("eagle-cache", replies)
    steps = max(20, int(options.scale * 800))
    stages.once(
        "eagle", lambda: train_head(RECIPES["eagle"], TARGET, work / "replies-cache", work / "eagle", steps=steps)
    )
    rules = ["lossless", f"judge=judge:{judges[f'checker-{PAPER_SIZE}'].folder}"]
    for drafter, name, shapes in (
        (DRAFT, "draft_lm", LONG_SHAPES),
        (str(work / "eagle" / "drafter"), "eagle", HEAD_SHAPES),
    ):
        for shape in shapes:
            stages.once(
                f"drafters-{name}-{shape}",
                lambda drafter=drafter, name=name, shape=shape: evaluate_rules(  # type: ignore[misc]
                    TARGET,
                    drafter,
                    work / "test.jsonl",
                    "final-number",
                    rules,
                    work / f"report-{name}-{shape}",
                    shape=shape,
                    draw=DrawOptions(max_new_tokens=200),
                    selection=PromptSelection(limit=max(4, int(options.scale * 200))),
                    workload=WorkloadOptions(timed_problems=max(2, int(options.scale * 15))),
                ),
            )


def drafters_table(work: Path) -> str:
    """One line a drafter, shape and rule."""
    lines = [
        "| drafter | shape | rule | right answers | accepted a cycle | target forwards an answer | speed-up |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, shapes in (("draft_lm", LONG_SHAPES), ("eagle", HEAD_SHAPES)):
        for shape in shapes:
            for row in json.loads((work / f"report-{name}-{shape}" / "report.json").read_text())["rows"][1:]:
                measures = [
                    f"{row[key]:.2f}" for key in ("accepted_per_cycle", "target_forwards_per_answer", "speedup")
                ]
                rule = f"{row['rule']} (lossy)" if row["lossy"] else row["rule"]
                lines.append("| " + " | ".join([name, shape, rule, f"{100 * row['accuracy']:.1f} %", *measures]) + " |")
    return "\n".join(lines)


def people(stages: Stages, options: argparse.Namespace) -> Judged:
    """A judge on people's labels of other models' solutions, with chat-6m's states: does it run, and what is it worth?"""
    work, target = stages.work, str(options.data / "models" / "chat-6m")
    store = work / "people.db"

    def read() -> None:
        # The sets in which people marked the place of the first error.
        for source in sorted((options.data / "judge").glob("[bp]*.jsonl")):
            import_answers(source, str(store), entry=EntryOptions(licence="see the source"))

    stages.once("people-import", read)
    folder = work / "people"

    def make() -> None:
        label_rows(target, folder / "rows.jsonl", store=str(store))
        extract(target, folder / "rows.jsonl", folder / "cache")

    stages.once("cache-people", make)
    return trained(stages, "people", [folder], target=target)


def publish(stages: Stages, judges: dict[str, Judged], human: Judged | None, options: argparse.Namespace) -> None:
    """The page, the rows and the charts."""
    work, name = stages.work, f"{date.today().isoformat()}-judge"
    record = provenance.record(provenance.command_line(), {}, {})
    facts = {key: record[key] for key in ("command", "machine", "versions")}
    report = json.loads((work / "report" / "report.json").read_text())
    atomic_write(work / "report.json", json.dumps(facts | {"rows": report["rows"]}, indent=1) + "\n")
    shutil.copyfile(work / "report" / "report.png", options.out / f"{name}.png")
    shutil.copyfile(work / "report.json", options.out / f"{name}.json")
    mined = json.loads((work / "mined" / "report.json").read_text())
    spent = stages.seconds()
    page = [
        f"# The judge on the embedded pair, {date.today().isoformat()}",
        f"`{record['command']}`; {sum(spent.values()) / 60:.1f} minutes in all.",
        f"Target `{TARGET}`, draft LM `{DRAFT}`, chains of {SHAPE.removeprefix('1x')} drafted tokens, temperature 0. Every rule but plain "
        "and lossless is LOSSY.",
        "## The judges",
        judges_table(judges | ({"people's labels, chat-6m's states": human} if human else {})),
        "## Rules on unseen problems",
        section(work / "report"),
        f"![Right answers against accepted tokens and speed]({name}.png)",
        "## Whose errors they are",
        errors_table(work),
        "## Longer chains, an early stop, another drafter",
        f"The first {max(4, int(options.scale * 200))} of the problems; EAGLE-1 was trained for {max(20, int(options.scale * 800))} steps "
        "on the target's own replies.",
        drafters_table(work),
        "## Out of domain: problems with division",
        section(work / "report-division"),
        "The same judges on the problems without division:",
        section(work / "report-other"),
        "## Mining",
        "\n".join(f"- {key}: {value}" for key, value in mined.items() if isinstance(value, int | float)),
        "## Time",
        "\n".join(f"- {stage}: {seconds:.0f} s" for stage, seconds in spent.items() if seconds >= 1),
        "## The machine",
        "\n".join(
            f"- {key}: {value}" for part in (record["machine"], record["versions"]) for key, value in part.items()
        ),
    ]
    atomic_write(options.out / f"{name}.md", "\n\n".join(page) + "\n")
    print(options.out / f"{name}.md")


def judges_table(judges: dict[str, Judged]) -> str:
    """How well each tells held-out tokens apart."""
    lines = ["| judge | questions | AUC on held-out questions | threshold |", "|---|---|---|---|"]
    lines += [
        f"| {name} | {judge.questions} | {judge.auc:.3f} | {judge.threshold:.3f} |" for name, judge in judges.items()
    ]
    return "\n".join(lines)


def section(report: Path) -> str:
    """The table of a report."""
    lines: Iterable[str] = (report / "report.md").read_text().splitlines()
    return "\n".join(line for line in lines if line.startswith("|"))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--people", action="store_true", help="fit a judge to people's labels too; needs --data")
    parser.add_argument("--work", type=Path, default=Path("runs/judge"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/judge"))
    parser.add_argument("--scale", type=float, default=1.0, help="of questions and problems; 0.05 tries the script out")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(run(_options()))

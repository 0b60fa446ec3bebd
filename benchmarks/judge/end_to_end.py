"""The judge on the embedded pair, from nothing to its price: labels, on-policy rounds, tuning by answers; against rules without training.

    python -m benchmarks.judge.end_to_end                 # everything; `make judge` is this
    python -m benchmarks.judge.end_to_end --people        # and a fit to people's labels, which --data must hold; three minutes more
    python -m benchmarks.judge.end_to_end --ablations     # and judges of 50 to 1,500 questions and of mined labels, each tuned by answers
    python -m benchmarks.judge.end_to_end --scale 0.03    # tries the script out

1. Labels: target and draft LM answer questions of the training split. The corpus's exact checker says where a wrong answer goes wrong;
   pairs of a right and a wrong answer are rows. `draftsmith label corrupt` adds one wrong answer in each wording; others are mined.
2. Judges: what they read, what they learn from, how many questions; then `draftsmith judge rounds` with three drafters.
3. `draftsmith judge tune` on other questions of the training split chooses threshold and shape, for each drafter.
4. Everything else is measured on problems of the test split, which nothing has seen: the tuned judge beside lossless decoding and every
   rule without training; each drafter; each judge; problems out of the judge's domain.

Writes `<date>-judge.md`, `.json` and charts into benchmarks/results/judge/, and the rows into `runs/judge/report.json`. The same command
resumes a run that was stopped; `rm -r runs/judge` starts again. `--people` and `--ablations` also add to a folder without them, and
`--ablations alone` makes nothing else but what they need, and a page of them. Stages run side by side; what each prints is in
`runs/judge/logs`.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.drafters.recipes import RECIPES
from benchmarks.drafters.recipes import train as train_head
from benchmarks.judge.ablations import PARTS, REPORT, SIZES, ablations
from benchmarks.judge.lanes import Stage, Stages, needed
from benchmarks.judge.page import ALONE, BESIDE, FIRST_ERRORS, OUT_OF_DOMAIN, PEOPLE, publish, publish_ablations
from benchmarks.judge.reports import NARROW, races, reports
from benchmarks.judge.stages import (
    DRAFT,
    LICENCE,
    STATE,
    TARGET,
    cached,
    checked,
    judge_folder,
    judged,
    trained,
    with_operation,
    write_problems,
)
from benchmarks.judge.tuned import HEAD_SHAPES, SHAPE, tuning
from benchmarks.judge.tuned import THRESHOLDS as TRIED
from draftsmith.data.cache.extract import extract
from draftsmith.data.prompts import PromptSelection
from draftsmith.data.replies.reply_plan import BatchOptions
from draftsmith.data.replies.respond import respond
from draftsmith.decode.sampling import DrawOptions, ReplyOptions
from draftsmith.label.commands.entry_options import EntryOptions
from draftsmith.label.commands.generate_command import generate
from draftsmith.label.commands.store_commands import import_answers
from draftsmith.label.mine.mine_command import MiningOptions, mine
from draftsmith.train.judge.rounds_command import RoundOptions, judge_rounds

ROUNDS = 2
FULL = {"train": 2400, "held": 200, "test": 500, "mine": 200, "rounds": 800, "tuning": 800}
FEWEST = {"mine": 200, "rounds": 2 * ROUNDS, "tuning": 12}
ANSWERS = DrawOptions(max_new_tokens=200)
LONGEST_PATH = (
    "problems",
    "answers-train",
    "corrupt",
    "cache-corrupted",
    "cache-checker",
    "replies",
    "train-redrafter",
    "train-eagle",
    "train-corrupted",
    "rounds",
    "tune-draft_lm",
    "tune-price",
    "report",
    "compiler",
)
"""What the end waits for: of the stages that could begin, these do first."""


def run(options: argparse.Namespace) -> None:
    """All stages, then the page."""
    work, stages = options.work, Stages(options.work)
    work.mkdir(parents=True, exist_ok=True)
    # Few mined tokens are wrong, and a judge must find some of these: fewer questions would be too few.
    counts = {name: max(FEWEST.get(name, 8), int(options.scale * full)) for name, full in FULL.items()}
    stages.check_plan({"counts": counts, "rounds": ROUNDS, "thresholds": list(TRIED)})
    judges, plan = planned(work, counts, options)
    if options.ablations == ALONE:
        stages.run(needed(plan, [REPORT, *(["train-people"] if options.people else [])]))
        publish_ablations(stages, judged(judges[PEOPLE]) if options.people else None, options)
        return
    stages.run(sorted(plan, key=_turn))
    stages.run(races(work), at_once=1)
    publish(stages, {name: judged(folder) for name, folder in judges.items()}, options)


def _turn(stage: Stage) -> int:
    return LONGEST_PATH.index(stage.name) if stage.name in LONGEST_PATH else len(LONGEST_PATH)


def planned(work: Path, counts: dict[str, int], options: argparse.Namespace) -> tuple[dict[str, Path], list[Stage]]:
    """The judges by the name that the page gives them, and all stages but the races."""
    judges, learning = learnt(work, counts, options.scale)
    out_of_domain = OUT_OF_DOMAIN not in options.without
    last = judges[f"+ {ROUNDS} rounds"]
    trainings = [stage.name for stage in learning]
    if out_of_domain:
        judges[NARROW] = judge_folder(work, "no-division")
    plan = [
        Stage("problems", lambda: write_problems(work, counts)),
        *labels(work),
        *heads(work, options.scale),
        *learning,
        *(narrow(work) if out_of_domain else []),
        *tuning(work, last, options.scale),
        *reports(work, dict(judges), trainings, FIRST_ERRORS not in options.without, out_of_domain),
        *(ablations(work, options.scale) if options.ablations else []),
    ]
    if options.people:
        # Of another target: no report on the embedded pair asks it.
        judges[PEOPLE] = judge_folder(work, "people")
        plan += people(work, options.data)
    return judges, plan


def labels(work: Path) -> list[Stage]:
    """Checked and spoiled answers, held-out answers, mined tokens; and the states of all."""
    held = work / "held-answers" / "answers.jsonl"

    def answer_held() -> None:
        generate(work / "held.jsonl", (DRAFT,), "embedded", held.parent, entry=LICENCE)

    def mined() -> None:
        mining = MiningOptions(max_new_tokens=160, batch_rows=32)
        mine(TARGET, DRAFT, work / "mine.jsonl", work / "mined", mining=mining)

    return [
        *checked(work),
        Stage("answers-held", answer_held, ("problems",)),
        cached(work, "held", "answers-held", held),
        Stage("mine", mined, ("problems",)),
        Stage(
            "cache-mined",
            lambda: extract(TARGET, work / "mined" / "rows.jsonl", work / "mined" / "cache"),
            ("mine",),
        ),
    ]


def heads(work: Path, scale: float) -> list[Stage]:
    """A ReDrafter and an EAGLE-1, trained on the target's own replies."""

    def replies() -> None:
        respond(
            TARGET,
            work / "train.jsonl",
            work / "replies",
            selection=PromptSelection(limit=max(64, int(scale * 800))),
            reply=ReplyOptions(max_new_tokens=160),
            batches=BatchOptions(batch_rows=64),
        )
        extract(TARGET, work / "replies", work / "replies-cache")

    def head(name: str) -> Stage:
        steps = max(20, int(scale * 800))
        return Stage(
            f"train-{name}",
            lambda: train_head(RECIPES[name], TARGET, work / "replies-cache", work / name, steps=steps),
            ("replies",),
        )

    return [Stage("replies", replies, ("problems",)), *map(head, HEAD_SHAPES)]


def learnt(work: Path, counts: dict[str, int], scale: float) -> tuple[dict[str, Path], list[Stage]]:
    """Judges by what they read and learn from, and by how many questions; then the rounds with every drafter. And their trainings."""

    def rounds() -> None:
        judge_rounds(
            TARGET,
            judge_folder(work, "corrupted"),
            [work / part / "rows.jsonl" for part in PARTS],
            [work / part / "cache" for part in PARTS],
            [DRAFT, *(str(work / name / "drafter") for name in HEAD_SHAPES)],
            work / "rounds.jsonl",
            work / "rounds",
            checker="embedded",
            shapes=(SHAPE, *HEAD_SHAPES.values()),
            licence="Apache-2.0",
            course=RoundOptions(rounds=ROUNDS, questions=counts["rounds"] // ROUNDS, batch_rows=64),
            draw=ANSWERS,
        )

    sizes = {f"+ corrupted, {size} questions": f"corrupted-{size}" for size in SIZES}
    names = {"state": "state", "state + opinion": "opinion", **sizes, "+ corrupted": "corrupted"}
    judges = {said: judge_folder(work, name) for said, name in names.items()}
    for number in range(1, ROUNDS + 1):
        name = f"+ {number} round{'s' if number > 1 else ''}"
        judges[name] = work / "rounds" / f"round-{number}" / "judge"
    judges["mined"] = judge_folder(work, "mined")
    stages = [
        trained(work, "corrupted", PARTS),
        Stage("rounds", rounds, ("train-corrupted", *(f"train-{name}" for name in HEAD_SHAPES))),
        trained(work, "state", ["checker"], feature=STATE),
        trained(work, "opinion", ["checker"]),
        *(trained(work, f"corrupted-{size}", PARTS, int(max(6, scale * size))) for size in SIZES),
        trained(work, "mined", ["mined"]),
    ]
    return judges, stages


def narrow(work: Path) -> list[Stage]:
    """A judge that learns without division, to be tested on it."""
    answers = {"checker": ("answers-train", work / "answers" / "answers.jsonl")}
    answers["corrupted"] = "corrupt", work / "corrupted.jsonl"

    def part(name: str) -> list[Stage]:
        (after, file), kept = answers[name], work / f"{name}-no-division.jsonl"
        left_out = Stage(f"narrow-{name}", lambda: with_operation(file, kept, "/", False), (after,))
        return [left_out, cached(work, f"{name}-no-division", left_out.name, kept)]

    return [
        *part("checker"),
        *part("corrupted"),
        trained(work, "no-division", [f"{name}-no-division" for name in answers]),
    ]


def people(work: Path, data: Path) -> list[Stage]:
    """A judge on people's labels of other models' solutions, with chat-6m's states: does it run, and what is it worth?"""
    target, store = str(data / "models" / "chat-6m"), work / "people.db"

    def read() -> None:
        # The sets in which people marked the place of the first error.
        for source in sorted((data / "judge").glob("[bp]*.jsonl")):
            import_answers(source, str(store), entry=EntryOptions(licence="see the source"))

    return [
        Stage("people-import", read),
        cached(work, "people", "people-import", store=store, target=target),
        trained(work, "people", ["people"], target=target),
    ]


def _options(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--people", action="store_true", help="fit a judge to people's labels too; needs --data")
    parser.add_argument(
        "--ablations",
        nargs="?",
        choices=(BESIDE, ALONE),
        const=BESIDE,
        help="compare sizes up to 1,500 questions and mined labels, each tuned; beside the rest (the default), or alone",
    )
    parser.add_argument("--work", type=Path, default=Path("runs/judge"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/judge"))
    parts = (FIRST_ERRORS, OUT_OF_DOMAIN)
    parser.add_argument("--without", nargs="*", choices=parts, default=[], help="parts to leave out; they cost minutes")
    parser.add_argument("--scale", type=float, default=1.0, help="of questions and problems; 0.03 tries the script out")
    return parser.parse_args(words)


if __name__ == "__main__":
    sys.exit(run(_options()))

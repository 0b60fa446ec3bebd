"""The judge on the embedded pair, from nothing to its price: labels, on-policy rounds, tuning by answers; against rules without training.

    python -m benchmarks.judge.end_to_end                 # everything; `make judge` is this
    python -m benchmarks.judge.end_to_end --people        # and a fit to people's labels, which --data must hold; three minutes more
    python -m benchmarks.judge.end_to_end --scale 0.03    # tries the script out

1. Labels: target and draft LM answer questions of the training split. The corpus's exact checker says where a wrong answer goes wrong;
   pairs of a right and a wrong answer are rows. `draftsmith label corrupt` adds one wrong answer in each wording; others are mined.
2. Judges: what they read, what they learn from, how many questions; then `draftsmith judge rounds` with three drafters.
3. `draftsmith judge tune` on other questions of the training split chooses threshold and shape, for each drafter.
4. Everything else is measured on problems of the test split, which nothing has seen: the tuned judge beside lossless decoding and every
   rule without training, each with several settings; each drafter; each judge; problems out of the judge's domain.

Writes `<date>-judge.md`, `.json` and charts into benchmarks/results/judge/, and the rows into `runs/judge/report.json`. The same command
resumes a run that was stopped; `rm -r runs/judge` starts again.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.drafters.recipes import RECIPES
from benchmarks.drafters.recipes import train as train_head
from benchmarks.judge.page import FIRST_ERRORS, OUT_OF_DOMAIN, publish
from benchmarks.judge.reports import NARROW, measure
from benchmarks.judge.stages import (
    DRAFT,
    STATE,
    TARGET,
    Judged,
    Stages,
    asked_in,
    cached,
    judged,
    trained,
    with_operation,
    write_problems,
)
from benchmarks.judge.tuned import HEAD_SHAPES, SHAPE, tune_all
from benchmarks.judge.tuned import THRESHOLDS as TRIED
from draftsmith.data.cache.extract import extract
from draftsmith.data.prompts import PromptSelection
from draftsmith.data.replies.reply_plan import BatchOptions
from draftsmith.data.replies.respond import respond
from draftsmith.decode.sampling import DrawOptions, ReplyOptions
from draftsmith.label.commands.entry_options import EntryOptions
from draftsmith.label.commands.generate_command import generate
from draftsmith.label.commands.store_commands import import_answers
from draftsmith.label.corrupt.corrupt_command import corrupt
from draftsmith.label.mine.mine_command import MiningOptions, mine
from draftsmith.train.judge.rounds_command import RoundOptions, judge_rounds

SIZES = (50, 150)
ROUNDS = 2
FULL = {"train": 2400, "held": 200, "test": 500, "mine": 200, "rounds": 800, "tuning": 800}
FEWEST = {"mine": 200, "rounds": 2 * ROUNDS, "tuning": 12}
LICENCE = EntryOptions(licence="Apache-2.0")
ANSWERS = DrawOptions(max_new_tokens=200)


def run(options: argparse.Namespace) -> None:
    """All stages, then the page."""
    work, stages = options.work, Stages(options.work)
    work.mkdir(parents=True, exist_ok=True)
    # Few mined tokens are wrong, and a judge must find some of these: fewer questions would be too few.
    counts = {name: max(FEWEST.get(name, 8), int(options.scale * full)) for name, full in FULL.items()}
    stages.check_plan({"counts": counts, "rounds": ROUNDS, "thresholds": list(TRIED)})
    stages.once("problems", lambda: write_problems(work, counts))
    labels(stages)
    heads(stages, options)
    judges = learnt(stages, counts, options)
    if OUT_OF_DOMAIN not in options.without:
        judges[NARROW] = narrow(stages)
    tune_all(stages, judges[f"+ {ROUNDS} rounds"].folder, options.scale)
    measure(stages, judges, FIRST_ERRORS not in options.without, OUT_OF_DOMAIN not in options.without)
    human = people(stages, options) if options.people else None
    publish(stages, judges | ({"people's labels, chat-6m's states": human} if human else {}), options)


def labels(stages: Stages) -> None:
    """Answers of target and draft LM with the checker's labels, spoiled answers, mined tokens; and the states of all."""
    work = stages.work
    answers, held = work / "answers" / "answers.jsonl", work / "held-answers" / "answers.jsonl"
    models = (TARGET, DRAFT)
    stages.once(
        "answers-train",
        lambda: generate(work / "train.jsonl", models, "embedded", work / "answers", entry=LICENCE, pairs=True),
    )
    stages.once(
        "answers-held",
        lambda: generate(work / "held.jsonl", (DRAFT,), "embedded", work / "held-answers", entry=LICENCE),
    )

    def spoil() -> None:
        asked = asked_in(work / "train.jsonl", answers, work / "asked.jsonl")
        corrupt(asked, work / "corrupted.jsonl", "embedded", licence="Apache-2.0")

    stages.once("corrupt", spoil)
    cached(stages, "checker", answers)
    cached(stages, "corrupted", work / "corrupted.jsonl")
    cached(stages, "held", held)
    mining = MiningOptions(max_new_tokens=160, batch_rows=32)
    stages.once("mine", lambda: mine(TARGET, DRAFT, work / "mine.jsonl", work / "mined", mining=mining))
    stages.once("cache-mined", lambda: extract(TARGET, work / "mined" / "rows.jsonl", work / "mined" / "cache"))


def heads(stages: Stages, options: argparse.Namespace) -> None:
    """A ReDrafter and an EAGLE-1, trained on the target's own replies."""
    work = stages.work

    def replies() -> None:
        respond(
            TARGET,
            work / "train.jsonl",
            work / "replies",
            selection=PromptSelection(limit=max(64, int(options.scale * 800))),
            reply=ReplyOptions(max_new_tokens=160),
            batches=BatchOptions(batch_rows=64),
        )
        extract(TARGET, work / "replies", work / "replies-cache")

    stages.once("replies", replies)
    steps = max(20, int(options.scale * 800))
    for name in HEAD_SHAPES:
        stages.once(
            f"train-{name}",
            lambda name=name: train_head(RECIPES[name], TARGET, work / "replies-cache", work / name, steps=steps),  # type: ignore[misc]
        )


def learnt(stages: Stages, counts: dict[str, int], options: argparse.Namespace) -> dict[str, Judged]:
    """Judges by what they read and learn from, and by how many questions; then the rounds with every drafter."""
    work = stages.work
    pairs, spoiled = work / "checker", work / "corrupted"
    judges = {
        "state": trained(stages, "state", [pairs], feature=STATE),
        "state + opinion": trained(stages, "opinion", [pairs]),
    }
    for size in SIZES:
        questions = int(max(6, options.scale * size))
        judges[f"+ corrupted, {size} questions"] = trained(stages, f"corrupted-{size}", [pairs, spoiled], questions)
    judges["+ corrupted"] = trained(stages, "corrupted", [pairs, spoiled])
    stages.once(
        "rounds",
        lambda: judge_rounds(
            TARGET,
            judges["+ corrupted"].folder,
            [pairs / "rows.jsonl", spoiled / "rows.jsonl"],
            [pairs / "cache", spoiled / "cache"],
            [DRAFT, *(str(work / name / "drafter") for name in HEAD_SHAPES)],
            work / "rounds.jsonl",
            work / "rounds",
            checker="embedded",
            shapes=(SHAPE, *HEAD_SHAPES.values()),
            licence="Apache-2.0",
            course=RoundOptions(rounds=ROUNDS, questions=counts["rounds"] // ROUNDS, batch_rows=64),
            draw=ANSWERS,
        ),
    )
    for number in range(1, ROUNDS + 1):
        name = f"+ {number} round{'s' if number > 1 else ''}"
        judges[name] = judged(work / "rounds" / f"round-{number}" / "judge")
    judges["mined"] = trained(stages, "mined", [work / "mined"])
    return judges


def narrow(stages: Stages) -> Judged:
    """A judge that learnt without division, to be tested on it."""
    work, parts = stages.work, []
    for name, answers in (("checker", work / "answers" / "answers.jsonl"), ("corrupted", work / "corrupted.jsonl")):
        part = work / f"{name}-no-division.jsonl"
        stages.once(
            f"narrow-{name}",
            lambda answers=answers, part=part: with_operation(answers, part, "/", False),  # type: ignore[misc]
        )
        parts.append(cached(stages, f"{name}-no-division", part))
    return trained(stages, "no-division", parts)


def people(stages: Stages, options: argparse.Namespace) -> Judged:
    """A judge on people's labels of other models' solutions, with chat-6m's states: does it run, and what is it worth?"""
    work, target = stages.work, str(options.data / "models" / "chat-6m")
    store = work / "people.db"

    def read() -> None:
        # The sets in which people marked the place of the first error.
        for source in sorted((options.data / "judge").glob("[bp]*.jsonl")):
            import_answers(source, str(store), entry=EntryOptions(licence="see the source"))

    stages.once("people-import", read)
    folder = cached(stages, "people", store=store, target=target)
    return trained(stages, "people", [folder], target=target)


def _options(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--people", action="store_true", help="fit a judge to people's labels too; needs --data")
    parser.add_argument("--work", type=Path, default=Path("runs/judge"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/judge"))
    parts = (FIRST_ERRORS, OUT_OF_DOMAIN)
    parser.add_argument("--without", nargs="*", choices=parts, default=[], help="parts to leave out; they cost minutes")
    parser.add_argument("--scale", type=float, default=1.0, help="of questions and problems; 0.03 tries the script out")
    return parser.parse_args(words)


if __name__ == "__main__":
    sys.exit(run(_options()))

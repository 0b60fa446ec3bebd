"""What refilled rows gain: tokens/s and busy rows against fixed batches, and drafts against plain decoding by the number of rows.

    python -m benchmarks.decode.refilled_rows [--data ../shared/data] [--prompts 96] [--rounds 3] [--rows 1,4,16] [--shapes 1x4]

The prompts are answered as `draftsmith data respond` answers them, with its plan and the settings of its defaults. *Fixed batches* are
those of the plan: a batch ends with its longest reply, and rows that have ended leave it. *Refilled rows* are the stretches of the plan: a
prompt that waits takes the row of one that has ended. Both take turns, and the median of the rounds counts. The replies must be the same.

Without `--data` only the embedded target is measured; `models/chat-6m` and `replies/chat-6m_train.jsonl` are read from that folder.
"""

from __future__ import annotations

import argparse
import heapq
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import torch

from benchmarks.machine import machine_line
from draftsmith.data.chat_template import ChatTemplate
from draftsmith.data.prompts import Prompt
from draftsmith.data.replies.reply_plan import BatchOptions, Plan, make_plan
from draftsmith.data.replies.reply_settings import reply_settings
from draftsmith.decode import Engine, Generation, GenerationSettings
from draftsmith.decode.batch import busy_share
from draftsmith.decode.sampling import ReplyOptions
from draftsmith.embedded.problems import distinct_problems
from draftsmith.files import read_jsonl
from draftsmith.models import Target, load_tokenizer
from draftsmith.models.drafters.drafter_folder import load_drafter
from draftsmith.models.tree.shapes import parse_shape

Calls = list[list[Generation]]


@dataclass(frozen=True)
class Subject:
    """A target with the prompts that it answers.

    Attributes:
        name: for the page.
        target: answers.
        plan: of the prompts; makes batches and stretches.
        drafter: folder of a drafter for it, or None.
    """

    name: str
    target: Target
    plan: Plan
    drafter: str | None


@dataclass(frozen=True)
class Pace:
    """How fast an arm was.

    Attributes:
        tokens_per_second: of the median round.
        busy: share of its rows that were busy.
        mean_reply: tokens of a reply.
    """

    tokens_per_second: float
    busy: float
    mean_reply: float


def fixed_batches(engine: Engine, plan: Plan) -> Calls:
    """Batch after batch, each until its longest reply has ended."""
    numbers = count()
    return [
        engine.generate([list(ids) for _, ids in batch], plan.settings, request_ids=[next(numbers) for _ in batch])
        for batch in plan.batches
    ]


def refilled_rows(engine: Engine, plan: Plan) -> Calls:
    """Stretch after stretch, each in rows that are refilled."""
    numbers, calls = count(), []
    for stretch in plan.stretches(set()):
        prompts = [(next(numbers), list(ids)) for _, ids in stretch.prompts]
        stream = engine.stream(prompts, plan.settings, plan.num_rows(stretch.room), stretch.room, in_order=True)
        calls.append([reply for _, reply in stream])
    return calls


def in_turns(arms: Mapping[str, Callable[[], Calls]], num_rows: int, rounds: int) -> dict[str, Pace]:
    """Time arms that give the same replies, one after the other in each round. A first round is not timed.

    Args:
        arms: by name.
        num_rows: of each.
        rounds: timed.

    Raises:
        RuntimeError: two arms differ in a token.
    """
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    calls: dict[str, Calls] = {}
    for number in range(rounds + 1):
        for name, decode in arms.items():
            started = time.perf_counter()
            calls[name] = decode()
            if number:
                seconds[name].append(time.perf_counter() - started)
    texts = {name: [reply.token_ids for call in own for reply in call] for name, own in calls.items()}
    first = next(iter(texts.values()))
    if any(own != first for own in texts.values()):
        raise RuntimeError("the arms emitted different tokens")
    num_tokens = sum(map(len, first))
    return {
        name: Pace(
            num_tokens / statistics.median(seconds[name]), busy_share(calls[name], num_rows), num_tokens / len(first)
        )
        for name in arms
    }


def subjects(options: argparse.Namespace) -> Iterator[Subject]:
    """The embedded target, and chat-6m where its folder is named."""
    problems = distinct_problems("train", options.prompts, seed=0)
    yield subject(options, "embedded:target", [problem.question for problem in problems], "embedded:draft_lm")
    if options.data is not None:
        rows = [row for _, row in read_jsonl(options.data / "replies" / "chat-6m_train.jsonl")][: options.prompts]
        texts = [row["messages"][0]["content"] for row in rows]
        yield subject(options, str(options.data / "models" / "chat-6m"), texts, options.drafter)


def subject(options: argparse.Namespace, path: str, texts: Sequence[str], drafter: str | None) -> Subject:
    """A target with questions of one turn."""
    target, tokenizer = Target.load(path), load_tokenizer(path)
    settings = reply_settings(path, tokenizer, reply=ReplyOptions(max_new_tokens=options.tokens))
    prompts = [
        Prompt(f"{number:05d}", ({"role": "user", "content": text},), "train", "benchmark")
        for number, text in enumerate(texts)
    ]
    limits = BatchOptions(batch_rows=max(options.rows))
    plan = make_plan(prompts, ChatTemplate(tokenizer), settings, target.max_positions, limits)
    return Subject(path if path.startswith("embedded:") else Path(path).name, target, plan, drafter)


def counted_cycles(lengths: Sequence[int], num_rows: int) -> tuple[int, int]:
    """How many cycles plain decoding takes, counted from the lengths of its replies.

    Args:
        lengths: tokens of each reply, in the order of the prompts.
        num_rows: how many are decoded at once.

    Returns:
        In fixed batches, and in refilled rows. The first token of a reply needs no cycle.
    """
    own = [length - 1 for length in lengths]
    fixed = sum(max(own[start : start + num_rows]) for start in range(0, len(own), num_rows))
    rows = [0] * num_rows
    for cycles in own:
        heapq.heapreplace(rows, rows[0] + cycles)
    return fixed, max(rows)


def counted(options: argparse.Namespace) -> Iterator[str]:
    """What follows from the lengths of the replies of chat-6m alone: busy rows and cycles, for some prompts and for all."""
    rows = [row for _, row in read_jsonl(options.data / "replies" / "chat-6m_train.jsonl")]
    rows.sort(key=lambda row: -len(row["prompt_ids"]))
    lengths, num_rows = [len(row["reply_ids"]) for row in rows], options.rows[-1]
    for num_prompts in sorted({min(options.prompts, len(rows)), len(rows)}):
        fixed, refilled = counted_cycles(lengths[:num_prompts], num_rows)
        busy = sum(lengths[:num_prompts]) - num_prompts
        shares = [f"{cycles} ({busy / (num_rows * cycles):.0%})" for cycles in (fixed, refilled)]
        yield f"| {num_prompts} | {num_rows} | {shares[0]} | {shares[1]} | {fixed / refilled:.2f} |"


def by_rows(chosen: Subject, options: argparse.Namespace) -> Iterator[tuple[int, str, Pace, float]]:
    """For each number of rows and each shape the pace, and the ratio to plain decoding in as many rows."""
    if chosen.drafter is None:
        return
    drafter = load_drafter(Path(chosen.drafter) if Path(chosen.drafter).exists() else chosen.drafter, "float32")
    engines = {"plain": Engine(chosen.target)}
    engines |= {shape: Engine(chosen.target, drafter, parse_shape(shape)) for shape in options.shapes}
    prompts = [list(ids) for batch in chosen.plan.batches for _, ids in batch]
    for num_rows in options.rows:
        few = prompts[: max(4 * num_rows, 8)]
        arms = {name: _decoder(engine, few, chosen.plan.settings, num_rows) for name, engine in engines.items()}
        paces = in_turns(arms, num_rows, options.rounds)
        for name, pace in paces.items():
            yield num_rows, name, pace, pace.tokens_per_second / paces["plain"].tokens_per_second


def _decoder(
    engine: Engine, prompts: list[list[int]], settings: GenerationSettings, num_rows: int
) -> Callable[[], Calls]:
    return lambda: [engine.generate(prompts, settings, num_rows=num_rows)]


def report(options: argparse.Namespace) -> Iterator[str]:
    """The page, line by line, as it is measured."""
    yield f"`python -m benchmarks.decode.refilled_rows {shlex.join(options.given)}`"
    yield ""
    yield f"{machine_line()}, float32; load at the start {os.getloadavg()[0]:.1f}."
    if options.data is not None:
        yield ""
        yield "| replies of chat-6m | rows | cycles in fixed batches (busy) | in refilled rows (busy) | ratio |"
        yield "|---|---|---|---|---|"
        yield from counted(options)
    chosen = list(subjects(options))
    yield ""
    yield "| target | prompts | rows | mean reply | fixed batches, tokens/s (busy) | refilled rows, tokens/s (busy) | gain |"
    yield "|---|---|---|---|---|---|---|"
    for each in chosen:
        engine, plan = Engine(each.target), each.plan
        arms = {
            "fixed": lambda e=engine, p=plan: fixed_batches(e, p),
            "refilled": lambda e=engine, p=plan: refilled_rows(e, p),
        }
        paces = in_turns(arms, options.rows[-1], options.rounds)
        shown = " | ".join(f"{pace.tokens_per_second:.0f} ({pace.busy:.0%})" for pace in paces.values())
        gain = paces["refilled"].tokens_per_second / paces["fixed"].tokens_per_second
        yield f"| {each.name} | {plan.num_prompts} | {options.rows[-1]} | {paces['fixed'].mean_reply:.0f} tokens | {shown} | {gain:.2f} |"
    yield ""
    yield "| target | rows | shape | tokens/s | busy | against plain |"
    yield "|---|---|---|---|---|---|"
    for each in chosen:
        for num_rows, name, pace, ratio in by_rows(each, options):
            yield f"| {each.name} | {num_rows} | {name} | {pace.tokens_per_second:.0f} | {pace.busy:.0%} | {ratio:.2f} |"


def parse(given: list[str]) -> argparse.Namespace:
    """The options of a command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with models/chat-6m and replies/chat-6m_train.jsonl")
    parser.add_argument("--drafter", help="a drafter of chat-6m")
    parser.add_argument("--out", type=Path, help="file to write the page to")
    parser.add_argument("--prompts", type=int, default=96, help="prompts of each target")
    parser.add_argument("--tokens", type=int, default=256, help="longest reply")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds")
    parser.add_argument("--rows", type=lambda text: sorted(map(int, text.split(","))), default=[1, 4, 16])
    parser.add_argument("--shapes", type=lambda text: text.split(","), default=["1x4", "2x3"])
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(given)
    options.given = given
    return options


def main() -> None:
    """Measure, print and write the page."""
    options = parse(sys.argv[1:])
    torch.set_num_threads(options.threads)
    lines = []
    for line in report(options):
        print(line, flush=True)
        lines.append(line)
    if options.out is not None:
        options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

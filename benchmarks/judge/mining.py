"""What mining costs against the plain procedure: forwards, tokens and processor seconds per label, and whether the labels agree.

    OMP_NUM_THREADS=1 python -m benchmarks.judge.mining [--problems 8] [--target embedded:target] [--draft embedded:draft_lm]

Every line is printed as soon as it is measured. Seconds are the process's own, so that other work on the machine counts little.
"""

import argparse
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from benchmarks.machine import machine_line
from draftsmith import embedded, provenance
from draftsmith.data.chat_template import ChatTemplate
from draftsmith.label.mine.answers import answer_parser
from draftsmith.label.mine.many_questions import Miner
from draftsmith.label.mine.plain import mine_plain
from draftsmith.label.mine.question_mining import MiningQuestion, MiningResult, Rules
from draftsmith.models.files.loading import load_tokenizer
from draftsmith.models.target.target import Target


class Watch:
    """Counts a model's forwards and the tokens that they read, padding included, whoever calls it."""

    def __init__(self, target: Target) -> None:
        self.forwards = self.tokens = 0
        target.model.base_model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.forwards += 1
        self.tokens += kwargs["input_ids"].numel()


@dataclass(frozen=True)
class Bench:
    """The models, watched, and the questions."""

    target: Target
    draft: Target
    watches: tuple[Watch, Watch]
    questions: list[MiningQuestion]
    rules: dict[str, Any]

    def line(
        self, name: str, mine: Callable[[], list[MiningResult]], baseline: list[MiningResult] | None
    ) -> list[MiningResult]:
        """Measures one way of mining and prints its row."""
        before = [(watch.forwards, watch.tokens) for watch in self.watches]
        started = time.process_time()
        rows = sorted(mine(), key=lambda mined: mined.id)
        seconds = time.process_time() - started
        spent = [
            (watch.forwards - forwards, watch.tokens - tokens)
            for watch, (forwards, tokens) in zip(self.watches, before, strict=True)
        ]
        labels = [swap.label for mined in rows for swap in mined.swaps]
        same = "" if baseline is None else f"{agreeing(rows, baseline)} of {len(rows)}"
        print(
            f"| {name} | {len(labels)} ({labels.count(0)}) | {spent[0][0] / len(labels):.2f} | {spent[0][1] / len(labels):.0f} "
            f"| {spent[1][0] / len(labels):.2f} | {seconds / len(labels):.3f} | {same} |",
            flush=True,
        )
        return rows

    def mining(self, batch_rows: int = 1, **settings: Any) -> Callable[[], list[MiningResult]]:
        """Our mining, with these settings."""
        miner = Miner(self.target, self.draft, Rules(**(self.rules | settings)), batch_rows)
        return lambda: list(miner.mine(self.questions))

    def plain(self) -> list[MiningResult]:
        """The twin."""
        return [mine_plain(self.target, self.draft, question, Rules(**self.rules)) for question in self.questions]


def agreeing(rows: list[MiningResult], baseline: list[MiningResult]) -> int:
    """Questions with the same swaps and the same final reply."""
    return sum(
        (ours.swaps, ours.reply_ids) == (theirs.swaps, theirs.reply_ids)
        for ours, theirs in zip(rows, baseline, strict=True)
    )


def prepare(target_name: str, draft_name: str, num_problems: int, max_new_tokens: int) -> Bench:
    """Loads everything."""
    target, draft, tokenizer = Target.load(target_name), Target.load(draft_name), load_tokenizer(target_name)
    parse = answer_parser("final-number")
    chat = ChatTemplate(tokenizer, None, target.eos_token_ids)
    questions = [
        MiningQuestion(problem.id, chat.first_prompt_ids([{"role": "user", "content": problem.question}]))
        for problem in embedded.distinct_problems("test", num_problems, 0)
    ]
    rules = {
        "parse": lambda reply: parse(str(tokenizer.decode(reply, skip_special_tokens=True))),
        "eos_token_ids": target.eos_token_ids,
        "max_new_tokens": max_new_tokens,
        "context": target.max_positions,
    }
    return Bench(target, draft, (Watch(target), Watch(draft)), questions, rules)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="embedded:target")
    parser.add_argument("--draft", default="embedded:draft_lm")
    parser.add_argument("--problems", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=160)
    options = parser.parse_args()
    print(
        f"`{provenance.command_line()}`: {machine_line()}, transformers {transformers.__version__}, "
        f"Python {platform.python_version()}, float32\n"
    )
    bench = prepare(options.target, options.draft, options.problems, options.max_new_tokens)
    print(
        "| | labels (wrong) | target forwards a label | target tokens a label | draft forwards a label | s a label | questions alike |"
    )
    print("|---|---|---|---|---|---|---|", flush=True)
    ours = bench.line("one question at a time", bench.mining(), None)
    bench.line("eight at a time", bench.mining(8), ours)
    for length in (4, 8, 12):
        bench.line(f"`--stop-on-rejoin {length}`", bench.mining(8, stop_on_rejoin=length), ours)
    bench.line("plain procedure", bench.plain, ours)
    bench.line("known answers, no guesses of the draft", bench.mining(draft_length=0), ours)
    bench.line("kept keys and values alone", bench.mining(draft_length=0, draft_window=0), ours)


if __name__ == "__main__":
    main()

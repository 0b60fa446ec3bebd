"""Drafters without training against a trained head, by category of the prompts: tokens per step of real greedy decoding, in one batch.

    python -m benchmarks.drafters.without_training --target TARGET --prompts FILE \\
      --drafters head=FOLDER@4x4n16,4x4n16m1 suffix=embedded:suffix@4x10n16 union=FOLDER@4x10n16 [--max-new-tokens 64]

FILE is JSONL with `category` and `turns`, as Spec-Bench is; the first turn is asked. *Same*: replies that are those of plain decoding.
*CPU s*: the process's time for all replies, which other work on the machine does not change much.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.machine import machine_line
from draftsmith.decode import Engine, GenerationSettings
from draftsmith.evaluate.drafters import parse_entries
from draftsmith.evaluate.strata.acceptance import tokens_per_step, tokens_per_step_interval
from draftsmith.evaluate.strata.decoded import Decoded
from draftsmith.evaluate.strata.words import ranged
from draftsmith.files import read_jsonl
from draftsmith.models import Target
from draftsmith.models.drafters.drafter_folder import load_drafter
from draftsmith.models.files.end_tokens import end_tokens
from draftsmith.models.files.loading import load_tokenizer
from draftsmith.models.tree.shapes import shape_text


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.drafters.without_training", description=__doc__)
    parser.add_argument("--target", required=True)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--drafters", nargs="+", required=True, help="NAME=FOLDER@SHAPE,SHAPE")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    options = parser.parse_args(arguments)
    options.words = list(sys.argv[1:] if arguments is None else arguments)
    return options


def report(options: argparse.Namespace) -> Iterator[str]:
    """The page, line by line."""
    yield f"`{shlex.join(['python', '-m', 'benchmarks.drafters.without_training', *options.words])}`"
    yield ""
    rows = [row for _, row in read_jsonl(options.prompts)]
    target, tokenizer = Target.load(options.target), load_tokenizer(options.target)
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": row["turns"][0]}], add_generation_prompt=True, return_dict=False
        )
        for row in rows
    ]
    settings = GenerationSettings(options.max_new_tokens, eos_token_ids=tuple(end_tokens(tokenizer=tokenizer)))
    categories = list(dict.fromkeys(row["category"] for row in rows))
    counts = ", ".join(f"{sum(row['category'] == name for row in rows)} of {name}" for name in categories)
    yield (
        f"{machine_line()}, float32. Prompts: {counts}, at most "
        f"{max(map(len, prompts))} tokens; {options.max_new_tokens} new tokens, greedy."
    )
    yield ""
    yield f"| drafter | shape | {' | '.join(f'{name}: tokens per step (95 %)' for name in categories)} | same | CPU s |"
    yield "|---|---|" + "---|" * (len(categories) + 2)
    started = time.process_time()
    plain = [reply.token_ids for reply in Engine(target).generate(prompts, settings)]
    yield f"| plain | | {' | '.join('1.00' for _ in categories)} | | {time.process_time() - started:.1f} |"
    for entry in parse_entries(options.drafters, []):
        drafter = load_drafter(entry.path)
        for limits in entry.shapes:
            started = time.process_time()
            replies = Engine(target, drafter, limits).generate(prompts, settings)
            seconds = time.process_time() - started
            same = sum(reply.token_ids == expected for reply, expected in zip(replies, plain, strict=True))
            cells = []
            for name in categories:
                pairs = zip(replies, rows, strict=True)
                kept = [
                    Decoded(tuple(reply.token_ids), tuple(reply.accepted))
                    for reply, row in pairs
                    if row["category"] == name
                ]
                cells.append(ranged(tokens_per_step(kept), tokens_per_step_interval(kept)))
            yield f"| {entry.name} | `{shape_text(limits)}` | {' | '.join(cells)} | {same}/{len(rows)} | {seconds:.1f} |"


if __name__ == "__main__":
    for line in report(parse()):
        print(line, flush=True)

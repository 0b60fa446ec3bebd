"""Tokens per step by category of a benchmark: draft heads, draft LMs and prompt lookup on the same cached replies.

    python -m benchmarks.real.spec_bench --target TARGET --set 0 REPLIES CACHE --set 1 REPLIES CACHE \\
      --drafters eagle=FOLDER@1x3,10x5n24 redrafter=FOLDER@10x5n24 --report PAGE

REPLIES is what `draftsmith data respond` wrote for the benchmark's prompts, of one turn each, and CACHE what `draftsmith data extract`
made of it. The number before them is the temperature of the replies. Random numbers belong to places of a reply, so a reply does
not depend on what drafts, at any temperature. The cycles are therefore replayed, and the target runs no more.

Owns: the sets of replies, prompt lookup on a known reply, the tables. Does not know: how heads draft along a cache (`learning/replay.py`).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

from benchmarks.learning.replay import Drawn, record_cached
from draftsmith.data.cache.reader import HiddenStateCache
from draftsmith.data.corpus import RESPONSE_GLOB
from draftsmith.data.replies.dialogues import noise_number
from draftsmith.data.shards.shards import CachedSample
from draftsmith.decode.sampling import GenerationSettings
from draftsmith.evaluate.drafters import Entry, parse_entries
from draftsmith.evaluate.strata.acceptance import tokens_per_step, tokens_per_step_interval
from draftsmith.evaluate.strata.categories import prompts_by_category
from draftsmith.evaluate.strata.decoded import Decoded
from draftsmith.evaluate.strata.words import ranged, table
from draftsmith.evaluate.tune.recording import Recorded
from draftsmith.evaluate.tune.simulate import replay
from draftsmith.models import DraftLimits
from draftsmith.models.drafters.drafter_folder import load_drafter
from draftsmith.models.target.target import TargetEnds
from draftsmith.models.tree.shapes import shape_text

ALL = "all"


@dataclass(frozen=True)
class ReplySet:
    """Replies at one temperature.

    Attributes:
        temperature: as it was named on the command line.
        samples: a prompt and a reply each, with the target's states.
        categories: of each sample.
        drawn: how the replies were drawn; None for greedy ones.
    """

    temperature: str
    samples: list[CachedSample]
    categories: list[str | None]
    drawn: Drawn | None


@dataclass(frozen=True)
class Column:
    """One contender: its name and what it emits for each sample of a set."""

    name: str
    decoded: list[Decoded]


def reply_set(temperature: str, replies: Path, cache: Path) -> ReplySet:
    """Joins a cache with the categories of its rows.

    Args:
        temperature: of the replies.
        replies: the folder that `draftsmith data respond` wrote.
        cache: of these replies.

    Raises:
        ValueError: a sample of the cache is no row of the replies.
    """
    lines = (line for file in sorted(replies.glob(RESPONSE_GLOB)) for line in file.open(encoding="utf-8"))
    rows = {row["id"]: row for row in map(json.loads, lines)}
    samples = list(HiddenStateCache(cache))
    unknown = next((sample.id for sample in samples if sample.id not in rows), None)
    if unknown is not None:
        raise ValueError(
            f"{cache} has the sample {unknown!r}, and {replies} has no such row; give the cache of these replies"
        )
    return ReplySet(
        temperature, samples, [rows[sample.id].get("category") for sample in samples], _drawn(rows, samples)
    )


def _drawn(rows: dict[str, Any], samples: Sequence[CachedSample]) -> Drawn | None:
    """How the target drew these replies, by what their rows say."""
    settings = rows[samples[0].id].get("settings")
    if settings is None or settings["temperature"] == 0.0:
        return None
    return Drawn(GenerationSettings(**settings), [noise_number(sample.id, 0) for sample in samples])


def lookup_decoded(prompt_ids: Sequence[int], reply: Sequence[int], num_tokens: int) -> Decoded:
    """What prompt lookup of Transformers accepts on its way along a known reply.

    Its first draft comes with the prompt's own forward, so what that emits counts for no cycle, as in `draftsmith evaluate`.

    Args:
        prompt_ids: token ids.
        reply: token ids, at least one.
        num_tokens: most drafted tokens of a step.
    """
    generator = PromptLookupCandidateGenerator(num_output_tokens=num_tokens, max_length=len(prompt_ids) + len(reply))
    accepted, done = [], 0
    while done < len(reply):
        text = torch.LongTensor([[*prompt_ids, *reply[:done]]])
        drafted = generator.get_candidates(text)[0][0, text.shape[1] :].tolist()
        accepted.append(_num_equal(drafted, reply[done:-1]))  # the token behind what is accepted is the target's own
        done += accepted[-1] + 1
    return Decoded(tuple(reply), tuple(accepted[1:]), prefill_tokens=accepted[0] + 1)


def _num_equal(drafted: Sequence[int], wanted: Sequence[int]) -> int:
    """How many tokens two lists begin with alike."""
    pairs = enumerate(zip(drafted, wanted, strict=False))
    return next((place for place, (own, other) in pairs if own != other), min(len(drafted), len(wanted)))


def lookup_column(replies: ReplySet, num_tokens: int) -> Column:
    """Prompt lookup on a set.

    Args:
        replies: the set.
        num_tokens: most drafted tokens of a step.
    """
    decoded = []
    for sample in replies.samples:
        ids, num_prompt = sample.input_ids.tolist(), int(sample.loss_mask.int().argmax())
        decoded.append(lookup_decoded(ids[:num_prompt], ids[num_prompt:], num_tokens))
    return Column(f"prompt lookup {num_tokens}", decoded)


def drafter_columns(entry: Entry, ends: TargetEnds, replies: ReplySet) -> Iterator[Column]:
    """A drafter on a set, with each of its shapes.

    Args:
        entry: name, folder, shapes.
        ends: of the target whose states the set holds.
        replies: the set.

    Yields:
        A column for each shape.
    """
    drafter = load_drafter(entry.path).bound(ends)
    recorded = dict[DraftLimits, list[Recorded]]()
    for limits in entry.shapes:
        largest = max((each for each in entry.shapes if _same_but_nodes(each, limits)), key=_num_nodes, default=limits)
        if largest not in recorded:
            recorded[largest] = record_cached(drafter, replies.samples, largest, drawn=replies.drawn)
        yield Column(f"{entry.name} {shape_text(limits)}", [replay(reply, limits) for reply in recorded[largest]])


def _same_but_nodes(first: DraftLimits, second: DraftLimits) -> bool:
    """Dynamic trees that differ in their number of nodes alone: the smaller one is a part of the larger one."""
    both = first.node_budget is not None and second.node_budget is not None
    return both and replace(first, node_budget=second.node_budget) == second


def _num_nodes(limits: DraftLimits) -> int:
    return limits.node_budget or 0


def category_table(replies: ReplySet, columns: Sequence[Column]) -> str:
    """Tokens per step of all contenders, by category and over all prompts.

    Args:
        replies: the set.
        columns: one for each contender.

    Returns:
        Markdown.
    """
    groups = prompts_by_category(dict(enumerate(replies.categories))) | {ALL: list(range(len(replies.samples)))}
    lines = [
        [name, str(len(numbers)), *(_cell([column.decoded[number] for number in numbers]) for column in columns)]
        for name, numbers in groups.items()
    ]
    return table(["category", "prompts", *(column.name for column in columns)], lines)


def _cell(decoded: Sequence[Decoded]) -> str:
    return ranged(tokens_per_step(decoded), tokens_per_step_interval(decoded))


def page(target: str, sets: Sequence[ReplySet], entries: Sequence[Entry], num_tokens: int) -> str:
    """The tables of all temperatures.

    Args:
        target: whose replies the sets hold.
        sets: one for each temperature.
        entries: the drafters.
        num_tokens: most drafted tokens of prompt lookup.

    Returns:
        Markdown.
    """
    ends = TargetEnds.load(target)
    parts = []
    for replies in sets:
        columns = [lookup_column(replies, num_tokens)]
        columns += [column for entry in entries for column in drafter_columns(entry, ends, replies)]
        parts.append(f"Temperature {replies.temperature}:\n\n{category_table(replies, columns)}")
    return "\n\n".join(parts) + "\n"


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--target", required=True, help="whose states the caches hold: a folder, a hub id or a GGUF file"
    )
    parser.add_argument(
        "--set", nargs=3, action="append", required=True, metavar=("TEMPERATURE", "REPLIES", "CACHE"), dest="sets",
        help="replies to the prompts of the benchmark and their states; once for each temperature",
    )  # fmt: skip
    parser.add_argument("--drafters", nargs="*", default=[], help="NAME=FOLDER or NAME=FOLDER@SHAPE,SHAPE")
    parser.add_argument("--shapes", nargs="+", default=["10x5n24"], help="of the drafters that name none")
    parser.add_argument("--prompt-lookup", type=int, default=5, help="most drafted tokens of prompt lookup")
    parser.add_argument("--report", type=Path, help="Markdown to write")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the tables.

    Args:
        arguments: of the command; None reads the process's.
    """
    options = _options(arguments)
    sets = [reply_set(temperature, Path(replies), Path(cache)) for temperature, replies, cache in options.sets]
    text = page(options.target, sets, parse_entries(options.drafters, options.shapes), options.prompt_lookup)
    print(text, end="")
    if options.report is not None:
        options.report.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

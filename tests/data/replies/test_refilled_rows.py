"""Replies from an engine that refills rows: the same as in batches, within the limits of memory, whole and in order."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from tiny import EOS
from transformers import PreTrainedTokenizerBase

from draftsmith.data.chat_template import ChatTemplate
from draftsmith.data.chats.messages import Message
from draftsmith.data.prompts import Prompt
from draftsmith.data.replies.reply_files import write_replies
from draftsmith.data.replies.reply_plan import BatchOptions, Plan, make_plan
from draftsmith.data.replies.reply_sources import Reply
from draftsmith.data.shared_work import Share
from draftsmith.decode.sampling import GenerationSettings

SETTINGS = GenerationSettings(max_new_tokens=8, eos_token_ids=(EOS,))
LIMITS = BatchOptions(batch_rows=4, batch_tokens=400)


def replied(prompt: list[int]) -> Reply:
    """A reply that depends on its prompt alone."""
    return Reply([10 + len(prompt) % 200, EOS], "eos")


class InBatches:
    def reply(self, prompts: list[list[int]], settings: GenerationSettings, request_ids: list[int]) -> list[Reply]:
        return [replied(prompt) for prompt in prompts]


class InRows:
    """Ends requests in any order, and checks what it is asked for."""

    def __init__(self, seed: int, fail_after: int | None = None) -> None:
        self.random, self.left = random.Random(seed), fail_after
        self.most_rows = self.passes = 0

    def stream(
        self, requests: Iterator[tuple[int, list[int]]], settings: GenerationSettings, num_rows: int, room: int
    ) -> Iterator[tuple[int, Reply]]:
        assert num_rows == 1 or num_rows * room <= LIMITS.batch_tokens
        self.passes += 1
        rows: dict[int, list[int]] = {}
        numbers = iter(range(10_000))
        while True:
            for _, prompt in islice(requests, num_rows - len(rows)):
                assert len(prompt) + settings.max_new_tokens <= room
                rows[next(numbers)] = prompt
            self.most_rows = max(self.most_rows, len(rows))
            if not rows:
                return
            if self.left == 0:
                raise KeyboardInterrupt
            self.left = None if self.left is None else self.left - 1
            index = self.random.choice(sorted(rows))
            yield index, replied(rows.pop(index))


def asking(name: str, *turns: str) -> Prompt:
    return Prompt(name, tuple(Message(role="user", content=turn) for turn in turns), "train", "test")


MIXED = [
    *(asking(f"one{number}", "word " * (number % 9 + 1)) for number in range(9)),
    *(asking(f"two{number}", "word " * (number % 3 + 1), "And?") for number in range(5)),
    *(asking(f"three{number}", "Hi", "word " * 12, "And then?") for number in range(3)),
]


@pytest.fixture
def plan(tokenizer: PreTrainedTokenizerBase) -> Plan:
    return make_plan(MIXED, ChatTemplate(tokenizer), SETTINGS, 128, LIMITS)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "responses.jsonl").read_text().splitlines()]


def test_rows_are_those_of_batches_and_their_order_does_not_depend_on_who_ends_first(
    tmp_path: Path, plan: Plan, tokenizer: PreTrainedTokenizerBase
) -> None:
    chat = ChatTemplate(tokenizer)
    write_replies(tmp_path / "batches", Share(), plan, chat, InBatches(), {})
    written = []
    for seed in range(4):
        engine = InRows(seed)
        write_replies(tmp_path / str(seed), Share(), plan, chat, engine, {})
        written.append((tmp_path / str(seed) / "responses.jsonl").read_bytes())
        assert engine.most_rows == 4
    assert len(set(written)) == 1
    by_id = {row["id"]: row for row in rows_of(tmp_path / "0")}
    assert by_id == {row["id"]: row for row in rows_of(tmp_path / "batches")}
    assert len(rows_of(tmp_path / "0")) == len(MIXED)


@pytest.mark.parametrize("fail_after", [1, 7, 20])
def test_an_interrupted_run_continues_to_the_same_rows(
    tmp_path: Path, plan: Plan, tokenizer: PreTrainedTokenizerBase, fail_after: int
) -> None:
    chat = ChatTemplate(tokenizer)
    with pytest.raises(KeyboardInterrupt):
        write_replies(tmp_path / "cut", Share(), plan, chat, InRows(1, fail_after), {})
    write_replies(tmp_path / "cut", Share(), plan, chat, InRows(2), {})
    write_replies(tmp_path / "whole", Share(), plan, chat, InRows(3), {})
    cut, whole = ({row["id"]: row for row in rows_of(tmp_path / name)} for name in ("cut", "whole"))
    assert cut == whole
    assert len(rows_of(tmp_path / "cut")) == len(MIXED)


def test_later_turns_that_fit_stay_in_their_stretch(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Beside one long prompt of the same stretch, two short turns have room in a row."""
    chat = ChatTemplate(tokenizer)
    talk = [asking("long", "word " * 11), *(asking(f"talk{number}", "word " * 5, "And?") for number in range(3))]
    engine = InRows(0)
    plan = make_plan(talk, chat, SETTINGS, 128, LIMITS)
    assert len(list(plan.stretches(set()))) == 1
    write_replies(tmp_path, Share(), plan, chat, engine, {})
    assert engine.passes == 1
    assert [len(row["turns"]) for row in rows_of(tmp_path)] == [1, 2, 2, 2]

"""Requests that wait take the rows of those that have ended, and nobody's reply depends on who shares the batch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from doubles import BOS, PlannedDrafter, random_target
from every_family import EVERY_FAMILY, fresh, name_of
from torch import Tensor

from draftsmith.decode import Engine, GenerationSettings, Ledger
from draftsmith.decode.batch import Request, busy_share
from draftsmith.decode.constraints import Constraints
from draftsmith.decode.verify.lossy_rules import Everything
from draftsmith.models import Drafter, DraftLimits, LMDrafter, Target
from draftsmith.models.slots.row_state import ReplacedRows, UnknownState, all_by_rows, put_rows, take_rows, write_over
from draftsmith.models.slots.slot_cache import SlotCache
from draftsmith.models.tree.shapes import parse_shape

PROMPTS = [[BOS, 5, 9, 11, 4], [BOS, 7], [BOS, 8, 8, 8, 30, 31, 32], [BOS, 3, 4], [BOS, 40], [BOS, 41, 42, 43]]
ENDS = tuple(range(3, 9))
REQUESTS = {
    "greedy": GenerationSettings(max_new_tokens=13, eos_token_ids=ENDS),
    "drawn": GenerationSettings(max_new_tokens=13, eos_token_ids=ENDS, temperature=1.0, min_p=0.02, seed=5),
    "penalty": GenerationSettings(max_new_tokens=13, eos_token_ids=ENDS, repetition_penalty=1.4),
    "constraints": GenerationSettings(
        max_new_tokens=13, eos_token_ids=ENDS, constraints=Constraints(no_repeat_ngram_size=2)
    ),
}


@pytest.fixture(scope="module")
def target() -> Target:
    return random_target()


@pytest.fixture(scope="module")
def drafters(target: Target) -> dict[str, Drafter]:
    families: dict[str, Drafter] = {name_of(family): fresh(family, target.ends) for family in EVERY_FAMILY}
    return {**families, "draft LM": LMDrafter(random_target(seed=3)).eval()}


def alone(target: Target, request: GenerationSettings) -> list[list[int]]:
    """Each reply decoded plainly, one by one."""
    engine = Engine(target)
    numbered = enumerate(PROMPTS)
    return [engine.generate([prompt], request, request_ids=[number])[0].token_ids for number, prompt in numbered]


@pytest.mark.parametrize("request_name", REQUESTS)
@pytest.mark.parametrize("num_rows", [1, 2, 4])
def test_replies_are_those_of_each_prompt_alone(target: Target, request_name: str, num_rows: int) -> None:
    request = REQUESTS[request_name]
    expected = alone(target, request)
    assert len({len(reply) for reply in expected}) > 2
    for engine in (Engine(target), Engine(target, PlannedDrafter(target, "half"), DraftLimits(3, 4))):
        replies = engine.generate(PROMPTS, request, num_rows=num_rows)
        assert [reply.token_ids for reply in replies] == expected


@pytest.mark.parametrize("shape", ["1x3", "3x3n5", "2x3e0.4"])
@pytest.mark.parametrize("name", [*map(name_of, EVERY_FAMILY), "draft LM"])
def test_every_drafter_drafts_for_rows_that_come_later(
    target: Target, drafters: dict[str, Drafter], name: str, shape: str
) -> None:
    request = REQUESTS["drawn"]
    engine = Engine(target, drafters[name], parse_shape(shape))
    replies = engine.generate(PROMPTS, request, num_rows=2)
    assert [reply.token_ids for reply in replies] == alone(target, request)


@pytest.mark.parametrize("name", [*map(name_of, EVERY_FAMILY), "draft LM"])
def test_a_row_that_comes_later_is_drafted_for_as_it_would_be_alone(
    target: Target, drafters: dict[str, Drafter], name: str
) -> None:
    """What is accepted in each cycle tells whether the drafter's state came with the row."""
    request, engine = REQUESTS["greedy"], Engine(target, drafters[name], DraftLimits(3, 3))
    together = engine.generate(PROMPTS, request, num_rows=2)
    alone = [engine.generate([prompt], request)[0] for prompt in PROMPTS]
    assert [reply.accepted for reply in together] == [reply.accepted for reply in alone]


@pytest.mark.parametrize("name", [*map(name_of, EVERY_FAMILY), "draft LM"])
def test_a_row_that_comes_when_all_others_have_ended_gets_the_draft_that_it_would_get_alone(
    target: Target, drafters: dict[str, Drafter], name: str
) -> None:
    """Where everything is accepted, the reply shows every token of the drafts."""
    request = GenerationSettings(max_new_tokens=13)
    engine = Engine(target, drafters[name], parse_shape("1x3"), rule=Everything())
    later = PROMPTS[2]
    *_, reply = engine.generate([PROMPTS[0], PROMPTS[0], later], request, num_rows=2)
    own = engine.generate([later], request)[0]
    assert (reply.token_ids, reply.accepted) == (own.token_ids, own.accepted)


@pytest.mark.parametrize("name", [*map(name_of, EVERY_FAMILY), "draft LM"])
def test_a_prompt_that_is_read_early_is_drafted_for_as_it_would_be_alone(
    target: Target, drafters: dict[str, Drafter], name: str
) -> None:
    """Of four rows two are read at a time, so that a state waits for its row."""
    request, engine = REQUESTS["penalty"], Engine(target, drafters[name], DraftLimits(3, 3))
    prompts = [*PROMPTS, *(prompt[::-1] for prompt in PROMPTS)]
    own = [engine.generate([prompt], request, request_ids=[number])[0] for number, prompt in enumerate(prompts)]
    replies = engine.generate(prompts, request, num_rows=4)
    assert [(reply.token_ids, reply.accepted) for reply in replies] == [(one.token_ids, one.accepted) for one in own]


def test_an_oracle_is_accepted_whole_in_rows_that_come_later(target: Target) -> None:
    engine = Engine(target, PlannedDrafter(target, "late"), DraftLimits(3, 4))
    replies = engine.generate(PROMPTS, GenerationSettings(max_new_tokens=11), num_rows=2)
    assert [reply.accepted for reply in replies] == [[4, 4]] * len(PROMPTS)


def test_no_row_is_idle_while_a_request_waits(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    from draftsmith.decode.batch import Batch
    from draftsmith.decode.cycle import CycleReport, DecodeCycle

    busy, call = [], DecodeCycle.__call__

    def watched(self: DecodeCycle, batch: Batch, settings: GenerationSettings, ledger: Ledger | None) -> CycleReport:
        busy.append((sum(request is not None for request in batch.requests), len(batch.requests)))
        return call(self, batch, settings, ledger)

    monkeypatch.setattr(DecodeCycle, "__call__", watched)
    replies = Engine(target).generate(PROMPTS, REQUESTS["greedy"], num_rows=2)
    assert all(working == rows for working, rows in busy)
    cycles = sum(len(reply.accepted) for reply in replies)
    assert len(busy) < cycles
    assert busy.count((2, 2)) >= (cycles - max(len(reply.accepted) for reply in replies)) // 2


def test_prompts_are_taken_as_rows_become_free_and_replies_given_as_they_end(target: Target) -> None:
    taken: list[int] = []

    def prompts() -> Iterator[tuple[int, list[int]]]:
        for number, prompt in enumerate(PROMPTS):
            taken.append(number)
            yield number, prompt

    request = REQUESTS["greedy"]
    expected = alone(target, request)
    order = []
    for index, reply in Engine(target).stream(prompts(), request, num_rows=2, room=30):
        order.append(index)
        assert reply.token_ids == expected[index]
        assert len(taken) <= len(order) + 2
    assert sorted(order) == list(range(len(PROMPTS)))


def test_short_prompts_are_read_together_and_wait_for_a_row(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four rows one ends at a time; two prompts are then read, and the second waits. Its reply and its first cycle are its own."""
    from draftsmith.decode.prefill import Prefill

    read, in_steps = [], Prefill.in_steps

    def watched(self: Prefill, requests: Sequence[Request], *args: Any) -> Any:
        read.append(len(requests))
        return in_steps(self, requests, *args)

    monkeypatch.setattr(Prefill, "in_steps", watched)
    prompts = [[BOS, 4 + number, 9][: 2 + number % 2] for number in range(16)]
    for request in REQUESTS.values():
        own = [
            Engine(target).generate([prompt], request, request_ids=[number])[0] for number, prompt in enumerate(prompts)
        ]
        read.clear()
        replies = Engine(target).generate(prompts, request, num_rows=4)
        assert [reply.token_ids for reply in replies] == [reply.token_ids for reply in own]
        assert read[0] == 4
        assert set(read[1:]) >= {2}
        assert len(read[1:]) < len(prompts) - 4
        assert busy_share([replies], 4) > 0.7


def test_prompts_may_follow_from_replies(target: Target) -> None:
    """Two rows, and two prompts at first: each reply brings one more, also when no other waits and no row decodes."""

    class Growing:
        def __init__(self) -> None:
            self.waiting = [[BOS, 5, 9, 11], [BOS, 40]]
            self.given: list[list[int]] = []

        def __iter__(self) -> Growing:
            return self

        def __next__(self) -> tuple[int, list[int]]:
            if not self.waiting:
                raise StopIteration
            self.given.append(self.waiting.pop())
            return len(self.given) - 1, self.given[-1]

    prompts, request = Growing(), GenerationSettings(max_new_tokens=3)
    replies = {}
    for index, reply in Engine(target).stream(prompts, request, num_rows=2, room=30):
        replies[index] = reply.token_ids
        if len(prompts.given) < 6:
            prompts.waiting.append([*prompts.given[index], *reply.token_ids])
    assert sorted(replies) == list(range(6))
    for index, prompt in enumerate(prompts.given):
        assert replies[index] == Engine(target).generate([prompt], request)[0].token_ids


def test_a_prompt_that_does_not_fit_into_a_row_is_refused_with_both_numbers(target: Target) -> None:
    requests = iter([(0, PROMPTS[1]), (1, PROMPTS[2])])
    with pytest.raises(
        ValueError, match=r"prompt 1 has 7 tokens and its reply up to 13, a row has room for 18; .*a room of 20"
    ):
        list(Engine(target).stream(requests, REQUESTS["greedy"], num_rows=1, room=18))


WRONG = {
    "too long": ([BOS] * 20, "prompt {} has 20 tokens and its reply up to 13, a row has room for 30; .*a room of 33"),
    "longer than the context": ([BOS] * 96, "prompt {} has 96 tokens, the context of .* is 96"),
    "empty": ([], "prompt {} is empty"),
    "other ids": ([BOS, 999], "prompt {} holds token id 999"),
}


@pytest.mark.parametrize("place", [0, 1, 4])
@pytest.mark.parametrize("wrong", WRONG)
def test_a_prompt_that_cannot_be_decoded_costs_no_reply_before_it(target: Target, wrong: str, place: int) -> None:
    """With two rows: the first of all, one of the first that are taken, and one that comes later."""
    prompt, message = WRONG[wrong]
    prompts = [*PROMPTS[:place], prompt, *PROMPTS[place:]]
    replies: dict[int, list[int]] = {}
    stream = Engine(target).stream(enumerate(prompts), REQUESTS["greedy"], num_rows=2, room=30)
    with pytest.raises(ValueError, match=message.format(place)):
        replies.update((index, reply.token_ids) for index, reply in stream)
    assert replies == dict(enumerate(alone(target, REQUESTS["greedy"])[:place]))


def test_a_list_with_a_prompt_that_cannot_be_decoded_is_checked_before_the_first_cycle(target: Target) -> None:
    with pytest.raises(ValueError, match="prompt 6 is empty"):
        Engine(target).generate(
            [*PROMPTS, []], REQUESTS["greedy"], on_tokens=lambda *_: pytest.fail("decoded"), num_rows=2
        )


def test_replies_come_in_the_order_of_the_prompts_if_asked(target: Target) -> None:
    request = REQUESTS["greedy"]
    ended = [index for index, _ in Engine(target).stream(enumerate(PROMPTS), request, num_rows=3, room=30)]
    assert ended != sorted(ended)
    replies = list(Engine(target).stream(enumerate(PROMPTS), request, num_rows=3, room=30, in_order=True))
    assert [(index, reply.token_ids) for index, reply in replies] == list(enumerate(alone(target, request)))


def test_prompts_may_come_from_any_iterable(target: Target) -> None:
    replies = Engine(target).generate((prompt for prompt in PROMPTS), REQUESTS["greedy"], num_rows=2)
    assert [reply.token_ids for reply in replies] == alone(target, REQUESTS["greedy"])


def test_a_number_of_rows_below_one_is_refused(target: Target) -> None:
    with pytest.raises(ValueError, match="num_rows is 0; give at least 1"):
        Engine(target).generate(PROMPTS, REQUESTS["greedy"], num_rows=0)


def test_the_examples_of_the_page_on_decoding_run(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "reference" / "decoding.md").read_text(encoding="utf-8")
    code = "".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL))
    known: dict[str, Any] = {}
    exec(compile(code, "docs/reference/decoding.md", "exec"), known)
    assert len(known["replies"]) == 4
    lines = capsys.readouterr().out.splitlines()
    assert sorted(lines) == [
        f"prompt {number}: {len(reply.token_ids)} tokens, ended by {reply.finish}"
        for number, reply in enumerate(known["replies"])
    ]


@dataclass(frozen=True)
class State:
    """A state as a family may have it."""

    pending_BE: Tensor
    texts: list[str]
    cache: SlotCache
    depth: int = 3


def state_of(numbers: list[int], width: int) -> State:
    cache = SlotCache(width, 1)
    cache.aim(torch.arange(width).expand(len(numbers), -1), width, 0)
    keys = torch.tensor(numbers, dtype=torch.float32)[:, None, None, None].expand(-1, 1, width, 2)
    cache.update(keys, keys, 0)
    pending_BE = torch.tensor(numbers)[:, None].expand(-1, width).clone()
    return State(pending_BE, [str(number) for number in numbers], cache)


def test_rows_of_any_state_are_replaced_and_the_others_stay() -> None:
    places = ReplacedRows.of([2, 0], 3, torch.device("cpu"))
    put = put_rows(state_of([0, 1, 2], 4), state_of([7, 8], 3), places)
    assert put.pending_BE[:, :3].tolist() == [[8] * 3, [1] * 3, [7] * 3]
    assert put.texts == ["8", "1", "7"]
    assert put.cache.layer(0)[0][:, 0, :3, 0].tolist() == [[8.0] * 3, [1.0] * 3, [7.0] * 3]
    longer = put_rows(put.pending_BE, torch.full((1, 6), 9), ReplacedRows.of([1], 3, torch.device("cpu")))
    assert longer.shape == (3, 6)
    assert longer[:, :3].tolist() == [[8] * 3, [9] * 3, [7] * 3]


def test_rows_of_any_state_are_taken_and_written_elsewhere() -> None:
    fresh = state_of([6, 7, 8], 4)
    left = take_rows(fresh, slice(1, 3), 3)
    assert left.texts == ["7", "8"]
    put = put_rows(state_of([0, 1, 2], 4), left, ReplacedRows.of([2, 0], 3, torch.device("cpu")))
    assert put.pending_BE[:, 0].tolist() == [8, 1, 7]
    assert put.cache.layer(0)[0][:, 0, 0, 0].tolist() == [8.0, 1.0, 7.0]
    assert fresh.pending_BE[:, 0].tolist() == [6, 7, 8]
    with pytest.raises(UnknownState, match="no entry for each of 3 rows"):
        take_rows([1, 2], slice(1, 3), 3)


def test_a_state_that_has_no_entry_for_each_row_is_known() -> None:
    assert all_by_rows(state_of([0, 1], 2), 2)
    assert all_by_rows(None, 2)
    assert not all_by_rows({"table": torch.zeros(5, 2)}, 2)
    assert not all_by_rows([1, 2, 3], 2)
    with pytest.raises(UnknownState, match="differs between rows"):
        put_rows({"depth": 3}, {"depth": 4}, ReplacedRows.of([0], 1, torch.device("cpu")))


def test_a_state_is_written_over_in_place_also_by_a_shorter_one() -> None:
    kept, new = {"a": torch.zeros(2, 4), "b": None}, {"a": torch.ones(2, 3), "b": None}
    address = kept["a"].data_ptr()  # type: ignore[union-attr]
    write_over(kept, new)
    assert kept["a"].data_ptr() == address  # type: ignore[union-attr]
    assert kept["a"].sum() == 6  # type: ignore[union-attr]
    with pytest.raises(UnknownState, match="fixed address"):
        write_over([1], [2])

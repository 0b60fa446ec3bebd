"""A long prompt that takes a free row is read in chunks between the cycles of the others, and no reply changes by it."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from doubles import BOS, random_target
from every_family import EVERY_FAMILY, fresh, name_of
from torch import Tensor

from draftsmith.decode import Engine, GenerationSettings
from draftsmith.decode.batch import Batch, busy_share
from draftsmith.decode.cycle import CycleReport, DecodeCycle
from draftsmith.models import Drafter, DraftLimits, LMDrafter, Target
from draftsmith.models.trunk.forwards import joined

CHUNK = 4
LENGTHS = [3, 13, 2, CHUNK, 2 * CHUNK, CHUNK + 1]
PROMPTS = [[BOS, *(5 + (7 * row + place) % 50 for place in range(length - 1))] for row, length in enumerate(LENGTHS)]
ENDS = tuple(range(3, 9))
GREEDY = GenerationSettings(max_new_tokens=10, eos_token_ids=ENDS)
DRAWN = GenerationSettings(max_new_tokens=10, eos_token_ids=ENDS, temperature=1.0, seed=7, repetition_penalty=1.2)
DRAFTERS = ["plain", *map(name_of, EVERY_FAMILY), "draft LM"]


@pytest.fixture(scope="module")
def target() -> Target:
    return random_target()


@pytest.fixture(scope="module")
def drafters(target: Target) -> dict[str, Drafter | None]:
    families = {name_of(family): fresh(family, target.ends) for family in EVERY_FAMILY}
    return {"plain": None, **families, "draft LM": LMDrafter(random_target(seed=3)).eval()}


@pytest.fixture(scope="module")
def alone(target: Target) -> list[list[int]]:
    """Each drawn reply decoded plainly, by itself, its prompt read at once."""
    engine = Engine(target)
    return [engine.generate([prompt], DRAWN, request_ids=[row])[0].token_ids for row, prompt in enumerate(PROMPTS)]


def same_shapes(cycle: DecodeCycle) -> DecodeCycle:
    """Runs cycles of fixed shapes op by op."""
    return cycle


@pytest.mark.parametrize("runner", [None, same_shapes], ids=["shapes follow rows", "fixed shapes"])
@pytest.mark.parametrize("name", DRAFTERS)
def test_replies_are_those_of_each_prompt_alone(
    target: Target,
    drafters: dict[str, Drafter | None],
    alone: list[list[int]],
    name: str,
    runner: Any,
) -> None:
    engine = Engine(target, drafters[name], DraftLimits(2, 3), prefill_chunk=CHUNK, runner=runner)
    replies = engine.generate(PROMPTS, DRAWN, num_rows=3)
    assert [reply.token_ids for reply in replies] == alone


@pytest.mark.parametrize("name", DRAFTERS[1:])
def test_a_prompt_read_in_chunks_is_drafted_for_as_one_read_at_once(
    target: Target, drafters: dict[str, Drafter | None], name: str
) -> None:
    limits = DraftLimits(2, 3)
    replies = Engine(target, drafters[name], limits, prefill_chunk=CHUNK).generate(PROMPTS, GREEDY, num_rows=2)
    engine = Engine(target, drafters[name], limits)
    whole = [engine.generate([prompt], GREEDY)[0] for prompt in PROMPTS]
    assert [(reply.token_ids, reply.accepted) for reply in replies] == [
        (reply.token_ids, reply.accepted) for reply in whole
    ]


def watch(target: Target, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Notes cycles with how many rows are busy, and forwards outside of cycles with how many tokens they read."""
    events: list[tuple[str, int]] = []
    cycle_call, forward, inside = DecodeCycle.__call__, target.forward, []

    def watched_cycle(self: DecodeCycle, batch: Batch, *rest: Any) -> CycleReport:
        events.append(("cycle", sum(request is not None for request in batch.requests)))
        inside.append(True)
        report = cycle_call(self, batch, *rest)
        inside.pop()
        return report

    def watched_forward(input_ids: Tensor, **named: Any) -> Any:
        if not inside:
            events.append(("read", input_ids.numel()))
        return forward(input_ids, **named)

    monkeypatch.setattr(DecodeCycle, "__call__", watched_cycle)
    monkeypatch.setattr(target, "forward", watched_forward)
    return events


def test_no_more_than_a_chunk_is_read_between_two_cycles_of_other_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    target = random_target()
    events = watch(target, monkeypatch)
    budgets = GenerationSettings(max_new_tokens=30)
    prompts = [[BOS, 5], [BOS, 6, 7], *([BOS, *range(5, 40)] for _ in range(2)), *([BOS, 9] for _ in range(6))]

    def ends(index: int, reply: list[int]) -> bool:
        return index == 0 and len(reply) == 3

    replies = Engine(target, prefill_chunk=CHUNK).generate(prompts, budgets, num_rows=2, until=ends)
    assert len(replies[0].token_ids) == 3
    cycles = [place for place, (what, _) in enumerate(events) if what == "cycle"]
    # The prompt of 36 tokens takes nine chunks. The other row decodes eight tokens meanwhile.
    entering = [events[before + 1 : after] for before, after in pairwise(cycles[1:11])]
    assert entering == 9 * [[("read", CHUNK)]]
    assert [events[place] for place in cycles[2:10]] == 8 * [("cycle", 1)]
    assert replies[2].cycles_before == 2 + 8


def test_short_prompts_are_read_together_and_none_waits_for_more_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    target = random_target()
    events = watch(target, monkeypatch)
    prompts = [[BOS, 5]] + 3 * [[BOS, 6]] + 3 * [[BOS, 9]]
    lengths = [30, 4, 4, 4, 4, 4, 4]
    engine = Engine(target, prefill_chunk=CHUNK)
    engine.generate(
        prompts, GenerationSettings(30), num_rows=4, until=lambda index, reply: len(reply) == lengths[index]
    )
    reads = [count for what, count in events if what == "read"]
    assert reads[0] == 8  # the first rows, which keep nobody waiting
    assert reads[1:] == [4, 2]
    busy = [count for what, count in events if what == "cycle"]
    assert busy[:8] == [4, 4, 4, 3, 4, 4, 2, 1]


@pytest.mark.parametrize("runner", [None, same_shapes], ids=["shapes follow rows", "fixed shapes"])
def test_a_row_that_ran_past_its_budget_may_rest_while_others_decode(target: Target, runner: Any) -> None:
    """The draft LM is the target itself, so a row ends in the middle of a long draft. It stays idle while a prompt is read in chunks."""
    drafter = LMDrafter(random_target()).eval()
    request = GenerationSettings(max_new_tokens=9)
    prompts = [[BOS, *range(5, 30)], [BOS, 7], [BOS, 9], [BOS, *range(4, 29)]]
    engine = Engine(target, drafter, DraftLimits(1, 6), prefill_chunk=2, runner=runner)
    replies = engine.generate(prompts, request, num_rows=2, until=lambda index, reply: index == 1 and len(reply) == 2)
    for prompt, reply in zip(prompts, replies, strict=True):
        expected = Engine(target).generate([prompt], request)[0].token_ids
        assert reply.token_ids == expected[: len(reply.token_ids)]


def test_the_share_of_busy_rows_counts_rows_that_rest(target: Target) -> None:
    request = GenerationSettings(max_new_tokens=9)
    ends = [9, 5, 3, 3]
    engine = Engine(target)
    replies = engine.generate(PROMPTS[:4], request, num_rows=2, until=lambda index, reply: len(reply) == ends[index])
    # Cycles of each: 8, 4, 2, 2; the last two take the second's row, so both rows are busy for 8 cycles.
    assert [reply.cycles_before for reply in replies] == [0, 0, 4, 6]
    assert busy_share([replies], 2) == 1.0
    together = engine.generate(PROMPTS[:4], request, until=lambda index, reply: len(reply) == ends[index])
    assert busy_share([together], 4) == pytest.approx((8 + 4 + 2 + 2) / 32)
    assert busy_share([together, together], 4) == busy_share([together], 4)
    assert busy_share([], 4) == 1.0


def test_chunks_of_states_go_as_they_are_joined() -> None:
    chunks = [{"low": torch.ones(1, 2, 3), "high": torch.zeros(1, 2, 3)} for _ in range(2)]
    whole = joined(chunks)
    assert {name: tuple(states.shape) for name, states in whole.items()} == {"low": (1, 4, 3), "high": (1, 4, 3)}
    assert chunks == [{}, {}], "a long prompt is not in memory twice"

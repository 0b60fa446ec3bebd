"""The clock of the stages: how much is decoded for it, and what it keeps."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from draftsmith.decode import Engine, GenerationSettings, ledger
from draftsmith.evaluate.roofline.roofline import cycle_load
from draftsmith.evaluate.roofline.stage_clock import LEAST_CYCLES, StageTimes, clock_stages
from draftsmith.models.target.target import Target

PROMPTS = [[10 + number, 9, 30] for number in range(4)]
SETTINGS = GenerationSettings(max_new_tokens=24)


@pytest.fixture
def model(target: Path) -> Target:
    return Target.load(str(target))


@pytest.fixture(autouse=True)
def ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every phase of the ledger takes one second."""
    clock = itertools.count()
    monkeypatch.setattr(ledger, "time", SimpleNamespace(perf_counter=lambda: float(next(clock))))


def seconds(step: float) -> Iterator[float]:
    return itertools.count(0.0, step)


def clocked(model: Target, most_seconds: float, step: float, batch_size: int = 1, **changes: object) -> StageTimes:
    """With a clock that shows `step` more whenever it is looked at."""
    time = seconds(step)
    engine, lengths = Engine(model), [24] * len(PROMPTS)
    named: dict = {"reply_lengths": lengths, "now": lambda: next(time)} | changes
    return clock_stages(engine, PROMPTS, SETTINGS, batch_size, most_seconds, **named)


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_with_time_left_every_prompt_is_decoded_to_its_end(model: Target, batch_size: int) -> None:
    times = clocked(model, 1e9, 1.0, batch_size)
    replies = Engine(model).generate(PROMPTS, SETTINGS)
    num_batches = -(-len(PROMPTS) // batch_size)
    assert (times.replies, times.cycles) == (4, 23 * num_batches)
    assert times.load == cycle_load([3] * 4, [reply.accepted for reply in replies], batch_size)
    assert times.seconds["prefill"] == num_batches
    assert times.seconds["verify"] == times.cycles


def test_replies_are_cut_when_the_time_is_over_and_no_prompt_is_begun_behind_it(model: Target) -> None:
    times = clocked(model, 30.0, 1.0)
    assert times.replies == 2
    assert 24 < times.cycles < 2 * 23


def test_the_slowest_target_is_clocked_for_a_few_cycles_only(model: Target) -> None:
    times = clocked(model, 5.0, 1e6)
    assert (times.replies, times.cycles) == (1, LEAST_CYCLES)


def test_a_reply_behind_too_few_cycles_is_not_cut_at_its_first_token(model: Target) -> None:
    """The first reply ends by itself after one cycle too few; the prefill of the second one is no cycle."""
    time = seconds(1e6)
    settings = GenerationSettings(max_new_tokens=LEAST_CYCLES)
    lengths = [LEAST_CYCLES] * len(PROMPTS)
    times = clock_stages(Engine(model), PROMPTS, settings, 1, 5.0, lengths, now=lambda: next(time))
    assert (times.replies, times.cycles) == (2, LEAST_CYCLES)


def test_rows_that_decode_together_are_cut_together(model: Target) -> None:
    times = clocked(model, 5.0, 1e6, batch_size=4)
    assert (times.replies, times.cycles, times.num_rows) == (4, LEAST_CYCLES, 4.0)


def test_the_prefill_of_a_reply_that_is_cut_counts_in_proportion(model: Target) -> None:
    times = clocked(model, 5.0, 1e6)
    assert times.seconds["prefill"] == pytest.approx((1 + LEAST_CYCLES) / 24)


def test_what_warms_up_is_not_in_the_times(model: Target) -> None:
    assert clocked(model, 1e9, 1.0, warm_up=True) == clocked(model, 1e9, 1.0)


def test_a_clock_leaves_the_engine_without_one(model: Target) -> None:
    engine = Engine(model)
    clock_stages(engine, PROMPTS[:1], SETTINGS, 1, 1e9, [24])
    assert engine.ledger is None

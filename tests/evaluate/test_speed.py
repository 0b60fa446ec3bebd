from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from draftsmith.evaluate.records import Sample, Timed
from draftsmith.evaluate.speed import (
    is_suspicious,
    num_calls,
    race,
    speedup,
    speedup_interval,
    speedup_median,
    track,
)
from draftsmith.evaluate.strata.decoded import Decoded

SAMPLES = [Sample(str(number), "all", (1, 2)) for number in range(5)]


@dataclass
class World:
    """A clock that only contenders move, and a log of who decoded what."""

    now: float = 0.0
    log: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)


@dataclass
class Fake:
    name: str
    world: World
    seconds: float
    tokens: int = 10

    def decode(self, samples: Sequence[Sample], numbers: Sequence[int]) -> tuple[Decoded, ...]:
        self.world.now += self.seconds
        self.world.log.append((self.name, tuple(numbers)))
        return tuple(Decoded(tuple(range(self.tokens)), (0,) * (self.tokens - 1)) for _ in samples)


def run(world: World, *contenders: Fake, **options) -> dict[str, list[Timed]]:
    return race(contenders, SAMPLES, clock=lambda: world.now, **options)


def test_contenders_alternate_prompt_by_prompt_and_the_order_rotates() -> None:
    world = World()
    run(world, Fake("a", world, 1), Fake("b", world, 1), Fake("c", world, 1))
    timed = world.log[3:]
    assert [name for name, _ in timed] == list("abcbcacababcbca")
    assert [numbers[0] for _, numbers in timed] == [n for n in range(5) for _ in range(3)]


def test_warm_up_is_run_by_everyone_and_not_timed() -> None:
    world = World()
    runs = run(world, Fake("a", world, 1), Fake("b", world, 2))
    assert [name for name, _ in world.log[:2]] == ["a", "b"]
    assert len(runs["a"]) == len(runs["b"]) == 5
    assert sum(one.seconds for one in runs["b"]) == 10


def test_batches_are_consecutive_and_the_last_may_be_short() -> None:
    world = World()
    runs = run(world, Fake("a", world, 1), batch_size=2)
    assert [one.samples for one in runs["a"]] == [(0, 1), (2, 3), (4,)]
    assert [one.batch for one in runs["a"]] == [0, 1, 2]


def test_the_warm_up_can_be_shorter_than_a_batch() -> None:
    world = World()
    run(world, Fake("a", world, 1), batch_size=4, warm_up=2)
    assert world.log == [("a", (0, 1)), ("a", (0, 1, 2, 3)), ("a", (4,))]


def test_a_contender_can_take_part_in_the_first_batches_only() -> None:
    world = World()
    told: list[int] = []
    runs = run(
        world,
        Fake("a", world, 1),
        Fake("b", world, 1),
        first_only={"b": 2},
        repeats=2,
        advance=lambda n: told.append(n),
    )
    assert [(one.batch, one.repeat) for one in runs["b"]] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert sum(told) == num_calls(["a", "b"], 5, 2, {"b": 2}) == 14


def timed(batch: int, seconds: float, tokens: int, repeat: int = 0) -> Timed:
    return Timed((batch,), batch, repeat, seconds, (Decoded(tuple(range(tokens)), ()),))


def test_seconds_are_the_median_over_repeats() -> None:
    found = track([timed(0, 1.0, 10, 0), timed(0, 9.0, 10, 1), timed(0, 2.0, 10, 2)])
    assert found.seconds == {0: 2.0}
    assert found.tokens == {0: 10}


def test_repeats_with_other_token_counts_are_compared_per_token() -> None:
    assert track([timed(0, 1.0, 10, 0), timed(0, 4.0, 20, 1), timed(0, 3.0, 10, 2)]).seconds[0] == pytest.approx(2.0)


def test_speedup_is_pooled_and_its_median_is_not() -> None:
    base = track([timed(0, 10.0, 100), timed(1, 1.0, 10), timed(2, 1.0, 10)])
    fast = track([timed(0, 2.0, 100), timed(1, 1.0, 10), timed(2, 0.5, 10)])
    assert speedup(fast, base) == pytest.approx(12 / 3.5)
    assert speedup_median(fast, base) == pytest.approx(2.0)


def test_speedup_compares_only_what_both_decoded() -> None:
    base = track([timed(0, 10.0, 100), timed(1, 1.0, 10)])
    assert speedup(track([timed(1, 0.5, 10)]), base) == pytest.approx(2.0)


def test_speedup_of_shorter_replies_is_per_token() -> None:
    assert speedup(track([timed(0, 1.0, 50)]), track([timed(0, 2.0, 100)])) == pytest.approx(1.0)


def test_speedup_interval_holds_the_pooled_value_and_closes_on_equal_prompts() -> None:
    base = track([timed(n, 2.0, 10) for n in range(30)])
    assert speedup_interval(track([timed(n, 1.0, 10) for n in range(30)]), base) == (2.0, 2.0)
    mixed = track([timed(n, 0.5 + n / 30, 10) for n in range(30)])
    low, high = speedup_interval(mixed, base)
    assert low < speedup(mixed, base) < high


def test_a_speedup_beyond_its_tokens_per_step_is_suspicious() -> None:
    assert is_suspicious(3.01, 3.0)
    assert not is_suspicious(3.0, 3.0)
    assert not is_suspicious(1.0, 1.0)
    assert not is_suspicious(9.0, None)

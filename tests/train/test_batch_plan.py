"""Batches: nothing lost, nothing twice, equal shares, and the same data for any number of ranks."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from draftsmith.train.batch_plan import EpochSampler, count_batches, plan_epoch

LENGTHS = st.lists(st.integers(1, 50), min_size=4, max_size=60)


def test_equal_cuts_of_a_small_epoch() -> None:
    assert plan_epoch([3, 3, 2, 4], 6, seed=0, epoch=0, shuffle=False) == [[0, 1], [2, 3]]


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(1, 200), st.integers(0, 5), st.sampled_from([1, 2, 4]))
def test_every_sample_is_in_exactly_one_batch_and_no_batch_is_empty(
    lengths: list[int], tokens: int, epoch: int, world_size: int
) -> None:
    plan = plan_epoch(lengths, tokens, seed=3, epoch=epoch, world_size=world_size)
    assert sorted(index for batch in plan for index in batch) == list(range(len(lengths)))
    assert all(plan)
    assert len(plan) == count_batches(lengths, tokens, world_size)
    assert len(plan) % world_size == 0


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=16, max_size=60), st.sampled_from([2, 4]))
def test_the_batches_of_all_ranks_together_are_those_of_one_process(lengths: list[int], world_size: int) -> None:
    tokens = -(-sum(lengths) // (3 * world_size))
    split = plan_epoch(lengths, tokens, seed=0, epoch=1, world_size=world_size)
    joint = plan_epoch(lengths, tokens * world_size, seed=0, epoch=1)
    rounds = [split[start : start + world_size] for start in range(0, len(split), world_size)]
    together = [[index for batch in batches for index in batch] for batches in rounds]
    if max(lengths) <= tokens:
        assert together == joint


def test_ranks_share_an_epoch_without_overlap() -> None:
    lengths = list(range(1, 30))
    ranks = [EpochSampler(lengths, 40, seed=0, shuffle=True, rank=rank, world_size=3, epoch=2) for rank in range(3)]
    seen = [index for sampler in ranks for batch in sampler for index in batch]
    assert sorted(seen) == list(range(29))
    assert len({len(list(sampler)) for sampler in ranks}) == 1


def test_a_sampler_goes_on_in_the_middle_of_an_epoch_and_starts_the_next_one_whole() -> None:
    arguments = {"seed": 0, "shuffle": True, "rank": 0, "world_size": 1}
    whole = EpochSampler([5] * 20, 10, **arguments)  # type: ignore[arg-type]
    resumed = EpochSampler([5] * 20, 10, epoch=0, start=4, **arguments)  # type: ignore[arg-type]
    assert list(resumed) == list(whole)[4:]
    resumed.set_epoch(0)
    assert list(resumed) == list(whole)[4:]
    resumed.set_epoch(1)
    whole.set_epoch(1)
    assert list(resumed) == list(whole)
    assert len(list(whole)) == len(resumed)


def test_epochs_differ_in_order_and_a_seed_repeats_them() -> None:
    first, again = (plan_epoch([4] * 30, 16, seed=1, epoch=0) for _ in range(2))
    assert first == again
    assert first != plan_epoch([4] * 30, 16, seed=1, epoch=1)
    assert first != plan_epoch([4] * 30, 16, seed=2, epoch=0)


@pytest.mark.parametrize(
    ("lengths", "tokens", "world_size", "rule"), [([3], 8, 2, "processes"), ([3], 0, 1, "at least 1")]
)
def test_impossible_plans_are_refused(lengths: list[int], tokens: int, world_size: int, rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        plan_epoch(lengths, tokens, seed=0, epoch=0, world_size=world_size)

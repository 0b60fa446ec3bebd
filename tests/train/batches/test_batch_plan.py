"""Batches: nothing lost, nothing twice, equal shares, and the same data for any number of ranks."""

import itertools
from bisect import bisect_left
from collections.abc import Iterable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from draftsmith.train.batches.batch_plan import count_batches, plan_epoch, steps_differ
from draftsmith.train.batches.epoch_order import Buckets, Windows
from draftsmith.train.batches.epoch_sampler import EpochSampler, needed_shards
from draftsmith.train.batches.shares import deal_by_length, deal_out

LENGTHS = st.lists(st.integers(1, 50), min_size=4, max_size=60)


def test_equal_cuts_of_a_small_epoch() -> None:
    assert list(plan_epoch([3, 3, 2, 4], 6, seed=0, epoch=0, shuffle=False)) == [[0, 1], [2, 3]]


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
    split = list(plan_epoch(lengths, tokens, seed=0, epoch=1, world_size=world_size))
    joint = list(plan_epoch(lengths, tokens * world_size, seed=0, epoch=1))
    rounds = [split[start : start + world_size] for start in range(0, len(split), world_size)]
    together = [sorted(index for batch in batches for index in batch) for batches in rounds]
    if max(lengths) <= tokens:
        assert together == [sorted(batch) for batch in joint]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 2000), min_size=1, max_size=60), st.integers(1, 8))
def test_a_joint_batch_is_dealt_out_in_nearly_equal_parts(lengths: list[int], num_ranks: int) -> None:
    rank_of = deal_out(np.array(lengths), num_ranks)
    parts = [
        sum(length for length, rank in zip(lengths, rank_of, strict=True) if rank == own) for own in range(num_ranks)
    ]
    assert sum(parts) == sum(lengths)
    assert max(parts) - min(parts) <= max(lengths)
    assert all(parts) or len(lengths) < num_ranks
    if num_ranks == 1:
        assert parts == [sum(lengths)]


def test_ranks_wait_less_for_one_another_than_if_a_joint_batch_were_cut_in_order() -> None:
    lengths = np.random.default_rng(0).integers(20, 300, 4000)
    plan = plan_epoch(lengths, 1024, seed=0, epoch=0, world_size=4)

    def waiting(parts: list[list[int]]) -> float:
        """Share of all ranks' time, were time as tokens."""
        shares = lengths_of(parts).reshape(-1, 4)
        return 1.0 - shares.mean() / shares.max(axis=1).mean()

    def lengths_of(parts: list[list[int]]) -> np.ndarray:
        return np.array([lengths[part].sum() for part in parts])

    in_order = []
    for start, stop in plan.bounds:
        ends = np.cumsum(lengths[plan.order[start:stop]])
        cuts = [int(np.abs(ends - ends[-1] * rank / 4).argmin()) + 1 for rank in (1, 2, 3)]
        in_order += [part.tolist() for part in np.split(plan.order[start:stop], cuts)]
    assert waiting(list(plan)) < 0.03 < 0.07 < waiting(in_order)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 8), st.data())
def test_with_buckets_a_rank_gets_neighbours_in_length(num_ranks: int, data: st.DataObject) -> None:
    lengths = np.array(data.draw(st.lists(st.integers(1, 2000), min_size=num_ranks, max_size=60)))
    rank_of = deal_by_length(lengths, num_ranks)
    parts = [lengths[rank_of == rank] for rank in range(num_ranks)]
    assert all(map(len, parts))
    for shorter, longer in itertools.pairwise(parts):
        assert shorter.max() <= longer.min()


def test_buckets_keep_their_padding_low_with_several_ranks() -> None:
    lengths = np.random.default_rng(0).integers(20, 500, 8000)
    plan = plan_epoch(lengths, 4096, seed=0, epoch=0, world_size=8, buckets=Buckets(64))

    def padded(parts: Iterable[np.ndarray]) -> int:
        """Tokens of batches that are padded to their longest sample."""
        return sum(len(part) * int(plan.lengths[part].max()) for part in parts)

    dealt_out = [
        joint[deal_out(plan.lengths[joint], 8) == rank]
        for joint in (plan.order[start:stop] for start, stop in plan.bounds)
        for rank in range(8)
    ]
    own = padded(np.array(part) for part in plan)
    assert own / lengths.sum() < 1.15 < padded(dealt_out) / lengths.sum()


def test_the_longest_sample_goes_round_the_ranks() -> None:
    lengths = [1000] + [10] * 30
    plan = plan_epoch(lengths * 8, 500, seed=0, epoch=0, world_size=4)
    ranks = [number % 4 for number, part in enumerate(plan) if any(index % 31 == 0 for index in part)]
    assert len(set(ranks)) > 1


def test_ranks_of_a_node_begin_at_different_shards_of_the_window_that_is_read() -> None:
    plan = plan_epoch([4] * 60, 10, seed=0, epoch=0, world_size=2, windows=Windows(np.repeat(np.arange(12), 5), 4))
    first, second, third = (set(map(int, window)) for window in plan.windows)
    for rank in range(9):
        needed = needed_shards(plan, 1, rank)
        assert [set(needed[:4]), set(needed[4:8]), set(needed[8:])] == [second, third, first]
    assert len({needed_shards(plan, 1, rank)[0] for rank in range(4)}) == 4


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
    first, again = (list(plan_epoch([4] * 30, 16, seed=1, epoch=0)) for _ in range(2))
    assert first == again
    assert first != list(plan_epoch([4] * 30, 16, seed=1, epoch=1))
    assert first != list(plan_epoch([4] * 30, 16, seed=2, epoch=0))


@pytest.mark.parametrize(
    ("lengths", "tokens", "world_size", "rule"), [([3], 8, 2, "processes"), ([3], 0, 1, "at least 1")]
)
def test_impossible_plans_are_refused(lengths: list[int], tokens: int, world_size: int, rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        plan_epoch(lengths, tokens, seed=0, epoch=0, world_size=world_size)


def plain_cuts(lengths: list[int], order: list[int], tokens: int) -> list[list[int]]:
    """One process's batches sample by sample: the plain twin of the vectorised cut."""
    num_batches = min(max(1, round(Fraction(sum(lengths), tokens))), len(lengths))
    ends = list(itertools.accumulate(lengths[index] for index in order))
    batches, start = [], 0
    for number in range(num_batches):
        wanted = Fraction((number + 1) * ends[-1], num_batches)
        stop = bisect_left(ends, wanted)
        if stop < len(ends) and (stop == 0 or ends[stop] - wanted <= wanted - ends[stop - 1]):
            stop += 1
        stop = min(max(stop, start + 1), len(order) - (num_batches - 1 - number))
        batches.append(order[start:stop])
        start = stop
    return batches


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=80), st.integers(1, 200))
def test_the_cut_is_the_one_made_sample_by_sample(lengths: list[int], tokens: int) -> None:
    plan = plan_epoch(lengths, tokens, seed=5, epoch=0)
    assert list(plan) == plain_cuts(lengths, plan.order.tolist(), tokens)


@st.composite
def settings_of_an_epoch(draw: st.DrawFn) -> dict[str, Any]:
    """Lengths with any layout: in shards or not, in buckets or not."""
    lengths = draw(st.lists(st.integers(1, 60), min_size=8, max_size=120))
    counts = draw(st.lists(st.integers(1, 9), min_size=len(lengths), max_size=len(lengths)))
    shards = np.repeat(np.arange(len(counts)), counts)[: len(lengths)]
    windows = Windows(shards, draw(st.integers(1, 4)))
    buckets = Buckets(draw(st.sampled_from([1, 4, 16])), draw(st.integers(1, 4)))
    return {
        "lengths": lengths,
        "shuffle": draw(st.booleans()),
        "windows": draw(st.sampled_from([None, windows])),
        "buckets": draw(st.sampled_from([None, buckets])),
        "seed": draw(st.integers(0, 3)),
        "epoch": draw(st.integers(0, 3)),
    }


@settings(max_examples=200, deadline=None)
@given(settings_of_an_epoch(), st.integers(1, 400), st.sampled_from([1, 2, 3, 4]))
def test_whatever_the_layout_an_epoch_has_every_sample_once_and_ranks_have_equal_shares(
    layout: dict[str, Any], tokens: int, world_size: int
) -> None:
    samplers = [
        EpochSampler(tokens_per_batch=tokens, rank=rank, world_size=world_size, **layout) for rank in range(world_size)
    ]
    shares = [list(sampler) for sampler in samplers]
    assert sorted(index for share in shares for batch in share for index in batch) == list(
        range(len(layout["lengths"]))
    )
    assert {len(share) for share in shares} == {len(samplers[0])}
    assert all(batch for share in shares for batch in share)
    again = [
        EpochSampler(tokens_per_batch=tokens, rank=rank, world_size=world_size, **layout) for rank in range(world_size)
    ]
    assert [list(sampler) for sampler in again] == shares


@settings(max_examples=100, deadline=None)
@given(settings_of_an_epoch(), st.integers(1, 400), st.data())
def test_whatever_the_layout_a_run_goes_on_at_any_batch(
    layout: dict[str, Any], tokens: int, data: st.DataObject
) -> None:
    whole = list(EpochSampler(tokens_per_batch=tokens, rank=1, world_size=2, **layout))
    start = data.draw(st.integers(0, len(whole)))
    assert list(EpochSampler(tokens_per_batch=tokens, rank=1, world_size=2, start=start, **layout)) == whole[start:]


@settings(max_examples=200, deadline=None)
@given(settings_of_an_epoch(), st.integers(1, 100))
def test_steps_hold_the_same_samples_for_any_number_of_ranks_as_long_as_these_suffice(
    layout: dict[str, Any], tokens: int
) -> None:
    """`steps_differ` says where they do not: nowhere, while every step of one process has four samples."""
    plans = {
        ranks: plan_epoch(tokens_per_batch=Fraction(4 * tokens, ranks), world_size=ranks, **layout)
        for ranks in (1, 2, 4)
    }
    enough = all(len(batch) >= 4 for batch in plans[1])
    for ranks in (2, 4):
        batches = list(plans[ranks])
        steps = [sorted(itertools.chain(*batches[start : start + ranks])) for start in range(0, len(batches), ranks)]
        agree = steps == [sorted(batch) for batch in plans[1]]
        assert agree or not enough
        assert agree == (steps_differ(plans[1], plans[ranks]) is None)


@settings(max_examples=200, deadline=None)
@given(settings_of_an_epoch(), st.integers(1, 400), st.sampled_from([1, 2, 4]))
def test_a_batch_needs_two_windows_at_most_and_they_are_announced_before(
    layout: dict[str, Any], tokens: int, world_size: int
) -> None:
    layout["windows"] = layout["windows"] or Windows(np.arange(len(layout["lengths"])) // 3, 2)
    shard_of = layout["windows"].shards
    announced: list[list[int]] = []
    sampler = EpochSampler(tokens_per_batch=tokens, rank=0, world_size=world_size, need=announced.append, **layout)
    window_of = {int(shard): number for number, window in enumerate(sampler.plan().windows) for shard in window}
    assert sorted(window_of) == sorted(set(shard_of.tolist()))
    assert all(len(window) >= min(layout["windows"].size, len(window_of)) for window in sampler.plan().windows[:-1])
    before = 0
    for batch in sampler:
        touched = sorted({window_of[int(shard_of[index])] for index in batch})
        assert touched[-1] - touched[0] <= 1
        assert touched[-1] >= before
        before = touched[-1]
        assert {int(shard_of[index]) for index in batch} <= set(announced[-1])
    assert announced[-1] == []


def test_windows_shuffle_shards_and_samples_and_grow_until_they_hold_a_step() -> None:
    windows = Windows(np.repeat(np.arange(12), 5), 2)
    plan = plan_epoch([4] * 60, 10, seed=0, epoch=0, windows=windows)
    assert [len(window) for window in plan.windows] == [2] * 6
    assert np.concatenate(plan.windows).tolist() != list(range(12))
    assert plan.order[:10].tolist() != sorted(plan.order[:10].tolist())
    large = plan_epoch([4] * 60, 60, seed=0, epoch=0, windows=windows)
    assert {len(window) for window in large.windows[:-1]} == {4}  # 16 samples of 4 tokens: 3 shards hold 15
    still = plan_epoch([4] * 60, 10, seed=0, epoch=0, windows=windows, shuffle=False)
    assert still.order.tolist() == list(range(60))


def test_buckets_bring_similar_lengths_together() -> None:
    generator = np.random.default_rng(0)
    lengths = generator.integers(1, 500, 4000).tolist()

    def waste(buckets: Buckets | None) -> float:
        plan = plan_epoch(lengths, 4000, seed=0, epoch=0, buckets=buckets)
        padded = sum(len(batch) * max(lengths[index] for index in batch) for batch in plan)
        return padded / sum(lengths) - 1.0

    assert waste(Buckets(1)) < 0.15 < 0.5 < waste(None)
    first = plan_epoch(lengths, 4000, seed=0, epoch=0, buckets=Buckets(1))
    longest = [max(lengths[index] for index in batch) for batch in first]
    assert longest[:16] != sorted(longest[:16])
    assert longest[:16] != sorted(longest[:16], reverse=True)


def test_buckets_count_padding_into_a_batch() -> None:
    plan = plan_epoch([5] * 16, 32, seed=0, epoch=0, buckets=Buckets(8))
    assert [len(batch) for batch in plan] == [4] * 4


@pytest.mark.parametrize(
    ("layout", "rule"),
    [
        ({"windows": Windows(np.zeros(4, dtype=np.int64), 0)}, "a window needs at least 1 shard"),
        ({"buckets": Buckets(0)}, "both must be at least 1"),
        ({"buckets": Buckets(8, 0)}, "both must be at least 1"),
    ],
)
def test_layouts_of_nothing_are_refused(layout: dict[str, Any], rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        plan_epoch([3] * 4, 6, seed=0, epoch=0, **layout)

import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from draftsmith.data.cache.extract import CachedSample, HiddenStateCache
from draftsmith.data.shards.manifest import CacheIdentity, Manifest
from draftsmith.data.shards.packing import pack, packed_batches, plan_batches
from draftsmith.data.shards.shards import ShardContent, write_shard


@given(st.lists(st.integers(1, 40), max_size=60), st.integers(1, 64), st.randoms())
def test_no_sample_is_split_or_lost_and_no_batch_is_over_budget(lengths: list[int], budget: int, rng: object) -> None:
    order = list(range(len(lengths)))
    rng.shuffle(order)  # type: ignore[attr-defined]
    batches = plan_batches(lengths, budget, order)
    assert [index for batch in batches for index in batch] == order
    assert all(len(batch) == 1 or sum(lengths[i] for i in batch) <= budget for batch in batches)
    assert batches == plan_batches(lengths, budget, order)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=60), st.integers(40, 64))
def test_consecutive_batches_do_not_fit_into_one(lengths: list[int], budget: int) -> None:
    sums = [sum(lengths[i] for i in batch) for batch in plan_batches(lengths, budget)]
    batches = plan_batches(lengths, budget)
    assert all(sums[n] + lengths[batches[n + 1][0]] > budget for n in range(len(batches) - 1))


def sample(name: str, length: int, greedy: bool = False) -> CachedSample:
    ids = torch.arange(length) + 10 * len(name)
    return CachedSample(
        id=name,
        input_ids=ids,
        loss_mask=ids % 2 == 0,
        hidden={"last.pre_norm": ids[:, None].to(torch.bfloat16).expand(-1, 4)},
        greedy_ids=torch.stack([ids, ids + 1], dim=1) if greedy else None,
    )


def test_packed_samples_lie_end_to_end() -> None:
    batch = pack([sample("a", 3, greedy=True), sample("bb", 2, greedy=True)])
    assert batch.input_ids.tolist() == [10, 11, 12, 20, 21]
    assert batch.loss_mask.tolist() == [True, False, True, True, False]
    assert batch.document_ids.tolist() == [0, 0, 0, 1, 1]
    assert batch.positions.tolist() == [0, 1, 2, 0, 1]
    assert batch.hidden["last.pre_norm"][:, 0].tolist() == [10, 11, 12, 20, 21]
    assert batch.greedy_ids is not None
    assert batch.greedy_ids.tolist() == [[10, 11], [11, 12], [12, 13], [20, 21], [21, 22]]


def test_greedy_ids_are_left_out_unless_every_sample_has_them() -> None:
    assert pack([sample("a", 3, greedy=True), sample("b", 2)]).greedy_ids is None


def test_nothing_to_pack_and_a_budget_of_nothing_are_errors() -> None:
    with pytest.raises(ValueError, match="at least one sample"):
        pack([])
    with pytest.raises(ValueError, match="set at least 1"):
        plan_batches([1], 0)


def test_reading_and_packing_keep_far_ahead_of_training(tmp_path: Path) -> None:
    """Training takes about 5,000 tokens a second on two cores: reading must not be what it waits for."""
    identity = CacheIdentity(
        "t", None, "f", "k", "c", ("last.pre_norm",), 256, "bfloat16", "float32", "s", None, "m", 128, 0, 64.0, 1
    )
    count, length = 200, 100
    content = ShardContent(
        ids=[str(n) for n in range(count)],
        offsets=torch.arange(0, count * length + 1, length),
        input_ids=torch.zeros(count * length, dtype=torch.int32),
        loss_mask=torch.ones(count * length, dtype=torch.bool),
        hidden={"last.pre_norm": torch.zeros(count * length, 256, dtype=torch.bfloat16)},
        greedy_ids=None,
    )
    record = write_shard(tmp_path / "shard-00000.safetensors", content)
    Manifest(identity, count, count * length, count * length, 0, 0).with_shards([record]).save(tmp_path)
    started = time.perf_counter()
    cache = HiddenStateCache(tmp_path)
    tokens = sum(batch.input_ids.shape[0] for batch in packed_batches(cache, cache.sample_lengths, 4096))
    assert tokens == count * length
    assert tokens / (time.perf_counter() - started) > 10 * 5_000

"""The file of lengths: exact, the same bytes for the same lengths, and refused where it is damaged or another cache's."""

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from draftsmith.data.shards.lengths import LENGTHS_FILE, read_lengths, write_lengths
from draftsmith.data.shards.manifest import CacheIdentity, Manifest, ShardRecord

IDENTITY = CacheIdentity("t", None, "f", "k", "c", (), 4, "bfloat16", "float32", "s", None, "m", 99, 0, 1.0, 9)


def manifest_of(shards: list[list[int]]) -> Manifest:
    flat = [length for own in shards for length in own]
    records = [ShardRecord(f"shard-{n:05d}", "", 0, len(own), sum(own), 0) for n, own in enumerate(shards)]
    return Manifest(IDENTITY, len(flat), sum(flat), 0, 0, 0).with_shards(records)


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(1, 2**20), min_size=1, max_size=9), min_size=1, max_size=9))
def test_lengths_come_back_as_they_were_written(
    tmp_path_factory: pytest.TempPathFactory, shards: list[list[int]]
) -> None:
    folder = tmp_path_factory.mktemp("lengths")
    flat = [length for own in shards for length in own]
    payload = write_lengths(folder, flat).read_bytes()
    found = read_lengths(payload, manifest_of(shards), "x")
    assert found.tolist() == flat
    assert found.dtype == np.int32
    assert write_lengths(folder, np.array(flat)).read_bytes() == payload
    assert [path.name for path in folder.iterdir()] == [LENGTHS_FILE]


@pytest.mark.parametrize(
    "other", [[[3, 4], [5]], [[3, 5], [4, 1]], [[4, 4], [4]], [[3, 4], [5, 0, 1]], [[3, 5], [4], [1]]]
)
def test_lengths_of_another_cache_are_refused(tmp_path: Path, other: list[list[int]]) -> None:
    payload = write_lengths(tmp_path, [3, 4, 5, 1]).read_bytes()
    read_lengths(payload, manifest_of([[3, 4], [5, 1]]), "x")
    with pytest.raises(ValueError, match=r"x tells of 4 samples and 13 tokens, .* belongs to another cache"):
        read_lengths(payload, manifest_of(other), "x")


@pytest.mark.parametrize("damage", [lambda payload: payload[:-3], lambda payload: b"", lambda payload: b"\x00" * 40])
def test_damaged_lengths_are_refused(tmp_path: Path, damage: object) -> None:
    payload = write_lengths(tmp_path, [3, 4]).read_bytes()
    with pytest.raises(ValueError, match="x is damaged"):
        read_lengths(damage(payload), manifest_of([[3, 4]]), "x")  # type: ignore[operator]


def test_a_manifest_that_vouches_for_the_file_finds_a_change_that_the_sums_hide(tmp_path: Path) -> None:
    manifest = manifest_of([[3, 4]])
    payload = write_lengths(tmp_path, [3, 4]).read_bytes()
    vouched = replace(manifest, lengths_sha256=hashlib.sha256(payload).hexdigest())
    assert read_lengths(payload, vouched, "x").tolist() == [3, 4]
    swapped = write_lengths(tmp_path, [4, 3]).read_bytes()
    assert read_lengths(swapped, manifest, "x").tolist() == [4, 3]
    with pytest.raises(ValueError, match="x was altered"):
        read_lengths(swapped, vouched, "x")

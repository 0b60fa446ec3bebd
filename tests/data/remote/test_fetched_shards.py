"""The folder of fetched shards: what it holds, drops and refuses, full disks, and fetching ahead."""

import errno
import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from remote_caches import Flaky, fetched, hold, opened, same, wait_for, write_cache

from draftsmith.data.cache.reader import HiddenStateCache
from draftsmith.data.remote import node_folder as shard_folder
from draftsmith.data.remote.node_folder import ShardFolder
from draftsmith.data.remote.prefetch import Prefetcher
from draftsmith.data.remote.remote_shards import RemoteShards


def test_the_folder_drops_what_was_not_used_for_longest_and_never_what_is_held(tmp_path: Path) -> None:
    folder = ShardFolder(tmp_path / "node", limit=300, patience=0.3)
    contents = [bytes([number]) * 100 for number in range(5)]
    first = hold(folder, contents[0])
    for content in contents[1:3]:
        hold(folder, content).release()
        time.sleep(0.01)
    hold(folder, contents[1]).release()  # used again: 2 is now the oldest that nobody holds
    hold(folder, contents[3]).release()
    names = {path.read_bytes()[0] for path in (tmp_path / "node").glob("*.safetensors")}
    assert names == {0, 1, 3}
    others = [hold(folder, contents[number]) for number in (1, 3)]
    assert hold(folder, contents[4], patient=False) is None
    with pytest.raises(ValueError, match=r"is full: 0.00 of 0.00 GiB are in use .* raise shard_cache_gib"):
        hold(folder, contents[4])
    others[0].release()
    hold(folder, contents[4]).release()
    assert {path.read_bytes()[0] for path in (tmp_path / "node").glob("*.safetensors")} == {0, 3, 4}
    assert first.path.read_bytes() == contents[0]


def test_a_shard_larger_than_the_folder_may_be_is_told_at_once(tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(ValueError, match=r"one shard has .*; raise shard_cache_gib"):
        hold(ShardFolder(tmp_path / "node", limit=99), b"x" * 100)
    assert time.monotonic() - started < 10


def test_a_reader_holds_only_what_it_reads_now(tmp_path: Path, upload: Callable[..., str]) -> None:
    cache = opened(upload(write_cache(tmp_path / "cache")), tmp_path)
    paths = [tmp_path / "node" / f"{record.sha256}.safetensors" for record in cache.manifest.shards]
    for batch, shards in (([0, 3], {0, 1}), ([4, 12, 0], {0, 2, 4}), ([8], {3})):
        cache.read_next(np.array(batch))
        assert [cache[index].input_ids.shape[0] for index in batch] == cache.lengths[batch].tolist()
        held = {number for number, path in enumerate(paths) if path.exists() and not shard_folder._drop_if_free(path)}
        assert held == shards


def test_a_reader_lets_go_of_what_it_read_before_it_waits_for_others(
    tmp_path: Path, upload: Callable[..., str]
) -> None:
    folder = write_cache(tmp_path / "cache")
    largest = max(record.num_bytes for record in HiddenStateCache(folder).manifest.shards)
    cache = opened(upload(folder), tmp_path, shard_cache_gib=(2 * largest + 100) / 2**30)
    started = time.monotonic()
    assert same(HiddenStateCache(folder), cache)
    assert time.monotonic() - started < 30
    assert len(fetched(tmp_path)) <= 3


def test_a_fetched_file_that_was_cut_off_on_the_disk_is_fetched_again(tmp_path: Path) -> None:
    folder = ShardFolder(tmp_path / "node", limit=300)
    held = hold(folder, b"x" * 100)
    held.release()
    held.path.write_bytes(b"x" * 50)
    assert hold(folder, b"x" * 100).path.read_bytes() == b"x" * 100


def test_a_full_disk_is_told(tmp_path: Path) -> None:
    def fill(into: int) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(ValueError, match=r"disk of .*node is full; name another folder as shard_cache"):
        ShardFolder(tmp_path / "node", limit=300).hold("0" * 64, 10, fill)


@pytest.mark.parametrize("largest", [1, 7, 100])
def test_a_disk_that_takes_a_part_of_a_write_is_given_the_rest(
    tmp_path: Path, upload: Callable[..., str], monkeypatch: pytest.MonkeyPatch, largest: int
) -> None:
    folder, real = write_cache(tmp_path / "cache"), os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda handle, content, place: real(handle, content[:largest], place))
    assert same(HiddenStateCache(folder), opened(upload(folder), tmp_path))


@pytest.mark.parametrize("taken", [0, None])
def test_a_disk_that_fills_up_in_the_middle_of_a_write_leaves_no_shard(
    tmp_path: Path, upload: Callable[..., str], monkeypatch: pytest.MonkeyPatch, taken: int | None
) -> None:
    real = os.pwrite

    def fill_up(handle: int, content: bytes, place: int) -> int:
        if place == 0:
            return real(handle, content[:50], place)
        if taken is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        return taken

    monkeypatch.setattr(os, "pwrite", fill_up)
    cache = opened(upload(write_cache(tmp_path / "cache")), tmp_path)
    with pytest.raises(ValueError, match=r"disk of .*node is full; name another folder as shard_cache"):
        cache[0]
    assert list((tmp_path / "node").iterdir()) == []


def test_a_full_disk_is_told_before_anything_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int, start: int, num_bytes: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ValueError, match=r"disk of .*node is full"):
        ShardFolder(tmp_path / "node", limit=300).hold("0" * 64, 10, lambda into: pytest.fail("fetched"))
    assert list((tmp_path / "node").iterdir()) == []


def test_the_space_of_a_shard_is_its_own_while_it_is_fetched(tmp_path: Path) -> None:
    blocks = []

    def fill(into: int) -> None:
        blocks.append(os.fstat(into).st_blocks * 512)
        os.pwrite(into, b"x" * 10**6, 0)

    name = hashlib.sha256(b"x" * 10**6).hexdigest()
    held = ShardFolder(tmp_path / "node", limit=10**7).hold(name, 10**6, fill)
    assert held is not None
    held.release()
    assert blocks[0] >= 10**6


def test_a_file_system_that_cannot_reserve_space_is_used_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(handle: int, start: int, num_bytes: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", unknown)
    assert hold(ShardFolder(tmp_path / "node", limit=300), b"x" * 100).path.read_bytes() == b"x" * 100


def test_what_will_be_needed_is_fetched_ahead_and_kept(tmp_path: Path, upload: Callable[..., str]) -> None:
    url = upload(write_cache(tmp_path / "cache"))
    cache = opened(url, tmp_path)
    reader, other = object(), object()
    cache.need([3, 1], reader)
    wait_for(lambda: len(fetched(tmp_path)) == 2)
    cache.need([2], other)
    wait_for(lambda: len(fetched(tmp_path)) == 3)
    before = Flaky.reads.total()
    assert (cache[3].id, cache[4].id, cache[8].id) == ("s1-0", "s2-0", "s3-0")
    assert Flaky.reads.total() == before
    assert isinstance(cache.shards, RemoteShards)
    prefetcher = cache.shards._prefetcher
    assert prefetcher is not None
    wait_for(lambda: prefetcher[1].fetched == {1, 2, 3})
    cache.need([3], reader)
    wait_for(lambda: prefetcher[1].fetched == {2, 3})
    cache.close()
    assert prefetcher[1].fetched == set()


def test_what_cannot_be_fetched_ahead_is_told_to_who_reads_it(tmp_path: Path, upload: Callable[..., str]) -> None:
    cache = opened(upload(write_cache(tmp_path / "cache")), tmp_path)
    Flaky.failures["shard-00001.safetensors"] = 3
    cache.need([1, 2], object())
    wait_for(lambda: len(fetched(tmp_path)) == 1 and Flaky.failures["shard-00001.safetensors"] == 0)
    assert cache[3].id == "s1-0"
    cache.close()


def test_what_another_process_is_fetching_keeps_nobody_from_the_rest() -> None:
    got: list[int] = []

    def hold_some(number: int) -> Any:
        if number == 0 and len(got) < 5:
            return None
        got.append(number)
        return shard_folder.HeldFile(Path("x"), os.open(os.devnull, os.O_RDONLY))

    prefetcher = Prefetcher(hold_some, threads=1)
    prefetcher.want(range(6))
    wait_for(lambda: prefetcher.fetched == set(range(6)))
    assert got == [1, 2, 3, 4, 5, 0]
    prefetcher.close()


def test_threads_end_when_they_are_closed() -> None:
    prefetcher = Prefetcher(lambda number: None, threads=2)
    prefetcher.want([1, 2])
    threads = list(prefetcher._threads)
    prefetcher.close()
    for thread in threads:
        thread.join(timeout=10)
    assert not any(thread.is_alive() for thread in threads)

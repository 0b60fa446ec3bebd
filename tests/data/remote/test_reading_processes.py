"""Processes that share a folder of fetched shards, fork or are killed."""

import hashlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from remote_caches import LENGTHS, Server, fetched, hold, opened, same, wait_for, write_cache

from draftsmith.data.cache.reader import HiddenStateCache
from draftsmith.data.remote import node_folder as shard_folder
from draftsmith.data.remote import remote_folder as remote
from draftsmith.data.remote.node_folder import ShardFolder
from draftsmith.data.remote.remote_shards import RemoteShards


def test_a_process_forked_in_the_middle_of_a_fetch_keeps_nothing_locked(tmp_path: Path) -> None:
    """Validation's workers are forked while threads fetch for training, and live as long as it does."""
    context = multiprocessing.get_context("fork")
    may_end = context.Event()
    process = context.Process(target=may_end.wait, args=(30,))
    folder = ShardFolder(tmp_path / "node", limit=300)

    def fill(into: int) -> None:
        process.start()
        os.pwrite(into, b"x" * 100, 0)

    name = hashlib.sha256(b"x" * 100).hexdigest()
    try:
        fetched_now = folder.hold(name, 100, fill)
        assert fetched_now is not None
        fetched_now.release()
        again: list[Any] = []
        thread = threading.Thread(target=lambda: again.append(hold(folder, b"x" * 100)), daemon=True)
        thread.start()
        thread.join(timeout=10)
        assert process.is_alive()
        assert [held.path for held in again] == [fetched_now.path]
        again[0].release()
        assert shard_folder._drop_if_free(fetched_now.path)
    finally:
        may_end.set()
        process.join(timeout=20)
        process.kill()


def test_a_worker_forked_in_training_does_not_keep_what_was_fetched_ahead(
    tmp_path: Path, upload: Callable[..., str]
) -> None:
    cache = opened(upload(write_cache(tmp_path / "cache")), tmp_path)
    cache.need([0, 2, 3], cache)
    assert isinstance(cache.shards, RemoteShards)
    prefetcher = cache.shards._prefetcher
    assert prefetcher is not None
    wait_for(lambda: prefetcher[1].fetched == {0, 2, 3})
    context = multiprocessing.get_context("fork")
    has_read, may_end = context.Event(), context.Event()
    process = context.Process(target=read_another, args=(cache, has_read, may_end))
    process.start()
    try:
        assert has_read.wait(60)
        paths = [tmp_path / "node" / f"{cache.manifest.shards[number].sha256}.safetensors" for number in (0, 2, 3)]
        assert not any(shard_folder._drop_if_free(path) for path in paths)
        cache.need([2], cache)
        assert [shard_folder._drop_if_free(path) for path in paths] == [True, False, True]
        if Path("/proc").is_dir():  # a dropped file that a process has open still takes up the disk
            opened_there = [os.readlink(link) for link in Path(f"/proc/{process.pid}/fd").iterdir()]
            assert sum(str(tmp_path / "node") in name for name in opened_there) == 1
    finally:
        may_end.set()
        process.join(timeout=20)
        process.kill()
        cache.close()


def read_all(url: str, tmp_path: Path, results: Any) -> None:
    """In a process of its own."""
    cache = opened(url, tmp_path)
    results.put([sample.id for sample in cache])


def test_processes_share_a_folder_and_each_shard_is_fetched_once(tmp_path: Path, serve: Callable[[Path], str]) -> None:
    folder = write_cache(tmp_path / "cache")
    url = serve(folder)
    Server.pause = 0.05
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=read_all, args=(url, tmp_path, results)) for _ in range(3)]
    for process in processes:
        process.start()
    try:
        found = [results.get(timeout=60) for _ in processes]
    finally:
        for process in processes:
            process.join(timeout=20)
            process.kill()
    assert found == [[sample.id for sample in HiddenStateCache(folder)]] * 3
    assert all(Server.asked[f"shard-{number:05d}.safetensors"] == 1 for number in range(len(LENGTHS)))


def read_inherited(cache: HiddenStateCache, results: Any) -> None:
    """In a forked process, with its parent's cache."""
    cache.need([1], cache)
    results.put([sample.id for sample in cache])
    cache.close()


def test_a_forked_worker_reads_on_where_its_parent_has_read(tmp_path: Path, serve: Callable[[Path], str]) -> None:
    folder = write_cache(tmp_path / "cache")
    cache = opened(serve(folder), tmp_path)
    assert cache[0].id == "s0-0"
    cache.need([2], cache)
    wait_for(lambda: len(fetched(tmp_path)) == 2)
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=read_inherited, args=(cache, results)) for _ in range(2)]
    for process in processes:
        process.start()
    try:
        found = [results.get(timeout=60) for _ in processes]
    finally:
        for process in processes:
            process.join(timeout=20)
            process.kill()
    expected = [sample.id for sample in HiddenStateCache(folder)]
    assert found == [expected] * 2
    assert [sample.id for sample in cache] == expected
    cache.close()


def read_another(cache: HiddenStateCache, has_read: Any, may_end: Any) -> None:
    """In a forked process, which stays."""
    assert cache[3].id == "s1-0"
    has_read.set()
    may_end.wait(30)


def test_a_forked_worker_holds_none_of_its_parents_files(tmp_path: Path, upload: Callable[..., str]) -> None:
    cache = opened(upload(write_cache(tmp_path / "cache")), tmp_path)
    assert cache[0].id == "s0-0"
    [parents] = (tmp_path / "node").glob("*.safetensors")
    context = multiprocessing.get_context("fork")
    has_read, may_end = context.Event(), context.Event()
    process = context.Process(target=read_another, args=(cache, has_read, may_end))
    process.start()
    try:
        assert has_read.wait(60)
        assert not shard_folder._drop_if_free(parents)
        cache.close()
        assert shard_folder._drop_if_free(parents)
        assert len(fetched(tmp_path)) == 1
    finally:
        may_end.set()
        process.join(timeout=20)
        process.kill()


def read_one(url: str, tmp_path: Path) -> None:
    """In a process of its own, slowly."""
    opened(url, tmp_path)[0]


def test_a_process_killed_while_it_fetches_leaves_nothing_that_is_read(
    tmp_path: Path, serve: Callable[[Path], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "_PIECE", 100)
    folder = write_cache(tmp_path / "cache")
    url = serve(folder)
    Server.pause = 0.2
    process = multiprocessing.get_context("fork").Process(target=read_one, args=(url, tmp_path))
    process.start()
    try:
        wait_for(lambda: Server.asked["shard-00000.safetensors"] > 2)
    finally:
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join(timeout=20)
    assert fetched(tmp_path) == []
    assert list((tmp_path / "node").glob(".*.partial"))
    Server.pause = 0.0
    assert same(HiddenStateCache(folder), opened(url, tmp_path))
    assert not list((tmp_path / "node").glob(".*"))

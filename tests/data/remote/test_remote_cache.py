"""Caches behind a URL: the same samples, whatever the network does, in a folder that never grows past its limit."""

import errno
import hashlib
import http.server
import importlib.util
import multiprocessing
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import numpy as np
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from draftsmith.data.cache.reader import HiddenStateCache
from draftsmith.data.remote import node_folder as shard_folder
from draftsmith.data.remote import remote_folder as remote
from draftsmith.data.remote.node_folder import ShardFolder
from draftsmith.data.remote.prefetch import Prefetcher
from draftsmith.data.remote.remote_folder import Retry, location
from draftsmith.data.remote.remote_shards import RemoteShards
from draftsmith.data.shards.lengths import LENGTHS_FILE, write_lengths
from draftsmith.data.shards.manifest import MANIFEST_FILE, CacheIdentity, Manifest
from draftsmith.data.shards.shards import ShardContent, write_shard

LAYER = "last.pre_norm"
AT_ONCE = Retry(attempts=3, wait=0.0)
LENGTHS = [[3, 5, 2], [4], [6, 1, 7, 2], [5, 5], [8, 3, 4]]


def write_cache(folder: Path, lengths: list[list[int]] = LENGTHS, with_lengths: bool = True) -> Path:
    """A small cache of one shard a list."""
    identity = CacheIdentity(
        "t", None, "f", "k", "c", (LAYER,), 4, "bfloat16", "float32", "s", None, "m", 99, 0, 1.0, 9
    )
    flat = [length for own in lengths for length in own]
    labelled = sum((sum(own) + 1) // 2 for own in lengths)
    manifest = Manifest(identity, len(flat), sum(flat), labelled, 0, 0)
    for number, own in enumerate(lengths):
        ids = torch.arange(sum(own), dtype=torch.int32) + 100 * number
        content = ShardContent(
            ids=[f"s{number}-{place}" for place in range(len(own))],
            offsets=torch.tensor([0, *own]).cumsum(0),
            input_ids=ids,
            loss_mask=ids % 2 == 0,
            hidden={LAYER: ids[:, None].to(torch.bfloat16).expand(-1, 4).contiguous()},
            greedy_ids=None,
        )
        manifest = manifest.with_shard(write_shard(folder / f"shard-{number:05d}.safetensors", content))
    manifest.save(folder)
    if with_lengths:
        write_lengths(folder, flat)
    return folder


class Flaky(MemoryFileSystem):
    """Files in memory behind a network: counts what is read, and fails as told."""

    protocol = "flaky"
    store: dict[str, Any] = {}  # noqa: RUF012  (fsspec's own way)
    pseudo_dirs = [""]  # noqa: RUF012
    reads: ClassVar[Counter] = Counter()
    failures: ClassVar[Counter] = Counter()
    cuts: ClassVar[Counter] = Counter()
    pause = 0.0

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        """As in memory, but slower and less sure."""
        name = path.rsplit("/", 1)[-1]
        Flaky.reads[name] += 1
        time.sleep(Flaky.pause)
        if Flaky.failures[name] > 0:
            Flaky.failures[name] -= 1
            raise ConnectionResetError("the line went dead")
        content = super().cat_file(path, start=start, end=end, **kwargs)
        if Flaky.cuts[name] > 0:
            Flaky.cuts[name] -= 1
            return content[:-3]
        return content


fsspec.register_implementation("flaky", Flaky, clobber=True)


@pytest.fixture
def upload(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """upload(folder) -> its URL; nothing fails until a test says so."""

    def copy(folder: Path) -> str:
        url = f"flaky://bucket/{hashlib.sha256(str(folder).encode()).hexdigest()[:8]}"
        file_system, root = fsspec.core.url_to_fs(url)
        for file in folder.iterdir():
            file_system.pipe_file(f"{root}/{file.name}", file.read_bytes())
        return url

    for counter in (Flaky.reads, Flaky.failures, Flaky.cuts):
        counter.clear()
    Flaky.pause = 0.0
    yield copy
    Flaky.store.clear()
    Flaky.pause = 0.0


def opened(url: str | Path, tmp_path: Path, **settings: Any) -> HiddenStateCache:
    return HiddenStateCache(url, **{"shard_cache": tmp_path / "node", "retry": AT_ONCE, **settings})


def same(first: HiddenStateCache, second: HiddenStateCache) -> bool:
    pairs = zip(first, second, strict=True)
    return all(
        one.id == other.id
        and torch.equal(one.input_ids, other.input_ids)
        and torch.equal(one.loss_mask, other.loss_mask)
        and torch.equal(one.hidden[LAYER], other.hidden[LAYER])
        for one, other in pairs
    )


def fetched(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "node").glob("*.safetensors"))


@pytest.mark.parametrize(
    ("path", "place"),
    [
        ("runs/cache", Path("runs/cache")),
        ("runs:1/cache", Path("runs:1/cache")),
        (Path("/data/cache"), Path("/data/cache")),
        ("file:///data/cache", Path("/data/cache")),
        (Path("file:///data/cache"), Path("/data/cache")),
        ("s3://bucket/cache", "s3://bucket/cache"),
        (Path("s3://bucket/cache"), "s3://bucket/cache"),
        (Path("memory://cache"), "memory://cache"),
        (Path("simplecache::s3://bucket/cache"), "simplecache::s3://bucket/cache"),
    ],
)
def test_a_url_is_known_from_a_folder_even_after_it_was_taken_for_a_path(path: Path | str, place: Path | str) -> None:
    assert location(path) == place


@pytest.mark.parametrize(
    "path", ["runs/a b/cache", "/data/ö:x@y/cache?", "s3://bucket/a b/c:d@e", "http://host:80/c@d"]
)
def test_odd_letters_are_no_secrets(path: str) -> None:
    assert str(location(path)) == path


@pytest.mark.parametrize(
    "url",
    ["ftp://me:hush@host/cache", "simplecache::ftp://me:hush@host/cache", "https://host/cache?sig=hush"],
)
def test_a_url_with_a_secret_is_refused_without_repeating_it(url: str) -> None:
    for path in (url, Path(url)):
        with pytest.raises(ValueError, match=r"FSSPEC_[A-Z]+=") as refused:
            HiddenStateCache(path)
        assert "hush" not in str(refused.value)


def test_options_of_a_file_system_come_from_fsspecs_own_configuration(
    tmp_path: Path, upload: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = upload(write_cache(tmp_path / "cache"))
    monkeypatch.setitem(fsspec.config.conf, "flaky", {"token": "hush"})
    cache = opened(url, tmp_path)
    assert isinstance(cache.shards, RemoteShards)
    assert cache.shards.source._file_system()[0].storage_options == {"token": "hush"}


def test_a_path_with_spaces_is_read_from_both_sides(tmp_path: Path) -> None:
    folder = write_cache(tmp_path / "my cache")
    file_system, root = fsspec.core.url_to_fs("memory://with spaces/my cache")
    for file in folder.iterdir():
        file_system.pipe_file(f"{root}/{file.name}", file.read_bytes())
    try:
        far = HiddenStateCache("memory://with spaces/my cache", shard_cache=tmp_path / "the node", retry=AT_ONCE)
        assert same(HiddenStateCache(f"file://{folder}"), far)
    finally:
        file_system.rm(root, recursive=True)


def test_samples_behind_a_url_are_those_of_the_folder(tmp_path: Path, upload: Callable[..., str]) -> None:
    folder = write_cache(tmp_path / "cache")
    cache = opened(upload(folder), tmp_path)
    assert same(HiddenStateCache(folder), cache)
    assert len(fetched(tmp_path)) == len(LENGTHS)
    assert all(Flaky.reads[f"shard-{number:05d}.safetensors"] == 1 for number in range(len(LENGTHS)))
    assert same(HiddenStateCache(folder), opened(cache.path, tmp_path))  # now from the node's folder
    assert all(Flaky.reads[f"shard-{number:05d}.safetensors"] == 1 for number in range(len(LENGTHS)))


@pytest.mark.parametrize("with_lengths", [True, False])
def test_lengths_and_texts_are_known_without_any_states(
    tmp_path: Path, upload: Callable[..., str], monkeypatch: pytest.MonkeyPatch, with_lengths: bool
) -> None:
    monkeypatch.setattr(remote, "_GLANCE", 16)  # smaller than a head: it must be read on
    folder = write_cache(tmp_path / "cache", with_lengths=with_lengths)
    url = upload(folder)
    cache = opened(url, tmp_path)
    assert cache.lengths.tolist() == [length for own in LENGTHS for length in own]
    assert cache.shard_of.tolist() == [number for number, own in enumerate(LENGTHS) for _ in own]
    chosen = [0, 2, 3, 6, 7, 12]
    own = HiddenStateCache(folder)
    for (ids, mask), (own_ids, own_mask) in zip(cache.texts(chosen), own.texts(np.array(chosen)), strict=True):
        assert torch.equal(ids, own_ids)
        assert torch.equal(mask, own_mask)
    assert fetched(tmp_path) == []
    before = Flaky.reads.total()
    assert opened(url, tmp_path).lengths.tolist() == cache.lengths.tolist()
    assert Flaky.reads.total() - before == 2  # the manifest, and the file of lengths or the try for it


def test_texts_cut_short_by_the_network_are_read_again(tmp_path: Path, upload: Callable[..., str]) -> None:
    folder = write_cache(tmp_path / "cache", with_lengths=False)
    cache, own = opened(upload(folder), tmp_path), HiddenStateCache(folder)
    for name in ("shard-00001.safetensors", "shard-00003.safetensors"):
        Flaky.cuts[name] = 2
    assert cache.sample_lengths == own.sample_lengths
    Flaky.cuts["shard-00002.safetensors"] = 2
    pairs = zip(cache.texts(range(13)), own.texts(range(13)), strict=True)
    assert all(torch.equal(ids, own_ids) and torch.equal(mask, own_mask) for (ids, mask), (own_ids, own_mask) in pairs)
    assert list(cache.texts([])) == []


def test_texts_are_read_several_shards_at_a_time(tmp_path: Path, upload: Callable[..., str]) -> None:
    """And not all of them for who stops early."""
    folder = write_cache(tmp_path / "cache", [[3, 2]] * 60)
    cache = opened(upload(folder), tmp_path)
    assert len(cache.lengths) == 120
    Flaky.pause = 0.05
    started = time.monotonic()
    assert len(list(cache.texts(range(120)))) == 120
    assert time.monotonic() - started < 60 * 0.05 / 2
    Flaky.reads.clear()
    next(iter(cache.texts(range(120))))
    assert Flaky.reads.total() < 40


def test_a_network_that_fails_now_and_then_is_tried_again(tmp_path: Path, upload: Callable[..., str]) -> None:
    folder = write_cache(tmp_path / "cache")
    url = upload(folder)
    for name in (MANIFEST_FILE, LENGTHS_FILE, "shard-00001.safetensors"):
        Flaky.failures[name] = 2
    Flaky.cuts["shard-00003.safetensors"] = 2
    assert same(HiddenStateCache(folder), opened(url, tmp_path))


def test_only_the_piece_that_failed_is_read_again(
    tmp_path: Path, upload: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_cache(tmp_path / "cache", [[40]])
    size = (folder / "shard-00000.safetensors").stat().st_size
    monkeypatch.setattr(remote, "_PIECE", size // 4 + 1)
    Flaky.failures["shard-00000.safetensors"] = 2
    assert same(HiddenStateCache(folder), opened(upload(folder), tmp_path))
    assert Flaky.reads["shard-00000.safetensors"] == 4 + 2


def test_a_network_that_stays_down_is_an_error_that_names_shard_and_url(
    tmp_path: Path, upload: Callable[..., str]
) -> None:
    url = upload(write_cache(tmp_path / "cache"))
    cache = opened(url, tmp_path)
    Flaky.failures["shard-00002.safetensors"] = 99
    with pytest.raises(
        ValueError, match=rf"{url}/shard-00002.safetensors cannot be read: .*the line went dead.*3 times"
    ):
        cache[5]
    Flaky.failures.clear()
    assert cache[5].id == "s2-1"  # the next try is a fresh one
    assert not list((tmp_path / "node").glob(".*"))


@pytest.mark.parametrize("damage", ["a byte", "missing", "another size"])
def test_what_arrives_altered_is_never_read(tmp_path: Path, upload: Callable[..., str], damage: str) -> None:
    folder = write_cache(tmp_path / "cache")
    url = upload(folder)
    file_system, root = fsspec.core.url_to_fs(url)
    shard = f"{root}/shard-00001.safetensors"
    content = bytearray(file_system.cat_file(shard))
    if damage == "missing":
        file_system.rm_file(shard)
    else:
        content[-1] ^= 1
        file_system.pipe_file(shard, bytes(content if damage == "a byte" else content[:-8]))
    rule = {"a byte": "its sha256 is", "missing": "is missing", "another size": "bytes came"}[damage]
    with pytest.raises(ValueError, match=rf"{url}/shard-00001.safetensors .*{rule}"):
        opened(url, tmp_path)[3]
    assert list((tmp_path / "node").iterdir()) == []


def test_a_manifest_that_is_no_good_is_told_by_its_url(tmp_path: Path, upload: Callable[..., str]) -> None:
    folder = write_cache(tmp_path / "cache")
    url = upload(folder)
    file_system, root = fsspec.core.url_to_fs(url)
    file_system.pipe_file(f"{root}/{MANIFEST_FILE}", b"{}")
    with pytest.raises(ValueError, match=rf"{url}/manifest.json has the schema None"):
        opened(url, tmp_path)
    with pytest.raises(ValueError, match=r"no hidden-state cache: it has no manifest.json"):
        opened("flaky://bucket/nothing", tmp_path)


def test_lengths_of_another_cache_are_refused(tmp_path: Path, upload: Callable[..., str]) -> None:
    folder = write_cache(tmp_path / "cache")
    write_lengths(folder, [3, 5, 2, 4, 6, 1, 7, 2, 5, 5, 8, 4, 3][::-1])
    with pytest.raises(ValueError, match=r"lengths.safetensors tells of 13 samples .* another cache"):
        HiddenStateCache(folder).sample_lengths  # noqa: B018
    with pytest.raises(ValueError, match=r"lengths.safetensors tells of 13 samples .* another cache"):
        opened(upload(folder), tmp_path).sample_lengths  # noqa: B018


@pytest.mark.skipif(importlib.util.find_spec("s3fs") is not None, reason="s3fs is installed")
def test_a_missing_package_is_named_with_its_pip_line() -> None:
    with pytest.raises(ValueError, match=r"s3://bucket/cache cannot be opened .*pip install 's3fs>="):
        HiddenStateCache("s3://bucket/cache")


def hold(folder: ShardFolder, content: bytes, patient: bool = True) -> Any:
    return folder.hold(
        hashlib.sha256(content).hexdigest(), len(content), lambda into: os.pwrite(into, content, 0) and None, patient
    )


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


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


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


class Server(http.server.BaseHTTPRequestHandler):
    """Serves a folder with or without ranges, and counts what is asked for."""

    folder: Path
    ranges = True
    asked: ClassVar[Counter] = Counter()
    pause = 0.0

    def do_GET(self) -> None:
        path = self.folder / self.path.lstrip("/")
        if not path.is_file():
            self.send_error(404)
            return
        Server.asked[path.name] += 1
        time.sleep(Server.pause)
        content = path.read_bytes()
        wanted = self.headers.get("Range") if Server.ranges else None
        if wanted is None:
            self.send_response(200)
        else:
            start, stop = wanted.removeprefix("bytes=").split("-")
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{stop}/{len(content)}")
            content = content[int(start) : int(stop) + 1]
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments: Any) -> None:
        """Says nothing."""


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[[Path], str]]:
    """serve(folder) -> its URL on a free port."""
    pytest.importorskip("aiohttp")
    servers: list[http.server.ThreadingHTTPServer] = []

    def start(folder: Path) -> str:
        Server.folder, Server.ranges, Server.pause = folder, True, 0.0
        Server.asked.clear()
        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("ranges", [True, False])
def test_a_web_server_serves_a_cache_with_ranges_or_without(
    tmp_path: Path, serve: Callable[[Path], str], monkeypatch: pytest.MonkeyPatch, ranges: bool
) -> None:
    monkeypatch.setattr(remote, "_PIECE", 200)
    folder = write_cache(tmp_path / "cache")
    url = serve(folder)
    Server.ranges = ranges
    assert same(HiddenStateCache(folder), opened(url, tmp_path))
    assert (Server.asked["shard-00000.safetensors"] > 1) == ranges


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

"""A cache behind a URL: its samples are those of the folder, and what arrives altered is never read."""

import time
from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from remote_caches import LENGTHS, Flaky, Server, fetched, opened, same, write_cache

from draftsmith.data.cache.reader import HiddenStateCache
from draftsmith.data.remote import remote_folder as remote
from draftsmith.data.shards.lengths import LENGTHS_FILE, write_lengths
from draftsmith.data.shards.manifest import MANIFEST_FILE


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
    monkeypatch.setattr(remote, "_GLANCE", 16)  # smaller than a header: it must be read on
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

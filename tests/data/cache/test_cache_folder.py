"""A cache while several processes make it: what one says is there, and what it leaves alone when it clears up."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from draftsmith import files
from draftsmith.data.cache.cache_folder import CacheFolder
from draftsmith.data.shards.manifest import MANIFEST_FILE, CacheIdentity, Manifest
from draftsmith.data.shards.shards import ShardContent
from draftsmith.files import atomic_file

LAYER = "last.pre_norm"
IDENTITY = CacheIdentity("t", None, "f", "k", "c", (LAYER,), 4, "bfloat16", "float32", "s", None, "m", 99, 0, 1.0, 9)
LENGTHS = [3, 5]


def content(number: int) -> ShardContent:
    """A shard of one sample."""
    ids = torch.arange(LENGTHS[number])
    return ShardContent(
        [f"s{number}"], torch.tensor([0, len(ids)]), ids, ids > 0, {LAYER: torch.ones(len(ids), 4)}, None
    )


def begun(path: Path) -> CacheFolder:
    folder = CacheFolder(path)
    folder.begin(Manifest(IDENTITY, len(LENGTHS), sum(LENGTHS), sum(LENGTHS) - 2, 0, 0), [], {})
    return folder


def finished(path: Path) -> CacheFolder:
    folder = begun(path)
    for number in range(len(LENGTHS)):
        folder.add(number, content(number))
    assert folder.gather(LENGTHS).complete
    return folder


def test_a_finished_shard_is_there_before_and_after_the_cache_is_complete(tmp_path: Path) -> None:
    other = begun(tmp_path)
    assert not other.has(0)
    begun(tmp_path).add(0, content(0))
    assert (other.has(0), other.has(1)) == (True, False)
    finished(tmp_path)
    assert not list(tmp_path.glob("shard-*.json"))
    assert [other.has(number) for number in range(3)] == [True, True, False]


def test_a_shard_found_altered_is_not_there(tmp_path: Path) -> None:
    folder = finished(tmp_path)
    assert folder.has(1)
    (tmp_path / "shard-00001.safetensors").write_bytes(b"")
    assert folder.keep_good(range(2)) == {0}
    assert (folder.has(0), folder.has(1)) == (True, False)


def test_completing_a_cache_leaves_what_a_living_process_is_writing(tmp_path: Path) -> None:
    killed = subprocess.Popen([sys.executable, "-c", ""])
    killed.wait()
    tmp_path.mkdir(exist_ok=True)
    left = tmp_path / f".shard-00001.safetensors.partial-{files._machine()}-{killed.pid}-0123abcd"
    left.write_bytes(b"half")
    with atomic_file(tmp_path / "shard-00000.safetensors") as file:
        file.write(b"by a rank of ")
        finished(tmp_path)
        assert not left.exists()
        file.write(b"another world size")
    assert (tmp_path / "shard-00000.safetensors").read_bytes() == b"by a rank of another world size"


def test_a_cache_begun_by_another_rank_while_one_looks_is_no_foreign_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.iterdir

    def begin_first(path: Path) -> Iterator[Path]:
        monkeypatch.undo()
        begun(tmp_path)
        return real(path)

    monkeypatch.setattr(Path, "iterdir", begin_first)
    CacheFolder(tmp_path).check_place()
    assert (tmp_path / MANIFEST_FILE).exists()
    os.unlink(tmp_path / MANIFEST_FILE)
    with pytest.raises(ValueError, match="not empty and no cache"):
        CacheFolder(tmp_path).check_place()

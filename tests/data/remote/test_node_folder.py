"""The node's folder of fetched shards: nothing leaves it, nothing strange in it is followed, trusted or dropped."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest
from caches import change_manifest, write_small_cache

from draftsmith.data.cache.reader import HiddenStateCache
from draftsmith.data.remote import private_folder as own_folder
from draftsmith.data.remote.node_folder import ShardFolder
from draftsmith.data.remote.remote_folder import RemoteFolder, Retry
from draftsmith.ownership import user_cache_folder

CONTENT = b"x" * 100
NAME = hashlib.sha256(CONTENT).hexdigest()


def fill(into: int) -> None:
    os.pwrite(into, CONTENT, 0)


def not_fetched(into: int) -> None:
    raise AssertionError("fetched")


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_cache(tmp_path_factory.mktemp("good"))


@pytest.fixture
def upload(good: Path, tmp_path: Path) -> Iterator[Callable[[Callable[[Path], object]], str]]:
    """upload(change) -> the URL of a changed copy of a good cache."""
    file_system, root = fsspec.core.url_to_fs("memory://folders/cache")

    def copy(change: Callable[[Path], object]) -> str:
        folder = Path(shutil.copytree(good, tmp_path / "uploaded"))
        change(folder)
        for file in folder.iterdir():
            file_system.pipe_file(f"{root}/{file.name}", file.read_bytes())
        return "memory://folders/cache"

    yield copy
    file_system.rm("/folders", recursive=True)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This user's cache folder, elsewhere."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


@pytest.mark.parametrize("field", ["sha256", "name"])
@pytest.mark.parametrize(
    "climb", ["../../../victim/model", "/victim/model", "..", "shard-00001.safetensors/../../x", "a\0b"]
)
def test_no_field_of_a_manifest_leads_out_of_a_folder(
    tmp_path: Path, upload: Callable[[Callable[[Path], object]], str], field: str, climb: str
) -> None:
    victim = tmp_path / "victim" / "model.safetensors"
    victim.parent.mkdir()
    victim.write_bytes(b"precious")
    url = upload(lambda folder: change_manifest(folder, lambda told: told["shards"][1].update({field: climb})))
    for place in (url, tmp_path / "uploaded"):
        with pytest.raises(ValueError, match=rf"manifest.json: shards\[1\].{field} is .*it must be text"):
            HiddenStateCache(place, shard_cache=tmp_path / "node", retry=Retry(1))
    assert victim.read_bytes() == b"precious"
    assert not (tmp_path / "node").exists()


def test_names_are_checked_again_where_a_path_is_made_of_them(tmp_path: Path) -> None:
    victim = tmp_path / "victim.safetensors"
    victim.write_bytes(b"precious")
    with pytest.raises(ValueError, match=r"'../victim' is no sha256 and names no file"):
        ShardFolder(tmp_path / "node", 1000).hold("../victim", 100, fill)
    with pytest.raises(ValueError, match=r"memory://x is '../victim', which is no plain file name"):
        RemoteFolder("memory://x").read("../victim")
    assert victim.read_bytes() == b"precious"


def test_the_default_folder_is_the_users_own_and_private(home: Path, upload: Callable[..., str]) -> None:
    cache = HiddenStateCache(upload(lambda folder: None), retry=Retry(1))
    assert cache[0].id == "s0-0"
    assert len(list((home / "draftsmith" / "shards").glob("*.safetensors"))) == 1
    assert stat.S_IMODE((home / "draftsmith" / "shards").stat().st_mode) == 0o700
    assert stat.S_IMODE((home / "draftsmith").stat().st_mode) == 0o700


def test_without_xdg_cache_home_it_lies_in_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_cache_folder("shards") == tmp_path / ".cache" / "draftsmith" / "shards"
    monkeypatch.setenv("XDG_CACHE_HOME", "caches")
    with pytest.raises(ValueError, match=r"XDG_CACHE_HOME is 'caches', which is no absolute path"):
        user_cache_folder("shards")


def test_a_folder_that_others_may_read_becomes_private(home: Path) -> None:
    (home / "draftsmith" / "shards").mkdir(parents=True, mode=0o755)
    held = ShardFolder(None, 1000).hold(NAME, 100, fill)
    assert held is not None
    assert stat.S_IMODE((home / "draftsmith" / "shards").stat().st_mode) == 0o700


@pytest.mark.parametrize("below", ["draftsmith", "draftsmith/shards"])
@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_a_default_folder_that_others_may_write_in_is_refused(home: Path, below: str, mode: int) -> None:
    (home / "draftsmith" / "shards").mkdir(parents=True)
    (home / below).chmod(mode)
    with pytest.raises(ValueError, match=rf"{below} may be written by others \(mode 0{mode:o}\).*chmod 700"):
        ShardFolder(None, 1000).hold(NAME, 100, fill)


@pytest.mark.parametrize("below", ["draftsmith", "draftsmith/shards"])
def test_a_default_folder_that_is_a_link_or_anothers_is_refused(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, below: str
) -> None:
    (tmp_path / "elsewhere" / "shards").mkdir(parents=True)
    (home / below).parent.mkdir(exist_ok=True)
    (home / below).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=rf"{below} is a link, which is never followed"):
        ShardFolder(None, 1000).hold(NAME, 100, fill)
    (home / below).unlink()
    (home / "draftsmith" / "shards").mkdir(parents=True, exist_ok=True)
    monkeypatch.setattr(own_folder.os, "geteuid", lambda: 12345)
    with pytest.raises(ValueError, match=rf"draftsmith belongs to user {os.getuid()}, not to this one \(12345\)"):
        ShardFolder(None, 1000).hold(NAME, 100, fill)


def test_a_default_folder_that_others_could_exchange_is_refused(home: Path) -> None:
    home.chmod(0o777)
    with pytest.raises(ValueError, match=r"home, which holds .*draftsmith, may be written by everybody"):
        ShardFolder(None, 1000).hold(NAME, 100, fill)
    home.chmod(0o1777)  # as /tmp: nobody may rename what is another's
    assert ShardFolder(None, 1000).hold(NAME, 100, fill) is not None


@pytest.mark.parametrize("name", [f"{NAME}.safetensors", f".{NAME}.lock", f".{NAME}.partial", ".room.lock"])
def test_links_in_the_folder_are_never_followed(tmp_path: Path, name: str) -> None:
    node, victim = tmp_path / "node", tmp_path / "victim"
    node.mkdir()
    victim.write_bytes(CONTENT)
    (node / name).symlink_to(victim)
    with pytest.raises(ValueError, match=rf"{name} is a link, which is never followed"):
        ShardFolder(node, 1000).hold(NAME, 100, fill)
    assert victim.read_bytes() == CONTENT
    (tmp_path / "node2").symlink_to(node)
    with pytest.raises(ValueError, match=r"node2 is a link"):
        ShardFolder(tmp_path / "node2", 1000).hold(NAME, 100, fill)


def test_a_pipe_in_the_place_of_a_shard_is_no_shard(tmp_path: Path) -> None:
    (tmp_path / "node").mkdir()
    os.mkfifo(tmp_path / "node" / f"{NAME}.safetensors")
    with pytest.raises(ValueError, match=r"is no regular file"):
        ShardFolder(tmp_path / "node", 1000).hold(NAME, 100, fill)


def test_what_another_process_left_is_hashed_once_before_it_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = tmp_path / "node"
    held = ShardFolder(node, 1000).hold(NAME, 100, fill)
    assert held is not None
    held.release()
    held.path.write_bytes(b"y" * 100)
    again = ShardFolder(node, 1000)
    taken = again.hold(NAME, 100, fill)
    assert taken is not None
    assert taken.path.read_bytes() == CONTENT
    assert "is not what its name says" in caplog.text
    hashed: list[int] = []
    real = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda *given: hashed.append(1) or real(*given))
    other = ShardFolder(node, 1000)
    for _ in range(3):
        assert other.hold(NAME, 100, not_fetched) is not None
        assert again.hold(NAME, 100, not_fetched) is not None  # which fetched it itself
    assert hashed == [1]


@pytest.mark.parametrize(("mode", "hashed"), [(0o700, False), (0o770, True)])
def test_check_off_spares_the_hash_only_where_nobody_else_may_write(tmp_path: Path, mode: int, hashed: bool) -> None:
    node = tmp_path / "node"
    held = ShardFolder(node, 1000).hold(NAME, 100, fill)
    assert held is not None
    held.release()
    held.path.write_bytes(b"y" * 100)
    node.chmod(mode)
    taken = ShardFolder(node, 1000, check=False).hold(NAME, 100, fill)
    assert taken is not None
    assert taken.path.read_bytes() == (CONTENT if hashed else b"y" * 100)


def test_files_that_are_not_fetched_shards_are_neither_dropped_nor_counted(tmp_path: Path) -> None:
    node = tmp_path / "node"
    node.mkdir()
    for name in ("model.safetensors", "a" * 63 + ".safetensors", "notes.partial", ".x.partial"):
        (node / name).write_bytes(b"precious" * 100)
    folder = ShardFolder(node, 150)
    for number in range(3):
        content = bytes([number]) * 100
        held = folder.hold(
            hashlib.sha256(content).hexdigest(), 100, lambda into, content=content: os.pwrite(into, content, 0)
        )
        assert held is not None
        held.release()
    assert sorted(path.name for path in node.iterdir() if path.stat().st_size == 800) == sorted(
        ["model.safetensors", "a" * 63 + ".safetensors", "notes.partial", ".x.partial"]
    )

"""URLs: which addresses are one, secrets in them, and the packages that they need."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest
from remote_caches import AT_ONCE, opened, same, write_cache

from draftsmith.data.cache.reader import HiddenStateCache
from draftsmith.data.remote.remote_folder import location
from draftsmith.data.remote.remote_shards import RemoteShards


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


@pytest.mark.skipif(importlib.util.find_spec("s3fs") is not None, reason="s3fs is installed")
def test_a_missing_package_is_named_with_its_pip_line() -> None:
    with pytest.raises(ValueError, match=r"s3://bucket/cache cannot be opened .*pip install 's3fs>="):
        HiddenStateCache("s3://bucket/cache")

"""Batches of a cache in windows of shards: from a URL as from a folder, and what cannot be laid out."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from judging import judge_data, rows_of, save_rows
from sharded_caches import opened
from training import VOCAB, KeepLosses, make_module, make_trainer

from draftsmith.data.cache.extract import verify
from draftsmith.data.cache.reader import HiddenStateCache
from draftsmith.models.target.target import PRE_NORM
from draftsmith.train.batches.data_module import CacheDataModule


@pytest.fixture(scope="module")
def url(in_shards: Path) -> Iterator[str]:
    """The same cache behind a URL."""
    place = "memory://layouts/cache"
    file_system, root = fsspec.core.url_to_fs(place)
    for file in in_shards.iterdir():
        file_system.pipe_file(f"{root}/{file.name}", file.read_bytes())
    yield place
    file_system.rm("/layouts", recursive=True)


def batch_ids(data: CacheDataModule, loader: Any) -> list[tuple[str, ...]]:
    found = [batch.sample_ids for batch in loader]
    data.teardown("fit")
    return found


@pytest.mark.parametrize("batching", ["packed", "bucketed"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_from_a_url_are_those_of_the_folder_read_shard_by_shard(
    in_shards: Path, url: str, tmp_path: Path, batching: Any, num_workers: int
) -> None:
    chosen: dict[str, Any] = {"tokens_per_batch": 50, "val_fraction": 0.2, "batching": batching, "window_shards": 2}
    local = CacheDataModule(in_shards, shuffle="windowed", **chosen)
    local.setup()
    assert len({index // 5 for index in local.val_set.indices}) == 2  # type: ignore[union-attr]  # whole shards
    far = CacheDataModule(url, num_workers=num_workers, shard_cache=tmp_path / "node", **chosen)
    far.setup()
    assert not list((tmp_path / "node").glob("*.safetensors"))
    for make in (CacheDataModule.train_dataloader, CacheDataModule.val_dataloader):
        expected, found = (batch_ids(data, make(data)) for data in (local, far))
        assert found == expected
        assert len(found) > 1
    assert torch.equal(far.token_counts(VOCAB), local.token_counts(VOCAB))
    assert far.val_prompts(3) == local.val_prompts(3)
    batches = zip(local.val_dataloader(), far.val_dataloader(), strict=True)
    assert all(torch.equal(one.packed.hidden[PRE_NORM], other.packed.hidden[PRE_NORM]) for one, other in batches)
    far.teardown("fit")


def test_a_drafter_trained_from_a_url_is_that_of_the_folder(
    in_shards: Path, url: str, target_dir: Path, tmp_path: Path
) -> None:
    weights = []
    for place, shuffle in ((in_shards, "windowed"), (url, True)):
        module = make_module(target_dir)
        data = CacheDataModule(
            place, tokens_per_batch=60, shuffle=shuffle, window_shards=2, shard_cache=tmp_path / "node"
        )
        make_trainer(tmp_path).fit(module, data)
        weights.append(module.evaluated.state_dict())
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_a_judges_tokens_come_from_a_url_as_from_the_folder(
    in_shards: Path, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    rows = save_rows(tmp_path, rows_of(in_shards))
    far, near = judge_data(Path(url), rows), judge_data(in_shards, rows)
    for data in (far, near):
        data.setup()
        data.read_states()
    assert torch.equal(far.tokens("train").features, near.tokens("train").features)
    assert len(list((tmp_path / "draftsmith/shards").glob("*.safetensors"))) == 8


def test_a_cache_behind_a_url_is_verified(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    verify(Path(url), samples=2)
    assert "2 samples recomputed" in capsys.readouterr().out


def test_the_pages_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).resolve().parents[3] / "docs" / "reference" / "batches.md").read_text(encoding="utf-8")
    [code] = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    small = code.replace("10_000_000, 25_000", "10_000, 50")
    assert small != code
    exec(compile(small, "docs/reference/batches.md", "exec"), {})
    assert capsys.readouterr().out.count("batches a rank") == 3


@pytest.mark.parametrize("batching", ["packed", "bucketed"])
def test_a_step_of_bucketed_batches_learns_what_its_samples_teach(
    in_shards: Path, target_dir: Path, tmp_path: Path, batching: Any
) -> None:
    """A whole epoch in one step, so that both layouts hold the same samples."""
    losses: list[float] = []
    data = CacheDataModule(in_shards, tokens_per_batch=10_000, batching=batching, pad_to=8)
    make_trainer(tmp_path, callbacks=[KeepLosses(losses)]).fit(make_module(target_dir), data)
    other: list[float] = []
    plain = CacheDataModule(in_shards, tokens_per_batch=10_000)
    make_trainer(tmp_path, callbacks=[KeepLosses(other)]).fit(make_module(target_dir), plain)
    assert losses == pytest.approx(other, rel=1e-5)


@pytest.mark.parametrize(
    ("chosen", "rule"),
    [
        ({"cache": "memory://layouts/cache", "shuffle": "full"}, "use 'windowed'"),
        ({"cache": "x", "window_shards": 0}, "window_shards is 0; it must be at least 1$"),
        ({"cache": "x", "pad_to": 0}, "pad_to is 0; it must be at least 1$"),
        ({"cache": "x", "max_samples": 0}, "max_samples is 0; it must be at least 1, or null for all"),
    ],
)
def test_layouts_that_cannot_be_are_refused(chosen: dict[str, Any], rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        CacheDataModule(**chosen)


def test_a_folder_too_small_for_the_windows_is_refused_before_training(url: str, tmp_path: Path) -> None:
    size = sum(record.num_bytes for record in HiddenStateCache(url, shard_cache=tmp_path).manifest.shards) / 2**30
    data = CacheDataModule(url, window_shards=1, tokens_per_batch=20, shard_cache=tmp_path, shard_cache_gib=size * 0.4)
    data.setup()
    with pytest.raises(ValueError, match=r"windows of up to .* raise it, or lower window_shards"):
        data.train_dataloader()
    CacheDataModule(
        url, window_shards=1, tokens_per_batch=20, shard_cache=tmp_path, shard_cache_gib=size * 1.01
    ).setup()


def bytes_in(node: Path) -> int:
    """Of the shards there; some may go while they are counted."""
    total = 0
    for path in node.glob("*.safetensors"):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


@pytest.mark.parametrize("num_workers", [0, 2])
def test_epochs_through_a_folder_that_holds_less_than_the_cache(
    in_shards: Path, url: str, tmp_path: Path, num_workers: int
) -> None:
    node = tmp_path / "node"
    size = sum(record.num_bytes for record in HiddenStateCache(in_shards).manifest.shards)
    limit = size * 7 // 8
    chosen: dict[str, Any] = {"tokens_per_batch": 20, "val_fraction": 0.0, "window_shards": 1}
    local = opened(in_shards, shuffle="windowed", **chosen)
    far = opened(url, shard_cache=node, shard_cache_gib=limit / 2**30, num_workers=num_workers, **chosen)
    loaders = [data.train_dataloader() for data in (local, far)]
    for epoch in range(3):
        for loader in loaders:
            loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        for expected, found in zip(*loaders, strict=True):
            assert found.sample_ids == expected.sample_ids
            assert torch.equal(found.packed.hidden[PRE_NORM], expected.packed.hidden[PRE_NORM])
            assert bytes_in(node) <= limit
    far.teardown("fit")


def test_a_worker_that_reads_little_of_each_window_holds_little(url: str, tmp_path: Path) -> None:
    """With many workers each reads few shards of a window; kept open, those of old windows would fill the folder."""
    data = opened(Path(url), shard_cache=tmp_path / "node", val_fraction=0.0)
    train, cache = data.train_set, data.open_cache()
    assert train is not None
    for numbers in ([0, 6], [12], [39, 1]):
        assert len(train[numbers].sample_ids) == len(numbers)
        assert set(cache._readers) == {number // 5 for number in numbers}
    data.teardown("fit")

"""Cache batches that are read while a step runs: the same batches and weights, one reader at a time, errors in their place."""

import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader
from training import MakeCache, make_module, make_trainer

from draftsmith.models.target.target import PRE_NORM
from draftsmith.train.batches.cache_subset import CacheBatch, CacheSubset
from draftsmith.train.batches.data_module import CacheDataModule

LENGTHS = [7, 9, 11, 8, 10, 12, 9, 7, 10, 11, 8, 9]


@pytest.fixture(scope="module")
def cache(make_cache: MakeCache) -> Path:
    return make_cache(LENGTHS)


def data_of(cache: Path, look_ahead: bool | None, **settings: object) -> CacheDataModule:
    chosen: dict[str, object] = {"val_fraction": 0.1, "tokens_per_batch": 20, "look_ahead": look_ahead}
    return CacheDataModule(cache, **(chosen | settings))  # type: ignore[arg-type]


def contents(data: CacheDataModule) -> list[tuple[tuple[str, ...], torch.Tensor, torch.Tensor]]:
    data.setup()
    loaders = (data.train_dataloader(), data.val_dataloader())
    return [
        (batch.sample_ids, batch.packed.input_ids, batch.packed.hidden[PRE_NORM].clone())
        for loader in loaders
        for batch in loader
    ]


def test_a_cpu_reads_in_turn_unless_it_is_asked_to_look_ahead(cache: Path) -> None:
    data = data_of(cache, None)
    data.setup()
    assert type(data.train_dataloader()) is DataLoader
    assert type(data.val_dataloader()) is DataLoader


@pytest.mark.parametrize("num_workers", [0, 1])
def test_looking_ahead_gives_the_same_batches_in_the_same_order(cache: Path, num_workers: int) -> None:
    expected = contents(data_of(cache, None))
    ahead = contents(data_of(cache, True, num_workers=num_workers))
    assert len(expected) == 6
    assert [batch[0] for batch in ahead] == [batch[0] for batch in expected]
    for own, others in zip(ahead, expected, strict=True):
        assert all(torch.equal(value, other) for value, other in zip(own[1:], others[1:], strict=True))


def fit(
    target_dir: Path, root: Path, data: CacheDataModule, checkpoint: Path | None = None, *callbacks: pl.Callback
) -> dict[str, torch.Tensor]:
    module = make_module(target_dir)
    settings = {"max_epochs": 2, "enable_checkpointing": bool(callbacks), "val_check_interval": 1}
    trainer = make_trainer(root, callbacks=list(callbacks), **settings)
    trainer.fit(module, data, ckpt_path=checkpoint)
    assert trainer.global_step == 10
    return module.state_dict()


class Killed(pl.Callback):
    """Ends the run in the middle, while the next batch is being read."""

    def on_train_batch_end(self, trainer: pl.Trainer, *args: object, **kwargs: object) -> None:
        if trainer.global_step == 7:
            raise KeyboardInterrupt


def test_a_run_killed_while_it_looks_ahead_resumes_with_the_very_weights_of_one_that_never_does(
    target_dir: Path, cache: Path, tmp_path: Path
) -> None:
    expected = fit(target_dir, tmp_path, data_of(cache, None))
    keeper = ModelCheckpoint(tmp_path / "steps", filename="{step}", save_top_k=-1, every_n_train_steps=1)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(target_dir, tmp_path, data_of(cache, True), None, keeper, Killed())
    for ahead in (True, None):
        resumed = fit(target_dir, tmp_path, data_of(cache, ahead), tmp_path / "steps" / "step=6.ckpt")
        assert all(torch.equal(value, expected[name]) for name, value in resumed.items())
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("look-ahead")]


def test_nobody_reads_the_cache_while_another_does(
    target_dir: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, threads = 0, set()
    get = CacheSubset.__getitem__

    def watched(self: CacheSubset, numbers: Sequence[int]) -> CacheBatch:
        nonlocal reading
        reading += 1
        assert reading == 1, "two threads read one cache"
        threads.add(threading.current_thread().name)
        time.sleep(0.01)
        batch = get(self, numbers)
        reading -= 1
        return batch

    monkeypatch.setattr(CacheSubset, "__getitem__", watched)
    fit(target_dir, tmp_path, data_of(cache, True, val_fraction=0.1))
    assert len(threads) == 2, "the training batches are read in a thread of their own, those of validation are not"


def test_an_error_in_reading_comes_with_the_batch_that_it_belongs_to(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = data_of(cache, True)
    data.setup()
    get, asked = CacheSubset.__getitem__, 0

    def failing(self: CacheSubset, numbers: Sequence[int]) -> CacheBatch:
        nonlocal asked
        asked += 1
        if asked == 3:
            raise ValueError("shard 7 is damaged")
        return get(self, numbers)

    monkeypatch.setattr(CacheSubset, "__getitem__", failing)
    batches = iter(data.train_dataloader())
    assert next(batches).num_labelled > 0
    assert next(batches).num_labelled > 0
    with pytest.raises(ValueError, match="shard 7 is damaged"):
        next(batches)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_looks_ahead_by_default_and_its_batches_are_those_of_the_plain_loop(
    target_dir: Path, cache: Path, tmp_path: Path
) -> None:
    weights = {}
    for ahead in (False, None):
        module = make_module(target_dir)
        make_trainer(tmp_path, accelerator="gpu", max_epochs=2).fit(module, data_of(cache, ahead))
        weights[ahead] = module.state_dict()
    for name, value in weights[None].items():
        torch.testing.assert_close(value, weights[False][name])

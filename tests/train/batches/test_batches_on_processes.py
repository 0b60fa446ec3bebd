"""Batches on several processes, and runs that resume on another number of them."""

import logging
import re
import shutil
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sharded_caches import opened, train
from training import MakeCache, tiny_config

from draftsmith.data.cache.reader import HiddenStateCache
from draftsmith.train.batches.data_module import CacheDataModule


def on_ranks(monkeypatch: pytest.MonkeyPatch, world_size: int, rank: int = 0) -> None:
    monkeypatch.setattr(CacheDataModule, "_world", lambda data: (rank, world_size))


def test_one_process_of_a_node_compares_the_shards_for_all(in_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[str] = []
    monkeypatch.setattr(HiddenStateCache, "verify_integrity", lambda cache: compared.append(str(cache.path)))
    first, second = (CacheDataModule(in_shards, val_cache=in_shards) for _ in range(2))
    first.prepare_data()
    assert compared == [str(in_shards)] * 2
    first.setup()
    second.trainer = SimpleNamespace(local_rank=1, global_rank=1, world_size=2)  # type: ignore[assignment]
    second.setup()
    assert len(compared) == 2
    # Without Lightning nobody has called prepare_data().
    opened(in_shards)
    assert len(compared) == 3


def test_fewer_held_out_samples_than_processes_are_refused(in_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = opened(in_shards, val_fraction=0.05)
    on_ranks(monkeypatch, 4)
    with pytest.raises(
        ValueError, match=r"2 sample\(s\) are held out .* each of 4 processes needs one; raise val_fraction"
    ):
        data.val_dataloader()


def test_whole_shards_that_hold_out_far_more_than_asked_are_told(
    in_shards: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        opened(in_shards, shuffle="windowed", val_fraction=0.01)
    assert re.search(
        r"\d+ of 40 samples are held out for validation instead of 1, because whole shards are", caplog.text
    )
    caplog.clear()
    with caplog.at_level(logging.INFO):
        opened(in_shards, val_fraction=0.01)
    assert "held out" not in caplog.text


def checkpoint(data: CacheDataModule, batches_done: int) -> dict[str, Any]:
    """As state_dict() gives it within a fit."""
    return {
        "batches_done": batches_done,
        "batches_per_epoch": len(data.train_dataloader()),
        "layout": data._layout(),
    }


def steps(monkeypatch: pytest.MonkeyPatch, data: CacheDataModule, world_size: int) -> list[list[str]]:
    """The samples of each step over all processes, from where the run stands."""
    shares = []
    for rank in range(world_size):
        on_ranks(monkeypatch, world_size, rank)
        shares.append([batch.sample_ids for batch in data.train_dataloader()])
    return [sorted(name for share in step for name in share) for step in zip(*shares, strict=True)]


@pytest.mark.parametrize(
    "settings_", [{}, {"shuffle": "windowed", "window_shards": 2}, {"batching": "bucketed", "pad_to": 4}]
)
@pytest.mark.parametrize("change", [(4, 1), (1, 4), (4, 3), (2, 4)])
def test_a_run_goes_on_with_another_number_of_processes_and_the_same_samples_a_step(
    in_shards: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    settings_: dict[str, Any],
    change: tuple[int, int],
) -> None:
    before, now = change
    chosen = {"tokens_per_batch": 96 // before, **settings_}
    on_ranks(monkeypatch, before)
    interrupted = opened(in_shards, **chosen)
    saved = checkpoint(interrupted, 2)
    expected = steps(monkeypatch, interrupted, before)[2:]
    on_ranks(monkeypatch, now)
    resumed = opened(in_shards, **chosen)
    with caplog.at_level(logging.INFO):
        resumed.load_state_dict(saved)
    assert f"resumes with {now} instead of {before} processes" in caplog.text
    assert f"its 96 tokens, each process now takes {96 / now:g}" in caplog.text
    assert steps(monkeypatch, resumed, now) == expected
    # And once more, from its own checkpoint, with as many processes.
    on_ranks(monkeypatch, now)
    again = opened(in_shards, **chosen)
    again.load_state_dict(checkpoint(resumed, 3))
    assert steps(monkeypatch, again, now) == expected[1:]


def test_a_setting_that_keeps_the_tokens_of_a_step_is_as_good(in_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_ranks(monkeypatch, 2)
    saved = checkpoint(opened(in_shards, tokens_per_batch=48), 1)
    on_ranks(monkeypatch, 4)
    data = opened(in_shards, tokens_per_batch=24)
    data.load_state_dict(saved)
    assert data._budget() == 24
    on_ranks(monkeypatch, 5)
    uneven = opened(in_shards, tokens_per_batch=48)
    uneven.load_state_dict(saved)
    assert uneven._budget() == Fraction(96, 5)


@pytest.mark.parametrize(
    ("chosen", "rule"),
    [
        ({"tokens_per_batch": 30}, "made with tokens_per_batch = 48, this run has 30"),
        ({"seed": 1}, "made with seed = 0, this run has 1"),
        ({"max_samples": 20}, "made with samples = 39, this run has 20"),
        ({"shuffle": False}, "made with shuffle = True, this run has False"),
        ({"shuffle": "windowed"}, "made with windows = None, this run has 32"),
        ({"batching": "bucketed"}, r"made with buckets = None, this run has \[64, 16\]"),
    ],
)
@pytest.mark.parametrize("now", [1, 2, 4])
def test_other_differences_stay_refused(
    in_shards: Path, monkeypatch: pytest.MonkeyPatch, chosen: dict[str, Any], rule: str, now: int
) -> None:
    on_ranks(monkeypatch, 2)
    saved = checkpoint(opened(in_shards, tokens_per_batch=48), 1)
    for name in ("windows", "buckets", "joint_tokens"):  # as earlier versions saved it
        del saved["layout"][name]
    on_ranks(monkeypatch, now)
    with pytest.raises(ValueError, match=rule):
        opened(in_shards, **{"tokens_per_batch": 48, **chosen}).load_state_dict(saved)


def test_steps_too_small_for_the_processes_are_refused(in_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = checkpoint(opened(in_shards, tokens_per_batch=12), 1)
    on_ranks(monkeypatch, 4)
    with pytest.raises(ValueError, match="too few samples to be the same for 4 processes as for 1; resume with 1"):
        opened(in_shards, tokens_per_batch=12).load_state_dict(saved)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_processes_for_some_steps_and_then_one_end_as_one_all_along(
    target_dir: Path, make_cache: MakeCache, tmp_path: Path
) -> None:
    cache = make_cache([7, 12, 9, 15, 8, 11, 14, 9, 10, 13, 8, 12])
    results = {}
    for name, devices, tokens in (("two", 2, 20), ("then one", 1, 20), ("one", 1, 40)):
        folder = tmp_path / name.replace(" ", "-")
        folder.mkdir()
        config = tiny_config(folder, target_dir, cache)
        every = config.read_text().replace("save_top_k: 0", "save_top_k: -1, filename: '{step}'")
        config.write_text(every)
        more = [f"--trainer.devices={devices}", f"--data.init_args.tokens_per_batch={tokens}"]
        more += ["--trainer.strategy=ddp"] if devices > 1 else []
        if name == "then one":
            shutil.copy(tmp_path / "two" / "run" / "checkpoints" / "step=2.ckpt", folder / "from.ckpt")
            more += [f"--ckpt_path={folder / 'from.ckpt'}"]
        train(config, *more)
        results[name] = torch.load(folder / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert {result["global_step"] for result in results.values()} == {6}
    for name in ("two", "then one"):
        for weight, value in results["one"]["state_dict"].items():
            torch.testing.assert_close(results[name]["state_dict"][weight], value, rtol=1e-4, atol=1e-6)

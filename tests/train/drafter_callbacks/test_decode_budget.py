"""Validation by decoding takes its share of the training time, and the same prompts every time."""

import logging
import time
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
from training import MakeCache, make_module, make_trainer

from draftsmith.decode.engine import Engine
from draftsmith.train.batches.data_module import CacheDataModule
from draftsmith.train.drafter_callbacks import decode_budget
from draftsmith.train.drafter_callbacks.decode_budget import DecodeBudget
from draftsmith.train.drafter_callbacks.tree_decode_validation import TreeDecodeValidation


class Clock:
    """Training steps last a second; so does decoding a batch. Notes how many prompts each call decodes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.decoded: list[int] = []
        monkeypatch.setattr(decode_budget.time, "perf_counter", lambda: self.now)
        generate = Engine.generate

        def slow(engine: Engine, prompts: list[list[int]], *rest: Any, **named: Any) -> Any:
            self.now += 1.0
            self.decoded.append(len(prompts))
            return generate(engine, prompts, *rest, **named)

        monkeypatch.setattr(Engine, "generate", slow)


class Second(pl.Callback):
    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_train_batch_end(self, *_: Any) -> None:
        self.clock.now += 1.0


@pytest.mark.parametrize(
    ("share", "decoded"),
    [(0.5, [1, 1, 2]), (0.25, [1, 1]), (0.01, [1, 1]), (None, [3, 3])],
)
def test_each_validation_decodes_what_its_share_of_the_time_allows(
    target_dir: Path,
    make_cache: MakeCache,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    share: float | None,
    decoded: list[int],
) -> None:
    clock = Clock(monkeypatch)
    data = CacheDataModule(make_cache([9] * 10), val_fraction=0.3, tokens_per_batch=16)
    validation = TreeDecodeValidation(3, 4, batch_size=1, time_share=share)
    with caplog.at_level(logging.INFO):
        make_trainer(tmp_path, max_epochs=2, callbacks=[Second(clock), validation]).fit(make_module(target_dir), data)
    assert clock.decoded == decoded
    said = [record.message for record in caplog.records if "of 3 prompts" in record.message]
    assert len(said) == (0 if share is None else 1)


def test_a_resumed_run_decodes_as_many_prompts_as_before() -> None:
    before, after = TreeDecodeValidation(), TreeDecodeValidation()
    before.budget.rounds = 3
    after.load_state_dict(before.state_dict())
    assert after.budget.rounds == 3


@pytest.mark.parametrize("share", [0.0, -1.0, 1.5, float("nan")])
def test_a_share_out_of_range_is_an_error(share: float) -> None:
    with pytest.raises(ValueError, match="time_share"):
        DecodeBudget(share)


def test_the_clock_is_the_real_one() -> None:
    budget = DecodeBudget(1.0)
    budget.start_training()
    time.sleep(0.01)
    budget.stop_training()
    assert 0.0 < budget._trained < 10.0

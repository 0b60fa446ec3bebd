"""A run says how long it is, and when its validations can tell nothing."""

import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
from training import MakeCache, make_module, make_trainer

from draftsmith.train.batches.data_module import CacheDataModule
from draftsmith.train.drafter import run_length
from draftsmith.train.drafter.run_length import RunLength


@pytest.fixture(scope="module")
def cache(make_cache: MakeCache) -> Path:
    return make_cache([9] * 10)


def told(
    target_dir: Path, cache: Path, root: Path, caplog: pytest.LogCaptureFixture, **settings: Any
) -> tuple[str, list[str]]:
    """What a run of 4 batches an epoch prints at its start, and its warnings."""
    data = CacheDataModule(cache, val_fraction=0.2, tokens_per_batch=20)
    with warnings.catch_warnings(record=True) as found, caplog.at_level(logging.INFO):
        warnings.simplefilter("always")
        make_trainer(root, callbacks=[RunLength()], **settings).fit(make_module(target_dir), data)
    printed = [record.message for record in caplog.records if "this run has" in record.message]
    warned = [str(one.message) for one in found]
    return " ".join(printed), [one for one in warned if "optimiser steps" in one or "no validation" in one]


def test_a_run_says_how_many_steps_it_has_and_that_so_few_tell_nothing(
    target_dir: Path, cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    printed, warned = told(target_dir, cache, tmp_path, caplog, max_epochs=3, accumulate_grad_batches=2)
    assert printed == "this run has 6 optimiser steps; an epoch has 4 batches"
    [few] = warned
    assert few.startswith("6 optimiser steps are too few for a new drafter (fewer than 100)")


@pytest.mark.parametrize(
    ("settings", "first"),
    [
        ({"max_epochs": 1, "check_val_every_n_epoch": 2}, 8),
        ({"max_steps": 2, "val_check_interval": 3}, 3),
        ({"max_steps": 3, "max_epochs": -1, "check_val_every_n_epoch": None, "val_check_interval": 6}, 6),
        ({"max_epochs": 2, "check_val_every_n_epoch": 2}, None),
        ({"max_epochs": 1, "limit_val_batches": 0, "check_val_every_n_epoch": 2}, None),
    ],
    ids=str,
)
def test_a_run_in_which_no_validation_comes_says_so(
    target_dir: Path,
    cache: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    first: int | None,
) -> None:
    monkeypatch.setattr(run_length, "FEW_STEPS", 0)
    _, warned = told(target_dir, cache, tmp_path, caplog, **settings)
    assert [one.partition(",")[0] for one in warned] == (
        [] if first is None else [f"no validation comes: the first would follow step {first}"]
    )

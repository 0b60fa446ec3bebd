"""A run says how long it is, and when its validations can tell nothing."""

import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from training import MakeCache, make_module, make_trainer

from draftsmith.models.target.target import TargetEnds
from draftsmith.train.batches import labelled_text
from draftsmith.train.batches.data_module import CacheDataModule
from draftsmith.train.drafter_callbacks import run_length
from draftsmith.train.drafter_callbacks.run_length import RunLength
from draftsmith.train.drafter_callbacks.tree_decode_validation import TreeDecodeValidation


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
    assert printed == "this run has 6 optimiser steps in at most 3 epochs; an epoch has 4 batches"
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


def test_a_run_says_what_it_trains_on_and_what_a_draft_vocabulary_would_save(
    target_dir: Path, cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    told(target_dir, cache, tmp_path, caplog, max_epochs=1)
    assert any("draft vocab" in record.message or "draft_vocab" in record.message for record in caplog.records)
    vocabulary = TargetEnds.load(str(target_dir)).vocab_size
    data = CacheDataModule(cache, val_fraction=0.2, tokens_per_batch=20)
    data.setup()
    texts = list(data.open_cache().texts(data.train_set.indices))  # type: ignore[union-attr]
    labelled = torch.cat([ids[mask] for ids, mask in texts])
    [line] = [record.message for record in caplog.records if "it trains on" in record.message]
    assert line == (
        f"it trains on 8 samples with {len(labelled)} labelled tokens, {len(labelled.unique())} distinct of a vocabulary of {vocabulary}"
    )


def test_the_proposed_draft_vocabulary_has_nearly_all_labelled_tokens_in_half_the_head_at_most() -> None:
    counts = torch.zeros(64, dtype=torch.int64)
    counts[[3, 9, 40]] = torch.tensor([90, 9, 1])
    assert labelled_text._draft_vocabulary(counts) == [
        "draft_vocab_size 2 would make the drafter's head 32.0 times smaller and hold 99.0 % of the labelled tokens"
    ]
    [line] = labelled_text._draft_vocabulary(torch.ones(64, dtype=torch.int64))
    assert line == "a draft vocabulary would save little: 64 tokens are needed for 99 % of the labelled ones"


@pytest.mark.parametrize(
    ("validation", "decoding"),
    [
        ([], "decodes no prompts"),
        ([TreeDecodeValidation(1, 2)], "decodes for at most 15 % of the training time, one batch of prompts at least"),
        ([TreeDecodeValidation(1, 2, time_share=None)], "decodes all its prompts, however long that takes"),
    ],
    ids=["none", "share", "all"],
)
def test_a_run_says_when_validations_come_and_what_share_of_its_time_they_may_take(
    target_dir: Path,
    cache: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    validation: list[TreeDecodeValidation],
    decoding: str,
) -> None:
    data = CacheDataModule(cache, val_fraction=0.2, tokens_per_batch=20)
    with caplog.at_level(logging.INFO):
        trainer = make_trainer(tmp_path, callbacks=[RunLength(), *validation], val_check_interval=2)
        trainer.fit(make_module(target_dir), data)
    [line] = [record.message for record in caplog.records if "a validation comes" in record.message]
    assert line.startswith(
        f"a validation comes every 2 batches: it reads held-out text, 50 % of what training reads in between, and {decoding}"
    )


def test_a_drafter_whose_vocabulary_is_chosen_already_gets_no_proposal() -> None:
    counts = torch.zeros(64, dtype=torch.int64)
    counts[3] = 9
    texts = {size: labelled_text.LabelledText(counts, 1, 1, draft_vocabulary=size).lines() for size in (64, 8, None)}
    assert [len(lines) for lines in texts.values()] == [2, 1, 1]


def test_counting_takes_a_sample_of_a_large_cache(cache: Path) -> None:
    data = CacheDataModule(cache, val_fraction=0.0)
    data.setup()
    counts, counted, samples = data.sampled_token_counts(300, 4)
    assert (counted, samples) == (4, 10)
    whole, counted, _ = data.sampled_token_counts(300, 10)
    assert counted == 10
    assert torch.equal(whole, data.token_counts(300))
    assert 0 < int(counts.sum()) < int(whole.sum())


def test_a_run_that_keeps_no_drafter_says_so(target_dir: Path, cache: Path, tmp_path: Path) -> None:
    data = CacheDataModule(cache, val_fraction=0.2, tokens_per_batch=20)
    with pytest.warns(UserWarning, match="nothing keeps this run's drafter; add draftsmith.train.KeepBestDrafter"):
        make_trainer(tmp_path, callbacks=[RunLength()], max_epochs=1).fit(make_module(target_dir), data)

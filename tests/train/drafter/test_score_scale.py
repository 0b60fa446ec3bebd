"""The factor on draft scores: fitted to the target's choices in validation, saved with the drafter, and used by the search alone."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from training import MakeCache, make_module, make_trainer

from draftsmith.data.cache.reader import HiddenStateCache
from draftsmith.data.shards.packing import pack
from draftsmith.models import ReDrafter, Target
from draftsmith.models.drafters.drafter_folder import load_drafter
from draftsmith.models.drafters.rollout import PackedBatch, data_rollout
from draftsmith.models.target.target import PRE_NORM
from draftsmith.train.batches.data_module import CacheDataModule
from draftsmith.train.drafter.objective import inverse_draft_ids
from draftsmith.train.drafter.score_scale import SCALES, best_scale, surprise_by_scale
from draftsmith.train.drafter_callbacks.keep_best_drafter import KeepBestDrafter


def eager_surprise(target: Target, drafter: ReDrafter, cache: HiddenStateCache, scale: float) -> float:
    """Sample by sample and token by token."""
    total = 0.0
    draft_ids = drafter.draft_ids().tolist()
    for sample in cache:
        batch = pack([sample])
        rollout_logits = drafter_logits(drafter, batch)
        chosen = target.ends.logits(target.ends.final_norm(batch.hidden[PRE_NORM])).argmax(-1).tolist()
        for anchor in range(len(batch.input_ids) - 2):
            if batch.loss_mask[anchor + 1] and batch.loss_mask[anchor + 2] and chosen[anchor + 1] in draft_ids:
                log_probs = (scale * rollout_logits[anchor]).log_softmax(-1)
                total -= float(log_probs[draft_ids.index(chosen[anchor + 1])])
    return total


def drafter_logits(drafter: ReDrafter, batch: PackedBatch) -> torch.Tensor:
    rollout = data_rollout(batch, 1)
    logits = drafter.teacher_forced(batch, rollout)[0] @ drafter.head_weight.T
    found = torch.zeros(int(rollout.anchors.max()) + 1, logits.shape[-1])
    found[rollout.anchors] = logits
    return found


@torch.no_grad()
@pytest.mark.parametrize("draft_vocab", [None, 20])
def test_surprise_is_the_cross_entropy_of_the_targets_choices_at_every_factor(
    target: Target, make_cache: MakeCache, draft_vocab: int | None
) -> None:
    ids = None if draft_vocab is None else torch.arange(3, 3 + draft_vocab)
    torch.manual_seed(3)
    drafter = ReDrafter.for_target(target.ends, draft_token_ids=ids, head_init="random")
    cache = HiddenStateCache(make_cache([9, 12, 7]))
    to_draft = inverse_draft_ids(drafter.draft_ids(), target.ends.vocab_size)
    found = surprise_by_scale(pack(list(cache)), drafter, target.ends, to_draft)
    for number in (0, 4, 16):
        assert float(found[number]) == pytest.approx(eager_surprise(target, drafter, cache, SCALES[number]), rel=1e-4)


@settings(deadline=None)
@given(st.floats(0.6, 7.0), st.floats(0.1, 50.0))
def test_the_lowest_point_of_a_smooth_curve_is_found_between_the_points_of_the_grid(lowest: float, bend: float) -> None:
    curve = torch.tensor([bend * (torch.tensor(scale / lowest).log2() ** 2) + 3.0 for scale in SCALES])
    assert best_scale(curve) == pytest.approx(lowest, rel=0.01, abs=0.006)


def test_a_curve_that_falls_to_the_end_of_the_grid_gives_its_end() -> None:
    assert best_scale(torch.arange(17.0, 0.0, -1.0)) == 8.0
    assert best_scale(torch.arange(17.0)) == 0.5


def test_where_no_token_was_counted_scores_are_read_as_they_are() -> None:
    assert best_scale(torch.zeros(17)) == 1.0


def test_validation_fits_the_factor_and_the_saved_drafter_has_it(
    target_dir: Path, make_cache: MakeCache, tmp_path: Path
) -> None:
    # Taught to be right about a target that is sure of nothing, a drafter must be read more sharply than it speaks.
    data = CacheDataModule(make_cache([12] * 40), val_cache=make_cache([12] * 8, seed=1), tokens_per_batch=60)
    module = make_module(target_dir, distillation="path", lr=1e-2)
    trainer = make_trainer(tmp_path, max_epochs=8, callbacks=[KeepBestDrafter(tmp_path / "drafter")])
    trainer.fit(module, data)
    fitted = float(trainer.callback_metrics["val/score_scale"])
    assert fitted > 1.2
    assert load_drafter(tmp_path / "drafter").config.score_scale == pytest.approx(fitted)


def test_a_resumed_run_that_does_not_validate_again_keeps_the_factor(
    target_dir: Path, make_cache: MakeCache, tmp_path: Path
) -> None:
    cache = make_cache([12] * 10)
    trainer = make_trainer(tmp_path, max_steps=4, enable_checkpointing=True)
    module = make_module(target_dir)
    trainer.fit(module, CacheDataModule(cache, val_fraction=0.1, tokens_per_batch=40))
    module.evaluated.config.score_scale = 2.5
    trainer.save_checkpoint(tmp_path / "kept.ckpt")
    resumed = make_module(target_dir)
    other = make_trainer(tmp_path, max_steps=4, limit_val_batches=0)
    other.fit(resumed, CacheDataModule(cache, val_fraction=0.1, tokens_per_batch=40), ckpt_path=tmp_path / "kept.ckpt")
    assert resumed.evaluated.config.score_scale == 2.5


def test_temperature_softens_the_factor(target: Target) -> None:
    drafter = ReDrafter.for_target(target.ends, head_init="random")
    drafter.config.score_scale = 3.0
    assert [drafter.score_scale(one) for one in (0.0, 0.25, 0.5, 1.0, 2.0)] == [3.0, 3.0, 2.0, 1.0, 0.5]


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf"), "sharp"])
def test_a_factor_that_is_none_is_refused(target: Target, value: object) -> None:
    config = ReDrafter.for_target(target.ends).config
    config.score_scale = value  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"score_scale is .* must be a finite number above 0"):
        ReDrafter(config)

"""Training block drafters: each recipe learns, anchors are drawn, and the best drafter decodes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from training import KeepLosses, MakeCache, make_module, make_trainer

from draftsmith.models.drafters.drafter_folder import load_drafter
from draftsmith.models.drafters.rollout import PackedBatch, data_rollout, fewer_anchors
from draftsmith.models.families.block import BlockFamily
from draftsmith.models.target.target import PRE_NORM, TargetEnds
from draftsmith.train.batches.data_module import CacheDataModule
from draftsmith.train.drafter.objective import Objective
from draftsmith.train.drafter.starting_drafter import adopt
from draftsmith.train.drafter_callbacks.keep_best_drafter import KeepBestDrafter
from draftsmith.train.drafter_callbacks.tree_decode_validation import TreeDecodeValidation

LAYERS = ["layer.0.output", PRE_NORM]
RECIPES: dict[str, tuple[BlockFamily, dict[str, Any]]] = {
    "plain": (BlockFamily(layers=LAYERS), {"horizon_decay": 0.8}),
    "causal, 25 tokens": (BlockFamily(layers=LAYERS, mask="causal", draft_vocab_size=25, recompute=True), {}),
    "from the anchor": (BlockFamily(layers=LAYERS, sample_from_anchor=True, num_draft_layers=2), {"max_anchors": 12}),
    "dspark": (
        BlockFamily(layers=LAYERS, sample_from_anchor=True, correction="vanilla", correction_rank=4, confidence=True),
        {"divergence": "l1", "text_weight": 0.1},
    ),
    "dflash 2": (
        BlockFamily(layers=LAYERS, convolution=True, correction="selector", correction_rank=4, candidates=5),
        {},
    ),
    "gated": (BlockFamily(layers=LAYERS, sample_from_anchor=True, correction="gated", correction_rank=4), {}),
}


@pytest.fixture(scope="module")
def cache(make_cache: MakeCache) -> Path:
    return make_cache([12] * 40, layers=tuple(LAYERS))


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_learns(target_dir: Path, cache: Path, tmp_path: Path, recipe: str) -> None:
    family, settings = RECIPES[recipe]
    module = make_module(target_dir, drafter=family, lr=1e-2, distillation="path", **settings)
    losses: list[float] = []
    trainer = make_trainer(tmp_path, max_epochs=6, callbacks=[KeepLosses(losses)])
    trainer.fit(module, CacheDataModule(cache, tokens_per_batch=60))
    assert sum(losses[-8:]) < 0.8 * sum(losses[:8])
    assert "val/step2/top1" in trainer.callback_metrics
    assert ("val/step2/candidate_recall" in trainer.callback_metrics) == (recipe == "dflash 2")


@pytest.mark.parametrize(
    ("distillation", "chosen"),
    [
        ("none", {}),
        ("path", {}),
        ("path", {"correction": "vanilla", "correction_rank": 4, "confidence_with_markov": False}),
    ],
)
def test_a_confidence_head_learns_the_acceptance(
    target_dir: Path, cache: Path, tmp_path: Path, distillation: str, chosen: dict[str, Any]
) -> None:
    family = BlockFamily(layers=LAYERS, sample_from_anchor=True, confidence=True, **chosen)
    module = make_module(target_dir, drafter=family, lr=1e-2, distillation=distillation)
    data = CacheDataModule(cache, val_fraction=0.2, tokens_per_batch=60)
    trainer = make_trainer(tmp_path, max_epochs=6)
    [before] = trainer.validate(module, data, verbose=False)
    trainer.fit(module, data)
    after = trainer.callback_metrics

    def errors(figures: Any) -> list[float]:
        return [abs(float(figures[f"val/step{k}/confidence"] - figures[f"val/step{k}/acceptance"])) for k in range(3)]

    assert max(errors(after)) < 0.05 < min(errors(before))


def test_a_confidence_head_that_cannot_learn_is_refused(target_dir: Path, cache: Path, tmp_path: Path) -> None:
    for family, settings, complaint in (
        (BlockFamily(layers=LAYERS, confidence=True), {"distillation": "local"}, "use 'path' or 'none'"),
        (BlockFamily(layers=LAYERS), {"confidence_weight": 1.0}, "has no confidence head; leave it null"),
    ):
        with pytest.raises(ValueError, match=complaint):
            make_trainer(tmp_path).fit(make_module(target_dir, drafter=family, **settings), CacheDataModule(cache))
    with pytest.raises(ValueError, match=r"confidence_weight is 0\.0; it must be above 0"):
        Objective(2, confidence_weight=0.0)


def test_a_mask_that_ends_replies_is_an_error(target_dir: Path, cache: Path, tmp_path: Path) -> None:
    [end, *_] = TargetEnds.load(str(target_dir)).eos_token_ids
    module = make_module(target_dir, drafter=BlockFamily(layers=LAYERS, mask_token_id=end))
    with pytest.raises(ValueError, match=f"mask_token_id {end} ends the target's replies"):
        make_trainer(tmp_path, max_epochs=1).fit(module, CacheDataModule(cache, tokens_per_batch=60))


def test_the_best_drafter_decodes_and_loads_back(target_dir: Path, cache: Path, tmp_path: Path) -> None:
    callbacks = [TreeDecodeValidation(2, 8, draft_length=3), KeepBestDrafter(tmp_path / "best")]
    module = make_module(target_dir, drafter=BlockFamily(layers=LAYERS), max_anchors=16)
    trainer = make_trainer(tmp_path, callbacks=callbacks)
    trainer.fit(module, CacheDataModule(cache, val_fraction=0.2, tokens_per_batch=60))
    assert trainer.callback_metrics["val/tokens_per_step"] >= 1.0
    again, weights = load_drafter(tmp_path / "best").state_dict(), module.evaluated.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in again.items())


def text(length: int) -> PackedBatch:
    places = torch.arange(length)
    return PackedBatch(places, places >= 2, torch.zeros(length, dtype=torch.int64), places, {})


def test_fewer_anchors_are_spread_evenly_or_drawn() -> None:
    rollout = data_rollout(text(10), 2)
    assert rollout.anchors.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    spread = fewer_anchors(rollout, 3, at_random=False)
    assert spread.anchors.tolist() == [1, 3, 5], "8 predicts nothing, so 7 are left"
    assert torch.equal(spread.tokens, rollout.tokens[[0, 2, 4]])
    assert torch.equal(spread.valid, rollout.valid[[0, 2, 4]])
    torch.manual_seed(0)
    drawn = [tuple(fewer_anchors(rollout, 3, at_random=True).anchors.tolist()) for _ in range(8)]
    assert len(set(drawn)) > 1
    assert all(list(each) == sorted(set(each)) and 8 not in each for each in drawn)
    assert fewer_anchors(rollout, 20, at_random=True).anchors.tolist() == [1, 2, 3, 4, 5, 6, 7]


def test_every_anchor_is_learned_from_where_no_number_is_given() -> None:
    assert torch.equal(Objective(2).rollout(text(10)).anchors, data_rollout(text(10), 2).anchors)
    with pytest.raises(ValueError, match="max_anchors is 0; it must be at least 1, or null"):
        replace(Objective(2), max_anchors=0)


def test_a_run_says_which_settings_the_drafter_of_init_from_has_otherwise(
    target_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ends = TargetEnds.load(str(target_dir))
    trained = BlockFamily(layers=LAYERS, mask="causal", num_draft_layers=2)
    trained.build(ends, None, 3, "").save_pretrained(tmp_path)
    adopt(tmp_path, trained, ends, "")
    assert not caplog.text
    adopt(tmp_path, BlockFamily(), ends, "")
    assert "keeps its own shape" in caplog.text
    assert "causal True (the run says False), num_draft_layers 2 (the run says 1)" in caplog.text
    assert "layers [" not in caplog.text, "the run leaves them to the drafter"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"correction_rank": 32}, "correction_rank 32: not used, for correction 'none' has no such size"),
        (
            {"correction": "vanilla", "correction_state": 8},
            "correction_state 8: not used, for correction 'vanilla' has no such size",
        ),
        ({"correction": "gru", "correction_rank": 4, "correction_state": 8}, ""),
    ],
)
def test_a_size_of_another_correction_is_said_to_be_unused(
    target_dir: Path, caplog: pytest.LogCaptureFixture, settings: dict[str, Any], said: str
) -> None:
    BlockFamily(layers=LAYERS, **settings).build(TargetEnds.load(str(target_dir)), None, 3, "")
    assert said in caplog.text if said else not caplog.text

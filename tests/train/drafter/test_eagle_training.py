"""Training EAGLE drafters: the recipes of EAGLE-1, HASS and EAGLE-3 on a tiny random target."""

from pathlib import Path
from typing import Any

import pytest
import torch
from training import KeepLosses, MakeCache, make_module, make_trainer
from transformers import AutoModel

from draftsmith.models.drafters.family import DrafterFamily
from draftsmith.models.families.eagle import EagleFamily
from draftsmith.models.families.eagle3 import Eagle3Family
from draftsmith.models.families.redrafter import ReDrafterFamily
from draftsmith.models.target.target import PRE_NORM
from draftsmith.train.batches.data_module import CacheDataModule
from draftsmith.train.drafter.module import DraftModule
from draftsmith.train.drafter_callbacks.keep_best_drafter import KeepBestDrafter
from draftsmith.train.drafter_callbacks.tree_decode_validation import TreeDecodeValidation

LAYERS = ("layer.0.output", PRE_NORM)
EAGLE = {"distillation": "path", "feature_weight": 1.0, "logit_weight": 0.1, "num_steps": 1, "val_steps": 3}
RECIPES: dict[str, tuple[DrafterFamily, dict[str, Any]]] = {
    "eagle": (EagleFamily(), EAGLE),
    "eagle, noisy, 20 tokens": (EagleFamily(draft_vocab_size=20, feature_noise=0.01), EAGLE),
    "acceptance": (
        EagleFamily(draft_vocab_size=20),
        {**EAGLE, "num_steps": 2, "divergence": "lk_hybrid", "d_pace": 0.5},
    ),
    "hass": (EagleFamily(), {**EAGLE, "num_steps": 3, "top_k_weight": 1.0, "top_k": 5}),
    "eagle3": (
        Eagle3Family(layers=list(LAYERS), draft_vocab_size=25),
        {"distillation": "path", "num_steps": 3, "horizon_decay": 0.8, "skip_outside": True},
    ),
}


@pytest.fixture(scope="module")
def cache(make_cache: MakeCache) -> Path:
    """One cache for every drafter: what a family does not read stays on the disk."""
    return make_cache([12] * 40, layers=LAYERS)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_learns(target_dir: Path, cache: Path, tmp_path: Path, recipe: str, precision: str) -> None:
    family, settings = RECIPES[recipe]
    module = make_module(target_dir, drafter=family, lr=1e-2, **settings)
    losses: list[float] = []
    trainer = make_trainer(tmp_path, max_epochs=10, precision=precision, callbacks=[KeepLosses(losses)])
    trainer.fit(module, CacheDataModule(cache, tokens_per_batch=60))
    assert sum(losses[-8:]) < 0.75 * sum(losses[:8])
    assert "val/step2/top1" in trainer.callback_metrics


def test_the_feature_loss_is_logged_for_every_step(target_dir: Path, cache: Path, tmp_path: Path) -> None:
    family, settings = RECIPES["hass"]
    module = make_module(target_dir, drafter=family, **settings)
    noted: dict[str, float] = {}
    module._log_scalars = noted.update  # type: ignore[method-assign,assignment]
    make_trainer(tmp_path, max_steps=2).fit(module, CacheDataModule(cache, tokens_per_batch=60))
    assert all(noted[f"train/step{step}/feature_loss"] > 0 for step in range(3))


def test_only_the_layers_that_are_read_are_laid_out(target_dir: Path, cache: Path, tmp_path: Path) -> None:
    for recipe, layers in (("eagle", {PRE_NORM}), ("eagle3", set(LAYERS))):
        family, settings = RECIPES[recipe]
        data = CacheDataModule(cache, tokens_per_batch=60)
        make_trainer(tmp_path, max_steps=1).fit(make_module(target_dir, drafter=family, **settings), data)
        assert set(next(iter(data.train_dataloader())).packed.hidden) == layers


def test_real_decoding_validates_and_the_best_drafter_loads_back(target_dir: Path, cache: Path, tmp_path: Path) -> None:
    for recipe in ("hass", "eagle3"):
        family, settings = RECIPES[recipe]
        callbacks = [
            TreeDecodeValidation(2, 8, draft_length=3, beam_width=2, node_budget=5),
            KeepBestDrafter(tmp_path / recipe),
        ]
        module = make_module(target_dir, drafter=family, **settings)
        trainer = make_trainer(tmp_path, callbacks=callbacks)
        trainer.fit(module, CacheDataModule(cache, val_fraction=0.2, tokens_per_batch=60))
        assert trainer.callback_metrics["val/tokens_per_step"] >= 1.0
        again = AutoModel.from_pretrained(tmp_path / recipe)
        own = module.evaluated.state_dict()
        assert all(torch.equal(tensor, own[name]) for name, tensor in again.state_dict().items())


def test_a_trained_drafter_goes_on_where_it_was_left(target_dir: Path, cache: Path, tmp_path: Path) -> None:
    family, settings = RECIPES["eagle, noisy, 20 tokens"]
    first = make_module(target_dir, drafter=family, lr=1e-2, **settings)
    data = CacheDataModule(cache, val_fraction=0.2, tokens_per_batch=60)
    make_trainer(tmp_path, max_epochs=4, callbacks=[KeepBestDrafter(tmp_path / "first")]).fit(first, data)
    again = make_module(target_dir, drafter=family, init_from=tmp_path / "first", ema_decay=0.5, **settings)
    trainer = make_trainer(tmp_path)
    reached = trainer.validate(again, CacheDataModule(cache, val_fraction=0.2, tokens_per_batch=60), verbose=False)[0]
    own = make_trainer(tmp_path).validate(first, data, verbose=False)[0]
    assert reached["val/loss"] == pytest.approx(own["val/loss"], rel=1e-5)
    assert again.drafter is not None
    assert again.drafter.feature_noise == 0.01  # type: ignore[union-attr]
    other = make_module(target_dir, drafter=ReDrafterFamily(), init_from=tmp_path / "first")
    with pytest.raises(ValueError, match="holds a Eagle, the run's family makes a ReDrafter"):
        make_trainer(tmp_path).fit(other, CacheDataModule(cache))


@pytest.mark.parametrize(
    ("family", "settings", "complaint"),
    [
        (ReDrafterFamily(), {"feature_weight": 1.0}, "predicts tokens only, no features"),
        (Eagle3Family(layers=list(LAYERS)), {"feature_weight": 1.0}, "predicts tokens only, no features"),
        (Eagle3Family(), {}, "EAGLE-3 fuses three layers, the target has 2"),
        (Eagle3Family(layers=["layer.1.output"]), {}, r"reads the layers \['layer.1.output'\]"),
    ],
)
def test_what_cannot_be_taught_is_refused_before_training(
    target_dir: Path, cache: Path, tmp_path: Path, family: DrafterFamily, settings: dict[str, Any], complaint: str
) -> None:
    module = make_module(target_dir, drafter=family, **settings)
    with pytest.raises(ValueError, match=complaint):
        make_trainer(tmp_path).fit(module, CacheDataModule(cache))


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"top_k_weight": 1.0}, "use 'path'"),
        ({"skip_outside": True, "distillation": "local"}, "use 'path'"),
        ({"feature_weight": -1.0}, "must be at least 0"),
        ({"logit_weight": 0.0}, "one above"),
        ({"top_k_weight": 1.0, "top_k": 0, "distillation": "path"}, "both must be positive"),
        ({"divergence": "l1"}, "divergence l1 asks for the target's distribution"),
        ({"text_weight": 0.1, "distillation": "local"}, "text_weight asks for the target's distribution"),
        ({"text_weight": 1.0, "distillation": "path"}, "text_weight is 1.0"),
        ({"d_pace": 1.0}, "d_pace is 1.0"),
        ({"top_k_weight": 1.0, "distillation": "path", "divergence": "l1"}, "set top_k_weight to 0"),
    ],
)
def test_weights_that_make_no_sense_are_refused(target_dir: Path, settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        DraftModule(str(target_dir), EagleFamily(), **settings)

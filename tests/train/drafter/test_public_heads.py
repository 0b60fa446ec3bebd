"""Public heads as the start of a training run: all weights or LoRA, and the result is exported again."""

import json
from pathlib import Path

import pytest
import torch
from public_heads import Builder, normed_residual, official_eagle
from training import MakeCache, make_module, make_trainer

from draftsmith.cli import main
from draftsmith.models import Eagle, Eagle3
from draftsmith.models.drafters.drafter_folder import load_drafter
from draftsmith.models.drafters.other_layouts import TargetBond
from draftsmith.models.families.eagle import EagleFamily
from draftsmith.models.families.eagle3 import Eagle3Family
from draftsmith.models.lora.lora_adapter import LoraSettings, read_bond
from draftsmith.models.target.target import PRE_NORM, Target
from draftsmith.train.batches.data_module import CacheDataModule
from draftsmith.train.drafter_callbacks.keep_best_drafter import KeepBestDrafter

LAYERS = ("layer.0.output", PRE_NORM)
EAGLE = {"drafter": EagleFamily(), "distillation": "path", "feature_weight": 1.0, "logit_weight": 0.1, "num_steps": 2}
EAGLE3 = {"drafter": Eagle3Family(layers=list(LAYERS)), "distillation": "path"}


@pytest.fixture(scope="module")
def cache(make_cache: MakeCache) -> Path:
    return make_cache([12] * 12, layers=LAYERS)


def trained(target_dir: Path, cache: Path, folder: Path, **settings: object) -> Path:
    """What a few batches leave."""
    trainer = make_trainer(folder, max_steps=3, callbacks=[KeepBestDrafter(folder / "drafter")])
    trainer.fit(make_module(target_dir, **settings), CacheDataModule(cache, val_fraction=0.2, tokens_per_batch=60))
    return folder / "drafter"


@pytest.mark.parametrize(("build", "settings"), [(official_eagle, EAGLE), (normed_residual, EAGLE3)])
def test_all_weights_learn_and_the_result_is_exported(
    tmp_path: Path, target: Target, target_dir: Path, cache: Path, build: Builder, settings: dict
) -> None:
    build(tmp_path / "public", target.ends)
    drafter = trained(target_dir, cache, tmp_path / "run", init_from=tmp_path / "public", **settings)
    before, after = load_drafter(tmp_path / "public", target=TargetBond(target.ends)), load_drafter(drafter)
    assert type(after) is type(before)
    assert isinstance(after, Eagle | Eagle3)
    assert not torch.equal(after.fc.weight, before.fc.weight)
    assert after.config.target_fingerprint == target.fingerprint
    if isinstance(after, Eagle3):
        assert after.config.norm_before_residual
        words = ["--drafter", str(drafter), "--target", str(target_dir), "--layout", "speculators"]
        assert main(["export", *words, "--out", str(tmp_path / "again")]) == 0
        fields = json.loads((tmp_path / "again" / "config.json").read_text())
        assert fields["norm_before_residual"] is True
    else:
        assert after.config.bias


def test_an_adapter_on_a_public_head_is_loaded_and_exported_with_it(
    tmp_path: Path, target: Target, target_dir: Path, cache: Path
) -> None:
    public, bond = tmp_path / "public", TargetBond(target.ends)
    normed_residual(public, target.ends)
    lora = LoraSettings(rank=2, alpha=4.0)
    adapter = trained(target_dir, cache, tmp_path / "run", init_from=public, lora=lora, lr=3e-2, **EAGLE3)
    assert read_bond(adapter).drafter == str(public)
    below, merged = load_drafter(public, target=bond), load_drafter(adapter, target=bond)
    assert isinstance(below, Eagle3)
    assert isinstance(merged, Eagle3)
    assert not torch.equal(merged.fc.weight, below.fc.weight)
    assert torch.equal(merged.norm.weight, below.norm.weight)
    words = ["--drafter", str(public), "--drafter-adapter", str(adapter), "--target", str(target_dir)]
    assert main(["export", *words, "--out", str(tmp_path / "whole")]) == 0
    whole = load_drafter(tmp_path / "whole")
    assert isinstance(whole, Eagle3)
    torch.testing.assert_close(whole.fc.weight, merged.fc.weight)

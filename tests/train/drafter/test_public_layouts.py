"""Folders in every layout of other software: each decodes the target's own tokens, is trained further, and goes back into its layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from every_family import TWO_LAYERS
from safetensors.torch import load_file
from training import VOCAB, MakeCache, make_module, make_trainer

from draftsmith.decode.engine import Engine
from draftsmith.decode.sampling import GenerationSettings
from draftsmith.export.layouts.layouts import load_any, write
from draftsmith.export.layouts.readback import probe_logits, tensors_of
from draftsmith.models import Drafter, Eagle, Eagle3, Eagle3Config
from draftsmith.models.drafters.registry import family_of
from draftsmith.models.families.block import BlockDrafter
from draftsmith.models.families.heads import HeadsDrafter
from draftsmith.models.families.redrafter import ReDrafter
from draftsmith.models.families.riders.mtp import MtpHead
from draftsmith.models.target.target import Target
from draftsmith.models.tree.limits import DraftLimits
from draftsmith.train.batches.data_module import CacheDataModule
from draftsmith.train.drafter_callbacks.keep_best_drafter import KeepBestDrafter

IDS = torch.tensor([0, 3, 4, 9, 10, 17, 30, 36])
BLOCK: dict[str, Any] = {"mask_token_id": VOCAB - 1, "num_draft_layers": 2, "num_draft_steps": 3, "correction_rank": 5}
DSPARK: dict[str, Any] = BLOCK | {"sample_from_anchor": True, "draft_token_ids": IDS}
DFLASH2: dict[str, Any] = BLOCK | {"correction": "selector", "convolution": True, "candidates": 5}
DOMINO: dict[str, Any] = BLOCK | {"correction": "gru", "correction_state": 6, "sample_from_anchor": True}
NORMS = {"norm_before_residual": True, "norm_before_fc": True, "norm_output": True}
MASKED: dict[str, Any] = {"draft_token_ids": IDS, "mask_token_id": VOCAB - 1}
LAYOUTS: dict[str, tuple[str, type[Any], dict[str, Any], dict[str, Any]]] = {
    "Apple's": ("apple", ReDrafter, {}, {}),
    "EAGLE-1": ("eagle", Eagle, {}, {}),
    "EAGLE-3": ("eagle3", Eagle3, {"draft_token_ids": IDS}, {}),
    "EAGLE-3.1": ("eagle3", Eagle3, {"draft_token_ids": IDS, "num_draft_layers": 2}, NORMS),
    "EAGLE-3 with biases": ("eagle3", Eagle3, {}, {"attention_bias": True, "fc_norm": True}),
    "TensorRT-LLM's": ("tensorrt-llm", Eagle3, {"draft_token_ids": IDS}, {}),
    "EAGLE-3 of speculators": ("speculators", Eagle3, {"draft_token_ids": IDS}, {"norm_before_residual": True}),
    "Qwen3's of speculators": ("speculators", Eagle3, {"draft_token_ids": IDS, "head_norms": True}, {}),
    "P-EAGLE": ("peagle", Eagle3, MASKED, {}),
    "P-EAGLE of speculators": ("speculators", Eagle3, MASKED | {"num_draft_layers": 2}, {}),
    "DFlash": ("dflash", BlockDrafter, BLOCK | {"draft_token_ids": IDS}, {}),
    "DFlash of speculators": ("speculators", BlockDrafter, BLOCK, {}),
    "JetSpec": ("dflash", BlockDrafter, BLOCK | {"causal": True}, {}),
    "DFlash 2": ("dflash2", BlockDrafter, DFLASH2, {}),
    "DSpark": ("dspark", BlockDrafter, DSPARK | {"correction": "gated", "confidence": True}, {}),
    "DSpark of speculators": ("speculators", BlockDrafter, DSPARK | {"correction": "vanilla"}, {}),
    "Domino": ("domino", BlockDrafter, DOMINO, {}),
    "Medusa": ("medusa", HeadsDrafter, {"head": "per_step"}, {}),
    "MLP": (
        "mlp_speculator",
        HeadsDrafter,
        {"network": "mlp", "head": "shared", "tied": True, "scale_input": True},
        {},
    ),
    "MTP": ("mtp", MtpHead, {}, {}),
}


@pytest.fixture(scope="module")
def cache(make_cache: MakeCache) -> Path:
    return make_cache([12] * 8, layers=TWO_LAYERS)


def written(target: Target, folder: Path, name: str) -> Drafter:
    layout, kind, chosen, switches = LAYOUTS[name]
    layers = {"layers": list(TWO_LAYERS)} if kind in (BlockDrafter, Eagle3) else {}
    drafter = kind.for_target(target.ends, **layers, **chosen)
    if switches:
        own = drafter
        drafter = Eagle3(Eagle3Config.from_dict(own.config.to_dict() | switches)).attach(target.ends)
        if own.d2t is not None:
            drafter.set_draft_ids(chosen["draft_token_ids"])
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    folder.mkdir()
    write(drafter.eval(), folder, layout, target.ends)
    return drafter


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_folder_decodes_learns_and_goes_back_into_its_layout(
    tmp_path: Path, target: Target, target_dir: Path, cache: Path, name: str
) -> None:
    public = tmp_path / "public"
    made = written(target, public, name)
    drafter = load_any(public, target.ends)
    assert torch.equal(probe_logits(drafter), probe_logits(made))
    settings, prompts = GenerationSettings(max_new_tokens=8), [[1, 5, 9], [1, 7]]
    plain = Engine(target).generate(prompts, settings)
    drafted = Engine(target, drafter, DraftLimits(2, 2)).generate(prompts, settings)
    assert [reply.token_ids for reply in drafted] == [reply.token_ids for reply in plain]

    keep = KeepBestDrafter(tmp_path / "trained")
    trainer = make_trainer(tmp_path, max_steps=2, callbacks=[keep])
    family = family_of(drafter)
    features = {"feature_weight": 1.0, "logit_weight": 0.1} if family.drafter.predicts_features else {}
    module = make_module(
        target_dir, drafter=family.settings(), init_from=public, num_steps=2, distillation="path", **features
    )
    trainer.fit(module, CacheDataModule(cache, val_fraction=0.25, tokens_per_batch=60))
    trained = load_any(tmp_path / "trained", target.ends)
    before, after = tensors_of(drafter), tensors_of(trained)
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[part], after[part]) for part in before)

    again = tmp_path / "again"
    again.mkdir()
    write(trained, again, LAYOUTS[name][0], target.ends)
    fields, others = (json.loads((folder / "config.json").read_text()) for folder in (public, again))
    assert fields.keys() == others.keys()
    names, trained_names = (load_file(folder / "model.safetensors").keys() for folder in (public, again))
    assert names == trained_names
    back = load_any(again, target.ends)
    assert torch.equal(probe_logits(back), probe_logits(trained))
    after, last = tensors_of(trained), tensors_of(back)
    assert all(torch.equal(after[part], last[part]) for part in after)

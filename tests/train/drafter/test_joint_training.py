"""Heads and an adapter of their target, trained together: both learn, and what is kept decodes with the adapted model alone."""

import logging
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from training import KeepLosses, MakeCache, make_trainer

from draftsmith.decode.engine import Engine
from draftsmith.decode.sampling import GenerationSettings
from draftsmith.models import DraftLimits, Target
from draftsmith.models.drafters.drafter_folder import load_drafter
from draftsmith.models.drafters.rollout import data_rollout
from draftsmith.models.families.block import BlockFamily
from draftsmith.models.families.heads import HeadsFamily
from draftsmith.models.families.riders.rider_drafter import RiderFamily
from draftsmith.models.files.loading import load_causal_lm
from draftsmith.models.target.target import PRE_NORM
from draftsmith.train.batches.data_module import CacheDataModule
from draftsmith.train.drafter.adapted_target import AdaptedTarget, TargetLora, kept
from draftsmith.train.drafter.joint_module import JointDraftModule
from draftsmith.train.drafter_callbacks.keep_best_drafter import KeepBestDrafter
from draftsmith.train.drafter_callbacks.tree_decode_validation import TreeDecodeValidation

LORA = TargetLora(rank=2, lr=1e-2, keep_weight=0.5, heads_weight=1.0, heads_first=0.2)


@pytest.fixture(scope="module")
def cache(make_cache: MakeCache) -> Path:
    return make_cache([12] * 40)


def made(target_dir: Path, **chosen: object) -> JointDraftModule:
    torch.manual_seed(1)
    settings = {"num_steps": 3, "lr": 1e-2, "metrics_every": 1, "target_lora": LORA} | chosen
    return JointDraftModule(str(target_dir), HeadsFamily(), **settings)  # type: ignore[arg-type]


def test_a_fresh_adapter_has_the_targets_states_and_gradients_reach_it(target_dir: Path, cache: Path) -> None:
    target = Target.load(str(target_dir))
    data = CacheDataModule(cache, tokens_per_batch=40)
    data.read_layers((PRE_NORM,))
    data.setup("fit")
    batch = next(iter(data.train_dataloader())).packed
    adapted = AdaptedTarget(target, LORA)
    states = adapted.states(batch)
    torch.testing.assert_close(states, batch.hidden[PRE_NORM].float(), rtol=2e-2, atol=2e-2)  # the cache is in bfloat16
    assert len(data_rollout(batch, 1).anchors) > 0
    with torch.no_grad():
        for weight in adapted.parameters():
            weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)) * 0.5)
    closeness = kept(batch, adapted.states(batch), target.ends)
    assert float(closeness.divergence) > 0.001
    closeness.divergence.backward()
    assert all(weight.grad is not None and bool(weight.grad.any()) for weight in adapted.parameters())
    assert not any(weight.requires_grad for weight in target.ends.head.parameters())


def test_both_learn_and_the_folder_decodes_the_adapted_models_own_tokens(
    target_dir: Path, cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    losses: list[float] = []
    module = made(target_dir)
    kept_best = KeepBestDrafter(tmp_path / "drafter")
    trainer = make_trainer(tmp_path / "run", max_epochs=5, callbacks=[KeepLosses(losses), kept_best])
    trainer.fit(module, CacheDataModule(cache, tokens_per_batch=60, val_fraction=0.1))
    assert sum(losses[-6:]) < 0.9 * sum(losses[:6])
    assert trainer.callback_metrics["val/kept_divergence"] > 0.0
    assert 0.0 < trainer.callback_metrics["val/same_choice"] <= 1.0

    folder, adapter = tmp_path / "drafter", tmp_path / "drafter" / "target_adapter"
    adapted = Target.load(str(target_dir), adapter=str(adapter))
    with caplog.at_level(logging.WARNING):
        drafter = load_drafter(folder)
    assert "NOT the target without it" in caplog.text
    ids = torch.arange(2, 12)[None]
    before, after = Target.load(str(target_dir)).prefix(ids).pre_norm, adapted.prefix(ids).pre_norm
    assert not torch.allclose(before, after, atol=1e-3), "the adapter changes the model"
    peft = PeftModel.from_pretrained(load_causal_lm(str(target_dir), torch.float32, "cpu")[0], str(adapter))
    torch.testing.assert_close(
        peft(ids).logits, adapted.logits(adapted.ends.final_norm(after.clone())), rtol=1e-4, atol=1e-4
    )
    prompts, settings = [[2, 3, 4], [9, 5]], GenerationSettings(max_new_tokens=8)
    plain = [reply.token_ids for reply in Engine(adapted).generate(prompts, settings)]
    drafted = Engine(adapted, drafter, DraftLimits(3, 3, node_budget=6)).generate(prompts, settings)
    assert [reply.token_ids for reply in drafted] == plain
    with pytest.raises(ValueError, match="this drafter was trained for target"):
        Engine(Target.load(str(target_dir)), drafter)


def test_settings_that_cannot_train_together_are_errors(
    target_dir: Path, make_cache: MakeCache, tmp_path: Path
) -> None:
    data = CacheDataModule(make_cache([12] * 10, layers=("layer.0.output", PRE_NORM)), tokens_per_batch=60)
    adapts_nothing = made(target_dir, target_lora=TargetLora(target_modules=["nothing"]))
    with pytest.raises(ValueError, match=r"target_modules names nothing; .* end in down_proj, gate_proj"):
        make_trainer(tmp_path).fit(adapts_nothing, data)
    with pytest.raises(ValueError, match=r"keep_weight is 0\.0; it must be above 0"):
        TargetLora(keep_weight=0.0)
    other = JointDraftModule(str(target_dir), BlockFamily(layers=["layer.0.output"]), LORA, num_steps=3)
    with pytest.raises(ValueError, match=r"BlockDrafter reads layer\.0\.output"):
        make_trainer(tmp_path).fit(other, data)
    riders = JointDraftModule(str(target_dir), RiderFamily(), LORA, num_steps=3)
    with pytest.raises(
        ValueError, match=r"a RiderDrafter learns through the target's own blocks; use a family of heads"
    ):
        make_trainer(tmp_path).fit(riders, data)


def test_validation_does_not_decode_with_the_target_that_is_not_adapted(
    target_dir: Path, cache: Path, tmp_path: Path
) -> None:
    data = CacheDataModule(cache, tokens_per_batch=60, val_fraction=0.1)
    with pytest.raises(
        ValueError, match=r"TreeDecodeValidation decodes with the target itself.*leave the callback out"
    ):
        make_trainer(tmp_path, callbacks=[TreeDecodeValidation()]).fit(made(target_dir), data)

"""Validation is real decoding, it picks what is kept, and what is kept is what was measured."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from recurrent_models import recurrent_model
from training import MakeCache, make_module, make_trainer, tiny_config

from draftsmith.cli import main
from draftsmith.decode.batch import Generation
from draftsmith.decode.engine import Engine
from draftsmith.decode.sampling import GenerationSettings
from draftsmith.models.families.redrafter import ReDrafter
from draftsmith.models.target.target import Target
from draftsmith.models.tree.limits import DraftLimits
from draftsmith.train.batches.data_module import CacheDataModule
from draftsmith.train.drafter_callbacks import tree_decode_validation
from draftsmith.train.drafter_callbacks.acceptance_metrics import TOKENS_PER_STEP, acceptance_sums
from draftsmith.train.drafter_callbacks.keep_best_drafter import KeepBestDrafter
from draftsmith.train.drafter_callbacks.tree_decode_validation import TreeDecodeValidation


class SpoilLastEpoch(pl.Callback):
    """Turns the drafter's head over before the last validation."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self.values: list[float] = []

    def on_validation_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.current_epoch == self.epoch:
            pl_module.drafter.lm_head[-1].weight.data.neg_()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.values.append(float(trainer.callback_metrics[TOKENS_PER_STEP]))


def test_the_best_drafter_is_picked_by_real_tree_decoding_and_is_what_was_measured(
    target: Target, target_dir: Path, make_cache: MakeCache, tmp_path: Path
) -> None:
    data = CacheDataModule(make_cache([12] * 20), val_fraction=0.2, tokens_per_batch=60)
    spoil = SpoilLastEpoch(2)
    best = ModelCheckpoint(tmp_path, filename="best", monitor=TOKENS_PER_STEP, mode="max")
    decoding = TreeDecodeValidation(num_prompts=3, max_new_tokens=20, batch_size=2)
    callbacks = [decoding, KeepBestDrafter(), best, spoil]
    trainer = make_trainer(tmp_path, max_epochs=3, enable_checkpointing=True, callbacks=callbacks)
    trainer.fit(make_module(target_dir, lr=1e-4), data)
    assert spoil.values[-1] < max(spoil.values), "turning the head over must cost acceptance"
    kept = ReDrafter.from_pretrained(tmp_path / "drafter").eval()
    in_checkpoint = torch.load(best.best_model_path, weights_only=True)["state_dict"]
    assert torch.equal(kept.head_weight, in_checkpoint["drafter.lm_head.2.weight"])
    settings = GenerationSettings(max_new_tokens=20, eos_token_ids=(1,))
    generations = Engine(target, kept, DraftLimits(draft_length=3)).generate(data.val_prompts(3), settings)
    emitted, cycles = acceptance_sums(generations, 3)[:2].tolist()
    assert emitted / cycles == pytest.approx(max(spoil.values))


def test_acceptance_is_counted_by_depth() -> None:
    generation = Generation(token_ids=[5] * 6, accepted=[2, 1], depths=[2, 2])
    assert acceptance_sums([generation], 2).tolist() == [5, 2, 2, 1]


def test_without_prompts_to_decode_the_run_is_refused_at_its_start(
    target_dir: Path, make_cache: MakeCache, tmp_path: Path
) -> None:
    data = CacheDataModule(make_cache([9] * 6), val_fraction=0.0)
    with pytest.raises(ValueError, match="val_fraction above 0"):
        make_trainer(tmp_path, callbacks=[TreeDecodeValidation()]).fit(make_module(target_dir), data)


def test_a_new_run_never_replaces_the_best_of_an_earlier_one_unless_it_is_told_to(
    target_dir: Path, make_cache: MakeCache, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, root = tiny_config(tmp_path, target_dir, make_cache([9] * 10)), tmp_path / "run"
    fit = ["train", "fit", f"--config={config}", "--trainer.max_epochs=-1", "--trainer.max_steps"]
    assert main([*fit, "2"]) == 0
    before = {path: path.read_bytes() for path in [*(root / "drafter").iterdir(), root / "config.yaml"]}
    for arguments in (["3"], ["3", "--model.init_args.lr=1"]):
        assert main([*fit, *arguments]) == 1
        error = capsys.readouterr().err
        assert "drafter holds the best drafter of another run" in error
        assert all(way in error for way in ("--ckpt_path last", "--trainer.default_root_dir", "--replace_best true"))
        assert {path: path.read_bytes() for path in before} == before
    for arguments in (["4", "--ckpt_path=last"], ["4", "--replace_best=true"], ["6", "--ckpt_path=last"]):
        assert main([*fit, *arguments]) == 0
    (root / "drafter" / "note.txt").write_text("mine")
    assert main([*fit, "8", "--ckpt_path=last"]) == 1
    assert "drafter holds note.txt, which `draftsmith train (best drafter)` did not write" in capsys.readouterr().err


def test_a_checkpoint_of_another_root_does_not_let_a_run_replace_the_best_of_this_one(
    target_dir: Path, make_cache: MakeCache, tmp_path: Path
) -> None:
    data = CacheDataModule(make_cache([9] * 10), val_fraction=0.2, tokens_per_batch=40)
    for name in "ab":
        keeper = ModelCheckpoint(tmp_path / name, save_last=True)
        trainer = make_trainer(tmp_path / name, callbacks=[KeepBestDrafter(), keeper], enable_checkpointing=True)
        trainer.fit(make_module(target_dir), data)
    other = make_trainer(tmp_path / "a", max_epochs=2, callbacks=[KeepBestDrafter()])
    with pytest.raises(ValueError, match=r"a/drafter holds the best drafter of another run"):
        other.fit(make_module(target_dir), data, ckpt_path=tmp_path / "b" / "last.ckpt")


def test_a_resumed_run_whose_best_is_gone_keeps_the_best_from_then_on(
    target_dir: Path, make_cache: MakeCache, tmp_path: Path
) -> None:
    data = CacheDataModule(make_cache([9] * 10), val_fraction=0.2, tokens_per_batch=40)
    settings: dict[str, Any] = {"monitor": "val/never_better", "mode": "min"}

    class NeverBetter(pl.Callback):
        def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            pl_module.log("val/never_better", float(trainer.global_step))

    def fit(epochs: int, checkpoint: Path | None = None) -> None:
        callbacks = [NeverBetter(), KeepBestDrafter(**settings), ModelCheckpoint(tmp_path, save_last=True)]
        trainer = make_trainer(tmp_path, max_epochs=epochs, callbacks=callbacks, enable_checkpointing=True)
        trainer.fit(make_module(target_dir), data, ckpt_path=checkpoint)

    fit(1)
    first = (tmp_path / "drafter" / "provenance.json").read_bytes()
    fit(2, tmp_path / "last.ckpt")
    assert (tmp_path / "drafter" / "provenance.json").read_bytes() == first
    shutil.rmtree(tmp_path / "drafter")
    with pytest.warns(UserWarning, match=r"drafter no longer holds the best drafter of this run"):
        fit(3, tmp_path / "last.ckpt")
    assert (tmp_path / "drafter" / "model.safetensors").is_file()


def test_without_a_metric_the_last_weights_are_kept(target_dir: Path, make_cache: MakeCache, tmp_path: Path) -> None:
    module = make_module(target_dir)
    data = CacheDataModule(make_cache([9] * 6), val_fraction=0.0)
    make_trainer(tmp_path, callbacks=[KeepBestDrafter(tmp_path / "kept")]).fit(module, data)
    assert torch.equal(ReDrafter.from_pretrained(tmp_path / "kept").head_weight, module.evaluated.head_weight)


def module_of(target: Target) -> Any:
    """What the callback reads of a module that drafts three tokens."""
    return SimpleNamespace(objective=SimpleNamespace(num_steps=3), evaluated=ReDrafter.for_target(target.ends))


def test_validation_drafts_chains_with_a_target_that_keeps_a_recurrent_state(target: Target) -> None:
    module, recurrent = module_of(target), Target.from_model(recurrent_model("Lfm2"), "tiny-Lfm2")
    beams = TreeDecodeValidation(beam_width=4, draft_length=2, node_budget=6)
    assert not beams.limits_for(module).is_chain
    beams.target = recurrent
    assert beams.limits_for(module) == DraftLimits(draft_length=2)


@pytest.mark.parametrize(("settings", "says"), [({"beam_width": 4}, True), ({}, False)])
def test_validation_says_where_it_drafts_chains_instead(
    target: Target, settings: dict[str, Any], says: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    validation, module = TreeDecodeValidation(**settings), module_of(target)
    validation.target = Target.from_model(recurrent_model("Lfm2"), "tiny-Lfm2")
    said: list[str] = []
    monkeypatch.setattr(tree_decode_validation, "rank_zero_info", said.append)
    monkeypatch.setattr(tree_decode_validation, "module_and_data", lambda trainer, module: (module, None))
    validation.on_train_start(SimpleNamespace(), module)  # type: ignore[arg-type]
    assert said == ["tiny-Lfm2 keeps a recurrent state: validation drafts chains of 3, not trees"] * says


def test_a_tree_that_is_named_is_an_error_with_a_recurrent_state(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    validation, module = TreeDecodeValidation(shape="2x3"), module_of(target)
    validation.target = Target.from_model(recurrent_model("Lfm2"), "tiny-Lfm2")
    monkeypatch.setattr(tree_decode_validation, "module_and_data", lambda trainer, module: (module, None))
    with pytest.raises(ValueError, match="the shape 2x3 is a tree, but tiny-Lfm2 keeps a recurrent state"):
        validation.on_train_start(SimpleNamespace(), module)  # type: ignore[arg-type]

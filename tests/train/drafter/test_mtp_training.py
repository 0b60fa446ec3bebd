"""Heads close to the target learn: a new MTP layer, a Chimera, and the layer in a target's own folder, whole or by an adapter."""

from pathlib import Path

import pytest
import torch
from mtp_targets import mtp_tensors, save_target_with_mtp
from own_data import OwnData, write_own_data
from safetensors.torch import load_file
from training import KeepLosses, MakeCache, make_module, make_trainer

from draftsmith.cli import main
from draftsmith.models import Drafter, DrafterFamily, MtpHead, TargetEnds
from draftsmith.models.drafters.drafter_folder import load_drafter
from draftsmith.models.drafters.lora import LoraSettings, read_bond
from draftsmith.models.drafters.other_layouts import TargetBond
from draftsmith.models.families.riders.chimera import ChimeraFamily
from draftsmith.models.families.riders.mtp import MtpFamily
from draftsmith.train.batches.data_module import CacheDataModule
from draftsmith.train.drafter_callbacks.keep_best_drafter import KeepBestDrafter


@pytest.fixture(scope="module")
def cache(make_cache: MakeCache) -> Path:
    return make_cache([12] * 40)


@pytest.mark.parametrize("family", [MtpFamily(), MtpFamily(state_first=True), ChimeraFamily()])
def test_a_new_head_learns(target_dir: Path, cache: Path, tmp_path: Path, family: DrafterFamily) -> None:
    module = make_module(target_dir, drafter=family, lr=1e-2, distillation="path")
    losses: list[float] = []
    trainer = make_trainer(tmp_path, max_epochs=3, callbacks=[KeepLosses(losses)])
    trainer.fit(module, CacheDataModule(cache, tokens_per_batch=60))
    assert sum(losses[-8:]) < 0.9 * sum(losses[:8])


@pytest.fixture(scope="module")
def with_layer(tmp_path_factory: pytest.TempPathFactory) -> OwnData:
    """A target with an MTP layer in its folder, and a cache of its replies."""
    folder = tmp_path_factory.mktemp("with_layer")
    return write_own_data(folder, save_target_with_mtp(folder / "target"))


def trained(data: OwnData, folder: Path, lora: LoraSettings | None = None) -> Path:
    """What a few batches leave, from the target's own layer."""
    settings = {"init_from": data.target, "num_steps": 2, "horizon_decay": 0.6, "distillation": "path", "lr": 1e-2}
    module = make_module(data.target, drafter=MtpFamily(), lora=lora, **settings)
    trainer = make_trainer(folder, max_steps=3, callbacks=[KeepBestDrafter(folder / "drafter")])
    trainer.fit(module, CacheDataModule(data.cache, val_fraction=0.2, tokens_per_batch=60))
    return folder / "drafter"


def projection(drafter: Drafter) -> torch.Tensor:
    assert isinstance(drafter, MtpHead)
    return drafter.eh_proj.weight.detach()


def test_the_layer_in_a_targets_folder_learns_and_is_written_under_the_targets_names(
    with_layer: OwnData, tmp_path: Path
) -> None:
    after = load_drafter(trained(with_layer, tmp_path))
    before = mtp_tensors("Qwen's")["mtp.fc.weight"]
    assert not torch.equal(projection(after), before)
    torch.testing.assert_close(projection(after), before, rtol=0, atol=0.2)
    words = ["--drafter", str(tmp_path / "drafter"), "--target", str(with_layer.target), "--layout", "mtp"]
    assert main(["export", *words, "--out", str(tmp_path / "named")]) == 0
    assert torch.equal(load_file(tmp_path / "named" / "model.safetensors")["mtp.fc.weight"], projection(after))


def test_an_adapter_of_the_layer_in_a_targets_folder_is_loaded_and_exported_with_it(
    with_layer: OwnData, tmp_path: Path
) -> None:
    adapter = trained(with_layer, tmp_path, LoraSettings(rank=2, alpha=4.0))
    assert read_bond(adapter).drafter == str(with_layer.target)
    merged = load_drafter(adapter, target=TargetBond(TargetEnds.load(str(with_layer.target))))
    assert not torch.equal(projection(merged), mtp_tensors("Qwen's")["mtp.fc.weight"])
    words = ["--drafter", str(with_layer.target), "--drafter-adapter", str(adapter), "--target", str(with_layer.target)]
    assert main(["export", *words, "--out", str(tmp_path / "whole")]) == 0
    torch.testing.assert_close(projection(load_drafter(tmp_path / "whole")), projection(merged))


def test_a_targets_own_layer_is_exported_and_shown(
    with_layer: OwnData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--drafter", str(with_layer.target), "--target", str(with_layer.target)]
    assert main(["inspect", *words]) == 0
    assert "MTP head, for this model as the target" in capsys.readouterr().out
    assert main(["export", *words, "--out", str(tmp_path / "apart")]) == 0
    assert torch.equal(projection(load_drafter(tmp_path / "apart")), mtp_tensors("Qwen's")["mtp.fc.weight"])

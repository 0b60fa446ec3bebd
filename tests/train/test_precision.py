"""A run's precision and optimiser by its device: the user's setting wins, and a resumed run keeps what it began with."""

import logging
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import yaml
from pytorch_lightning.strategies import SingleDeviceStrategy, Strategy
from training import MakeCache, make_module, make_trainer, tiny_config

from draftsmith import provenance
from draftsmith.cli import main
from draftsmith.train import precision
from draftsmith.train.batches.data_module import CacheDataModule
from draftsmith.train.drafter.module import DraftModule
from draftsmith.train.drafter_callbacks.tree_decode_validation import TreeDecodeValidation
from draftsmith.train.judge.module import JudgeModule
from draftsmith.train.precision import RunPrecision, precision_for
from draftsmith.train.run.schedule import adamw


@pytest.fixture(scope="module")
def cache(make_cache: MakeCache) -> Path:
    return make_cache([9] * 10)


def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice that a GPU with bf16 would get, on this CPU."""
    monkeypatch.setattr(precision, "precision_for", lambda device: precision.BFLOAT16)


def test_a_cpu_trains_in_float32_and_cuda_in_bf16_where_it_multiplies_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    assert precision_for(torch.device("cpu")) == "32-true"
    assert precision_for(torch.device("mps")) == "32-true"
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    for supported, chosen in ((True, "bf16-mixed"), (False, "32-true")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, supported=supported: supported)
        assert precision_for(torch.device("cuda", 0)) == chosen


def run(config: Path, *arguments: str) -> None:
    assert main(["train", "fit", f"--config={config}", *arguments]) == 0


def recorded(folder: Path) -> tuple[str, str, str]:
    """The precision in the saved configuration, in the checkpoint and with the drafter."""
    saved = yaml.safe_load((folder / "run" / "config.yaml").read_text())["trainer"]["precision"]
    checkpoint = torch.load(folder / "run" / "checkpoints" / "last.ckpt", weights_only=True)["precision"]
    return saved, checkpoint, provenance.read(folder / "run" / "drafter")["config"]["precision"]  # type: ignore[index]


def test_an_open_precision_is_chosen_printed_and_recorded(
    target_dir: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    on_a_gpu(monkeypatch)
    config = tiny_config(tmp_path, target_dir, cache)
    with caplog.at_level(logging.INFO):
        run(config)
    assert (
        "it trains with precision bf16-mixed (chosen for this device; set trainer.precision to change it)"
        in caplog.text
    )
    assert recorded(tmp_path) == ("bf16-mixed",) * 3


def test_a_precision_that_the_user_sets_wins_over_the_devices(
    target_dir: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    on_a_gpu(monkeypatch)
    with caplog.at_level(logging.INFO):
        run(tiny_config(tmp_path, target_dir, cache), "--trainer.precision", "32-true")
    assert "it trains with precision 32-true" in caplog.text
    assert "chosen for this device" not in caplog.text
    assert recorded(tmp_path) == ("32-true",) * 3


@pytest.mark.parametrize("keeps_a_record", [True, False])
def test_a_resumed_run_keeps_the_precision_that_it_began_with(
    target_dir: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keeps_a_record: bool
) -> None:
    config = tiny_config(tmp_path, target_dir, cache)
    run(config, "--trainer.max_epochs", "1")
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    if not keeps_a_record:  # as earlier versions wrote it: in float32, where nobody chose
        checkpoint = torch.load(last, weights_only=True)
        del checkpoint["precision"], checkpoint["digest"]
        torch.save(checkpoint, last)
    on_a_gpu(monkeypatch)
    run(config, "--trainer.max_epochs", "2", "--ckpt_path", "last")
    assert recorded(tmp_path) == ("32-true",) * 3


def test_a_run_that_began_in_bf16_and_is_set_to_float32_says_so(
    target_dir: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    on_a_gpu(monkeypatch)
    config = tiny_config(tmp_path, target_dir, cache)
    run(config, "--trainer.max_epochs", "1")
    with caplog.at_level(logging.INFO):
        run(config, "--trainer.max_epochs", "2", "--ckpt_path", "last", "--trainer.precision", "32-true")
    assert "the run began with precision bf16-mixed and resumes with 32-true, which it is set to" in caplog.text
    assert recorded(tmp_path)[1] == "32-true"


def test_a_module_that_cannot_train_in_bf16_stays_in_float32(
    target_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_a_gpu(monkeypatch)
    for module, chosen in ((make_module(target_dir), "bf16-mixed"), (JudgeModule(str(target_dir)), "32-true")):
        trainer = make_trainer(tmp_path)
        RunPrecision(is_open=True).choose(trainer, module)
        assert trainer.precision == chosen


def strategy_on(device: str) -> Strategy:
    strategy = SingleDeviceStrategy.__new__(SingleDeviceStrategy)
    strategy._root_device = torch.device(device)
    return strategy


def groups() -> list[dict[str, Any]]:
    return [{"params": [torch.nn.Parameter(torch.zeros(2))]}]


@pytest.mark.parametrize("average_decay", [None, 0.9])
def test_adamw_is_fused_on_cuda_only_and_lightning_may_clip_its_gradients(average_decay: float | None) -> None:
    fused = adamw(groups(), strategy_on("cuda"), 1e-3, (0.9, 0.98), average_decay)
    plain = adamw(groups(), strategy_on("cpu"), 1e-3, (0.9, 0.98), average_decay)
    assert fused.param_groups[0]["fused"] is True
    assert not fused._step_supports_amp_scaling  # type: ignore[attr-defined]
    assert plain.param_groups[0]["fused"] is None
    assert type(fused) is type(plain)


def test_an_optimiser_that_cannot_be_fused_is_plain_and_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plain = torch.optim.AdamW.__init__

    def refuse(self: torch.optim.AdamW, *args: Any, fused: bool | None = None, **settings: Any) -> None:
        if fused:
            raise RuntimeError("`fused=True` requires all the params to be floating point Tensors")
        plain(self, *args, **settings)

    monkeypatch.setattr(torch.optim.AdamW, "__init__", refuse)
    with caplog.at_level(logging.INFO):
        optimizer = adamw(groups(), strategy_on("cuda"), 1e-3, (0.9, 0.98))
    assert optimizer.param_groups[0]["fused"] is None
    assert caplog.text.count("AdamW is not fused") == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_run_on_cuda_is_fused_clips_its_gradients_and_resumes(target_dir: Path, cache: Path, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, target_dir, cache)
    on_cuda = ("--trainer.accelerator", "gpu", "--trainer.gradient_clip_val", "1.0")
    run(config, *on_cuda, "--trainer.max_epochs", "1")
    run(config, *on_cuda, "--trainer.max_epochs", "2", "--ckpt_path", "last")
    assert recorded(tmp_path) == (precision_for(torch.device("cuda", 0)),) * 3
    saved = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["optimizer_states"][0]["param_groups"][0]["fused"] is True


def test_a_fused_optimiser_in_bf16_trains_with_clipped_gradients(
    target_dir: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch has the fused kernel on the CPU too, so that Lightning's refusal of such clipping would show here."""
    configure = DraftModule.configure_optimizers

    def fused(self: DraftModule) -> Any:
        configured = configure(self)
        optimizer = adamw(self._groups(), strategy_on("cuda"), self.lr, self.betas)
        configured["lr_scheduler"]["scheduler"].optimizer = optimizer  # type: ignore[typeddict-item]
        return {**configured, "optimizer": optimizer}

    monkeypatch.setattr(DraftModule, "configure_optimizers", fused)
    trainer: pl.Trainer = make_trainer(tmp_path, precision="bf16-mixed", gradient_clip_val=1.0, max_steps=2)
    trainer.fit(make_module(target_dir), CacheDataModule(cache, val_fraction=0, tokens_per_batch=40))
    assert trainer.global_step == 2


def test_validation_decodes_with_the_target_in_its_own_dtype_whatever_the_training_computes_in(
    target_dir: Path, cache: Path, tmp_path: Path
) -> None:
    for trained_in in ("32-true", "bf16-mixed"):
        validation = TreeDecodeValidation(2, 8, dtype="bfloat16")
        trainer = make_trainer(tmp_path, precision=trained_in, max_steps=2, callbacks=[validation])
        module = make_module(target_dir)
        trainer.fit(module, CacheDataModule(cache, val_fraction=0.2, tokens_per_batch=40))
        assert validation.target is not None
        assert validation.target.dtype == torch.bfloat16
        assert {weight.dtype for weight in module.evaluated.parameters()} == {torch.float32}
        assert trainer.callback_metrics["val/tokens_per_step"] >= 1.0

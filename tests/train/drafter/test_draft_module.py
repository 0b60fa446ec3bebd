"""Training as a whole on a tiny random target: losses, schedules, refusals, precision."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from training import VOCAB, KeepLosses, MakeCache, make_module, make_trainer

from draftsmith.models.families.redrafter import ReDrafterFamily
from draftsmith.train.batches.data_module import CacheDataModule
from draftsmith.train.drafter.metrics import proxy_tokens_per_step
from draftsmith.train.drafter.module import DraftModule
from draftsmith.train.losses import distillation
from draftsmith.train.run.schedule import lr_share


def test_training_on_text_lowers_its_loss_at_every_step_of_the_draft(
    target_dir: Path, make_cache: MakeCache, tmp_path: Path
) -> None:
    data = CacheDataModule(make_cache([12] * 40), val_cache=make_cache([12] * 8, seed=1), tokens_per_batch=60)
    module = make_module(target_dir, lr=1e-2)
    trainer = make_trainer(tmp_path, max_epochs=12)
    before = trainer.validate(module, data, verbose=False)[0]
    trainer.fit(module, data)
    for step in range(3):
        name = f"val/step{step}/loss"
        assert trainer.callback_metrics[name] < before[name] - 1.0
    assert trainer.callback_metrics["val/proxy_tokens_per_step"] > before["val/proxy_tokens_per_step"]
    # The text is no reply of this target, so nothing is known of the acceptance but its range.
    assert 1.0 <= trainer.callback_metrics["val/expected_tokens_per_step"] <= 4.0


def test_path_distillation_lowers_the_divergence_from_the_target(
    target_dir: Path, make_cache: MakeCache, tmp_path: Path
) -> None:
    data = CacheDataModule(make_cache([12] * 40), tokens_per_batch=60)
    module = make_module(target_dir, distillation="path", lr=1e-2)
    losses: list[float] = []
    trainer = make_trainer(tmp_path, max_epochs=8, callbacks=[KeepLosses(losses)])
    trainer.fit(module, data)
    assert sum(losses[-8:]) < 0.7 * sum(losses[:8])


class NoteShownLosses(pl.Callback):
    """Notes what the progress bar shows after each step: the loss, where a step has just logged it."""

    def __init__(self) -> None:
        self.shown: dict[int, float] = {}

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        value = trainer.progress_bar_metrics.get("loss")
        assert isinstance(value, float)
        self.shown[trainer.global_step] = value


def test_the_entropy_of_the_target_is_computed_only_in_steps_that_show_their_loss(
    target_dir: Path, make_cache: MakeCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = make_cache([12] * 10)
    computed: list[int] = []
    certainty = distillation._certainty

    def fit(metrics_every: int) -> tuple[NoteShownLosses, DraftModule]:
        notes = NoteShownLosses()
        trainer = make_trainer(tmp_path, max_steps=6, max_epochs=-1, callbacks=[notes])
        monkeypatch.setattr(
            distillation, "_certainty", lambda *args: (computed.append(trainer.global_step + 1), certainty(*args))[1]
        )
        module = make_module(target_dir, distillation="path", metrics_every=metrics_every)
        trainer.fit(module, CacheDataModule(cache, val_fraction=0, tokens_per_batch=12))
        return notes, module

    always, first = fit(1)
    assert set(computed) == {1, 2, 3, 4, 5, 6}
    computed.clear()
    sometimes, second = fit(3)
    assert set(computed) == {1, 3, 6}
    assert sometimes.shown == {
        step: always.shown[step if step in (1, 3, 6) else {2: 1, 4: 3, 5: 3}[step]] for step in range(1, 7)
    }
    expected = weights_of(first)
    assert all(torch.equal(value, expected[name]) for name, value in weights_of(second).items())


def weights_of(module: DraftModule) -> dict[str, torch.Tensor]:
    evaluated = {f"evaluated.{name}": value for name, value in module.evaluated.state_dict().items()}
    return {name: value.clone() for name, value in (module.state_dict() | evaluated).items()}


class SaveEveryStep(ModelCheckpoint):
    """Keeps every step's checkpoint as step=N.ckpt."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, filename="{step}", save_top_k=-1, every_n_train_steps=1)


@pytest.mark.parametrize("resume_at", [3, 5, 7])
def test_a_run_resumed_in_or_after_an_epoch_ends_with_the_very_weights_of_an_uninterrupted_one(
    target_dir: Path, make_cache: MakeCache, tmp_path: Path, resume_at: int
) -> None:
    cache = make_cache([7, 9, 11, 8, 10, 12, 9, 7, 10, 11, 8, 9])
    settings: dict[str, Any] = {"ema_decay": 0.9, "drafter": ReDrafterFamily(draft_vocab_size=20)}

    def fit(checkpoint: Path | None, callbacks: list[pl.Callback]) -> DraftModule:
        data = CacheDataModule(cache, val_fraction=0.1, tokens_per_batch=20)
        module = make_module(target_dir, **settings)
        trainer = make_trainer(tmp_path, max_epochs=2, enable_checkpointing=True, callbacks=callbacks)
        trainer.fit(module, data, ckpt_path=checkpoint)
        assert trainer.global_step == 10
        return module

    whole = fit(None, [SaveEveryStep(tmp_path / "steps")])
    resumed = fit(tmp_path / "steps" / f"step={resume_at}.ckpt", [])
    expected = weights_of(whole)
    assert all(torch.equal(value, expected[name]) for name, value in weights_of(resumed).items())
    assert not torch.equal(expected["evaluated.rnn_u.weight"], expected["drafter.rnn_u.weight"]), "no average"
    assert not any("embed" in name for name in expected), "the target's ends are in the checkpoint"


def test_resuming_on_other_data_is_refused(target_dir: Path, make_cache: MakeCache, tmp_path: Path) -> None:
    cache = make_cache([9] * 8)
    trainer = make_trainer(tmp_path, enable_checkpointing=True, callbacks=[SaveEveryStep(tmp_path)])
    trainer.fit(make_module(target_dir), CacheDataModule(cache, tokens_per_batch=20))
    other = make_trainer(tmp_path)
    with pytest.raises(ValueError, match="tokens_per_batch = 20, this run has 40"):
        other.fit(
            make_module(target_dir), CacheDataModule(cache, tokens_per_batch=40), ckpt_path=tmp_path / "step=1.ckpt"
        )


def test_a_feature_that_is_not_finite_is_refused_with_its_sample(
    target_dir: Path, make_cache: MakeCache, tmp_path: Path
) -> None:
    data = CacheDataModule(make_cache([9] * 6, poison=4), val_fraction=0.0, tokens_per_batch=60)
    with pytest.raises(ValueError, match=r"shard-00000.safetensors: sample s4: hidden.last.pre_norm holds NaN"):
        make_trainer(tmp_path).fit(make_module(target_dir), data)


def test_a_loss_that_explodes_is_refused_with_a_remedy(target_dir: Path, make_cache: MakeCache, tmp_path: Path) -> None:
    data = CacheDataModule(make_cache([9] * 30), tokens_per_batch=20)
    with pytest.raises(ValueError, match="lower lr"):
        make_trainer(tmp_path, max_epochs=20).fit(make_module(target_dir, lr=1e30, warmup_ratio=0.0), data)


def test_a_cache_of_another_target_is_refused(target_dir: Path, make_cache: MakeCache, tmp_path: Path) -> None:
    data = CacheDataModule(make_cache([9] * 6, fingerprint="0" * 64))
    with pytest.raises(ValueError, match="extract a cache with this target"):
        make_trainer(tmp_path).fit(make_module(target_dir), data)


def test_bf16_autocast_trains_float32_weights(target_dir: Path, make_cache: MakeCache, tmp_path: Path) -> None:
    cache = make_cache([12] * 12)
    losses: dict[str, list[float]] = {}
    for precision in ("32-true", "bf16-mixed"):
        losses[precision] = []
        module = make_module(target_dir, distillation="path")
        trainer = make_trainer(tmp_path, precision=precision, callbacks=[KeepLosses(losses[precision])])
        trainer.fit(module, CacheDataModule(cache, tokens_per_batch=60))
    assert all(weight.dtype == torch.float32 for weight in module.parameters())
    assert losses["bf16-mixed"] == pytest.approx(losses["32-true"], rel=0.05)
    assert losses["bf16-mixed"] != losses["32-true"]


def test_the_dtype_of_the_ends_is_float32_on_a_cpu_and_recorded_as_such(
    target_dir: Path, make_cache: MakeCache, tmp_path: Path
) -> None:
    module = make_module(target_dir)
    assert module.ends_dtype == "auto"
    make_trainer(tmp_path).fit(module, CacheDataModule(make_cache([9] * 4), val_fraction=0.0, tokens_per_batch=40))
    assert module.ends.embedding.weight.dtype == torch.float32
    assert module.settings()["ends_dtype"] == "float32"


@pytest.mark.parametrize(("ends_dtype", "expected"), [("auto", "bfloat16"), ("float32", "float32")])
def test_the_dtype_of_the_ends_is_the_checkpoints_own_on_a_gpu(
    target_dir: Path,
    make_cache: MakeCache,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    ends_dtype: str,
    expected: str,
) -> None:
    checkpoint = tmp_path / "target"
    shutil.copytree(target_dir, checkpoint)
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    module, trainer = make_module(checkpoint, ends_dtype=ends_dtype), make_trainer(tmp_path)
    monkeypatch.setattr(type(trainer.strategy), "root_device", torch.device("cuda", 0))
    data = CacheDataModule(make_cache([9] * 4), val_fraction=0.0, tokens_per_batch=40)
    module.trainer, trainer.datamodule = trainer, data  # type: ignore[attr-defined]
    data.setup("fit")
    module.setup("fit")
    assert module.settings()["ends_dtype"] == expected
    assert str(module.ends.embedding.weight.dtype) == f"torch.{expected}"


def test_gradients_accumulate_to_those_of_one_larger_batch(
    target_dir: Path, make_cache: MakeCache, tmp_path: Path
) -> None:
    cache = make_cache([10] * 8)

    def fit(tokens: int, accumulate: int) -> dict[str, torch.Tensor]:
        module = make_module(target_dir, warmup_ratio=0.0)
        trainer = make_trainer(tmp_path, accumulate_grad_batches=accumulate, max_steps=2)
        trainer.fit(module, CacheDataModule(cache, val_fraction=0.0, tokens_per_batch=tokens))
        return weights_of(module)

    joint, accumulated = fit(40, 1), fit(20, 2)
    for name, value in joint.items():
        torch.testing.assert_close(value, accumulated[name], atol=1e-4, rtol=1e-3, msg=name)


def test_the_average_lags_behind_the_weights_and_is_what_is_evaluated(
    target_dir: Path, make_cache: MakeCache, tmp_path: Path
) -> None:
    module = make_module(target_dir, ema_decay=0.5)
    trainer = make_trainer(tmp_path, max_steps=1)
    start: list[torch.Tensor] = []

    class Note(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            start.append(pl_module.drafter.rnn_u.weight.detach().clone())  # type: ignore[union-attr]

    trainer.callbacks.append(Note())  # type: ignore[attr-defined]
    trainer.fit(module, CacheDataModule(make_cache([10] * 8), tokens_per_batch=40))
    assert module.drafter is not None
    middle = (start[0] + module.drafter.rnn_u.weight) / 2  # type: ignore[operator]
    torch.testing.assert_close(module.evaluated.rnn_u.weight, middle)
    assert not torch.equal(module.evaluated.rnn_u.weight, module.drafter.rnn_u.weight)  # type: ignore[arg-type]


def test_a_draft_vocabulary_is_chosen_from_labelled_tokens(
    target_dir: Path, make_cache: MakeCache, tmp_path: Path
) -> None:
    data = CacheDataModule(make_cache([9] * 6), tokens_per_batch=60)
    module = make_module(target_dir, drafter=ReDrafterFamily(draft_vocab_size=10))
    make_trainer(tmp_path).fit(module, data)
    counts = data.token_counts(VOCAB)
    kept = module.evaluated.draft_ids()
    assert len(kept) == 10
    assert counts[kept].sum() == counts.sort(descending=True).values[:10].sum()
    assert counts.sum() == sum(
        int(sample.loss_mask.sum()) for sample in map(data.train_set.sample, range(len(data.train_set)))
    )  # type: ignore[union-attr, arg-type]


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"warmup_ratio": 2.0}, "between 0 and 1"),
        ({"ema_decay": 1.0}, "between 0 and 1"),
        ({"metrics_every": 0}, "at least 1"),
        ({"num_steps": 0}, "at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(target_dir: Path, settings: dict[str, Any], rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        make_module(target_dir, **settings)


def test_the_proxy_multiplies_accuracies() -> None:
    assert proxy_tokens_per_step(torch.tensor([0.5, 0.5])) == 1.75


def test_worker_processes_deliver_the_same_batches(target_dir: Path, make_cache: MakeCache, tmp_path: Path) -> None:
    cache = make_cache([9] * 12)
    losses: dict[int, list[float]] = {}
    for num_workers in (0, 1):
        losses[num_workers] = []
        data = CacheDataModule(cache, val_fraction=0.0, tokens_per_batch=30, num_workers=num_workers)
        make_trainer(tmp_path, callbacks=[KeepLosses(losses[num_workers])]).fit(make_module(target_dir), data)
    assert losses[0] == losses[1]
    assert len(losses[0]) > 2


def test_the_rate_rises_linearly_and_falls_on_a_cosine() -> None:
    rates = [lr_share(step, total=12, warmup_ratio=1 / 6, min_lr_ratio=0.1) for step in range(13)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[7] == pytest.approx(0.55)
    assert rates[12] == pytest.approx(0.1)
    assert rates[2:] == sorted(rates[2:], reverse=True)

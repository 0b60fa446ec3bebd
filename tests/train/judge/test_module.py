"""Training a judge: it lands on the optimum, keeps the best of the sweep with an honest threshold, resumes, and stops at bad input."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from judging import LENGTHS, fit, judge_data, judge_module, labelled_states, rows_of, save_rows
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from sklearn import linear_model
from training import HIDDEN, MakeCache, make_module, make_trainer

from draftsmith.data.cache.reader import HiddenStateCache
from draftsmith.data.shards.shards import CachedSample
from draftsmith.models.judge import POST_NORM, load_judge
from draftsmith.models.target.target import PRE_NORM, Target
from draftsmith.train.batches.data_module import CacheDataModule
from draftsmith.train.drafter_callbacks.keep_best_drafter import KeepBestDrafter
from draftsmith.train.drafter_callbacks.run_length import RunLength
from draftsmith.train.judge.callbacks import JudgeFigures, KeepJudge
from draftsmith.train.judge.figures import draw_precision_recall, draw_reliability, draw_roc
from draftsmith.train.judge.metrics import roc_auc
from draftsmith.train.judge.module import token_weights


@pytest.fixture(scope="module")
def cache(make_cache: MakeCache) -> Path:
    return make_cache(LENGTHS)


@pytest.fixture(scope="module")
def file(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_rows(tmp_path_factory.mktemp("rows"), rows_of(cache))


def sample_of(cache: Path, name: str) -> CachedSample:
    [sample] = [sample for sample in HiddenStateCache(cache) if sample.id == name]
    return sample


def test_weights_by_hand() -> None:
    labels = torch.tensor([True, True, False, True])
    assert token_weights(labels, labels.numpy(), "balanced").tolist() == pytest.approx([1 / 6, 1 / 6, 1 / 2, 1 / 6])
    assert token_weights(labels, labels.numpy(), 2.0).tolist() == pytest.approx([1 / 9, 1 / 9, 2 / 3, 1 / 9])
    # A process that holds two of four tokens gives them the weights that they have among all.
    assert token_weights(labels[:2], labels.numpy(), "balanced").tolist() == pytest.approx([1 / 6, 1 / 6])


@pytest.mark.parametrize("class_weight", ["balanced", 3.0])
def test_a_trained_judge_is_scikit_learns_on_the_training_tokens(
    target_dir: Path, cache: Path, file: Path, tmp_path: Path, class_weight: Any
) -> None:
    data = judge_data(cache, file)
    module = judge_module(target_dir, l2=[0.05], class_weight=class_weight)
    fit(tmp_path, module, data, epochs=30)
    states, labels = labelled_states(cache, [one.row for one in data._splits["train"].joined])
    raw = states.double().numpy()
    standard = (raw - raw.mean(0)) / raw.std(0)
    factor = 1.0 if class_weight == "balanced" else class_weight
    num_wrong = int((~labels).sum())
    by_class = {1: len(labels) / (2 * (len(labels) - num_wrong)), 0: factor * len(labels) / (2 * num_wrong)}
    total = sum(by_class[int(label)] for label in labels)
    reference = linear_model.LogisticRegression(
        C=1 / (0.05 * total), class_weight=by_class, solver="newton-cholesky", tol=1e-12
    ).fit(standard, labels.numpy())
    judge = module.judge()
    assert torch.allclose(judge.weight.double(), torch.tensor(reference.coef_[0]), atol=1e-6)
    assert judge.bias.item() == pytest.approx(float(reference.intercept_[0]), abs=1e-6)
    expected = torch.tensor(reference.decision_function(standard)).float()
    assert torch.allclose(judge.log_odds(states), expected, atol=1e-4)


def test_the_best_of_the_sweep_is_kept_with_a_threshold_from_the_held_out_questions(
    target_dir: Path, cache: Path, file: Path, tmp_path: Path
) -> None:
    data = judge_data(cache, file)
    module = judge_module(target_dir, l2=[1e-3, 1e-1, 100.0], max_wrong=0.2)
    fit(tmp_path, module, data, callbacks=[KeepJudge()])
    judge = load_judge(tmp_path / "judge")
    states, labels = labelled_states(cache, [one.row for one in data._splits["validation"].joined])
    areas = [roc_auc(module._values[:, index].numpy(), labels.numpy()) for index in range(3)]
    assert roc_auc(judge.log_odds(states).detach().numpy(), labels.numpy()) == pytest.approx(max(areas), abs=1e-3)
    assert max(areas) > 0.8
    accepted = judge.accepts(states)
    point = judge.config.labels["at_threshold"]
    assert float(accepted[labels].float().mean()) == pytest.approx(point["correct"])
    assert float(accepted[~labels].float().mean()) == pytest.approx(point["wrong"])
    assert point["wrong"] <= 0.2 < point["correct"]
    assert judge.config.threshold == point["threshold"]
    assert [one["threshold"] for one in judge.config.curve] == sorted(one["threshold"] for one in judge.config.curve)


def test_a_run_says_which_labelled_tokens_it_learns_from(
    target_dir: Path, cache: Path, file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = judge_data(cache, file)
    with caplog.at_level(logging.INFO):
        fit(tmp_path, judge_module(target_dir, iterations=2), data, callbacks=[RunLength()])
    said = [record.message for record in caplog.records]
    train, held_out = data.labels("train"), data.labels("validation")
    assert any(f" answers with {len(train)} labelled tokens, " in line for line in said)
    assert any(f"{train.sum()} of these tokens are correct and {(~train).sum()} wrong" in line for line in said)
    share = f"{100 * len(held_out) / len(train) / 2:.0f} % of what training reads in between, and decodes no prompts"
    assert any(share in line for line in said)


def test_the_dtype_of_the_norm_is_auto_and_recorded_as_what_it_became(
    target_dir: Path, cache: Path, file: Path, tmp_path: Path
) -> None:
    module = judge_module(target_dir)
    assert module.ends_dtype == "auto"
    fit(tmp_path, module, judge_data(cache, file))
    assert module.settings()["ends_dtype"] == "float32"


def test_the_kept_folder_says_whose_it_is_and_where_its_labels_are_from(
    target_dir: Path, cache: Path, file: Path, tmp_path: Path, target: Target
) -> None:
    fit(tmp_path, judge_module(target_dir), judge_data(cache, file), 2, callbacks=[KeepJudge(tmp_path / "kept")])
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == [
        "config.json",
        "model.safetensors",
        "provenance.json",
    ]
    config = load_judge(tmp_path / "kept").attach(target.ends).config
    assert (config.hidden_size, config.draft_hidden_size, config.feature) == (HIDDEN, 0, PRE_NORM)
    assert (config.target_name, config.target_fingerprint) == (str(target_dir), target.fingerprint)
    assert config.tokenizer_fingerprint == HiddenStateCache(cache).manifest.identity.tokenizer_fingerprint
    assert config.labels["how"] == {"rule": len(LENGTHS)}
    assert config.labels["questions"] == {"train": 21, "validation": 9}
    record = json.loads((tmp_path / "kept" / "provenance.json").read_text())
    assert record["config"]["l2"] == [1e-3, 1e-1]
    assert record["config"]["metrics"]["val/auc"] > 0.5


def test_a_worse_validation_does_not_replace_a_better_judge(
    target_dir: Path, cache: Path, file: Path, tmp_path: Path
) -> None:
    keeper = KeepJudge()
    fit(tmp_path, judge_module(target_dir), judge_data(cache, file), 2, callbacks=[keeper])
    kept = (tmp_path / "judge").stat().st_ino  # a saved judge is a new folder, moved into place
    keeper.best = 2.0  # better than any area under a curve
    fit(tmp_path, judge_module(target_dir), judge_data(cache, file), 2, callbacks=[keeper])
    assert (tmp_path / "judge").stat().st_ino == kept
    keeper.best = 0.0
    fit(tmp_path, judge_module(target_dir), judge_data(cache, file), 2, callbacks=[keeper])
    assert (tmp_path / "judge").stat().st_ino != kept


def test_post_norm_states_are_the_targets_normed_ones(
    target_dir: Path, cache: Path, file: Path, tmp_path: Path, target: Target
) -> None:
    data = judge_data(cache, file)
    module = judge_module(target_dir, feature=POST_NORM)
    fit(tmp_path, module, data)
    states, labels = labelled_states(cache, [one.row for one in data._splits["validation"].joined])
    assert torch.allclose(data.tokens("validation").features, target.ends.final_norm(states))
    judge = module.judge().attach(target.ends)
    assert torch.allclose(judge.log_odds(states).double(), module._values[:, module.best], atol=2e-4)
    assert roc_auc(judge.log_odds(states).detach().numpy(), labels.numpy()) > 0.7


def test_a_judge_may_read_the_draft_models_states_too(
    target_dir: Path, cache: Path, file: Path, tmp_path: Path, make_cache: MakeCache
) -> None:
    draft = make_cache(LENGTHS)
    module = judge_module(target_dir)
    fit(tmp_path, module, judge_data(cache, file, draft_cache=draft), 2, callbacks=[KeepJudge()])
    judge = load_judge(tmp_path / "judge")
    identity = HiddenStateCache(draft).manifest.identity
    assert (judge.config.draft_hidden_size, judge.config.draft_fingerprint) == (HIDDEN, identity.target_fingerprint)
    states = sample_of(cache, "s0").hidden[PRE_NORM].float()
    assert judge.accepts(states, states).shape == (len(states),)


def test_training_stops_when_it_has_converged(target_dir: Path, cache: Path, file: Path, tmp_path: Path) -> None:
    trainer = fit(tmp_path, judge_module(target_dir, l2=[1.0], tolerance=1e-5), judge_data(cache, file), epochs=500)
    assert trainer.current_epoch < 20
    assert float(trainer.callback_metrics["train/largest_gradient"]) <= 1e-5


def test_training_stops_early_where_held_out_questions_gain_nothing(
    target_dir: Path, cache: Path, file: Path, tmp_path: Path
) -> None:
    stopper = EarlyStopping("val/auc", mode="max", patience=2, min_delta=0.5)
    trainer = fit(
        tmp_path,
        judge_module(target_dir, iterations=1, tolerance=0.0),
        judge_data(cache, file),
        50,
        callbacks=[stopper],
    )
    assert trainer.current_epoch == 3


def test_a_resumed_run_ends_with_the_same_weights(target_dir: Path, cache: Path, file: Path, tmp_path: Path) -> None:
    def run(name: str, epochs: int, checkpoint: Path | None = None) -> Any:
        module = judge_module(target_dir, iterations=2, history=3, tolerance=0.0)
        saver = ModelCheckpoint(tmp_path / name, save_top_k=0, save_last=True, enable_version_counter=False)
        trainer = make_trainer(
            tmp_path / name, max_epochs=epochs, callbacks=[saver, KeepJudge()], enable_checkpointing=True
        )
        trainer.fit(module, judge_data(cache, file), ckpt_path=checkpoint)
        return module

    whole = run("whole", 5)
    run("half", 2)
    rest = run("half", 5, tmp_path / "half" / "last.ckpt")
    assert torch.equal(whole.theta, rest.theta)
    assert torch.equal(whole.judge().weight, rest.judge().weight)
    assert (
        load_judge(tmp_path / "whole" / "judge").config.threshold
        == load_judge(tmp_path / "half" / "judge").config.threshold
    )


def test_a_run_does_not_resume_on_other_tokens_or_penalties(
    target_dir: Path, cache: Path, file: Path, tmp_path: Path
) -> None:
    saver = ModelCheckpoint(tmp_path, save_top_k=0, save_last=True, enable_version_counter=False)
    fit(tmp_path, judge_module(target_dir), judge_data(cache, file), 1, callbacks=[saver], enable_checkpointing=True)
    for module, data, told in (
        (judge_module(target_dir), judge_data(cache, file, seed=4), "made with"),
        (judge_module(target_dir, l2=[0.5, 2.0]), judge_data(cache, file), "made with l2"),
    ):
        with pytest.raises(ValueError, match=told):
            make_trainer(tmp_path, max_epochs=2).fit(module, data, ckpt_path=tmp_path / "last.ckpt")


def test_curves_and_images_go_to_tensorboard(target_dir: Path, cache: Path, file: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path, name=None, version="")
    fit(
        tmp_path,
        judge_module(target_dir, tolerance=0.0),
        judge_data(cache, file),
        4,
        logger=logger,
        callbacks=[JudgeFigures(every=3)],
    )
    events = EventAccumulator(str(tmp_path), size_guidance={"images": 0})
    events.Reload()
    scalars = {"train/loss/l2=0.001", "train/largest_gradient", "val/auc", "val/auc/l2=0.1", "val/wrong_accepted"}
    assert scalars <= set(events.Tags()["scalars"])
    losses = [event.value for event in events.Scalars("train/loss/l2=0.001")]
    assert len(losses) == 4
    assert losses == sorted(losses, reverse=True)
    for name in ("val/roc", "val/precision_recall_wrong", "val/reliability"):
        images = events.Images(name)
        assert [image.step for image in images] == [1, 4, 4]
        assert images[0].width == 420


def test_figures_differ_with_what_they_show() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 5000)
    good, bad = np.clip(labels * 0.4 + rng.random(5000) * 0.6, 0, 1), rng.random(5000)
    for draw in (draw_roc, draw_precision_recall, draw_reliability):
        image = draw(good, labels)
        assert image.shape == (420, 420, 3)
        assert image.dtype == np.uint8
        assert not np.array_equal(image, draw(bad, labels))
        with pytest.raises(ValueError, match="both 1"):
            draw(good, np.ones(5000))


def test_a_cache_of_another_target_is_refused(
    target_dir: Path, file: Path, make_cache: MakeCache, tmp_path: Path
) -> None:
    foreign = make_cache(LENGTHS, fingerprint="0" * 64)
    with pytest.raises(ValueError, match="but this run's target is"):
        fit(tmp_path, judge_module(target_dir), judge_data(foreign, file))


def test_parts_that_do_not_fit_together_are_refused(target_dir: Path, cache: Path, file: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give it JudgeDataModule"):
        make_trainer(tmp_path).fit(judge_module(target_dir), CacheDataModule(cache))
    with pytest.raises(ValueError, match="serves JudgeModule"):
        make_trainer(tmp_path, callbacks=[KeepJudge()]).fit(
            make_module(target_dir), CacheDataModule(cache, val_fraction=0.2)
        )
    with pytest.raises(ValueError, match="serves DraftModule"):
        fit(tmp_path, judge_module(target_dir), judge_data(cache, file), 1, callbacks=[KeepBestDrafter(tmp_path / "x")])


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"l2": []}, "list of penalties above 0"),
        ({"l2": [0.0]}, "list of penalties above 0"),
        ({"l2": [1.0, 1.0]}, "each penalty stands once"),
        ({"class_weight": "equal"}, "class_weight is 'equal'"),
        ({"class_weight": 0.0}, "class_weight is 0.0"),
        ({"max_wrong": -0.1}, "max_wrong is -0.1"),
        ({"iterations": 0}, "iterations is 0"),
        ({"num_replicates": 0}, "num_replicates is 0"),
        ({"feature": "layer.1.output"}, "a judge reads last.pre_norm or last.post_norm"),
    ],
)
def test_settings_out_of_range_are_refused(target_dir: Path, settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        judge_module(target_dir, **settings)


@pytest.mark.parametrize("kind", [FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy])
def test_a_strategy_that_divides_the_judge_is_refused(
    target_dir: Path, cache: Path, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Strategy]
) -> None:
    module = judge_module(target_dir)
    fit(tmp_path, module, judge_data(cache, file), epochs=1)
    # Made without its settings: DeepSpeed's would ask for the package.
    monkeypatch.setattr(pl.Trainer, "strategy", kind.__new__(kind))
    with pytest.raises(ValueError, match=rf"strategy is {kind.__name__}, which may keep the judge in pieces, .*\bddp "):
        module.setup("fit")


def test_a_judge_before_any_validation_is_refused(target_dir: Path) -> None:
    with pytest.raises(ValueError, match="no validation has been run"):
        judge_module(target_dir).judge()

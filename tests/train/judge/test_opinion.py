"""Training a judge that reads the target's opinion, and the figures over the tokens that a judge is asked about."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from judging import LENGTHS, fit, judge_data, judge_module, labelled_states, rows_of, save_rows
from training import HIDDEN, MakeCache, make_trainer

from draftsmith.data.cache.reader import HiddenStateCache
from draftsmith.models.judge import WITH_OPINION, load_judge
from draftsmith.models.opinion import opinion_of_text
from draftsmith.models.target.target import PRE_NORM, Target
from draftsmith.train.judge.callbacks import KeepJudge
from draftsmith.train.judge.data import JudgeDataModule
from draftsmith.train.judge.held_out import HeldOutTokens
from draftsmith.train.judge.joined_rows import labelled_positions
from draftsmith.train.judge.metrics import roc_auc
from draftsmith.train.judge.module import JudgeModule


@pytest.fixture(scope="module")
def cache(make_cache: MakeCache) -> Path:
    return make_cache(LENGTHS)


@pytest.fixture(scope="module")
def file(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_rows(tmp_path_factory.mktemp("rows"), rows_of(cache))


@pytest.fixture(scope="module")
def trained(
    target_dir: Path, cache: Path, file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[JudgeModule, JudgeDataModule, Path]:
    root = tmp_path_factory.mktemp("opinion")
    module, data = judge_module(target_dir, feature=WITH_OPINION), judge_data(cache, file)
    trainer = fit(root, module, data, callbacks=[KeepJudge()])
    assert trainer.callback_metrics["val/auc_differing"] > 0.5
    return module, data, root / "judge"


def test_a_new_judge_reads_the_opinion_unless_asked_not_to() -> None:
    assert JudgeModule("embedded:target").feature == WITH_OPINION


def test_the_opinion_follows_from_the_cached_states_through_the_ends(
    trained: tuple[JudgeModule, JudgeDataModule, Path], cache: Path, target: Target
) -> None:
    module, data, _ = trained
    samples = {sample.id: sample for sample in HiddenStateCache(cache)}
    rows = [joined.row for joined in data._splits["validation"].joined]
    numbers = []
    for row in rows:
        sample = samples[row.id]
        positions, _ = labelled_positions(row)
        numbers.append(opinion_of_text(target.ends, sample.hidden[PRE_NORM], sample.input_ids, positions))
    tokens, expected = data.tokens("validation"), torch.cat(numbers)
    states, _ = labelled_states(cache, rows)
    assert torch.allclose(tokens.features, torch.cat([states, expected], dim=-1), atol=1e-5)
    assert torch.equal(tokens.differs, expected[:, 2] < 0)
    judge = module.judge()
    assert torch.allclose(judge.log_odds(states, opinion=expected).double(), module._values[:, module.best], atol=2e-4)


def test_a_kept_judge_has_figures_over_the_tokens_that_the_target_would_not_have_chosen(
    trained: tuple[JudgeModule, JudgeDataModule, Path],
) -> None:
    module, data, folder = trained
    kept, config = load_judge(folder).config, module.judge().config  # the best so far, and the last
    assert (kept.feature, kept.num_features) == (WITH_OPINION, HIDDEN + 6)
    assert kept.labels["differing"].keys() == config.labels["differing"].keys()
    differs = data.tokens("validation").differs.numpy()
    labels = data.labels("validation")[differs]
    found = config.labels["differing"]
    assert (found["correct"], found["wrong"]) == (int(labels.sum()), int((~labels).sum()))
    assert 0 < found["wrong"] < int((~data.labels("validation")).sum()) or differs.all()
    assert found["auc"] == pytest.approx(roc_auc(module._values[:, module.best].numpy()[differs], labels), abs=1e-6)
    assert found["at_threshold"]["threshold"] == config.threshold
    assert config.differing_curve[0]["threshold"] == 0.0


def test_the_threshold_limits_the_wrong_tokens_that_a_judge_is_asked_about(
    trained: tuple[JudgeModule, JudgeDataModule, Path], recwarn: pytest.WarningsRecorder
) -> None:
    module, _, _ = trained
    # Wrong tokens that the target itself chose are many and easily told apart; those that it would not have chosen are not.
    probabilities = np.array([0.10] * 8 + [0.6, 0.4] + [0.5, 0.7, 0.8])
    labels = np.array([False] * 10 + [True] * 3)
    differs = np.array([False] * 8 + [True] * 5)
    tokens = HeldOutTokens(probabilities, labels, np.arange(13), differs)
    assert module.threshold_over == "differing"
    thresholds = {}
    before, limit = module.held_out, module.max_wrong
    try:
        module.held_out, module.max_wrong = tokens, 0.1
        for over in ("differing", "all"):
            module.threshold_over = over
            config = module.judge().config
            thresholds[over] = config.threshold
            assert config.labels["threshold_over"] == over
            # Whatever was looked at, the card's row is over all tokens.
            assert config.labels["at_threshold"]["wrong"] == np.mean(probabilities[:10] > config.threshold)
        # One of ten wrong tokens may pass; of the two differing ones, none.
        assert 0.4 <= thresholds["all"] < 0.5
        assert 0.6 <= thresholds["differing"] < 0.7
        module.threshold_over = "differing"
        module.on_fit_end()
        assert not recwarn
        module.held_out = HeldOutTokens(probabilities, labels, np.arange(13), labels)
        assert module.judge().config.labels["threshold_over"] == "all"
        with pytest.warns(UserWarning, match="chosen over all labelled tokens"):
            module.on_fit_end()
    finally:
        module.held_out, module.max_wrong, module.threshold_over = before, limit, "differing"


def test_tokens_of_one_class_have_no_figures_of_their_own() -> None:
    tokens = HeldOutTokens(
        np.array([0.2, 0.8, 0.4]), np.array([True, True, False]), np.arange(3), np.array([True, True, False])
    )
    assert tokens.differing() is None


def test_a_row_without_a_prompt_has_no_token_before_its_reply(target_dir: Path, cache: Path, tmp_path: Path) -> None:
    rows = rows_of(cache)
    bare = replace(
        rows[0],
        prompt_ids=[],
        reply_ids=rows[0].prompt_ids + rows[0].reply_ids,
        labels=[1] * len(rows[0].prompt_ids) + rows[0].labels,
    )
    data = judge_data(cache, save_rows(tmp_path, [bare, *rows[1:]]))
    with pytest.raises(ValueError, match="row s0 has no prompt token"):
        make_trainer(tmp_path).fit(judge_module(target_dir), data)


def test_mined_labels_are_joined_to_others_only_by_asking_for_it(cache: Path, tmp_path: Path) -> None:
    rows = rows_of(cache)
    file = save_rows(tmp_path, [replace(row, how="mined") if number < 30 else row for number, row in enumerate(rows)])
    with pytest.raises(
        ValueError, match=r"labelled by mined \(30\), rule \(30\); a mined label means .*join_kinds: true"
    ):
        judge_data(cache, file).setup()
    joined = judge_data(cache, file, join_kinds=True)
    joined.setup()
    assert joined.record()["how"] == {"mined": 30, "rule": 30}

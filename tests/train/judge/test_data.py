"""Rows joined to states: which state a label belongs to, splits by question, shares of processes, and which inputs are an error."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from judging import ANSWERS, LENGTHS, judge_data, labelled_states, rows_of, save_rows
from training import HIDDEN, MakeCache

from draftsmith.label.token_rows import LabelledRow
from draftsmith.train.judge.data import JudgeDataModule, labelled_positions

SPLITS = ("train", "validation")


@pytest.fixture(scope="module")
def cache(make_cache: MakeCache) -> Path:
    return make_cache(LENGTHS)


@pytest.fixture(scope="module")
def rows(cache: Path) -> list[LabelledRow]:
    return rows_of(cache)


@pytest.fixture(scope="module")
def file(rows: list[LabelledRow], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_rows(tmp_path_factory.mktemp("rows"), rows)


def opened(data: JudgeDataModule) -> JudgeDataModule:
    data.setup()
    data.read_states()
    return data


def on_rank(data: JudgeDataModule, rank: int, world_size: int) -> JudgeDataModule:
    data.trainer = SimpleNamespace(global_rank=rank, world_size=world_size)  # type: ignore[assignment]
    return opened(data)


def held_out(data: JudgeDataModule) -> set[str]:
    return {one.row.question for one in data._splits["validation"].joined}


def test_a_label_belongs_to_the_state_at_the_tokens_own_place() -> None:
    row = LabelledRow("a", "q", "s", "rule", [5, 6, 7], [8, 9, 4], [-100, 0, 1])
    positions, labels = labelled_positions(row)
    assert positions.tolist() == [4, 5]
    assert labels.tolist() == [False, True]


def test_states_are_read_as_a_loop_over_tokens_reads_them(cache: Path, rows: list[LabelledRow], file: Path) -> None:
    data = opened(judge_data(cache, file))
    for split in SPLITS:
        tokens = data.tokens(split)
        chosen = [one.row for one in data._splits[split].joined]
        states, labels = labelled_states(cache, chosen)
        assert tokens.features.dtype == torch.float32
        assert torch.equal(tokens.features, states)
        assert torch.equal(tokens.labels, labels)
        assert torch.equal(torch.from_numpy(data.labels(split)), labels)
        assert tokens.places.tolist() == list(range(len(labels)))
        assert len({one.question for one in chosen}) == data.record()["questions"][split]


def test_no_question_is_on_both_sides_and_a_seed_fixes_which(cache: Path, rows: list[LabelledRow], file: Path) -> None:
    data = opened(judge_data(cache, file))
    trained = {one.row.question for one in data._splits["train"].joined}
    assert not trained & held_out(data)
    assert trained | held_out(data) == {row.question for row in rows}
    assert len(held_out(data)) == round(0.3 * len(LENGTHS) / ANSWERS)
    assert held_out(opened(judge_data(cache, file))) == held_out(data)
    assert held_out(opened(judge_data(cache, file, seed=1))) != held_out(data)
    sizes = torch.bincount(torch.from_numpy(data.questions("validation")))
    by_question: dict[str, int] = {}
    for one in data._splits["validation"].joined:
        by_question[one.row.question] = by_question.get(one.row.question, 0) + sum(
            label != -100 for label in one.row.labels
        )
    assert sorted(sizes.tolist()) == sorted(by_question.values())


def test_fewer_questions_are_among_more_and_leave_the_held_out_ones_alone(cache: Path, file: Path) -> None:
    found = {size: opened(judge_data(cache, file, max_questions=size)) for size in (3, 8)}
    few, many = ({one.row.question for one in found[size]._splits["train"].joined} for size in (3, 8))
    assert few < many
    assert (len(few), len(many)) == (3, 8)
    assert held_out(found[3]) == held_out(found[8]) == held_out(opened(judge_data(cache, file)))


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_hold_every_token_once(cache: Path, file: Path, world_size: int) -> None:
    alone = opened(judge_data(cache, file))
    shares = [on_rank(judge_data(cache, file), rank, world_size) for rank in range(world_size)]
    for split in SPLITS:
        whole = alone.tokens(split)
        places = torch.cat([share.tokens(split).places for share in shares])
        assert sorted(places.tolist()) == whole.places.tolist()
        features = torch.cat([share.tokens(split).features for share in shares])
        assert torch.equal(features[places.argsort()], whole.features)
        assert all(torch.equal(torch.from_numpy(share.labels(split)), whole.labels) for share in shares)


def test_parts_are_the_whole(cache: Path, file: Path) -> None:
    tokens = opened(judge_data(cache, file, batch_tokens=7)).tokens("train")
    parts = list(tokens.parts(torch.device("cpu")))
    assert len(parts) == -(-len(tokens) // 7)
    assert torch.equal(torch.cat([features for _, features in parts]), tokens.features)


def test_rows_and_caches_may_be_several(
    cache: Path, rows: list[LabelledRow], make_cache: MakeCache, tmp_path: Path
) -> None:
    second = [replace(row, id=f"t{row.id}") for row in rows_of(make_cache(LENGTHS, seed=1))]
    first_file, second_file = save_rows(tmp_path, rows, "a"), save_rows(tmp_path, rows[:3], "b")
    with pytest.raises(ValueError, match=r"the id s0 is in .*a already"):
        judge_data(cache, [first_file, second_file]).setup()  # type: ignore[arg-type]
    halves = [save_rows(tmp_path, rows[:30], "c"), save_rows(tmp_path, rows[30:], "d")]
    data = opened(judge_data(cache, halves))  # type: ignore[arg-type]
    assert data.record()["correct"] == opened(judge_data(cache, first_file)).record()["correct"]
    (tmp_path / "other").mkdir()
    namesakes = [halves[0], save_rows(tmp_path / "other", rows[30:], "c")]
    twins = opened(judge_data(cache, namesakes))  # type: ignore[arg-type]
    assert list(twins.record()["rows"]) == [str(path) for path in namesakes]
    assert twins.state_dict() == data.state_dict()
    with pytest.raises(ValueError, match=r"60 of 60 rows are not in .* \(first: ts0\); run draftsmith data extract"):
        judge_data(cache, save_rows(tmp_path, second, "e")).setup()
    with pytest.raises(ValueError, match="comes twice"):
        judge_data([cache, cache], first_file).setup()  # type: ignore[arg-type]


def test_the_draft_models_states_stand_behind_the_targets(cache: Path, file: Path, make_cache: MakeCache) -> None:
    draft = make_cache(LENGTHS)
    data = opened(judge_data(cache, file, draft_cache=draft))
    assert data.feature_sizes == (HIDDEN, HIDDEN)
    features = data.tokens("train").features
    assert torch.equal(features[:, :HIDDEN], features[:, HIDDEN:])
    with pytest.raises(ValueError, match="rows are not in"):
        judge_data(cache, file, draft_cache=make_cache(LENGTHS[:10])).setup()


def test_the_norm_is_for_the_targets_states_only(cache: Path, file: Path, make_cache: MakeCache) -> None:
    data = judge_data(cache, file, draft_cache=make_cache(LENGTHS))
    data.setup()
    data.read_states(lambda states: states * 2)
    features = data.tokens("train").features
    assert torch.equal(features[:, :HIDDEN], 2 * features[:, HIDDEN:])


def test_rows_of_another_tokenizer_or_a_cut_cache_are_refused(
    cache: Path, rows: list[LabelledRow], tmp_path: Path
) -> None:
    other = replace(rows[7], reply_ids=[*rows[7].reply_ids[:-1], 1])
    with pytest.raises(
        ValueError,
        match=r"sample s7 has other tokens than its row \(at 8: \d+, not 1\); the labels are those of another tokenizer",
    ):
        judge_data(cache, save_rows(tmp_path, [*rows[:7], other, *rows[8:]])).setup()
    longer = replace(rows[7], reply_ids=[*rows[7].reply_ids, 1], labels=[*rows[7].labels, 1])
    with pytest.raises(ValueError, match=r"sample s7 has 9 tokens, its row 10; the cache was cut"):
        judge_data(cache, save_rows(tmp_path, [*rows[:7], longer, *rows[8:]])).setup()


def test_states_that_are_not_finite_are_refused_with_the_sample(make_cache: MakeCache, tmp_path: Path) -> None:
    poisoned = make_cache(LENGTHS, poison=4)
    rows = rows_of(poisoned)
    rows = [replace(row, labels=[0, *[1] * (len(row.labels) - 1)]) for row in rows]
    data = judge_data(poisoned, save_rows(tmp_path, rows))
    data.setup()
    with pytest.raises(ValueError, match=r"sample s4: hidden.last.pre_norm holds NaN"):
        data.read_states()


@pytest.mark.parametrize("label", [0, 1])
def test_one_class_alone_is_refused(cache: Path, rows: list[LabelledRow], tmp_path: Path, label: int) -> None:
    alike = [replace(row, labels=[label] * len(row.labels)) for row in rows]
    with pytest.raises(ValueError, match=r"(train|validation) has .* both kinds are needed"):
        judge_data(cache, save_rows(tmp_path, alike)).setup()


def test_rows_without_a_label_are_left_aside_and_nothing_but_such_refused(
    cache: Path, rows: list[LabelledRow], file: Path, tmp_path: Path
) -> None:
    silent = [replace(row, id=f"x{row.id}", labels=[-100] * len(row.labels)) for row in rows]
    with pytest.raises(ValueError, match="has no labelled token"):
        judge_data(cache, save_rows(tmp_path, silent)).setup()
    data = opened(judge_data(cache, save_rows(tmp_path, [*rows, *silent])))
    assert data.record()["correct"] == opened(judge_data(cache, file)).record()["correct"]


def test_too_many_processes_are_refused(cache: Path, file: Path) -> None:
    with pytest.raises(ValueError, match="rows for 200 processes"):
        on_rank(judge_data(cache, file), 0, 200)


def test_a_cache_without_the_last_layer_is_refused(make_cache: MakeCache, file: Path) -> None:
    with pytest.raises(ValueError, match=r"a judge reads last\.pre_norm"):
        judge_data(make_cache(LENGTHS, layers=("layer.0.output",)), file).setup()


@pytest.mark.parametrize(
    "settings", [{"val_fraction": 0.0}, {"val_fraction": 1.0}, {"max_questions": 0}, {"batch_tokens": 0}]
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    [name] = settings
    with pytest.raises(ValueError, match=f"{name} is"):
        JudgeDataModule(Path("cache"), Path("rows"), **settings)

"""On-policy rounds: a judge decodes, what stood is checked, and it learns from that; a stopped command continues where it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from draftsmith import provenance
from draftsmith.cli import main
from draftsmith.data.cache.extract import extract
from draftsmith.embedded import write_prompts
from draftsmith.label.answer_rows import read_answers
from draftsmith.label.commands.rows_command import rows as label_rows
from draftsmith.label.corrupt.corrupt_command import CorruptionOptions, corrupt
from draftsmith.label.token_rows import read_rows
from draftsmith.models.judge import Judge, JudgeConfig, load_judge
from draftsmith.models.tree.shapes import parse_shape, shape_text
from draftsmith.train.judge.data import JudgeDataModule
from draftsmith.train.judge.module import JudgeModule
from draftsmith.train.judge.rounds import RoundFigures, Served, _say_cut_off, rounds_table, seen, train
from draftsmith.train.judge.rounds_command import RoundOptions, _files, recipe_of, served_drafters

TARGET, DRAFTER = "embedded:target", "embedded:draft_lm"


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a judge, the rows and the cache that it was trained from, and problems."""
    folder = tmp_path_factory.mktemp("first")
    write_prompts(folder / "problems.jsonl", "train", 20)
    ways = CorruptionOptions(wordings=("draft",))
    corrupt(folder / "problems.jsonl", folder / "wrong.jsonl", "embedded", "Apache-2.0", ways)
    label_rows(TARGET, folder / "rows.jsonl", answers=folder / "wrong.jsonl")
    extract(TARGET, folder / "rows.jsonl", folder / "cache")
    write_prompts(folder / "train.jsonl", "train", 6, seed=9)
    train(JudgeModule(TARGET), JudgeDataModule(folder / "cache", folder / "rows.jsonl"), folder / "run")
    return folder


def run(first: Path, out: Path, *words: object) -> int:
    fixed = {
        "target": TARGET,
        "judge": first / "run" / "judge",
        "rows": json.dumps([str(first / "rows.jsonl")]),
        "cache": json.dumps([str(first / "cache")]),
        "drafters": json.dumps([DRAFTER]),
        "prompts": first / "train.jsonl",
        "out": out,
        "licence": "Apache-2.0",
        "questions": 3,
        "max_new_tokens": 120,
    }
    return main(["judge", "rounds", *(f"--{name}={value}" for name, value in fixed.items()), *map(str, words)])


def test_rounds_make_judges_and_a_table_and_a_second_call_finds_them_done(
    first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(first, tmp_path / "rounds", "--checker", "embedded", "--rounds", 2) == 0
    figures = json.loads((tmp_path / "rounds" / "rounds.json").read_text())
    assert [row["number"] for row in figures] == [1, 2]
    assert all(row["answers"] == 3 and 0 <= row["right"] <= 3 for row in figures)
    assert all(0.0 < row["accepted_per_cycle"] <= 16 and 0 <= row["by_rule"] < row["tokens"] for row in figures)
    judges = [tmp_path / "rounds" / f"round-{number}" / "judge" for number in (1, 2)]
    for judge in judges:
        config = load_judge(judge).config
        assert [(seen["name"], seen["shapes"]) for seen in config.drafters] == [(DRAFTER, ["1x16"])]
    own = {row.id for number in (1, 2) for row in read_rows(judges[number - 1].parent / "rows.jsonl")}
    learnt = load_judge(judges[1]).config.labels
    # The second round learns from its own rows, those of the first round, and the first rows of all.
    assert len(own) == 6
    assert len(learnt["rows"]) == 3
    made = [judge.stat().st_ino for judge in judges]
    capsys.readouterr()
    assert run(first, tmp_path / "rounds", "--checker", "embedded", "--rounds", 2) == 0
    assert [judge.stat().st_ino for judge in judges] == made
    assert "| 2 | 3 |" in capsys.readouterr().out
    # More rounds, or fewer answers in flight, continue what is there.
    assert run(first, tmp_path / "rounds", "--checker", "embedded", "--rounds", 1, "--batch_rows", 1) == 0
    assert run(first, tmp_path / "rounds", "--checker", "final-number", "--rounds", 2) == 1
    assert "holds rounds with other settings: checker: there 'embedded', now 'final-number';" in capsys.readouterr().err


def test_without_a_checker_people_label_what_stood(
    first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rounds"
    assert run(first, out, "--rounds", 1) == 0
    assert "start the command again" in capsys.readouterr().out
    waiting = list(read_answers(out / "round-1" / "to-label.jsonl"))
    assert waiting
    assert all(answer.label is None for answer in waiting)
    rows = [json.loads(line) for line in (out / "round-1" / "to-label.jsonl").read_text().splitlines()]
    label = {"verdict": "correct", "labelled_by": "me", "how": "person"}
    (out / "round-1" / "answers.jsonl").write_text("".join(json.dumps(row | label) + "\n" for row in rows))
    assert run(first, out, "--rounds", 1) == 0
    assert load_judge(out / "round-1" / "judge").config.labels["how"].keys() == {"person", "rule"}
    assert "labelled by people" in (out / "rounds.md").read_text()


def test_a_static_tree_is_recorded_by_its_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("draftsmith.train.judge.rounds.drafter_folder", Path)
    monkeypatch.setattr("draftsmith.train.judge.rounds.drafter_fingerprint", lambda folder: "0")
    assert seen([Served("a", "t2.1"), Served("a", "1x4")])[0]["shapes"] == [shape_text(parse_shape("t2.1")), "1x4"]


def test_each_drafter_has_a_shape() -> None:
    assert served_drafters(["a", "b"], ["1x4"]) == [Served("a", "1x4"), Served("b", "1x4")]
    assert served_drafters(["a", "b"], ["1x4", "1x8"]) == [Served("a", "1x4"), Served("b", "1x8")]
    for drafters, shapes in ((["a"], ["1x4", "1x8"]), ([], ["1x4"])):
        with pytest.raises(ValueError, match="one shape for all or one for each"):
            served_drafters(drafters, shapes)


def test_too_few_problems_are_an_error_before_anything_is_decoded(
    first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(first, tmp_path / "rounds", "--rounds", 3) == 1
    assert "6 problems are too few for 3 rounds of 3; give 9" in capsys.readouterr().err
    with pytest.raises(ValueError, match="rounds is 0"):
        RoundOptions(rounds=0)


def test_a_count_tells_of_replies_that_were_cut_off_and_nothing_but_these_is_an_error(
    capsys: pytest.CaptureFixture[str],
) -> None:
    _say_cut_off(0, 4, 120)
    assert capsys.readouterr().err == ""
    _say_cut_off(1, 4, 120)
    assert "1 of 4 replies are empty or longer than max_new_tokens, 120" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"4 of 4 replies are empty or longer .*; raise --max_new_tokens"):
        _say_cut_off(4, 4, 120)


def test_a_judge_of_other_weights_in_the_same_folder_is_another_setting(tmp_path: Path) -> None:
    prompts = tmp_path / "problems.jsonl"
    prompts.write_text("")
    judge = Judge(JudgeConfig(4, "last.post_norm"))
    judge.save_pretrained(tmp_path / "judge")
    before = _files(tmp_path / "judge", [], prompts)
    with torch.no_grad():
        judge.bias.fill_(1.0)
    judge.save_pretrained(tmp_path / "judge")
    assert _files(tmp_path / "judge", [], prompts) != before


def test_every_round_trains_as_the_given_judge_was_trained_and_keeps_its_gate(first: Path, tmp_path: Path) -> None:
    settings = {"l2": [0.5], "class_weight": 2.0, "max_wrong": 0.11, "threshold_over": "all", "hold_upper": True}
    module = JudgeModule(TARGET, "last.post_norm", **settings, num_replicates=7)
    train(module, JudgeDataModule(first / "cache", first / "rows.jsonl", val_fraction=0.3, seed=5), tmp_path / "run")
    given = tmp_path / "run" / "judge"
    recipe = recipe_of(given)
    assert recipe.data == {"val_fraction": 0.3, "seed": 5, "join_kinds": False}
    assert recipe.remarks == ()
    gated = load_judge(given).with_gate("reply", veto=True)
    gated.save_pretrained(given)
    assert run(first, tmp_path / "rounds", "--checker", "embedded", "--rounds", 1, "--judge", given) == 0
    round_1 = tmp_path / "rounds" / "round-1"
    kept, made = load_judge(round_1 / "judge").config, provenance.read(round_1 / "judge")["config"]
    assert (kept.feature, kept.gate, kept.veto) == ("last.post_norm", "reply", True)
    assert {name: made[name] for name in settings} == settings
    assert (made["num_replicates"], made["data"]["val_fraction"], made["data"]["seed"]) == (7, 0.3, 5)
    assert kept.labels["threshold_over"] == "all"


def test_what_rounds_cannot_keep_is_said_or_is_an_error(tmp_path: Path) -> None:
    def saved(**fields: Any) -> Path:
        Judge(JudgeConfig(4, **fields)).save_pretrained(tmp_path / "judge")
        return tmp_path / "judge"

    assert "does not record how it was trained" in recipe_of(saved()).remarks[0]
    provenance.write(tmp_path / "judge", {"config": {"l2": [1.0], "data": {"max_questions": 50, "seed": 1}}})
    recipe = recipe_of(tmp_path / "judge")
    assert (recipe.module["l2"], recipe.data) == ([1.0], {"seed": 1})
    assert "at most 50 questions of its rows" in recipe.remarks[0]
    with pytest.raises(ValueError, match="learnt from mined labels"):
        recipe_of(saved(labels={"how": {"mined": 3}}))
    with pytest.raises(ValueError, match="reads the draft model's states"):
        recipe_of(saved(draft_hidden_size=3))


def test_what_an_older_record_lacks_is_said_and_its_threshold_stays_over_all_tokens(tmp_path: Path) -> None:
    folder = tmp_path / "judge"
    Judge(JudgeConfig(4)).save_pretrained(folder)
    provenance.write(folder, {"config": {"l2": [1.0]}})
    recipe = recipe_of(folder)
    assert (recipe.module["threshold_over"], recipe.data) == ("all", {})
    [remark] = recipe.remarks
    assert "held-out share, seed and join_kinds are not recorded" in remark
    Judge(JudgeConfig(4, labels={"how": {"mined": 3}})).save_pretrained(folder)
    provenance.write(folder, {"config": {"l2": [1.0]}})
    with pytest.raises(ValueError, match="does not record whether it was"):
        recipe_of(folder)


def test_the_table_tells_rounds_of_people_from_those_of_a_checker() -> None:
    rows = [RoundFigures(1, 4, 3, 7.5, 10, 100, 0.9, None, 0.5), RoundFigures(2, 4, None, 7.5, 10, 100, 0.9, 0.8, 0.5)]
    lines = rounds_table(rows).splitlines()
    assert lines[2] == "| 1 | 4 | 75.0 % | 7.50 | 10.0 % | 0.9000 | - | 0.5 |"
    assert lines[3] == "| 2 | 4 | labelled by people | 7.50 | 10.0 % | 0.9000 | 0.8000 | 0.5 |"

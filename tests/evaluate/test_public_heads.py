"""Public heads are raced, diagnosed, decoded and tuned as they are: no command needs them converted first."""

import json
from pathlib import Path

import pytest
from public_heads import READ, dflash

from draftsmith.cli import main
from draftsmith.models import TargetEnds

NAMES = ("EAGLE-1", "speculators", "speculators-normed-residual")


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory, target: Path) -> Path:
    """A folder with one public head a layout."""
    folder, ends = tmp_path_factory.mktemp("heads"), TargetEnds.load(str(target))
    for name in NAMES:
        READ[name][0](folder / name, ends)
    dflash(folder / "dflash", ends)
    return folder


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [{"id": str(number), "prompt_ids": [1, *range(5, 9 + number)]} for number in range(2)]
    file = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_they_are_raced_beside_each_other(tmp_path: Path, target: Path, heads: Path, questions: Path) -> None:
    folders = [str(heads / name) for name in NAMES]
    words = ["--target", str(target), "--prompts", str(questions), "--out", str(tmp_path / "out"), "--shapes", "1x3"]
    words += ["--max-new-tokens", "8", "--transformers-prompts", "0", "--ledger-prompts", "0"]
    assert main(["evaluate", *words, "--drafters", *folders]) == 0
    rows = json.loads((tmp_path / "out" / "report.json").read_text())["rows"]
    assert [row["drafter"] for row in rows][-3:] == list(NAMES)
    assert {row["exact_share"] for row in rows} == {1.0}


def test_they_decode_a_prompt(target: Path, heads: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--target", str(target), "--prompt", "apples", "--max-new-tokens", "6"]
    assert main(["decode", *words]) == 0
    plain = capsys.readouterr().out
    assert main(["decode", *words, "--drafter", str(heads / NAMES[2]), "--shape", "1x3"]) == 0
    drafted = capsys.readouterr().out
    assert drafted.splitlines()[0] == plain.splitlines()[0]
    assert "tokens per step" in drafted


def test_the_doctor_reads_them_and_takes_the_target_that_a_folder_names(
    target: Path, heads: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "--drafter", str(heads / NAMES[2])]) == 0
    assert "drafter-file" in capsys.readouterr().out
    assert main(["doctor", "--drafter", str(heads / "EAGLE-1")]) == 1
    assert "does not tell its target; name it with --target" in capsys.readouterr().err
    assert main(["doctor", "--drafter", str(heads / "EAGLE-1"), "--target", str(target)]) == 0


def test_a_dflash_of_a_deeper_target_is_an_error_that_names_both_depths(
    tmp_path: Path, target: Path, heads: Path, questions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--target", str(target), "--prompts", str(questions), "--out", str(tmp_path / "out")]
    assert main(["evaluate", *words, "--drafters", str(heads / "dflash")]) == 1
    said = capsys.readouterr().err
    assert "num_target_layers 36" in said
    assert f"{str(target)!r} has 2 layers; name the target that the drafter was made for" in said

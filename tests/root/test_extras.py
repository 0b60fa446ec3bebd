"""The commands that install what only one part needs."""

import importlib.metadata
import shlex
import tomllib
from pathlib import Path

import pytest

from draftsmith.extras import install_command

ROOT = Path(__file__).resolve().parents[2]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
FOLDERS = ("src", "models", "decode", "data", "label", "train", "export", "evaluate", "embedded")
# Model cards, whose readers have nothing of draftsmith's yet.
CARDS = {"card.py", "judge_card.py"}


def parts(requirement: str) -> tuple[str, set[str]]:
    """Name and version ranges: `fastapi>=0.115,<1` -> ("fastapi", {">=0.115", "<1"})."""
    name = requirement.split(">")[0].split("<")[0]
    return name, set(requirement.removeprefix(name).split(","))


@pytest.mark.parametrize("extra", sorted(EXTRAS))
def test_every_package_of_an_extra_is_named_with_the_range_that_the_project_states(extra: str) -> None:
    stated = [parts(requirement) for requirement in EXTRAS[extra]]
    words = shlex.split(install_command(*(name for name, _ in stated)))
    assert words[:2] == ["pip", "install"]
    assert [parts(word) for word in words[2:]] == stated


def test_a_package_that_no_extra_lists_goes_by_its_name() -> None:
    assert install_command("adlfs", "Psycopg2_Binary") == "pip install adlfs Psycopg2_Binary"


def test_the_spelling_of_a_name_does_not_matter() -> None:
    assert install_command("Pydantic_Settings") == install_command("pydantic-settings")
    assert install_command("Pydantic_Settings") != "pip install Pydantic_Settings"


def test_a_copy_that_was_never_installed_names_packages_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", absent)
    assert install_command("fastapi") == "pip install fastapi"


def test_no_message_writes_such_a_command_by_hand() -> None:
    files = [file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py") if file.name not in CARDS]
    with_commands = [str(file) for file in files if "pip install" in file.read_text(encoding="utf-8")]
    assert with_commands == [str(ROOT / "src" / "draftsmith" / "extras.py")]

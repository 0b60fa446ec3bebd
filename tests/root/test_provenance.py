"""What a run leaves behind about itself."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

import draftsmith
from draftsmith import provenance


@dataclasses.dataclass(frozen=True)
class Settings:
    path: Path
    widths: tuple[int, ...]


def test_a_record_survives_writing_and_reading(tmp_path: Path) -> None:
    config = {"settings": Settings(Path("a/b"), (1, 2)), "rate": 0.5, "name": None}
    made = provenance.record("draftsmith data prompts", config, {"a.jsonl": "sha256:00"})
    assert provenance.write(tmp_path, made) == tmp_path / "provenance.json"
    assert provenance.read(tmp_path) == made
    assert made["config"] == {"settings": {"path": "a/b", "widths": [1, 2]}, "rate": 0.5, "name": None}
    assert made["inputs"] == {"a.jsonl": "sha256:00"}
    assert set(made) == {"command", "config", "inputs", "versions", "git_revision", "machine", "time"}
    json.dumps(made)


def test_versions_name_this_package_and_torch() -> None:
    found = provenance.versions()
    assert found["draftsmith"] == draftsmith.__version__
    assert {"python", "torch", "transformers"} <= set(found)


def test_the_machine_is_described_with_cores_and_memory() -> None:
    found = provenance.machine()
    assert found["cores"] >= 1
    assert found["memory_gib"] > 0
    assert found["cpu"]
    assert isinstance(found["gpus"], list)


def test_the_revision_is_none_for_a_file_git_does_not_track(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "provenance.py"))
    assert provenance.git_revision() is None


def test_the_command_line_can_be_pasted_into_a_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/draftsmith", "decode", "--prompt", "two words"])
    assert provenance.command_line() == "draftsmith decode --prompt 'two words'"


def test_the_command_line_names_a_module_that_python_runs(tmp_path: Path) -> None:
    (tmp_path / "shown.py").write_text("from draftsmith import provenance\nprint(provenance.command_line())\n")
    command = [sys.executable, "-m", "shown", "--scale", "0.1"]
    shown = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert shown.stdout == "python -m shown --scale 0.1\n"


def test_reading_a_folder_without_a_record_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"provenance\.json does not exist"):
        provenance.read(tmp_path)

"""The stages of the judge's benchmark: each part runs once, side by side; a later run makes a part that an earlier one skipped."""

import sys
from pathlib import Path

import pytest

from benchmarks.judge.stages import Child, Stages


def child(folder: Path, name: str, code: str = "") -> Child:
    """A command that notes each of its runs in a file of its name."""
    note = f"open({str(folder / name)!r}, 'a').write('x'); {code}"
    return Child([sys.executable, "-c", note], folder / f"{name}.log")


def runs(folder: Path) -> dict[str, int]:
    return {file.name: len(file.read_text()) for file in folder.iterdir() if file.suffix == "" and file.is_file()}


def test_parts_run_once_and_one_that_was_left_out_runs_later(tmp_path: Path) -> None:
    stages = Stages(tmp_path)
    stages.together("reports", {"a": child(tmp_path, "a"), "b": child(tmp_path, "b")})
    stages.together("reports", {"a": child(tmp_path, "a"), "b": child(tmp_path, "b")})
    assert runs(tmp_path) == {"a": 1, "b": 1}
    before = stages.spent()["reports"]["seconds"]
    stages.together("reports", {"a": child(tmp_path, "a"), "b": child(tmp_path, "b"), "c": child(tmp_path, "c")})
    assert runs(tmp_path) == {"a": 1, "b": 1, "c": 1}
    assert set(stages.spent()) == {"reports", "reports.a", "reports.b", "reports.c"}
    assert stages.spent()["reports"]["seconds"] > before


def test_a_part_that_fails_is_quoted_and_runs_again(tmp_path: Path) -> None:
    stages = Stages(tmp_path)
    bad = child(tmp_path, "bad", "import sys; sys.exit('no such problem')")
    with pytest.raises(SystemExit, match="no such problem"):
        stages.together("reports", {"good": child(tmp_path, "good"), "bad": bad})
    assert bad.processor_seconds > 0.0
    stages.together("reports", {"good": child(tmp_path, "good"), "bad": child(tmp_path, "bad")})
    assert runs(tmp_path) == {"good": 1, "bad": 2}

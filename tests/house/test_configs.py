"""Every YAML in configs/ is a run that the training command accepts."""

import re
from pathlib import Path

import pytest

from draftsmith.cli import main

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


# Fragments are no runs by themselves: tests/train/run/test_engine_presets.py parses each with each drafter. Nor is the base.
RUNS = [path for path in sorted(CONFIGS.rglob("*.yaml")) if path.parent.name != "engines" and path.stem != "base"]


@pytest.mark.parametrize("config", RUNS, ids=lambda path: path.stem)
def test_every_shipped_configuration_parses(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["train", "fit", "--config", str(config), "--print_config"])
    assert stopped.value.code == 0, capsys.readouterr().err
    assert "class_path:" in capsys.readouterr().out


@pytest.mark.parametrize(
    "config", [path for path in RUNS if path.parent.name != "embedded"], ids=lambda path: path.stem
)
def test_the_runs_folder_is_typed_once(config: Path) -> None:
    text = config.read_text(encoding="utf-8")
    assert len(re.findall(r"^  default_root_dir: ", text, re.MULTILINE)) == 1
    assert not re.search(r"dirpath|save_dir", text)

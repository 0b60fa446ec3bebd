"""Every YAML in configs/ is a run that the training command accepts."""

from pathlib import Path

import pytest

from draftsmith.cli import main

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


# Fragments are no runs by themselves: tests/train/run/test_engine_presets.py parses each with each drafter.
RUNS = [path for path in sorted(CONFIGS.glob("*.yaml")) if not path.stem.startswith("engine_")]


@pytest.mark.parametrize("config", RUNS, ids=lambda path: path.stem)
def test_every_shipped_configuration_parses(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["train", "fit", "--config", str(config), "--print_config"])
    assert stopped.value.code == 0, capsys.readouterr().err
    assert "class_path:" in capsys.readouterr().out

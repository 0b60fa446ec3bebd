"""Training a judge from the command line, in one process and in two."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from judging import LENGTHS, rows_of, save_rows
from training import MakeCache

from draftsmith.models.judge import load_judge

ROOT = Path(__file__).resolve().parents[3]


def train(folder: Path, target: Path, cache: Path, rows: Path, *more: str) -> Path:
    """The shipped configuration, with this data."""
    run = folder / "run"
    arguments = [
        f"--config={ROOT / 'configs' / 'judge.yaml'}",
        f"--trainer.default_root_dir={run}",
        f"--trainer.logger.init_args.save_dir={run}",
        "--trainer.max_epochs=3",
        "--trainer.callbacks=[{class_path: KeepJudge}, {class_path: JudgeFigures}]",
        "--trainer.enable_checkpointing=false",
        f"--model.init_args.target={target}",
        "--model.init_args.l2=[0.001, 0.1]",
        f"--data.init_args.cache={cache}",
        f"--data.init_args.rows={rows}",
        "--data.init_args.val_fraction=0.3",
        *more,
    ]
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "fit", *arguments], capture_output=True, text=True, timeout=800
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert list(run.glob("events.out.tfevents*"))
    return run / "judge"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_processes_train_the_judge_that_one_trains(target_dir: Path, make_cache: MakeCache, tmp_path: Path) -> None:
    cache = make_cache(LENGTHS)
    rows = save_rows(tmp_path, rows_of(cache))
    judges = []
    for devices in (1, 2):
        more = ["--trainer.devices=2", "--trainer.strategy=ddp"] if devices == 2 else []
        judges.append(load_judge(train(tmp_path / str(devices), target_dir, cache, rows, *more)))
    alone, together = judges
    for name in ("mean", "scale", "weight", "bias"):
        assert torch.allclose(alone.state_dict()[name], together.state_dict()[name], rtol=1e-4, atol=1e-5), name
    assert together.config.threshold == pytest.approx(alone.config.threshold, abs=1e-4)
    assert together.config.labels == alone.config.labels

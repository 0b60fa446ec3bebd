"""A data module over a cache of several shards, and a run of the training script."""

import subprocess
import sys
from pathlib import Path
from typing import Any

from draftsmith.train.batches.data_module import CacheDataModule


def opened(cache: Path, **chosen: Any) -> CacheDataModule:
    data = CacheDataModule(cache, **chosen)
    data.setup()
    return data


def train(config: Path, *arguments: str) -> None:
    script = Path(__file__).resolve().parents[3] / "train.py"
    command = [sys.executable, str(script), "fit", f"--config={config}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "dataloader is not resumable" not in done.stderr

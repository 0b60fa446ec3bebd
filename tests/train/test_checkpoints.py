"""A disk that fills up while training: the run says so, and what was there before is still whole."""

import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_fabric.plugins import TorchCheckpointIO
from training import MakeCache, tiny_config

from draftsmith.train.checkpoints import AtomicCheckpointIO
from draftsmith.train.cli import main


@contextmanager
def disk_that_takes(num_bytes: int) -> Iterator[None]:
    """No file of this process may grow beyond num_bytes: writing fails as on a full disk."""
    before, old_handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, old_handler)


def test_a_full_disk_leaves_the_last_checkpoint_as_it_was(tmp_path: Path) -> None:
    path, writer = tmp_path / "deep" / "last.ckpt", AtomicCheckpointIO()
    writer.save_checkpoint({"step": torch.tensor(1)}, path)
    with disk_that_takes(4096), pytest.raises(OSError, match="File too large"):
        writer.save_checkpoint({"step": torch.tensor(2), "weights": torch.zeros(10_000)}, path)
    assert writer.load_checkpoint(path)["step"] == 1
    assert [entry.name for entry in path.parent.iterdir()] == ["last.ckpt"]


def test_the_training_command_writes_checkpoints_this_way(
    target_dir: Path, make_cache: MakeCache, tmp_path: Path
) -> None:
    config = tiny_config(tmp_path, target_dir, make_cache([9] * 10))
    cli = main(["fit", f"--config={config}", "--trainer.max_steps=1"])
    assert isinstance(cli.trainer.strategy.checkpoint_io, AtomicCheckpointIO)
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").is_file()


def test_a_full_disk_ends_the_run_and_the_next_one_resumes(
    target_dir: Path, make_cache: MakeCache, tmp_path: Path
) -> None:
    config = tiny_config(tmp_path, target_dir, make_cache([9] * 10))
    main(["fit", f"--config={config}", "--trainer.max_steps=1", "--trainer.max_epochs=-1"])
    with disk_that_takes(4096), pytest.raises(OSError, match="File too large"):
        main(["fit", f"--config={config}", "--ckpt_path=last"])
    checkpoint = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert TorchCheckpointIO().load_checkpoint(checkpoint)["global_step"] == 1
    resumed = main(["fit", f"--config={config}", "--ckpt_path=last"])
    assert resumed.trainer.global_step == 4


class Runs:
    """Would make a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


def test_a_checkpoint_that_would_run_code_is_refused_and_runs_none(tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "more": Runs(tmp_path / "ran")}, tmp_path / "evil.ckpt")
    for weights_only in (None, False, True):
        with pytest.raises(ValueError, match=r"evil.ckpt is no checkpoint of tensors and plain values"):
            AtomicCheckpointIO().load_checkpoint(tmp_path / "evil.ckpt", weights_only=weights_only)
    assert not (tmp_path / "ran").exists()
    AtomicCheckpointIO().save_checkpoint({"state_dict": {"w": torch.ones(2)}}, tmp_path / "good.ckpt")
    assert AtomicCheckpointIO().load_checkpoint(tmp_path / "good.ckpt")["state_dict"]["w"].tolist() == [1.0, 1.0]

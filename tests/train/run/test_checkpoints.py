"""Checkpoints: whole or absent on a full disk, refused when they are damaged or foreign, and never more than tensors and values."""

import os
import pickle
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lightning_fabric.plugins import TorchCheckpointIO
from safetensors.torch import save_file
from training import MakeCache, tiny_config

from draftsmith.cli import main as draftsmith
from draftsmith.train.cli import main
from draftsmith.train.run.checkpoints import AtomicCheckpointIO


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
    writer.save_checkpoint(checkpoint_of(torch.ones(1)), path)
    with disk_that_takes(4096), pytest.raises(OSError, match="File too large"):
        writer.save_checkpoint(checkpoint_of(torch.zeros(10_000)), path)
    assert writer.load_checkpoint(path)["state_dict"]["weight"] == 1
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


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """A checkpoint on disk, and what is in it."""
    path, content = tmp_path / "last.ckpt", checkpoint_of(torch.arange(100.0))
    AtomicCheckpointIO().save_checkpoint(content, path)
    return path, content


def checkpoint_of(weight: torch.Tensor) -> dict[str, Any]:
    fields = {"loops": {}, "global_step": 1, "epoch": 0, "pytorch-lightning_version": pl.__version__}
    return {"state_dict": {"weight": weight}, **fields}


@settings(
    max_examples=150, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(place=st.integers(0, 10**9), end=st.booleans(), cut=st.booleans())
def test_a_flipped_bit_or_a_missing_end_is_refused(
    saved: tuple[Path, dict[str, Any]], place: int, end: bool, cut: bool
) -> None:
    path, content = saved
    whole = path.read_bytes()
    bit = 8 * len(whole) - 1 - place % 800 if end else place % (8 * len(whole))  # as often at the digest as elsewhere
    damaged = bytearray(whole)
    damaged[bit // 8] ^= 1 << bit % 8
    other = path.with_name("damaged.ckpt")
    other.write_bytes(whole[: bit // 8] if cut else damaged)
    with pytest.raises(ValueError, match=r"damaged\.ckpt is (damaged|cut off)"):
        AtomicCheckpointIO().load_checkpoint(other)
    assert torch.equal(
        AtomicCheckpointIO().load_checkpoint(path)["state_dict"]["weight"], content["state_dict"]["weight"]
    )


def test_a_checkpoint_of_an_earlier_version_is_read_with_a_warning_and_refused_where_it_is_damaged(
    tmp_path: Path,
) -> None:
    path = tmp_path / "old.ckpt"
    torch.save(checkpoint_of(torch.arange(100.0)), path)
    with pytest.warns(UserWarning, match="has no digest"):
        assert AtomicCheckpointIO().load_checkpoint(path)["state_dict"]["weight"][7] == 7
    content = path.read_bytes()
    start = content.index(torch.arange(100.0).numpy().tobytes())
    path.write_bytes(content[:start] + b"\x01" + content[start + 1 :])
    with pytest.raises(ValueError, match="is damaged"):
        AtomicCheckpointIO().load_checkpoint(path)


FOREIGN: dict[str, Callable[[Path], object]] = {
    "empty": Path.touch,
    "text": lambda path: path.write_text("a letter"),
    "pickle": lambda path: path.write_bytes(pickle.dumps({"state_dict": {}})),
    "torch's old format": lambda path: torch.save({"a": 1}, path, _use_new_zipfile_serialization=False),
    "weights alone": lambda path: torch.save({"weight": torch.ones(2)}, path),
    "one tensor": lambda path: torch.save(torch.ones(2), path),
    "safetensors": lambda path: save_file({"weight": torch.ones(2)}, path),
    "a folder": Path.mkdir,
    "nothing": lambda path: None,
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_no_checkpoint_gets_one_sentence(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "given.ckpt"
    FOREIGN[kind](path)
    with pytest.raises(ValueError, match=r"given\.ckpt") as refused:
        AtomicCheckpointIO().load_checkpoint(path)
    assert "\n" not in str(refused.value)


def test_a_checkpoint_brings_no_settings_imports_no_module_and_fits_no_other_model(
    target_dir: Path, make_cache: MakeCache, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(tmp_path, target_dir, make_cache([9] * 10))
    main(["fit", f"--config={config}", "--trainer.max_steps=1", "--trainer.max_epochs=-1"])
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    content = AtomicCheckpointIO().load_checkpoint(path)
    (tmp_path / "trap.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Trap: pass\n")
    content["hyper_parameters"] = {"_class_path": "trap.Trap", "_instantiator": "trap.Trap", "num_steps": 9}
    crafted = tmp_path / "crafted.ckpt"
    AtomicCheckpointIO().save_checkpoint(content, crafted)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        resumed = main(["fit", f"--config={config}", f"--ckpt_path={crafted}", "--trainer.max_steps=2"])
    assert resumed.trainer.global_step == 2
    assert resumed.model.objective.num_steps == 3
    assert not (tmp_path / "ran").exists()
    name = next(iter(content["state_dict"]))
    content["state_dict"][name] = torch.zeros(1, 2, 3)
    AtomicCheckpointIO().save_checkpoint(content, crafted)
    assert draftsmith(["train", "fit", f"--config={config}", f"--ckpt_path={crafted}"]) == 1
    error = capsys.readouterr().err
    assert f"the checkpoint is of another model: weight {name} has shape (1, 2, 3) there" in error
    assert "Traceback" not in error


def test_only_checkpoint_files_are_deleted_whatever_a_checkpoint_lists_as_its_best(
    saved: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    (tmp_path / "folder.ckpt").mkdir()
    (tmp_path / "thesis.txt").touch()
    for path in ("thesis.txt", "folder.ckpt", "folder.ckpt/../last.ckpt"):
        with pytest.raises(ValueError, match="is no checkpoint file"):
            AtomicCheckpointIO().remove_checkpoint(str(tmp_path / path))
    AtomicCheckpointIO().remove_checkpoint(saved[0])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.ckpt", "thesis.txt"]


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

"""A lock that a killed compiler left behind stops a start with a remedy, where DeepSpeed itself would wait for ever."""

import logging
import os
import sys
import time
from pathlib import Path

import pytest

from draftsmith.models.target.extension_locks import LONGEST_COMPILE_S, check_extension_locks

pytest.importorskip("deepspeed")


@pytest.fixture(params=["chosen", "default"])
def built(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which PyTorch compiles, in a place that the user names or in its own."""
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    if request.param == "chosen":
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
        return tmp_path
    monkeypatch.setattr(f"{check_extension_locks.__module__}.get_default_build_root", lambda: str(tmp_path))
    monkeypatch.setattr("torch.version.cuda", None)
    return tmp_path / f"py{sys.version_info.major}{sys.version_info.minor}_cpu"


def lock_of(operation: Path, age_s: float) -> Path:
    """A lock and a half-compiled object, both last written so long ago."""
    operation.mkdir(parents=True)
    for name in ("lock", "shm.o"):
        (operation / name).touch()
        os.utime(operation / name, (time.time() - age_s, time.time() - age_s))
    return operation / "lock"


def test_a_lock_that_nobody_can_hold_any_more_stops_the_start_with_the_file_to_remove(built: Path) -> None:
    lock = lock_of(built / "deepspeed_shm_comm", 2 * LONGEST_COMPILE_S)
    with pytest.raises(ValueError, match=f"60 minutes.*remove {lock}"):
        check_extension_locks()
    lock.unlink()
    check_extension_locks()


def test_a_lock_beside_which_a_compiler_still_writes_is_named_and_waited_for(
    built: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lock = lock_of(built / "deepspeed_shm_comm", 2 * LONGEST_COMPILE_S)
    (built / "deepspeed_shm_comm" / "shm_interface.o").touch()
    with caplog.at_level(logging.WARNING):
        check_extension_locks()
    assert str(lock) in caplog.text


def test_locks_of_other_packages_and_other_versions_of_python_stop_nothing(
    built: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lock_of(built / "somebody_elses", 2 * LONGEST_COMPILE_S)
    for version in ("py39_cpu", f"{built.name}_other"):
        lock_of(built.parent / version / "deepspeed_shm_comm", 2 * LONGEST_COMPILE_S)
    with caplog.at_level(logging.WARNING):
        check_extension_locks()
    assert not caplog.text

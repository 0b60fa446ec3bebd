"""What made a result: command, resolved configuration, versions, source revision, inputs, machine.

Owns the shape of `provenance.json`, and the comparison of what two runs depend on. Knows nothing of what the stages do.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from draftsmith.files import atomic_write
from draftsmith.json_text import json_text, parse_json_object
from draftsmith.ownership import CLAIM_FILE as FILE_NAME
from draftsmith.ownership import check_unclaimed

_PACKAGES = ("draftsmith", "torch", "transformers", "pytorch-lightning", "datasets", "safetensors", "numpy")


def command_line() -> str:
    """This process's command line, ready to be pasted into a shell."""
    started = sys.argv[0] if sys.argv else ""
    module = getattr(sys.modules["__main__"], "__spec__", None)
    if module is not None and started and started == module.origin:  # python -m
        words = ["python", "-m", module.name.removesuffix(".__main__")]
    else:
        words = [Path(started).name or "python"]
    return shlex.join([*words, *sys.argv[1:]])


def record(command: str, config: Mapping[str, Any], inputs: Mapping[str, str]) -> dict[str, Any]:
    """Describes one run.

    Args:
        command: the command line (`command_line()`), or the function's name when called from Python.
        config: every setting of the run as resolved; paths, enums and dataclasses become plain JSON.
        inputs: what was read, by name or path, each with its fingerprint.
    """
    return {
        "command": command,
        "config": _plain(config),
        "inputs": dict(inputs),
        "versions": versions(),
        "git_revision": git_revision(),
        "machine": machine(),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def write(directory: Path, record: Mapping[str, Any]) -> Path:
    """Writes `record` to `directory/provenance.json`, atomically, and gives that path.

    Raises:
        ValueError: the folder is one that a stage wrote whole; its record stays.
    """
    check_unclaimed(Path(directory))
    path = Path(directory) / FILE_NAME
    atomic_write(path, json_text(record, indent=2) + "\n")
    return path


def read(directory: Path) -> dict[str, Any]:
    """The record in `directory`.

    Raises:
        ValueError: there is none, or it is not a JSON object.
    """
    path = Path(directory) / FILE_NAME
    if not path.is_file():
        raise ValueError(f"{path} does not exist; {directory} was not written by draftsmith, or only in part")
    return parse_json_object(path.read_bytes(), str(path), f"make {directory} anew")


def training(directory: Path) -> dict[str, Any]:
    """The record of how something was trained, which later stages hand on; empty where nothing was recorded.

    Args:
        directory: what training wrote, or a later stage.

    Raises:
        ValueError: the record cannot be read.
    """
    if not (directory / FILE_NAME).is_file():
        return {}
    own = read(directory)
    history = own.get("training", own)
    return history if isinstance(history, dict) else {}


def versions() -> dict[str, str]:
    """Versions of Python and of the packages a result depends on; those not installed are left out."""
    installed = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


def git_revision() -> str | None:
    """The commit of the checkout this package runs from (`-dirty` where tracked files differ); None outside of one."""
    source = Path(__file__).resolve()
    # An installed copy may lie inside somebody's repository without belonging to it: ask whether git tracks this file.
    if _git(source.parent, "ls-files", "--error-unmatch", source.name) is None:
        return None
    revision = _git(source.parent, "rev-parse", "HEAD")
    if revision is None:
        return None
    changes = _git(source.parent, "status", "--porcelain", "--untracked-files=no")
    return f"{revision}-dirty" if changes else revision


def _git(directory: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=directory, capture_output=True, text=True, timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def machine() -> dict[str, Any]:
    """Processor name, usable cores, memory in GiB, and the names of the CUDA devices."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cores": cores,
        "memory_gib": round(memory, 1),
        "gpus": _gpu_names(),
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _gpu_names() -> list[str]:
    import torch  # here, not above: asking for a version must not cost the seconds that torch takes to load

    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def _plain(value: Any) -> Any:
    """`value` as JSON can hold it."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return _plain(value.value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)


def differences(there: Mapping[str, Any], now: Mapping[str, Any], without: Collection[str] = ()) -> list[str]:
    """Which settings differ, as `name: there 'a', now 'b'`, in the order of their names; those inside objects as `settings.name`.

    A setting that one side lacks counts as null there. So null must be how a run does without a later version's setting, which is what
    every run of an earlier version did.

    Args:
        there: of the earlier run, as JSON gives it back.
        now: of this run.
        without: names at the top that may differ.

    Example:
        `{"n": 1}` and `{"n": 1, "context": None}` are the same; with `{"n": 1, "context": 64}` it is `context: there None, now 64`.
    """
    own, others = ({name: settings[name] for name in settings if name not in without} for settings in (now, there))
    return [f"{name}: there {old!r}, now {new!r}" for name, old, new in _unlike(others, own, "")]


def _unlike(there: Mapping[str, Any], now: Mapping[str, Any], within: str) -> Iterator[tuple[str, Any, Any]]:
    for name in sorted(there.keys() | now.keys()):
        old, new = there.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from _unlike(old, new, f"{within}{name}.")
        elif old != new:
            yield f"{within}{name}", old, new

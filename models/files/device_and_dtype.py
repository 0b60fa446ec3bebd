"""What a device and a dtype may be called, and what `auto` means on this machine.

Owns the names and their resolution: everything that is recorded or compared holds what `auto` was resolved to. Loads no weights.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from draftsmith.models.files.checkpoint_files import broken_file
from draftsmith.models.files.model_folder import resolve_model
from draftsmith.models.files.pretrained import read_config

AUTO = "auto"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
_IN_SAFETENSORS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}


def as_dtype(name: str) -> torch.dtype:
    """Look up a torch dtype by its name.

    Args:
        name: such as bfloat16.

    Returns:
        The dtype.

    Raises:
        ValueError: not a floating dtype that targets are run in.
    """
    if name not in _DTYPES:
        raise ValueError(f"dtype {name!r} is not one of {', '.join(_DTYPES)}")
    return _DTYPES[name]


def as_device(name: str) -> torch.device:
    """Make a torch device that is really there.

    Args:
        name: such as cuda:1.

    Returns:
        The device.

    Raises:
        ValueError: the name is no device, or this machine has none such.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device {name!r} is not a device; use auto, cpu, cuda, cuda:1, mps ...") from error
    there = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "meta": 0}
    if (device.index or 0) >= there.get(device.type, 0):
        raise ValueError(
            f"device {name!r} is not there: this machine has {there['cuda']} CUDA device(s); use --device cpu or one that it has"
        )
    return device


def resolved_device(name: str) -> str:
    """The device that a name means here: `auto` is CUDA where there is one, else the CPU.

    Where a launcher has started several processes on this machine, `cuda` is this process's own GPU, `cuda:LOCAL_RANK`.

    Args:
        name: auto, cpu, cuda, cuda:1 ...

    Returns:
        The name of a device, never auto.
    """
    if name == AUTO:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    local_rank = os.environ.get("LOCAL_RANK")
    return f"cuda:{local_rank}" if name == "cuda" and local_rank is not None else name


def resolved_dtype(
    name: str, path: str, device: str, revision: str | None = None, trust_remote_code: bool = False
) -> str:
    """The dtype that a name means for a model: `auto` is the checkpoint's own on CUDA, and float32 elsewhere.

    Args:
        name: auto, or a dtype's name.
        path: directory or hub id of the model.
        device: where the model runs, resolved.
        revision: the hub's revision.
        trust_remote_code: whether Python files that come with the model may run.

    Returns:
        The name of a dtype, never auto.

    Raises:
        ValueError: no such dtype, or a checkpoint whose dtype a target cannot run in.
    """
    if name != AUTO:
        as_dtype(name)
        return name
    return checkpoint_dtype(path, revision, trust_remote_code) if device.startswith("cuda") else "float32"


def checkpoint_dtype(path: str, revision: str | None = None, trust_remote_code: bool = False) -> str:
    """The dtype that a checkpoint was saved in: its config's, else that of its first floating tensor.

    Args:
        path: directory or hub id of the model.
        revision: the hub's revision.
        trust_remote_code: whether Python files that come with the model may run.

    Returns:
        The dtype's name.

    Raises:
        ValueError: bad path, a weights file that is cut off, or a dtype that targets are not run in.
    """
    folder = resolve_model(path, revision)
    config = read_config(folder, trust_remote_code)
    named = config.dtype or config.get_text_config().dtype or _first_floating(folder)
    name = str(named).removeprefix("torch.")
    if name not in _DTYPES:
        raise ValueError(
            f"the checkpoint {path} is in {name}, in which no target runs; name one of {', '.join(_DTYPES)} instead of auto"
        )
    return name


def _first_floating(folder: Path) -> str:
    """The dtype of the first floating tensor in the folder's safetensors files; float32 where there is none.

    Raises:
        ValueError: a file is cut off or no safetensors file.
    """
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, "pt") as tensors:
                dtypes = (tensors.get_slice(name).get_dtype() for name in tensors.keys())  # noqa: SIM118 (no mapping)
                dtype = next((_IN_SAFETENSORS[stored] for stored in dtypes if stored in _IN_SAFETENSORS), None)
        except SafetensorError as error:
            raise broken_file(file, error, "copy the folder again") from error
        if dtype is not None:
            return dtype
    return "float32"

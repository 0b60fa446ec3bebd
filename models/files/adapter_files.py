"""A PEFT adapter's folder on disk, of a target or of a drafter.

Owns what the folder must hold, how it is read without trusting it, and its fingerprint. Knows no model: `merged_adapter.py` merges an
adapter into a target, `models/drafters/lora.py` into a drafter.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from draftsmith.json_text import parse_json_object
from draftsmith.models.files.fingerprint import checkpoint_fingerprint
from draftsmith.models.files.finite import is_finite
from draftsmith.models.files.model_folder import resolve
from draftsmith.models.files.pretrained import name_faults

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # PEFT's, before every tensor's name
TARGET_ADAPTER = "target_adapter"  # in the folder of a drafter that was trained together with an adapter of its target
BOND = "bond.json"  # in the folder of a drafter's adapter, and in no other


def adapter_folder(name: str) -> Path:
    """Find where a target's adapter lies.

    Args:
        name: a directory, or a hub id.

    Returns:
        The folder; of a hub id its snapshot.

    Raises:
        ValueError: there is no such thing, it is no adapter, its weights are pickled, or their file is cut off.
    """
    try:
        folder = resolve(name)
    except ValueError as error:
        raise ValueError(
            f"adapter {name!r} cannot be had; give the directory or hub id of a PEFT adapter ({error})"
        ) from error
    _tensor_names(folder)
    return folder


def reaches(folder: Path, modules: Iterable[str]) -> bool:
    """Tell whether a target's adapter touches any of some modules. Tensors with names in another form than PEFT's count as touching them.

    Example: an adapter of ``q_proj`` alone does not reach ``("model.embed_tokens", "model.norm", "lm_head")``.

    Args:
        folder: what :func:`adapter_folder` gave.
        modules: full names of the model's modules.

    Returns:
        True where it does, or may.
    """
    own_prefixes = tuple(f"{PREFIX}{name}." for name in modules)
    return any(not key.startswith(PREFIX) or key.startswith(own_prefixes) for key in _tensor_names(folder))


def adapter_fingerprint(folder: Path) -> str:
    """Hash an adapter: its weights, and what its config says about their use (rank, alpha, layers ...).

    Args:
        folder: of the adapter.

    Returns:
        sha256 (hex).

    Raises:
        ValueError: no safetensors weights, or a broken config.
    """
    origin = ("base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version", "task_type")
    fields = {key: value for key, value in read_json(folder / CONFIG).items() if key not in origin and value}
    # PEFT writes sets as lists of any order.
    fields |= {key: sorted(value, key=str) for key, value in fields.items() if isinstance(value, list)}
    text = json.dumps([checkpoint_fingerprint(folder), fields], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Read the tensors of an adapter's folder.

    Args:
        folder: of the adapter.

    Returns:
        The tensors by PEFT's names, all of floating dtypes.

    Raises:
        ValueError: there are none, they are pickled, the file is broken, or a tensor is not of floats or holds NaN or infinity.
    """
    _tensor_names(folder)
    tensors = load_file(folder / WEIGHTS)
    whole = sorted(name for name, tensor in tensors.items() if not tensor.is_floating_point())
    if whole:
        raise ValueError(
            f"{folder / WEIGHTS} holds tensors that are not of floats ({name_faults({'in': whole})}); save the adapter again"
        )
    bad = sorted(name for name, tensor in tensors.items() if not is_finite(tensor))
    if bad:
        raise ValueError(
            f"{folder / WEIGHTS} holds NaN or infinity ({name_faults({'in': bad})}); its training went wrong: train the adapter again"
        )
    return tensors


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file of an adapter.

    Args:
        path: of the file.

    Returns:
        The object.

    Raises:
        ValueError: it is missing, or holds anything else.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing; give a whole adapter folder")
    return parse_json_object(path.read_bytes(), str(path), "save the adapter again")


def _tensor_names(folder: Path) -> list[str]:
    """Names of an adapter's tensors; of the file only its head is read.

    Raises:
        ValueError: a file is missing, the weights are pickled, or their file is cut off.
    """
    if not (folder / CONFIG).is_file():
        raise ValueError(
            f"{folder} holds no adapter ({CONFIG} is missing); give the folder that PEFT's save_pretrained wrote"
        )
    if not (folder / WEIGHTS).is_file():
        pickled = sorted(path.name for path in folder.glob("*.bin"))
        raise ValueError(
            f"{folder} holds {', '.join(pickled) or 'no weights'} and no {WEIGHTS}; pickled adapters are never loaded, save the adapter "
            "with `save_pretrained(path, safe_serialization=True)`"
        )
    try:
        with safe_open(folder / WEIGHTS, "pt") as file:
            return list(file.keys())
    except SafetensorError as error:
        raise ValueError(
            f"{folder / WEIGHTS} is cut off or no safetensors file: {error}; save the adapter again"
        ) from error

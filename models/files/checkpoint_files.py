"""A checkpoint's two files, ``config.json`` and ``model.safetensors``: how they are read and written.

Owns what a folder must hold before its content means anything. Pickled weights are never opened, since reading one can run code.
Knows no family and no layout.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from draftsmith.json_text import parse_json_object
from draftsmith.models.files.field_rules import safe_file_name

WEIGHTS, CONFIG = "model.safetensors", "config.json"
INDEX = f"{WEIGHTS}.index.json"
MTP_PROJECTIONS = {
    "DeepSeek's": re.compile(r"(model\.(?:language_model\.)?layers\.\d+\.)eh_proj\..+"),
    "MiMo's": re.compile(r"(model\.mtp_layers\.\d+\.)input_proj\..+"),
    "Qwen's": re.compile(r"(mtp\.)fc\..+"),
}
"""How an MTP layer inside a target's checkpoint is known: its projection, plain or quantised. The group begins all names of the layer."""
_OTHER_WEIGHTS = ("medusa_lm_head.safetensors",)  # what other software calls the one file of a drafter
_PART = re.compile(r"-of-(\d+)\.safetensors$")
_LFS_MARK = b"version https://git-lfs"
_AGAIN = "export it again, or copy the folder again"
_PICKLES = ("*.pt", "*.bin", "*.pth", "*.pkl")


def read_fields(folder: Path) -> dict[str, Any]:
    """Read ``config.json``.

    Args:
        folder: of the checkpoint.

    Returns:
        Its fields.

    Raises:
        ValueError: no such file, or not a JSON object.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise ValueError(f"{folder} holds no {CONFIG}; give the folder of a trained drafter")
    return parse_json_object(path.read_bytes(), str(path), "give the folder of a trained drafter")


def weight_files(folder: Path) -> list[Path]:
    """List the files of a checkpoint's tensors: ``model.safetensors``, the parts that its index names, or a file of another known name.

    Args:
        folder: of the checkpoint.

    Returns:
        The files, sorted; empty where there are none.

    Raises:
        ValueError: the index is broken, or a part that it names is not there.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    index = folder / INDEX
    if not index.is_file():
        return [folder / name for name in _OTHER_WEIGHTS if (folder / name).is_file()]
    remedy = "copy the folder again"
    parts = parse_json_object(index.read_bytes(), str(index), remedy).get("weight_map")
    if not isinstance(parts, dict) or not parts:
        raise ValueError(f"{index} has no weight_map; {remedy}")
    files = sorted({folder / safe_file_name(name, f"{index}: weight_map") for name in parts.values()})
    if missing := [file.name for file in files if not file.is_file()]:
        raise ValueError(f"{index} names {', '.join(missing)}, which {folder} lacks; {remedy}")
    return files


def mtp_beginnings(names: Iterable[str]) -> dict[str, list[str]]:
    """Find the MTP layers of a checkpoint.

    Args:
        names: of its tensors.

    Returns:
        The beginnings of the layers' names, sorted, by the style of their names; only styles with a layer.
    """
    listed = list(names)
    matched = {
        title: sorted({match.group(1) for match in map(pattern.fullmatch, listed) if match})
        for title, pattern in MTP_PROJECTIONS.items()
    }
    return {title: beginnings for title, beginnings in matched.items() if beginnings}


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Read ``model.safetensors``, or the parts that its index names.

    Args:
        folder: of the checkpoint.

    Returns:
        Its tensors by name.

    Raises:
        ValueError: there is no safetensors file, one is broken, two parts hold the same tensor, or only pickled weights are there, which
            are never opened.
    """
    files = weight_files(folder)
    if not files:
        raise ValueError(_no_weights(folder))
    tensors: dict[str, Tensor] = {}
    for path in files:
        part = read_file(path)
        _refuse_doubles(part, tensors, path)
        tensors |= part
    return tensors


def _refuse_doubles(part: Iterable[str], others: Mapping[str, object], path: Path) -> None:
    """Refuse a tensor that two parts of a checkpoint hold: which of the two counts is a matter of their order.

    Raises:
        ValueError: naming it.
    """
    if double := next((name for name in part if name in others), None):
        raise ValueError(f"{path} holds {double}, as another part of {path.parent} does; copy the folder again")


def read_file(path: Path, remedy: str = _AGAIN) -> dict[str, Tensor]:
    """Read one safetensors file.

    Args:
        path: of the file.
        remedy: what an error tells to do.

    Returns:
        Its tensors by name.

    Raises:
        ValueError: it is not there, cut off or no safetensors file.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist; {remedy}")
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except SafetensorError as error:
        raise broken_file(path, error, remedy) from error
    return tensors


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of a checkpoint by name, each read when it is asked for: a few of a large model cost no more than they are.

    Args:
        folder: of the checkpoint.

    Raises:
        ValueError: a file is cut off or no safetensors file, or the index of the files is broken.
    """

    def __init__(self, folder: Path) -> None:
        self._files: dict[str, Path] = {}
        for path in weight_files(folder):
            try:
                with safe_open(path, "pt") as file:
                    self._files |= dict.fromkeys(file.keys(), path)
            except SafetensorError as error:
                raise broken_file(path, error) from error

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self._files[name], "pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def broken_file(path: Path, error: Exception, remedy: str = _AGAIN) -> ValueError:
    """The error for a file that safetensors does not read.

    Args:
        path: of the file.
        error: of safetensors.
        remedy: what the error tells to do.

    Returns:
        The error, to be raised.
    """
    with open(path, "rb") as file:
        is_pointer = file.read(len(_LFS_MARK)) == _LFS_MARK
    if is_pointer:
        return ValueError(f"{path} is a pointer of Git LFS, not the weights; run `git lfs pull` in its folder")
    return ValueError(f"{path} is cut off or no safetensors file: {error}; {remedy}")


def _no_weights(folder: Path) -> str:
    """What an error says of a folder without safetensors."""
    others = sorted(file.name for file in folder.glob("*.safetensors"))
    if adapters := [name for name in others if name.startswith("adapter_")]:
        return (
            f"{folder} holds {', '.join(adapters)}, which is an adapter (LoRA) and no drafter; give the folder of a trained drafter, or "
            f"merge the adapter into its model"
        )
    if part := next(filter(None, map(_PART.search, others)), None):
        return f"{folder} holds {part.string}, of {int(part[1])} parts, without {INDEX}, which names them; copy the whole folder again"
    if len(others) == 1:
        return f"{folder} holds {others[0]} but no {WEIGHTS}; rename the file to {WEIGHTS}"
    if others:
        return f"{folder} holds {', '.join(others)} without {INDEX}, which names them; copy that file too"
    pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
    if not pickles:
        return (
            f"{folder} holds no {WEIGHTS}; give the folder of a trained drafter. Pickled weights of a hub id are not fetched: fetch and "
            "convert them first"
        )
    return (
        f"{folder} holds {', '.join(pickles)} but no {WEIGHTS}; pickled weights can run code and are not read. "
        'Convert them in that folder: python -c "import torch, safetensors.torch as s; '
        f"s.save_file({{n: t.contiguous() for n, t in torch.load('{pickles[0]}', weights_only=True).items()}}, '{WEIGHTS}')\""
    )


def write_files(folder: Path, config_text: str, tensors: Mapping[str, Tensor]) -> None:
    """Write both files into an existing folder.

    Args:
        folder: where to.
        config_text: of ``config.json``.
        tensors: by name, any dtype and device.

    Raises:
        OSError: the disk is full or the folder cannot be written.
    """
    save_file(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
        folder / WEIGHTS,
        metadata={"format": "pt"},
    )
    (folder / CONFIG).write_text(config_text, encoding="utf-8")


def as_text(fields: Mapping[str, Any]) -> str:
    """Write fields as the text of a ``config.json``.

    Args:
        fields: that JSON can hold.

    Returns:
        The text, with a newline at its end.
    """
    return json.dumps(fields, indent=2) + "\n"

"""Checkpoints that are whole or absent, prove it, and run no code when they are read.

Owns: how a checkpoint's bytes reach the disk and come back, the digest behind them. Does not know: when one is written, what a module
makes of it.

Lightning writes to the system's temporary folder and moves the file. Where that is another file system, moving is copying. A kill or a
full disk in the middle then leaves half a checkpoint under the name that the next run resumes from.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from lightning_fabric.plugins import TorchCheckpointIO
from lightning_fabric.utilities.cloud_io import get_filesystem
from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from torch import nn

from draftsmith.files import atomic_file

# Behind the archive that torch writes, and that every reader of archives passes over.
_MARK = b"\ndraftsmith sha256 "
_HEX = 2 * hashlib.sha256().digest_size
_TRAILER = len(_MARK) + _HEX
_END = b"PK\x05\x06"  # how the last record of an archive begins, and how long it is where it has no comment
_END_SIZE = 22
_BLOCK = 2**20
# Errors that torch raises for bytes that hold no tensors and plain values.
_UNREADABLE = (
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    ValueError,
)
_PROMISE = "digest"  # a field of every checkpoint that was written with a digest behind it
# The fields that Lightning reads from any checkpoint, and their types.
_FIELDS: Mapping[str, type] = {
    "state_dict": dict,
    "loops": dict,
    "global_step": int,
    "epoch": int,
    "pytorch-lightning_version": str,
}


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a temporary file and renames it; reads only files whose digest is right, and only tensors and plain values."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Saves a checkpoint with its digest, and removes what killed processes left in the same folder.

        Args:
            checkpoint: to save.
            path: a file, or an address with a scheme.
            storage_options: ignored.

        Raises:
            OSError: the disk cannot hold it; the earlier checkpoint stays.
        """
        if "://" in str(path):  # s3://... and the like: an object appears whole or not at all
            buffer = io.BytesIO()
            _write(checkpoint, buffer)
            with get_filesystem(path).open(str(path), "wb") as file:
                file.write(buffer.getvalue())
            return
        with atomic_file(Path(path)) as file:
            _write(checkpoint, file)

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = True) -> dict[str, Any]:
        """Reads a checkpoint without running what a pickle may hold.

        Args:
            path: a file, or an address with a scheme.
            map_location: where tensors go.
            weights_only: ignored: only tensors and plain values are ever read.

        Raises:
            ValueError: a file that is missing, damaged, or nothing that draftsmith has written.
        """
        storage = get_filesystem(path)
        if not storage.isfile(str(path)):
            raise ValueError(f"{path} is no file, so no checkpoint can be read from it; check --ckpt_path")
        with storage.open(str(path), "rb") as file:
            earlier = _ends_as_torch_ends(file)
            (_check_archive if earlier else _check_digest)(file, path)
            checkpoint = _checked(_read(file, path, map_location), path)
        if earlier and _PROMISE in checkpoint:
            raise ValueError(f"{path} is cut off: its digest is missing; resume from another checkpoint")
        if earlier:
            rank_zero_warn(
                f"{path} has no digest, because an earlier version wrote it: its weights were checked by the weaker sums of its archive"
            )
        return checkpoint

    def remove_checkpoint(self, path: Any) -> None:
        """Removes one checkpoint file. Its name may come from a checkpoint's own list of the best ones.

        Args:
            path: the file.

        Raises:
            ValueError: a path that is no checkpoint's.
        """
        if Path(path).suffix != ".ckpt" or ".." in Path(path).parts or Path(path).is_dir():
            raise ValueError(
                f"{path} is no checkpoint file, so it is not deleted; the run's checkpoint names it as one"
            )
        super().remove_checkpoint(path)


class _Hashing(io.RawIOBase):
    """Hands on what is written, and hashes it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest = file, hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return self.file.write(data)


def _write(checkpoint: Mapping[str, Any], file: BinaryIO) -> None:
    hashing = _Hashing(file)
    try:
        torch.save({**checkpoint, _PROMISE: "sha256"}, cast(BinaryIO, hashing))
    except RuntimeError as error:  # what torch makes of a disk's refusal while it closes its archive
        raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None
    hashing.write(_MARK)
    file.write(hashing.digest.hexdigest().encode())


def _ends_as_torch_ends(file: BinaryIO) -> bool:
    """Whether the file ends with an archive's last record, as checkpoints of earlier versions do; a damaged digest does not."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _END_SIZE))
    end = file.read()
    return len(end) == _END_SIZE and end.startswith(_END)


def _check_digest(file: BinaryIO, path: Any) -> None:
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    digest, left = hashlib.sha256(), size - _HEX
    while left > 0 and (block := file.read(min(_BLOCK, left))):
        digest.update(block)
        left -= len(block)
    file.seek(max(0, size - _TRAILER))
    if file.read() != _MARK + digest.hexdigest().encode():
        raise ValueError(
            f"{path} is damaged, cut off, or no checkpoint of draftsmith's: its digest does not match; resume from another checkpoint"
        )


def _check_archive(file: BinaryIO, path: Any) -> None:
    file.seek(0)
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, EOFError, OSError) as error:
        raise ValueError(f"{path} is damaged: {error}; resume from another checkpoint") from error
    if damaged is not None:
        raise ValueError(f"{path} is damaged at {damaged}; resume from another checkpoint")


def _read(file: BinaryIO, path: Any, map_location: Any) -> Any:
    file.seek(0)
    try:
        return torch.load(file, map_location=map_location, weights_only=True)
    except _UNREADABLE as error:
        raise ValueError(
            f"{path} is no checkpoint of tensors and plain values, as draftsmith writes them; others could run code and are not read"
        ) from error


def _checked(checkpoint: Any, path: Any) -> dict[str, Any]:
    """The checkpoint, if it has the fields of one."""
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path} holds a {type(checkpoint).__name__} and no checkpoint of a run; check --ckpt_path")
    for name, kind in _FIELDS.items():
        if not isinstance(checkpoint.get(name), kind):
            raise ValueError(f"{path} is no checkpoint of a run: it has no {name!r}; check --ckpt_path")
    return checkpoint


def check_fits(module: nn.Module, weights: Mapping[str, Any]) -> None:
    """Checks that weights belong to a module, before any of them is loaded.

    Args:
        module: to load into.
        weights: by name.

    Raises:
        ValueError: a weight is missing, of another shape, or none of the module's.
    """
    own = {name: tuple(weight.shape) for name, weight in module.state_dict().items()}
    theirs = {name: tuple(getattr(weight, "shape", ())) for name, weight in weights.items()}
    for name in [*own, *theirs]:
        if own.get(name) != theirs.get(name):
            raise ValueError(
                f"the checkpoint is of another model: weight {name} has shape {theirs.get(name, 'none')} there and "
                f"{own.get(name, 'none')} in this run; resume with the settings of that run, or start anew without --ckpt_path"
            )

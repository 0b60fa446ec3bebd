"""Checkpoints that are whole or absent, and run no code when they are read.

Owns: how a checkpoint's bytes reach the disk and come back. Does not know: what is in it, when it is written.

Lightning writes to the system's temporary folder and moves the file; where that is another file system, moving is copying,
and a kill or a full disk in the middle leaves half a checkpoint under the name that the next run resumes from.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins import TorchCheckpointIO

from draftsmith.files import atomic_file


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the final place and renames; reads tensors and plain values only, which Lightning by itself does not insist on."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Saves to a local path; an address with a scheme (s3://...) is left to Lightning.

        Raises OSError when the disk does not take it; the checkpoint that was there stays.
        """
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with atomic_file(Path(path)) as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:  # what torch makes of a disk's refusal while it closes its archive
                raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = True) -> dict[str, Any]:
        """Reads a checkpoint, whatever `weights_only` says without running what a pickle may hold.

        Raises ValueError for a file with anything but tensors and plain values.
        """
        try:
            return super().load_checkpoint(path, map_location, weights_only=True)
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"{path} is no checkpoint of tensors and plain values, as draftsmith writes them; others could run code and are not read"
            ) from error

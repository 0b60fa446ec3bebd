"""Checkpoints that are whole or absent.

Owns: how a checkpoint's bytes reach the disk. Does not know: what is in it, when it is written.

Lightning writes to the system's temporary folder and moves the file; where that is another file system, moving is copying,
and a kill or a full disk in the middle leaves half a checkpoint under the name that the next run resumes from.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins import TorchCheckpointIO

from draftsmith.files import atomic_file


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the final place and renames; reading is Lightning's."""

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

"""The locks under which DeepSpeed's operations are compiled: a process that is killed meanwhile leaves its own behind, and all later wait.

Owns: which locks there are, and which of them no process can still hold. Does not know: what DeepSpeed is used for.

PyTorch compiles an extension once a machine, beside a file called ``lock`` (``torch.utils.file_baton``). It waits for that file without
a word and without a limit.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.utils.cpp_extension import get_default_build_root

logger = logging.getLogger(__name__)

LONGEST_COMPILE_S = 1800
"""A folder in which nothing was written for so many seconds belongs to no compiler any more; one file takes a minute or two."""


def check_extension_locks() -> None:
    """Refuse a start that would wait for ever; say which compilation it may have to wait for.

    Raises:
        ValueError: an operation of DeepSpeed is locked, and for half an hour nothing was written beside the lock.
    """
    for lock in _locks():
        try:
            written = max((path.stat().st_mtime for path in lock.parent.iterdir()), default=time.time())
        except FileNotFoundError:
            continue  # the compiler is at work there, or has just ended
        quiet_min = (time.time() - written) / 60
        if quiet_min * 60 > LONGEST_COMPILE_S:
            raise ValueError(
                f"{lock} says that DeepSpeed's {lock.parent.name} is being compiled, but nothing was written there for {quiet_min:.0f} "
                f"minutes: the process that compiled it was probably killed, and PyTorch would wait for it for ever; remove {lock}"
            )
        logger.warning(
            "%s: another process compiles DeepSpeed's %s, and this run waits for it; if none does, stop this run and remove that file",
            lock,
            lock.parent.name,
        )


def _locks() -> Iterator[Path]:
    from deepspeed.ops.op_builder.all_ops import ALL_OPS

    operations = {builder.name for builder in ALL_OPS.values()}
    chosen = os.environ.get("TORCH_EXTENSIONS_DIR")
    # PyTorch's own folder has a folder for each version of Python and CUDA; the one that a user names has none.
    cuda = "cpu" if torch.version.cuda is None else f"cu{torch.version.cuda.replace('.', '')}"
    version = f"py{sys.version_info.major}{sys.version_info.minor}{getattr(sys, 'abiflags', '')}_{cuda}"
    folder = Path(chosen) if chosen else Path(get_default_build_root(), version)
    for lock in sorted(folder.glob("*/lock")):
        if lock.parent.name in operations:
            yield lock

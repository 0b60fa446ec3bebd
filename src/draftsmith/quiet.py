"""What the libraries below a command may print: errors, and warnings that are not known to be noise.

Owns the progress bars, log lines and warnings of Transformers, the Hub, Datasets, Lightning, PEFT, DeepSpeed and torch while a command
runs. Our own messages always come through. Only the command line uses this: code that imports draftsmith keeps the settings it has.
`DRAFTSMITH_LIBRARY_MESSAGES=1` shows everything. Knows none of the commands.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from draftsmith.escapes import visible

SHOW_ALL = "DRAFTSMITH_LIBRARY_MESSAGES"

# Read by the libraries when they are imported, also by processes that a command starts. What you have set yourself stays.
_ENVIRONMENT = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "DATASETS_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}
# Loggers with handlers of their own, whose warnings no user can act on.
_ERRORS_ONLY = ("DeepSpeed",)
# No module of ours warns with these: they are for the developers of the libraries.
_FOR_DEVELOPERS = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)
# Lightning's warnings "that could be false positives", by name: to import the class is to import Lightning.
_MAYBE_FALSE = "PossibleUserWarning"
_KNOWN_NOISE = re.compile(
    "|".join(
        (
            # Lightning
            r"Checkpoint directory .* exists and is not empty",
            r"You're resuming from a checkpoint that ended before the epoch",  # our data modules know their place in the epoch
            r"LightningCLI's args parameter",
            r'\.fit\(ckpt_path="last"\) is set, but there is no last checkpoint',  # documented: such a run starts afresh
            r"The number of training batches .* is smaller than the logging interval",
            r"Found \d+ module\(s\) in eval mode",
            # torch
            r"Detected call of `lr_scheduler\.step\(\)` before `optimizer\.step\(\)`",
            r"The given buffer is not writable",
            r"'?pin_memory'? argument is set as true but no accelerator",
            r"No device id is provided via `init_process_group` or `barrier",
            r"barrier\(\): using the device under current context",
            # PEFT
            r"Could not find a config file in .* - will assume that the vocabulary was not modified",
            r"Unable to fetch remote file due to the following error",
        )
    )
)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keeps the libraries quiet inside the block and puts everything back after it."""
    if os.environ.get(SHOW_ALL):
        yield
        return
    with _environment(), _log_lines(), _warnings():
        yield


@contextmanager
def _environment() -> Iterator[None]:
    added = {name: value for name, value in _ENVIRONMENT.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


@contextmanager
def _log_lines() -> Iterator[None]:
    """A handler at the root, in whose presence Lightning adds none of its own."""
    root, handler = logging.getLogger(), _Messages()
    strict, ours = [logging.getLogger(name) for name in _ERRORS_ONLY], logging.getLogger("draftsmith")
    level = ours.level
    ours.setLevel(logging.INFO)
    root.addHandler(handler)
    for logger in strict:
        logger.addFilter(_is_error)
    try:
        yield
    finally:
        root.removeHandler(handler)
        ours.setLevel(level)
        for logger in strict:
            logger.removeFilter(_is_error)


@contextmanager
def _warnings() -> Iterator[None]:
    before = warnings.showwarning
    warnings.showwarning = _show_warning
    try:
        yield
    finally:
        warnings.showwarning = before


class _Messages(logging.Handler):
    """Writes to stderr: our own log lines as they are, those of others from WARNING on."""

    def emit(self, record: logging.LogRecord) -> None:
        """Called by `logging` for every record that reaches the root."""
        if not _is_own_file(record.pathname):
            if record.levelno < logging.WARNING or _KNOWN_NOISE.search(record.getMessage()):
                return
            _write(f"{record.levelname.lower()} of {record.name.partition('.')[0]}: {record.getMessage()}")
        elif record.levelno < logging.WARNING:
            _write(record.getMessage())
        else:
            _write(f"{record.levelname.lower()}: {record.getMessage()}")


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Takes the place of `warnings.showwarning`: our own warnings, and those of others that are not known, a line each."""
    if _is_own_file(filename) and not issubclass(category, _FOR_DEVELOPERS):
        _write(f"warning: {message}", file)
    elif not is_noise(str(message), category):
        _write(f"warning of {_library(filename)}: {message}", file)


def is_noise(message: str, category: type[Warning]) -> bool:
    """Whether a library's warning is one that no user can act on."""
    named = {kind.__name__ for kind in category.__mro__}
    return issubclass(category, _FOR_DEVELOPERS) or _MAYBE_FALSE in named or bool(_KNOWN_NOISE.search(message))


def _is_own_file(path: str) -> bool:
    """Whether a message comes from a module of this package, wherever it is installed."""
    own = (module for name, module in list(sys.modules.items()) if name.partition(".")[0] == "draftsmith")
    return any(getattr(module, "__file__", None) == path for module in own)


def _library(path: str) -> str:
    """What a reader calls the library that a file belongs to: the folder below `site-packages`, or the file itself."""
    inside = re.search(r"site-packages/([^/]+)", path)
    return inside[1].removesuffix(".py") if inside else path


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def _write(text: str, file: TextIO | None = None) -> None:
    # Looked up now: a progress bar on screen puts its own stream there.
    print(visible(text), file=file or sys.stderr, flush=True)

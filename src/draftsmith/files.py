"""Files that are whole or absent: atomic writes, line-by-line JSON, resumable logs, one writer at a time.

Owns how bytes reach the disk. Knows nothing of prompts, tensors or models; every stage builds on it.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import hashlib
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from draftsmith.json_rows import Dropped, DroppedSink, UnusableRow, check_lines, is_blank, parse_object, shown
from draftsmith.json_text import json_text
from draftsmith.ownership import CLAIM_FILE, check_contents, check_replaceable, claimed, claimed_too

_OWNER = re.compile(r"\.(partial|replaced)-((?P<machine>.+)-(?P<pid>\d+)-[0-9a-f]{8}|(?P<old_pid>\d+))$")
_LONG_UNTOUCHED = 86_400.0
_LOCK_ATTEMPTS = 10


def _beside(path: Path, kind: str) -> Path:
    """A hidden name beside `path` that nobody else uses: process ids alone coincide in containers, and over machines."""
    return path.parent / f".{path.name}.{kind}-{_machine()}-{os.getpid()}-{secrets.token_hex(4)}"


def _machine() -> str:
    """Where this process's id means this process: the host's name, and which of its process namespaces this is."""
    host = re.sub(r"[^\w.-]", "_", socket.gethostname())
    try:
        return f"{host}.{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:  # no Linux: the host has but one
        return host


def is_abandoned(leftover: Path) -> bool:
    """Whether who was writing this half-written file or folder has certainly died.

    Certain is: a process of this machine that is gone, or one of another machine, which cannot be asked, that has not touched it for a
    day. Earlier versions named no machine.
    """
    owner = _OWNER.search(leftover.name)
    if owner is None:
        return False
    if owner["machine"] == _machine():
        return not _alive(int(owner["pid"]))
    if owner["machine"] is None and _alive(int(owner["old_pid"])):
        return False
    try:
        return time.time() - leftover.lstat().st_mtime > _LONG_UNTOUCHED
    except FileNotFoundError:
        return False


def clear_abandoned(folder: Path) -> None:
    """Removes from a folder what writers that died were writing into it, files and folders."""
    for leftover in folder.glob(".*.partial-*"):
        if is_abandoned(leftover):
            _remove(leftover)


def _remove(leftover: Path) -> None:
    if leftover.is_dir() and not leftover.is_symlink():
        shutil.rmtree(leftover, ignore_errors=True)
    else:
        leftover.unlink(missing_ok=True)


def _sync_directory(path: Path) -> None:
    """Makes a rename inside `path` survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def atomic_write(path: Path, data: bytes | str, clear: bool = True) -> None:
    """Writes `data` (text as UTF-8) to `path`: a reader sees the old content or the new, never a part.

    Args:
        path: the file.
        data: its whole content.
        clear: as in `atomic_file`.

    Raises:
        OSError: the disk is full or the folder cannot be written; `path` is then as it was.
    """
    with atomic_file(path, clear) as file:
        file.write(data.encode("utf-8") if isinstance(data, str) else data)


def atomic_addition(path: Path, data: bytes | str) -> None:
    """As `atomic_write`, of a file beside those that a stage wrote. The stage's claim then covers it, so the stage may replace the folder.

    Raises:
        OSError: the disk is full or the folder cannot be written.
    """
    claim = claimed_too(path.parent, path.name)
    if claim is not None:
        atomic_write(path.parent / CLAIM_FILE, claim)
    atomic_write(path, data)


@contextlib.contextmanager
def atomic_file(path: Path, clear: bool = True) -> Iterator[BinaryIO]:
    """Yields a file that becomes `path` when the block ends well, and vanishes when it does not: for what is too large to hold twice.

    Args:
        path: the file.
        clear: first remove what killed writers left half-written in the same folder, so that it takes no room. False where a folder of
            tens of thousands of files would be listed for each of them, and the stage clears it by itself.

    Raises:
        OSError: the disk is full or the folder cannot be written; `path` is then as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if clear:
        clear_abandoned(path.parent)
    partial = _beside(path, "partial")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    _sync_directory(path.parent)


@contextlib.contextmanager
def atomic_directory(path: Path, stage: str = "draftsmith") -> Iterator[Path]:
    """Yields an empty folder beside `path` that becomes `path` when the block ends well, and vanishes when it does not.

    A folder already at `path` is replaced if it is empty or this stage's own, and put back if the exchange itself fails. Links are
    followed. The new folder gets a `provenance.json` that claims it for `stage`, or has the claim added. What killed writers left beside
    it is cleared away; a folder that one of them had moved aside, and not yet replaced, is put back first.

    A stage whose work takes long asks `check_replaceable` before it begins.

    Args:
        path: where the folder goes.
        stage: who writes it, in the user's words: `draftsmith export`.

    Raises:
        ValueError: `path` is a file, or a folder that `stage` must not replace (see `check_replaceable`).
        OSError: the disk is full or the parent cannot be written; what was at `path` is untouched.
    """
    shown, path = Path(path), Path(path).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    _put_back(path)
    check_replaceable(shown, stage)
    clear_abandoned(path.parent)
    partial = _beside(path, "partial")
    partial.mkdir()
    try:
        yield partial
        atomic_write(partial / CLAIM_FILE, claimed(partial, stage))
        _sync_directory(partial)
        _exchange(partial, path, stage, shown)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    _sync_directory(path.parent)
    for leftover in _moved_aside(path):
        _remove(leftover)


def _moved_aside(path: Path) -> list[Path]:
    """What writers that died had taken from `path`, the latest first."""
    leftovers = filter(is_abandoned, path.parent.glob(f".{glob.escape(path.name)}.replaced-*"))
    return sorted(leftovers, key=lambda leftover: leftover.lstat().st_mtime, reverse=True)


def _put_back(path: Path) -> None:
    """Undoes an exchange in whose middle its process died."""
    leftovers = [] if path.exists() else _moved_aside(path)
    if leftovers:
        os.replace(leftovers[0], path)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _exchange(partial: Path, path: Path, stage: str, shown: Path) -> None:
    if not path.exists():
        os.replace(partial, path)
        return
    replaced = _beside(path, "replaced")
    os.replace(path, replaced)
    with contextlib.ExitStack() as undo:
        undo.callback(os.replace, replaced, path)
        # Here nobody can add to it any more.
        check_contents(replaced, stage, shown)
        os.replace(partial, path)
        undo.pop_all()
    shutil.rmtree(replaced)


def read_jsonl(path: Path, dropped: DroppedSink | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Gives `(line number from 1, row)` for each line of a JSON-lines file; blank lines are passed over.

    The path is checked at the call, the lines as they are read.

    Args:
        path: the file, in UTF-8; a byte-order mark is passed over.
        dropped: takes the record of each line that is no usable JSON object, and the others are read. None: such a line is
            an error.

    Raises:
        ValueError: the path is missing or a folder, the file is empty or UTF-16, or, without `dropped`, a line (named
            `FILE:LINE`) is no usable JSON object.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path} does not exist; check the path (relative paths start at {Path.cwd()})")
    if path.is_dir():
        raise ValueError(f"{path} is a folder, but a JSON-lines file is expected; name a file inside it")
    return _rows(path, dropped)


def _rows(path: Path, dropped: DroppedSink | None) -> Iterator[tuple[int, dict[str, Any]]]:
    empty = True
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                check_lines(path, line)
            if is_blank(line):
                continue
            empty = False
            place = f"{path}:{number}"
            try:
                row = parse_object(line)
            except UnusableRow as error:
                if dropped is None:
                    raise ValueError(f"{place}: {error}; mend or delete the line") from error
                dropped.append(Dropped(place, str(error), shown(line)))
                continue
            yield number, row
    if empty:
        raise ValueError(f"{path} is empty; one JSON object a line is expected")


class JsonlAppender:
    """A JSON-lines file that grows row by row and survives being killed at any byte.

    Opening cuts off a torn last line (one without its newline), reads what is there into `rows`, and appends after it.
    A row that was written outlives a killed process. A machine that fails may lose up to `sync_rows` rows, those since the last
    sync: it comes at `close`, and with a row that is written `sync_seconds` after the one before. Where rows are too many to be held
    whole, `keep` says what of each stays in `rows`.

    Raises:
        ValueError: a whole line of the existing file is not a JSON object (named `FILE:LINE`).
    """

    def __init__(
        self,
        path: Path,
        sync_rows: int = 32,
        sync_seconds: float = 2.0,
        keep: Callable[[dict[str, Any]], Any] = lambda row: row,
    ) -> None:
        self.path = Path(path)
        self._keep = keep
        self.sync_rows = sync_rows
        self.sync_seconds = sync_seconds
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.rows: list[Any] = self._recover()
        self._file = open(self.path, "ab")  # noqa: SIM115  (closed by `close`)
        self._unsynced = 0
        self._last_sync = time.monotonic()

    def _recover(self) -> list[Any]:
        if not self.path.exists():
            return []
        rows, whole = [], 0
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    break
                whole += len(line)
                if line.strip():
                    rows.append(self._keep(_logged(self.path, number, line)))
        if whole < self.path.stat().st_size:
            os.truncate(self.path, whole)
        return rows

    def write(self, row: dict[str, Any]) -> None:
        """Appends one row, in one write call so that a kill tears at most this line."""
        self._file.write(json_text(row).encode("utf-8") + b"\n")
        self._file.flush()
        self.rows.append(self._keep(row))
        self._unsynced += 1
        if self._unsynced >= self.sync_rows or time.monotonic() - self._last_sync >= self.sync_seconds:
            self.sync()

    def sync(self) -> None:
        """Forces the rows written so far onto the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._unsynced = 0
        self._last_sync = time.monotonic()

    def close(self) -> None:
        """Syncs and closes; closing twice is harmless."""
        if not self._file.closed:
            try:
                self.sync()
            finally:
                self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _logged(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        return parse_object(line, any_text=True)
    except UnusableRow as error:
        raise ValueError(
            f"{path}:{number}: {error}; this log was altered from outside: delete the line, and the next run makes its row again"
        ) from error


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Holds the right to write `path` (a file or folder, there already or not) against other processes.

    The lock is a flock on the sibling `.NAME.lock`, so the system drops it when its owner dies, however it dies.

    Raises:
        ValueError: another process holds it; its process id is named.
    """
    path = Path(path)
    place = path.resolve()  # one lock, whichever of its names a folder is called by
    lock = place.parent / f".{place.name}.lock"
    handle = _acquire(lock, path)
    try:
        os.ftruncate(handle, 0)
        os.pwrite(handle, str(os.getpid()).encode(), 0)
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(handle)


def _acquire(lock: Path, path: Path) -> int:
    while True:
        handle = _open_lock(lock)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.pread(handle, 32, 0).decode(errors="replace").strip() or "unknown"
            os.close(handle)
            raise ValueError(
                f"{path} is being written by another process (pid {owner}); wait for it, end it, or name another path"
            ) from error
        # The last owner may have unlinked the file between our open and our lock: then we hold a ghost.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), lock.stat()):
                return handle
        os.close(handle)


def _open_lock(lock: Path) -> int:
    """Another process may clear the folder away between its making and the opening: then both are done again."""
    for _ in range(_LOCK_ATTEMPTS):
        lock.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            return os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    return os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)


def sha256_file(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal.

    Raises:
        ValueError: there is no file at `path`.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path} is not a file, so it has no fingerprint; check the path")
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""Folders that lie elsewhere: any URL that fsspec knows, whole files kept in a folder of this node while they are needed.

Owns: reading over a network that fails, checking what arrived, the node's folder and what is dropped from it. Does not
know: manifests, samples, batches.

The folder is shared by all processes of the node. A file there is named by its sha256 and appears whole or not at all. One
process fetches it while the others wait. Whoever reads a file holds a shared lock on it, which the system drops when its
holder dies, and only files that nobody holds are dropped, the least recently used first.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import fsspec
import torch
from torch import Tensor

_T = TypeVar("_T")
_LOG = logging.getLogger(__name__)
_SCHEME = re.compile(r"^[a-z][a-z0-9+.\-]*:[:/]")
_LOCAL = re.compile(r"^(file|local):/*")
_SECRET = re.compile(r"^https?:[^?]*\?|^[^/]*:/{1,2}[^/@:]*:[^/@]*@")
_PACKAGES = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
    "abfss": "adlfs",
    "http": "aiohttp",
    "https": "aiohttp",
    "hf": "huggingface_hub",
    "oss": "ossfs",
    "ssh": "paramiko",
    "sftp": "paramiko",
}
_PIECE = 16 * 2**20
_GLANCE = 32 * 2**10
_DTYPES = {"I64": torch.int64, "I32": torch.int32, "BOOL": torch.bool}
_POLL_SECONDS = 0.2
_CANNOT_RESERVE = (errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)


def location(path: Path | str) -> Path | str:
    """A local folder as a Path, anything else as a URL.

    `file://` is local. A URL that went through `Path`, which folds its two slashes into one, is unfolded.

    Raises ValueError, which does not repeat it, for a URL with a password or an HTTP query: it would be written into
    configurations, logs and a drafter's provenance.
    """
    text = str(path)
    if _LOCAL.match(text):
        return Path("/" + _LOCAL.sub("", text))
    if not _SCHEME.match(text):
        return Path(path)
    if _SECRET.search(text):
        scheme = re.split(r":/|::", text)[0]
        raise ValueError(
            f"a cache's URL ({scheme}) holds a password or a query, which runs would write down; give options to fsspec instead: "
            f"in the environment, FSSPEC_{scheme.upper()}='{{\"option\": ...}}', or in ~/.config/fsspec"
        )
    return re.sub(r"^((?:[a-z0-9+.\-]+::)*[a-z][a-z0-9+.\-]*):/(?!/)", r"\1://", text)


def default_folder() -> Path:
    """Where fetched files go: `draftsmith/shards` in `$XDG_CACHE_HOME`, or else a folder of this user's under the system's temp."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return Path(cache) / "draftsmith/shards" if cache else Path(tempfile.gettempdir()) / f"draftsmith-{os.getuid()}"


@dataclass(frozen=True)
class Retry:
    """How often a read is tried, and how long it waits in between: twice as long each time, from `wait` to `longest` seconds."""

    attempts: int = 10
    wait: float = 0.5
    longest: float = 30.0

    def pauses(self) -> Iterator[float | None]:
        """Seconds to wait after each attempt; None after the last one."""
        for attempt in range(self.attempts - 1):
            yield min(self.longest, self.wait * 2**attempt)
        yield None


class RemoteFolder:
    """Files of a folder behind a URL.

    Raises ValueError when fsspec lacks the package that the URL needs, with the line that installs it.
    """

    def __init__(self, url: str, retry: Retry | None = None) -> None:
        self.url = url.rstrip("/")
        self.retry = Retry() if retry is None else retry
        self._opened: tuple[int, Any, str] | None = None
        self._file_system()

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_opened": None}

    def address(self, name: str) -> str:
        """What a file is called in errors."""
        return f"{self.url}/{name}"

    def read(self, name: str) -> bytes:
        """A file's bytes.

        Raises FileNotFoundError at once, and ValueError with the address when all attempts have failed.
        """
        file_system, root = self._file_system()
        return self._persist(name, lambda: bytes(file_system.cat_file(f"{root}/{name}")))

    def tensors(self, name: str, num_bytes: int, wanted: Sequence[str]) -> dict[str, Tensor]:
        """Some tensors of a safetensors file of that size, without reading the others; those of ids, masks and offsets only.

        Raises ValueError for a file that is none or lacks them, otherwise as `read`.
        """
        glance = self._piece(name, 0, min(_GLANCE, num_bytes), num_bytes)
        begin = 8 + int.from_bytes(glance[:8], "little")
        head = glance if begin <= len(glance) else self._piece(name, 0, min(begin, num_bytes), num_bytes)
        try:
            table = json.loads(head[8:begin])
            places = {key: (table[key], *table[key]["data_offsets"]) for key in wanted}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.address(name)} is no shard or is damaged ({error}); upload it again") from error
        found = {}
        for key, (entry, start, stop) in places.items():
            start, stop = begin + start, begin + stop
            part = head[start:stop] if stop <= len(head) else self._piece(name, start, stop, num_bytes)[: stop - start]
            found[key] = torch.frombuffer(bytearray(part), dtype=_DTYPES[entry["dtype"]]).reshape(entry["shape"])
        return found

    def fetch(self, name: str, sha256: str, num_bytes: int, into: int) -> None:
        """Writes a file to the descriptor `into`, piece by piece: a piece that fails is asked for again, not the whole.

        Raises ValueError with the address when there is no such file, when what arrives is not what the sha256 says, or when
        all attempts have failed; OSError when the disk does not take it.
        """

        def once() -> None:
            digest, written = hashlib.sha256(), 0
            while written < num_bytes:
                piece = self._piece(name, written, min(written + _PIECE, num_bytes), num_bytes)
                digest.update(piece)
                _write_whole(into, piece, written)
                written += len(piece)
            if digest.hexdigest() != sha256:
                raise AlteredError(
                    f"its sha256 is {digest.hexdigest()[:16]}, the manifest says {sha256[:16]}: it was replaced or did not arrive whole"
                )

        try:
            self._persist(name, once, only=AlteredError)
        except FileNotFoundError as error:
            raise ValueError(f"{self.address(name)} is missing; copy the whole cache there again") from error

    def _piece(self, name: str, start: int, stop: int, num_bytes: int) -> bytes:
        file_system, root = self._file_system()

        def once() -> bytes:
            piece = bytes(file_system.cat_file(f"{root}/{name}", start=start, end=stop))
            if len(piece) == num_bytes:  # a server that knows no ranges sends all
                return piece[start:]
            if len(piece) != stop - start:
                raise EOFError(f"{len(piece)} of {stop - start} bytes came")
            return piece

        return self._persist(name, once)

    def _persist(self, name: str, once: Callable[[], _T], only: type[Exception] = Exception) -> _T:
        for number, pause in enumerate(self.retry.pauses(), start=1):
            try:
                return once()
            except FileNotFoundError:
                raise
            except PermissionError as error:
                raise ValueError(f"{self.address(name)} may not be read ({error}); check the credentials") from error
            except only as error:  # each file system has errors of its own
                if pause is None:
                    raise ValueError(
                        f"{self.address(name)} cannot be read: {type(error).__name__}: {error} (tried {number} times); "
                        "check the network and that the file is whole, then resume"
                    ) from error
                if number == 1:
                    _LOG.warning(
                        "%s cannot be read now (%s: %s); trying again", self.address(name), type(error).__name__, error
                    )
                time.sleep(pause)
        raise AssertionError("no attempt was made")

    def _file_system(self) -> tuple[Any, str]:
        """fsspec's, opened anew in a process that was forked: connections do not survive it."""
        if self._opened is None or self._opened[0] != os.getpid():
            try:
                file_system, root = fsspec.core.url_to_fs(self.url)
            except (ImportError, ValueError) as error:
                scheme = re.split(r":/|::", self.url)[0]
                package = _PACKAGES.get(scheme)
                remedy = f"run `pip install {package}`" if package else "install the package that fsspec needs for it"
                raise ValueError(f"{self.url} cannot be opened ({error}); {remedy}") from error
            self._opened = os.getpid(), file_system, root.rstrip("/")
        return self._opened[1], self._opened[2]


class AlteredError(ValueError):
    """What arrived is not what was written."""


class Held:
    """A fetched file that stays where it is until it is released."""

    def __init__(self, path: Path, handle: int) -> None:
        self.path, self._handle, self._owner = path, handle, os.getpid()

    def release(self) -> None:
        """Lets the file be dropped; twice is harmless. In a forked process it only lets go of what that one inherited."""
        if self._handle >= 0:
            if self._owner == os.getpid():
                _unlock(self._handle)
            else:
                os.close(self._handle)
            self._handle = -1


class ShardFolder:
    """The node's folder of fetched files, at most `limit` bytes of them.

    Where there is no room because running processes hold everything, it waits `patience` seconds for them.

    Raises ValueError for a limit below 1 byte.
    """

    def __init__(self, path: Path, limit: int, patience: float = 60.0) -> None:
        if limit < 1:
            raise ValueError(f"the folder of fetched shards may hold {limit} bytes; give shard_cache_gib above 0")
        self.path, self.limit, self.patience = path, limit, patience

    def hold(
        self,
        sha256: str,
        num_bytes: int,
        fill: Callable[[int], None],
        patient: bool = True,
        give_way: Callable[[], bool] = lambda: False,
    ) -> Held | None:
        """The file with this sha256, fetched by `fill` (which writes to a descriptor) unless it is there.

        None, where not `patient`, when another process is fetching it or there is no room without dropping what is in use. Before
        it waits for others, `give_way` is asked to release something of its own, for as long as it does.

        Raises ValueError when it is larger than the folder may be, when no room was made in time or the disk is full, and what
        `fill` raises.
        """
        path = self.path / f"{sha256}.safetensors"
        if num_bytes > self.limit:
            raise ValueError(
                f"{self.path} may hold {self.limit / 2**30:.3g} GiB, one shard has {num_bytes / 2**30:.3g}; raise shard_cache_gib"
            )
        self.path.mkdir(parents=True, exist_ok=True)
        while True:
            held = self._present(path, num_bytes)
            if held is not None:
                return held
            with _locked(self.path / f".{sha256}.lock", patient) as mine:
                if not mine:
                    return None
                if path.exists():
                    continue
                with self._explaining_a_full_disk():
                    partial = self._reserve(sha256, num_bytes, patient, give_way)
                    if partial is None:
                        return None
                    try:
                        fill(partial.handle)
                        os.fsync(partial.handle)
                        os.replace(partial.path, path)
                    finally:
                        partial.drop()

    @contextlib.contextmanager
    def _explaining_a_full_disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise ValueError(
                    f"the disk of {self.path} is full; name another folder as shard_cache, or free space"
                ) from error
            raise

    @contextlib.contextmanager
    def in_turn(self, name: str) -> Iterator[None]:
        """One process or thread of the node at a time."""
        self.path.mkdir(parents=True, exist_ok=True)
        with _locked(self.path / f".{name}.lock"):
            yield

    def _present(self, path: Path, num_bytes: int) -> Held | None:
        try:
            handle = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        fcntl.flock(handle, fcntl.LOCK_SH)
        found = os.fstat(handle)
        if found.st_nlink == 0:  # dropped between our open and our lock
            _unlock(handle)
            return None
        if found.st_size != num_bytes:
            path.unlink(missing_ok=True)
            _unlock(handle)
            return None
        os.utime(path)
        return Held(path, handle)

    def _reserve(self, sha256: str, num_bytes: int, patient: bool, give_way: Callable[[], bool]) -> _Partial | None:
        """An empty file of the full size, which counts as if it were there."""
        deadline = time.monotonic() + self.patience
        while True:
            with _locked(self.path / ".room.lock"):
                used = self._make_room(num_bytes)
                if used + num_bytes <= self.limit:
                    return _Partial(self.path / f".{sha256}.partial", num_bytes)
            if not patient:
                return None
            if give_way():
                continue
            if time.monotonic() > deadline:
                raise ValueError(
                    f"{self.path} is full: {used / 2**30:.2f} of {self.limit / 2**30:.2f} GiB are in use by running processes; "
                    "raise shard_cache_gib, or lower window_shards"
                )
            time.sleep(_POLL_SECONDS)

    def _make_room(self, num_bytes: int) -> int:
        """Drops what nobody holds, the least recently used first, until there is room; gives the bytes that are left."""
        files = []
        for entry in os.scandir(self.path):
            if entry.name.endswith(".partial"):
                _drop_if_free(Path(entry.path))  # of a process that was killed
            with contextlib.suppress(FileNotFoundError):
                status = entry.stat()
                files.append((status.st_mtime_ns, entry.name, status.st_size))
        used = sum(size for _, _, size in files if size)
        for _, name, size in sorted(files):
            if used + num_bytes <= self.limit:
                break
            if name.endswith(".safetensors") and _drop_if_free(self.path / name):
                used -= size
        return used


class _Partial:
    """A file on its way, locked so that nobody takes it for a leftover.

    Raises OSError when the disk has no room for all of it, before any of it is fetched.
    """

    def __init__(self, path: Path, num_bytes: int) -> None:
        self.path = path
        self.handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            fcntl.flock(self.handle, fcntl.LOCK_EX)
            _reserve_space(self.handle, num_bytes)
        except OSError:
            self.drop()
            raise

    def drop(self) -> None:
        """Removes what was not renamed."""
        self.path.unlink(missing_ok=True)
        _unlock(self.handle)


def _reserve_space(handle: int, num_bytes: int) -> None:
    """Makes an empty file so large, its blocks its own where the file system can promise that."""
    if hasattr(os, "posix_fallocate"):  # not on macOS
        try:
            os.posix_fallocate(handle, 0, num_bytes)
            return
        except OSError as error:
            if error.errno not in _CANNOT_RESERVE:
                raise
    os.ftruncate(handle, num_bytes)


def _write_whole(handle: int, content: bytes, place: int) -> None:
    """A disk that is nearly full takes a part and says nothing: only the attempt to write the rest fails."""
    rest = memoryview(content)
    while rest:
        taken = os.pwrite(handle, rest, place)
        if taken == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        rest, place = rest[taken:], place + taken


def _unlock(handle: int) -> None:
    """Closing alone would not do: a process forked meanwhile, by another thread, has the file open too, and with it the lock."""
    fcntl.flock(handle, fcntl.LOCK_UN)
    os.close(handle)


def _drop_if_free(path: Path) -> bool:
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
    except BlockingIOError:
        return False
    finally:
        _unlock(handle)
    return True


@contextlib.contextmanager
def _locked(path: Path, patient: bool = True) -> Iterator[bool]:
    """Holds a lock against all other processes and threads; False where it is taken and one is not patient."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if patient else fcntl.LOCK_NB))
        except BlockingIOError:
            os.close(handle)
            yield False
            return
        # The last owner unlinks the file: then we hold a ghost, and the next one would not see us.
        if os.fstat(handle).st_nlink:
            break
        _unlock(handle)
    try:
        yield True
    finally:
        path.unlink(missing_ok=True)
        _unlock(handle)


class Ahead:
    """Holds what will be needed soon, fetching it in threads.

    Args:
        hold: gives a file by its number, or None where it cannot be had now.
        threads: fetches at a time.
    """

    def __init__(self, hold: Callable[[int], Held | None], threads: int = 4) -> None:
        self._hold, self._num_threads = hold, threads
        self._changed = threading.Condition()
        self._wanted: list[int] = []
        self._held: dict[int, Held] = {}
        self._busy: set[int] = set()
        self._given_up: set[int] = set()
        self._put_off: set[int] = set()
        self._threads: list[threading.Thread] = []
        self._closed = False

    def want(self, numbers: Sequence[int]) -> None:
        """Replaces what is wanted; what is no longer wanted is released."""
        with self._changed:
            self._wanted, self._given_up = list(numbers), set()
            for number in set(self._held) - set(numbers):
                self._held.pop(number).release()
            self._changed.notify_all()
            if not self._threads and numbers and not self._closed:
                self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(self._num_threads)]
                for thread in self._threads:
                    thread.start()

    def close(self) -> None:
        """Ends the threads, once they are through with what they fetch, and releases everything."""
        with self._changed:
            self._closed = True
        self.want([])

    def abandon(self) -> None:
        """Lets go of what a forked process has inherited; the threads, and whoever had the lock, are its parent's."""
        for held in self._held.values():
            held.release()
        self._held = {}

    @property
    def held(self) -> set[int]:
        """The numbers of what is there."""
        with self._changed:
            return set(self._held)

    def _work(self) -> None:
        while (number := self._next()) is not None:
            held = None
            try:
                held = self._hold(number)
            except (ValueError, OSError):
                with self._changed:  # whoever needs it tries again, and is told
                    self._given_up.add(number)
            with self._changed:
                self._busy.discard(number)
                if held is None:
                    self._put_off.add(number)
                elif number in self._wanted:
                    self._held[number] = held
                    continue
            if held is not None:
                held.release()

    def _next(self) -> int | None:
        with self._changed:
            while not self._closed:
                settled = self._held.keys() | self._busy | self._given_up
                for number in self._wanted:
                    if number not in settled and number not in self._put_off:
                        self._busy.add(number)
                        return number
                # What another process is fetching comes again after the others.
                self._changed.wait(_POLL_SECONDS if self._put_off else None)
                if self._put_off:
                    self._put_off.clear()
                    self._changed.notify_all()
        return None

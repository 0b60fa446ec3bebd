"""The node's folder of fetched files: what is in it, what may be trusted there, and what is dropped from it.

Owns: fetching each file once, locks on what is read, room, and the hashing of what another process left. Does not know: networks,
manifests, samples.

The folder is shared by all processes of the node. A file there is named by its sha256 and appears whole or not at all. One
process fetches it while the others wait. Whoever reads a file holds a shared lock on it, which the system drops when its
holder dies. Only files that nobody holds are dropped, the least recently used first. Files of other names are neither counted nor
dropped.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from draftsmith.data.remote.private_folder import is_ours_alone, make_folder, open_file
from draftsmith.data.shards.shard_names import safe_sha256
from draftsmith.ownership import user_cache_folder

_LOG = logging.getLogger(__name__)
_POLL_SECONDS = 0.2
_CANNOT_RESERVE = (errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)
_FETCHED = re.compile(r"[0-9a-f]{64}\.safetensors")
_ON_ITS_WAY = re.compile(r"\.[0-9a-f]{64}\.partial")
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS)


class HeldFile:
    """A fetched file that stays where it is until it is released.

    Args:
        path: of the file.
        handle: its descriptor, which holds a shared lock.
    """

    def __init__(self, path: Path, handle: int) -> None:
        self.path, self._handle, self._owner = path, handle, os.getpid()

    def release(self) -> None:
        """Let the file be dropped; twice is harmless. In a forked process it only closes what that one inherited."""
        if self._handle >= 0:
            if self._owner == os.getpid():
                _unlock(self._handle)
            else:
                os.close(self._handle)
            self._handle = -1


class ShardFolder:
    """The node's folder of fetched files, at most `limit` bytes of them.

    Where there is no room because running processes hold everything, it waits `patience` seconds for them.

    Args:
        path: where; None takes this user's cache folder, which nobody else may write in.
        limit: bytes.
        patience: seconds.
        check: hash what another process left before it is used, once a process and file. False skips that where nobody else may
            write; in a folder that others may write in, files are hashed all the same.

    Raises:
        ValueError: a limit below 1 byte.
    """

    def __init__(self, path: Path | None, limit: int, patience: float = 60.0, check: bool = True) -> None:
        if limit < 1:
            raise ValueError(f"the folder of fetched shards may hold {limit} bytes; give shard_cache_gib above 0")
        self.path, self.limit, self.patience, self.check = (
            path or user_cache_folder("shards", ", or give shard_cache"),
            limit,
            patience,
            check,
        )
        self._private = path is None
        self._known: set[tuple[str, int, int]] = set()

    def prepare(self) -> bool:
        """Make the folder unless it is there.

        Returns:
            Whether this user alone may write in it.

        Raises:
            ValueError: a link or a file is in its place, another user may write in a default folder, or it cannot be made.
        """
        with self._explaining_the_disk():
            return make_folder(self.path, self._private)

    def hold(
        self,
        sha256: str,
        num_bytes: int,
        fill: Callable[[int], None],
        patient: bool = True,
        give_way: Callable[[], bool] = lambda: False,
    ) -> HeldFile | None:
        """Give the file with this sha256, fetched by `fill` unless it is there.

        Args:
            sha256: of the file, hex.
            num_bytes: its size.
            fill: writes the file to a descriptor, and checks what it writes.
            patient: wait for other processes.
            give_way: releases something of the caller's and says whether there was something. It is called for as long as it does so,
                before this waits for others.

        Returns:
            The file. None, where not `patient`: another process is fetching it, or there is no room without dropping what is in use.

        Raises:
            ValueError: the sha256 is none, the file is larger than the folder may be, or no room was made in time. Also for a full disk,
                for a link in the file's place, and as `fill` raises.
        """
        path = self.path / f"{safe_sha256(sha256)}.safetensors"
        if num_bytes > self.limit:
            raise ValueError(
                f"{self.path} may hold {self.limit / 2**30:.3g} GiB, one shard has {num_bytes / 2**30:.3g}; raise shard_cache_gib"
            )
        is_private = self.prepare()
        with self._explaining_the_disk():
            while True:
                file = self._present(path, num_bytes, is_private)
                if file is not None:
                    return file
                with _locked(self.path / f".{sha256}.lock", patient) as mine:
                    if not mine:
                        return None
                    if os.path.lexists(path):
                        continue
                    partial = self._reserve(sha256, num_bytes, patient, give_way)
                    if partial is None:
                        return None
                    self._fetch(partial, fill, path)

    def _fetch(self, partial: _Partial, fill: Callable[[int], None], path: Path) -> None:
        try:
            fill(partial.handle)
            os.fsync(partial.handle)
            os.replace(partial.path, path)
            self._known.add(_identity(path.name, os.fstat(partial.handle)))
        finally:
            partial.drop()

    @contextlib.contextmanager
    def _explaining_the_disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in _DISK_FULL:
                raise ValueError(
                    f"the disk of {self.path} is full; name another folder as shard_cache, or free space"
                ) from error
            if error.errno in _NOT_ALLOWED:
                raise ValueError(
                    f"{self.path} cannot be used by this user ({error}); name a folder of your own as shard_cache"
                ) from error
            raise

    @contextlib.contextmanager
    def in_turn(self, name: str) -> Iterator[None]:
        """Let one process or thread of the node in at a time.

        Args:
            name: of what is done.

        Yields:
            Once, nothing.
        """
        self.prepare()
        with _locked(self.path / f".{name}.lock"):
            yield

    def _present(self, path: Path, num_bytes: int, is_private: bool) -> HeldFile | None:
        try:
            handle = open_file(path)
        except FileNotFoundError:
            return None
        fcntl.flock(handle, fcntl.LOCK_SH)
        status = os.fstat(handle)
        if status.st_nlink == 0:  # dropped between our open and our lock
            _unlock(handle)
            return None
        if status.st_size != num_bytes or not self._is_whole(path, handle, is_private):
            path.unlink(missing_ok=True)
            _unlock(handle)
            return None
        with contextlib.suppress(PermissionError):  # another user's file in a shared folder
            os.utime(path)
        return HeldFile(path, handle)

    def _is_whole(self, path: Path, handle: int, is_private: bool) -> bool:
        """Whether a file is what its name says. What this process has fetched or hashed before is not hashed again."""
        status = os.fstat(handle)
        identity = _identity(path.name, status)
        trusted = is_private and is_ours_alone(status) and not self.check
        if trusted or identity in self._known:
            return True
        with os.fdopen(os.dup(handle), "rb") as file:
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != path.stem:
            _LOG.warning("%s is not what its name says (its sha256 is %s); it is fetched again", path, digest[:16])
            return False
        self._known.add(identity)
        return True

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
            on_its_way = _ON_ITS_WAY.fullmatch(entry.name) is not None
            if on_its_way:
                _drop_if_free(Path(entry.path))  # of a process that was killed
            if on_its_way or _FETCHED.fullmatch(entry.name):
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat(follow_symlinks=False)
                    files.append((status.st_mtime_ns, entry.name, status.st_size))
        used = sum(size for _, _, size in files)
        for _, name, size in sorted(files):
            if used + num_bytes <= self.limit:
                break
            if _FETCHED.fullmatch(name) and _drop_if_free(self.path / name):
                used -= size
        return used


def _identity(name: str, status: os.stat_result) -> tuple[str, int, int]:
    return name, status.st_dev, status.st_ino


class _Partial:
    """A file on its way, locked so that nobody takes it for a leftover.

    Raises:
        OSError: the disk has no room for all of it, before any of it is fetched.
    """

    def __init__(self, path: Path, num_bytes: int) -> None:
        self.path = path
        self.handle = open_file(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
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


def _unlock(handle: int) -> None:
    """Closing alone would not do: a process forked meanwhile, by another thread, has the file open too, and with it the lock."""
    fcntl.flock(handle, fcntl.LOCK_UN)
    os.close(handle)


def _drop_if_free(path: Path) -> bool:
    try:
        handle = open_file(path)
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
        handle = open_file(path, os.O_RDWR | os.O_CREAT)
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

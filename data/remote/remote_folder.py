"""Folders that lie elsewhere: any URL that fsspec knows.

Owns: reading over a network that fails, and checking what arrived. Does not know: manifests, samples, where files are kept
(`node_folder.py`).
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import fsspec
import torch
from torch import Tensor

from draftsmith.data.remote.safetensors_header import Header, header_size, parse_header
from draftsmith.extras import install_command
from draftsmith.models.files.field_rules import safe_file_name

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


def location(path: Path | str) -> Path | str:
    """Tell a local folder from a URL.

    `file://` is local. A URL that went through `Path`, which folds its two slashes into one, is unfolded.

    Args:
        path: either.

    Returns:
        A Path for a local folder, text for a URL.

    Raises:
        ValueError: a URL with a password or an HTTP query, which would be written into configurations, logs and a drafter's
            provenance. The message does not repeat it.
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


@dataclass(frozen=True)
class Retry:
    """How often a read is tried, and how long it waits in between: twice as long each time.

    Attributes:
        attempts: in all.
        wait: seconds after the first.
        longest: most seconds.
    """

    attempts: int = 10
    wait: float = 0.5
    longest: float = 30.0

    def pauses(self) -> Iterator[float | None]:
        """How long to wait after each attempt.

        Yields:
            Seconds; None after the last one.
        """
        for attempt in range(self.attempts - 1):
            yield min(self.longest, self.wait * 2**attempt)
        yield None


class RemoteFolder:
    """Files of a folder behind a URL.

    Args:
        url: of the folder.
        retry: how a failing read is tried again.

    Raises:
        ValueError: fsspec lacks the package that the URL needs; the message has the line that installs it.
    """

    def __init__(self, url: str, retry: Retry | None = None) -> None:
        self.url = url.rstrip("/")
        self.retry = Retry() if retry is None else retry
        self._opened: tuple[int, Any, str] | None = None
        self._file_system()

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_opened": None}

    def address(self, name: str) -> str:
        """What errors call a file.

        Args:
            name: of the file.

        Returns:
            Its URL.
        """
        return f"{self.url}/{name}"

    def read(self, name: str) -> bytes:
        """Read a file's bytes.

        Args:
            name: of the file.

        Returns:
            All of them.

        Raises:
            FileNotFoundError: at once.
            ValueError: all attempts have failed; the message has the address.
        """
        file_system, root = self._file_system()
        place = f"{root}/{safe_file_name(name, self.url)}"
        return self._persist(name, lambda: bytes(file_system.cat_file(place)))

    def header(self, name: str, num_bytes: int) -> Header:
        """Read what a safetensors file says of its tensors, without reading them.

        Args:
            name: of the file.
            num_bytes: its size.

        Returns:
            The header.

        Raises:
            FileNotFoundError: as `read`.
            ValueError: the file is no such one; otherwise as `read`.
        """
        glance = self._piece(name, 0, min(_GLANCE, num_bytes), num_bytes)
        size = header_size(glance, num_bytes, self.address(name))
        content = glance if size <= len(glance) else self._piece(name, 0, size, num_bytes)
        return parse_header(content, num_bytes, self.address(name))

    def tensor(self, name: str, header: Header, key: str) -> Tensor:
        """Read one tensor of a safetensors file whose header was read: of ids, masks or offsets.

        Args:
            name: of the file.
            header: of the file.
            key: of the tensor.

        Returns:
            The tensor.

        Raises:
            FileNotFoundError: as `read`.
            ValueError: as `read`.
        """
        entry = header.entries[key]
        there = entry.stop <= len(header.content)
        part = header.content[entry.start : entry.stop]
        if not there:  # a server that knows no ranges sends more
            part = self._piece(name, entry.start, entry.stop, header.num_bytes)[: entry.stop - entry.start]
        return torch.frombuffer(bytearray(part), dtype=_DTYPES[entry.kind.dtype]).reshape(entry.kind.shape)

    def fetch(self, name: str, sha256: str, num_bytes: int, into: int) -> None:
        """Write a file to a descriptor, piece by piece: a piece that fails is asked for again, not the whole.

        Args:
            name: of the file.
            sha256: that it must have, hex.
            num_bytes: its size.
            into: the descriptor.

        Raises:
            ValueError: there is no such file, what arrives is not what the sha256 says, or all attempts have failed; the message has the
                address.
            OSError: the disk does not take it.
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
        place = f"{root}/{safe_file_name(name, self.url)}"

        def once() -> bytes:
            piece = bytes(file_system.cat_file(place, start=start, end=stop))
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
                remedy = (
                    f"run: {install_command(package)}" if package else "install the package that fsspec needs for it"
                )
                raise ValueError(f"{self.url} cannot be opened ({error}); {remedy}") from error
            self._opened = os.getpid(), file_system, root.rstrip("/")
        return self._opened[1], self._opened[2]


class AlteredError(ValueError):
    """What arrived is not what was written."""


def _write_whole(handle: int, content: bytes, place: int) -> None:
    """A disk that is nearly full takes a part and says nothing: only the attempt to write the rest fails."""
    rest = memoryview(content)
    while rest:
        taken = os.pwrite(handle, rest, place)
        if taken == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        rest, place = rest[taken:], place + taken

"""Counts different texts in little memory, however many there are.

Owns their digests, in a temporary file that SQLite removes. Knows nothing of what a text means.
"""

from __future__ import annotations

import contextlib
import hashlib
import sqlite3
from collections.abc import Iterator
from types import TracebackType
from typing import Self

_CACHE_KIB = 8192
_SETTINGS = (
    "PRAGMA journal_mode = OFF",
    "PRAGMA synchronous = OFF",
    f"PRAGMA cache_size = -{_CACHE_KIB}",
    "CREATE TABLE texts (digest BLOB PRIMARY KEY) WITHOUT ROWID",
    "BEGIN",
)


class Distinct:
    """The different texts among many, to be used as a context.

    Attributes:
        count: of different texts so far.

    Raises:
        ValueError: the temporary folder is full or cannot be written.
    """

    def __init__(self) -> None:
        self.count = 0
        with _errors_explained():
            self._index = sqlite3.connect("", isolation_level=None)  # no name: a temporary file
            for statement in _SETTINGS:
                self._index.execute(statement)

    def add(self, text: str) -> bool:
        """Takes the next text.

        Args:
            text: any.

        Returns:
            Whether it is new.

        Raises:
            ValueError: the temporary folder is full or cannot be written.
        """
        digest = hashlib.blake2b(text.encode("utf-8", "backslashreplace"), digest_size=16).digest()
        with _errors_explained():
            added = self._index.execute("INSERT OR IGNORE INTO texts VALUES (?)", (digest,)).rowcount > 0
        self.count += added
        return added

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._index.close()


@contextlib.contextmanager
def _errors_explained() -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise ValueError(
            f"an index of texts cannot be kept in the temporary folder: {error}; make room there, or set SQLITE_TMPDIR or TMPDIR to a "
            "folder with more"
        ) from error

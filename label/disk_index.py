"""An index that grows on disk and not in memory: tables of digests in a temporary file, which SQLite removes.

Owns the file, its settings and its errors. Does not know what is indexed.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

_CACHE_KIB = 8192


class DiskIndex:
    """Tables in a temporary file, to be used as a context.

    Args:
        what: for messages: the index of what.
        tables: each a name and its columns, as SQL.
        cache_kib: how much of them SQLite holds in memory.

    Raises:
        ValueError: the temporary folder is full or cannot be written.
    """

    def __init__(self, what: str, *tables: str, cache_kib: int = _CACHE_KIB) -> None:
        self._what = what
        with self._errors_explained():
            self._connection = sqlite3.connect("", isolation_level=None)  # no name: a temporary file
        for setting in ("journal_mode = OFF", "synchronous = OFF", f"cache_size = -{cache_kib}"):
            self.execute(f"PRAGMA {setting}")
        for table in tables:
            self.execute(f"CREATE TABLE {table} WITHOUT ROWID")
        self.execute("BEGIN")

    def execute(self, statement: str, *values: Any) -> sqlite3.Cursor:
        """Runs one statement.

        Args:
            statement: SQL.
            values: of its placeholders.

        Raises:
            ValueError: the temporary folder is full or cannot be written.
        """
        with self._errors_explained():
            return self._connection.execute(statement, values)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.close()

    @contextmanager
    def _errors_explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise ValueError(
                f"the index of {self._what} cannot be kept in {_temporary_folder()}: {error}; make room there, or set SQLITE_TMPDIR or "
                "TMPDIR to a folder with more"
            ) from error


def digest(text: str) -> bytes:
    """What stands for a text in an index.

    Args:
        text: any.
    """
    return hashlib.blake2b(text.encode("utf-8", "backslashreplace"), digest_size=16).digest()


def _temporary_folder() -> str:
    """Where SQLite keeps its temporary files, in its own order."""
    named = [os.environ.get("SQLITE_TMPDIR"), os.environ.get("TMPDIR"), "/var/tmp", "/usr/tmp", "/tmp"]
    usable = (folder for folder in named if folder and Path(folder).is_dir() and os.access(folder, os.W_OK | os.X_OK))
    return next(usable, "the current folder")

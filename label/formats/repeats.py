"""Answers that a file has twice: what it said of them before.

Owns the index of texts: digests in a temporary file that SQLite removes, so that memory does not grow with the rows. Knows no
format and no store.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

from draftsmith.label.schema import Answer

_CACHE_KIB = 32_768
_SETTINGS = (
    "PRAGMA journal_mode = OFF",
    "PRAGMA synchronous = OFF",
    f"PRAGMA cache_size = -{_CACHE_KIB}",
    "CREATE TABLE labels (answer BLOB PRIMARY KEY, label BLOB NOT NULL) WITHOUT ROWID",
    "CREATE TABLE answers (answer BLOB PRIMARY KEY, reference TEXT NOT NULL) WITHOUT ROWID",
    "BEGIN",
)


class Repeats:
    """Gives each answer of a file one reference, and counts the answers that the file has twice and labels differently.

    Raises:
        ValueError: the temporary folder is full or cannot be written.
    """

    def __init__(self) -> None:
        with _errors_explained():
            self._index = sqlite3.connect("", isolation_level=None)  # no name: a temporary file
            for statement in _SETTINGS:
                self._index.execute(statement)
        self._num_labels = self._num_references = 0

    def agreeing(self, answer: Answer) -> Answer:
        """The answer with the reference that the file gave it first.

        Args:
            answer: the next one of the file.

        Raises:
            ValueError: the temporary folder is full or cannot be written.
        """
        with _errors_explained():
            return self._noted(answer)

    def _noted(self, answer: Answer) -> Answer:
        if answer.label is not None:
            key, label = _digest(answer.id, answer.label.labelled_by), _digest(answer.label)
            before = self._index.execute("SELECT label FROM labels WHERE answer = ?", (key,)).fetchone()
            self._num_labels += before is not None and before[0] != label
            self._index.execute("INSERT OR REPLACE INTO labels VALUES (?, ?)", (key, label))
        if answer.reference is None:
            return answer
        key = _digest(answer.id)
        added = self._index.execute("INSERT OR IGNORE INTO answers VALUES (?, ?)", (key, answer.reference))
        if added.rowcount:
            return answer
        [first] = self._index.execute("SELECT reference FROM answers WHERE answer = ?", (key,)).fetchone()
        self._num_references += first != answer.reference
        return replace(answer, reference=first)

    def notes(self) -> list[str]:
        """A sentence on other labels, and one on other references, where there are any."""
        labels = f"{self._num_labels} rows repeat an earlier answer with another label; the last one counts"
        references = (
            f"{self._num_references} rows repeat an earlier answer with another reference; the first one counts"
        )
        return [labels] * bool(self._num_labels) + [references] * bool(self._num_references)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._index.close()


@contextmanager
def _errors_explained() -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise ValueError(
            f"the index of the file's answers cannot be kept in {_temporary_folder()}: {error}; make room there, or set SQLITE_TMPDIR or "
            "TMPDIR to a folder with more"
        ) from error


def _temporary_folder() -> str:
    """Where SQLite keeps its temporary files, in its own order."""
    named = [os.environ.get("SQLITE_TMPDIR"), os.environ.get("TMPDIR"), "/var/tmp", "/usr/tmp", "/tmp"]
    usable = (folder for folder in named if folder and Path(folder).is_dir() and os.access(folder, os.W_OK | os.X_OK))
    return next(usable, "the current folder")


def _digest(*values: object) -> bytes:
    return hashlib.blake2b(repr(values).encode("utf-8", "backslashreplace"), digest_size=16).digest()

"""Answers that a file has twice: what it said of them before.

Owns the index of a file's answers. Knows no format and no store.
"""

from __future__ import annotations

from dataclasses import replace

from draftsmith.label.disk_index import DiskIndex, digest
from draftsmith.label.schema import Answer

_CACHE_KIB = 32_768


class Repeats(DiskIndex):
    """Gives each answer of a file one reference, and counts the answers that the file has twice and labels differently.

    Raises:
        ValueError: the temporary folder is full or cannot be written.
    """

    def __init__(self) -> None:
        super().__init__(
            "the file's answers",
            "labels (answer BLOB PRIMARY KEY, label BLOB NOT NULL)",
            "answers (answer BLOB PRIMARY KEY, reference TEXT NOT NULL)",
            cache_kib=_CACHE_KIB,
        )
        self._num_labels = self._num_references = 0

    def agreeing(self, answer: Answer) -> Answer:
        """The answer with the reference that the file gave it first.

        Args:
            answer: the next one of the file.

        Raises:
            ValueError: the temporary folder is full or cannot be written.
        """
        if answer.label is not None:
            key, label = _key(answer.id, answer.label.labelled_by), _key(answer.label)
            before = self.execute("SELECT label FROM labels WHERE answer = ?", key).fetchone()
            self._num_labels += before is not None and before[0] != label
            self.execute("INSERT OR REPLACE INTO labels VALUES (?, ?)", key, label)
        if answer.reference is None:
            return answer
        key = _key(answer.id)
        added = self.execute("INSERT OR IGNORE INTO answers VALUES (?, ?)", key, answer.reference)
        if added.rowcount:
            return answer
        [first] = self.execute("SELECT reference FROM answers WHERE answer = ?", key).fetchone()
        self._num_references += first != answer.reference
        return replace(answer, reference=first)

    def notes(self) -> list[str]:
        """A sentence on other labels, and one on other references, where there are any."""
        labels = f"{self._num_labels} rows repeat an earlier answer with another label; the last one counts"
        references = (
            f"{self._num_references} rows repeat an earlier answer with another reference; the first one counts"
        )
        return [labels] * bool(self._num_labels) + [references] * bool(self._num_references)


def _key(*values: object) -> bytes:
    return digest(repr(values))

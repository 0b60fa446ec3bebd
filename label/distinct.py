"""Counts different texts in little memory, however many there are.

Owns the count. Knows nothing of what a text means.
"""

from __future__ import annotations

from draftsmith.label.disk_index import DiskIndex, digest


class Distinct(DiskIndex):
    """The different texts among many, to be used as a context.

    Attributes:
        count: of different texts so far.

    Raises:
        ValueError: the temporary folder is full or cannot be written.
    """

    def __init__(self) -> None:
        super().__init__("different texts", "texts (digest BLOB PRIMARY KEY)")
        self.count = 0

    def add(self, text: str) -> bool:
        """Takes the next text.

        Args:
            text: any.

        Returns:
            Whether it is new.

        Raises:
            ValueError: the temporary folder is full or cannot be written.
        """
        is_new = self.execute("INSERT OR IGNORE INTO texts VALUES (?)", digest(text)).rowcount > 0
        self.count += is_new
        return is_new

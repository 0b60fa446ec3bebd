"""What commands that add answers to a store ask about them.

Owns names, defaults and help of these options. Knows nothing of stores, and imports nothing heavy.
"""

from __future__ import annotations

import getpass
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class EntryOptions:
    """Under which licence answers enter a store, and who adds them.

    Args:
        licence: Licence of what is read, where its rows do not name one.
        author: Who adds to the store, for its log; default: the user of this process.
    """

    licence: str | None = None
    author: str | None = None

    def adder(self) -> str:
        """Name who adds to the store.

        Returns:
            The author, else the user of this process.

        Raises:
            ValueError: no author is given, and the user has no name.
        """
        if self.author:
            return self.author
        try:
            return getpass.getuser()
        except (OSError, KeyError) as error:
            raise ValueError("this process's user has no name; say who adds to the store with --author") from error


UNNAMED = EntryOptions()

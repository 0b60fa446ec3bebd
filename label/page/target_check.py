"""Which waiting answers the target could never learn from: they are listed, and not served.

Owns when an answer is looked at. Why one does not fit is `row_checks`' to say, the same as in `label rows`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from draftsmith.label.row_checks import LeftOut, RowChecks
from draftsmith.label.schema import Answer, Label
from draftsmith.label.store.store import Store


class TargetCheck:
    """Looks at every waiting answer once, and withholds those that give no row.

    Args:
        store: whose answers are served.
        checks: of the target.
        shared: the share of the answers that two annotators get.

    Attributes:
        tell: is called with the answers that do not fit, whenever there are new ones; None tells nobody.
    """

    def __init__(self, store: Store, checks: RowChecks, shared: float) -> None:
        self._store = store
        self._checks = checks
        self._shared = shared
        self._last_item = 0
        self._lock = threading.Lock()
        self._fits: dict[str, bool] = {}
        self._left_out: list[LeftOut] = []
        self.tell: Callable[[Sequence[LeftOut]], None] | None = None

    def look(self) -> list[LeftOut]:
        """Looks at the waiting answers that were added since the last time. Gives those that do not fit."""
        with self._lock:
            last = self._store.last_item()
            if last == self._last_item:
                return []
            waiting = self._store.waiting(self._shared, after=self._last_item)
            self._last_item = last
            return self._withhold(waiting)

    def fits(self, answer: Answer) -> bool:
        """Whether an answer that was assigned may be shown. One that waits again, after an undo, may not have been looked at.

        Args:
            answer: that waits.
        """
        with self._lock:
            if answer.id not in self._fits:
                self._withhold([(answer, self._store.imported(answer.id))])
            return self._fits[answer.id]

    @property
    def left_out(self) -> list[LeftOut]:
        """All that do not fit, so far."""
        return list(self._left_out)

    def _withhold(self, waiting: Sequence[tuple[Answer, list[Label]]]) -> list[LeftOut]:
        """Withholds those of some answers that do not fit, and gives the reasons. Under the lock."""
        new = []
        for answer, imported in waiting:
            reason = self._checks.why_not(answer, imported)
            self._fits[answer.id] = reason is None
            if reason is not None:
                self._store.withhold([answer.id])
                new.append(reason)
        self._left_out += new
        if new and self.tell is not None:
            self.tell(new)
        return new

"""Who has which item, which labels stand and which items still wait: kept in memory, caught up from the log.

Owns these rules. Rows of a store are only ever added, so that whoever has read the log up to a row needs only the rows behind it: a
request reads what was written since the last one, however many items there are. Reads no text of an answer. Writes nothing.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from sqlalchemy import Connection, Row, Select, exists, select

from draftsmith.label.store.assignments import Seat
from draftsmith.label.store.tables import ASSIGNMENTS, ENTRIES, ITEMS, RELEASES, REPLACED, STEPS

Refine = Literal["steps", "all", "none"]

_BATCH = 400  # numbers in one IN (...): SQLite's old limit is 999 parameters
_GAP_SECONDS = 600.0


class Standing(NamedTuple):
    """A label in the log, without its text.

    Attributes:
        number: of its entry.
        verdict: of the label.
        is_step: it calls a whole step wrong.
        decides: it replaces other labels.
        seconds: that it took, or None.
    """

    number: int
    verdict: str
    is_step: bool
    decides: bool
    seconds: float | None


@dataclass
class _Item:
    """What is known of one item: its lot, the labels by author (oldest first), and who holds its seats."""

    lot: float
    labels: dict[str, list[Standing]] = field(default_factory=dict)
    seats: dict[int, str] = field(default_factory=dict)
    turns: Counter[int] = field(default_factory=Counter)


@dataclass
class _Annotator:
    """What is known of one annotator: assignments by item in their order, and items given back."""

    held: dict[int, int] = field(default_factory=dict)
    released: set[int] = field(default_factory=set)
    labelled: set[int] = field(default_factory=set)

    def known(self) -> set[int]:
        return self.held.keys() | self.released | self.labelled


@dataclass
class _Open:
    """Items under one share: those with a free seat, and those that still need a label."""

    free: set[int] = field(default_factory=set)
    waiting: set[int] = field(default_factory=set)


class WorkList:
    """The work that a store holds, as of the last `catch_up`. Use it under its `lock`, within a transaction.

    An imported label is one by an author who never had a seat at the item. Whether it leaves something to do is `refine`'s to say. A label
    that replaces others settles its item.

    Args:
        refine: which imported labels wait for a person: those of whole `steps` and those without a place, `all`, or only the latter.
    """

    def __init__(self, refine: Refine = "steps") -> None:
        self.lock = threading.RLock()
        self._refine = refine
        self._withheld: set[int] = set()
        self._forget()

    def catch_up(self, connection: Connection) -> None:
        """Reads what was written since the last time. Where that fails on the way, the next time reads everything again.

        Args:
            connection: of a transaction that has not written yet.
        """
        try:
            self._read_on(connection)
        except BaseException:
            # Some tables were read further than the others, and rows that are read once are not given again.
            self._forget()
            raise

    def _forget(self) -> None:
        self._items: dict[int, _Item] = {}
        self._annotators: dict[str, _Annotator] = {}
        self._seats: dict[int, Seat] = {}
        self._by_share: dict[float, _Open] = {}
        self._tails = {name: _Tail() for name in ("items", "entries", "assignments")}

    def _read_on(self, connection: Connection) -> None:
        # Items last: those that the other rows name are there by then. What a person had open before or after may have been given back.
        entries, assignments = self._new_entries(connection), self._new_assignments(connection)
        touched = self._add_items(connection)
        is_first = not self._seats
        unlabelled = set(self._unlabelled())
        touched |= self._add_assignments(assignments) | self._add_entries(entries)
        unlabelled |= set(self._unlabelled())
        touched |= self._give_back(_all_releases(connection) if is_first else _releases(connection, sorted(unlabelled)))
        for item in touched:
            for shared, opened in self._by_share.items():
                self._sort(item, shared, opened)

    def new_items(self, after: int) -> list[int]:
        """The numbers of the items behind a number, in the order of their adding.

        Args:
            after: a number; 0 gives all.
        """
        if not self._items or next(reversed(self._items)) <= after:
            return []
        return [number for number in self._items if number > after]

    def withhold(self, items: Iterable[int]) -> None:
        """Offers some items to nobody from now on. They do not wait.

        Args:
            items: their numbers.
        """
        for item in items:
            self._withheld.add(item)
            for shared, opened in self._by_share.items():
                self._sort(item, shared, opened)

    def waiting(self, shared: float) -> set[int]:
        """The items that still need a label, by anybody.

        Args:
            shared: the share of the items that two get.
        """
        return self._opened(shared).waiting

    def labels(self, item: int) -> dict[str, Standing]:
        """The labels that stand, by author.

        Args:
            item: its number.
        """
        return {author: labels[-1] for author, labels in self._items[item].labels.items() if labels}

    def imported(self, item: int) -> dict[str, Standing]:
        """The imported labels that leave something to find out, by author.

        Args:
            item: its number.
        """
        return {
            author: label
            for author, label in self.labels(item).items()
            if not self._leaves_nothing(item, author, label)
        }

    def with_several(self) -> list[int]:
        """The items that two or more have labelled, in the order of their adding."""
        return [number for number, item in self._items.items() if sum(map(bool, item.labels.values())) > 1]

    def holds(self, annotator: str, item: int) -> bool:
        """Whether an annotator has the item, labelled or not.

        Args:
            annotator: their name.
            item: its number.
        """
        return item in self._of(annotator).held

    def open_item(self, annotator: str) -> int | None:
        """The first item assigned to an annotator that they have neither labelled nor released.

        Args:
            annotator: their name.
        """
        person = self._of(annotator)
        done = person.labelled | self._withheld  # once: they have labelled thousands
        return next((item for item in person.held if item not in done), None)

    def free_seat(self, annotator: str, shared: float) -> Seat | None:
        """A seat for an annotator at the first item that has one, or None.

        Args:
            annotator: their name.
            shared: the share of the items that two get.
        """
        item = min(self._opened(shared).free - self._of(annotator).known(), default=None)
        if item is None:
            return None
        record = self._items[item]
        seat = next(seat for seat in range(self._wanted(item, shared)) if seat not in record.seats)
        return Seat(item, seat, record.turns[seat], annotator)

    def labelled(self, annotator: str) -> list[Standing]:
        """The labels that an annotator gave to items assigned to them.

        Args:
            annotator: their name.
        """
        person = self._of(annotator)
        return [self._items[item].labels[annotator][-1] for item in person.held if item in person.labelled]

    def num_open(self, annotator: str, shared: float) -> int:
        """How many items an annotator has open, or could still get.

        Args:
            annotator: their name.
            shared: the share of the items that two get.
        """
        person = self._of(annotator)
        num_held = len(person.held.keys() - person.labelled - self._withheld)
        return num_held + len(self._opened(shared).free - person.known())

    def num_released(self, annotator: str) -> int:
        """How many items an annotator gave back.

        Args:
            annotator: their name.
        """
        return len(self._of(annotator).released)

    def last_entry(self, annotator: str) -> int | None:
        """The number of an annotator's last label of an item assigned to them; None where they have none.

        Args:
            annotator: their name.
        """
        return max((label.number for label in self.labelled(annotator)), default=None)

    def _of(self, annotator: str) -> _Annotator:
        return self._annotators.setdefault(annotator, _Annotator())

    def _opened(self, shared: float) -> _Open:
        if shared not in self._by_share:
            opened = self._by_share[shared] = _Open()
            for item in self._items:
                self._sort(item, shared, opened)
        return self._by_share[shared]

    def _sort(self, item: int, shared: float, opened: _Open) -> None:
        record = self._items[item]
        labels = self.labels(item)
        sitting = set(record.seats.values())
        final = {author for author, label in labels.items() if self._leaves_nothing(item, author, label)}
        settled = item in self._withheld or any(
            label.decides and author not in sitting for author, label in labels.items()
        )
        wanted = self._wanted(item, shared)
        has_seat = any(seat not in record.seats for seat in range(wanted))
        _put(opened.free, item, not settled and has_seat and len(final | sitting) < wanted)
        _put(opened.waiting, item, not settled and len(final) < wanted)

    def _leaves_nothing(self, item: int, author: str, label: Standing) -> bool:
        return author in self._items[item].seats.values() or self._is_final(label)

    def _is_final(self, label: Standing) -> bool:
        if label.decides:
            return True
        if label.verdict == "unplaced" or self._refine == "all":
            return False
        return self._refine == "none" or not label.is_step

    def _wanted(self, item: int, shared: float) -> int:
        return 2 if self._items[item].lot < shared else 1

    def _add_items(self, connection: Connection) -> set[int]:
        rows = self._tails["items"].read(connection, select(ITEMS.c.number, ITEMS.c.id), ITEMS.c.number)
        for row in rows:
            self._items[row.number] = _Item(_lot(row.id))
        return {row.number for row in rows}

    def _new_entries(self, connection: Connection) -> list[Row[Any]]:
        columns = select(
            ENTRIES.c.number,
            ENTRIES.c.item,
            ENTRIES.c.undoes,
            ENTRIES.c.verdict,
            ENTRIES.c.labelled_by,
            ENTRIES.c.seconds,
            exists().where(STEPS.c.entry == ENTRIES.c.number).label("is_step"),
            exists().where(REPLACED.c.entry == ENTRIES.c.number).label("decides"),
        )
        return self._tails["entries"].read(connection, columns, ENTRIES.c.number)

    def _add_entries(self, rows: list[Row[Any]]) -> set[int]:
        for row in rows:
            labels = self._items[row.item].labels.setdefault(row.labelled_by, [])
            if row.undoes is None:
                label = Standing(row.number, row.verdict, bool(row.is_step), bool(row.decides), row.seconds)
                labels.append(label)
                labels.sort()
            else:
                labels[:] = [label for label in labels if label.number != row.undoes]
            _put(self._of(row.labelled_by).labelled, row.item, bool(labels))
        return {row.item for row in rows}

    def _new_assignments(self, connection: Connection) -> list[Row[Any]]:
        return self._tails["assignments"].read(connection, select(ASSIGNMENTS), ASSIGNMENTS.c.number)

    def _add_assignments(self, rows: list[Row[Any]]) -> set[int]:
        for row in rows:
            record = self._items[row.item]
            record.seats[row.seat] = row.annotator
            record.turns[row.seat] = row.turn + 1
            self._of(row.annotator).held[row.item] = row.number
            self._seats[row.number] = Seat(row.item, row.seat, row.turn, row.annotator)
        return {row.item for row in rows}

    def _unlabelled(self) -> Iterator[int]:
        """The assignments that can be given back: an item or two for each annotator."""
        for person in self._annotators.values():
            yield from (number for item, number in person.held.items() if item not in person.labelled)

    def _give_back(self, assignments: Iterable[int]) -> set[int]:
        touched = set()
        for number in assignments:
            if number not in self._seats:  # committed since the assignments were read
                continue
            seat = self._seats[number]
            person, record = self._of(seat.annotator), self._items[seat.item]
            if person.held.pop(seat.item, None) is not None:
                person.released.add(seat.item)
                if record.seats.get(seat.seat) == seat.annotator:
                    del record.seats[seat.seat]
            touched.add(seat.item)
        return touched


def _all_releases(connection: Connection) -> list[int]:
    return list(connection.scalars(select(RELEASES.c.assignment)))


def _releases(connection: Connection, assignments: list[int]) -> Iterator[int]:
    for start in range(0, len(assignments), _BATCH):
        chosen = RELEASES.c.assignment.in_(assignments[start : start + _BATCH])
        yield from connection.scalars(select(RELEASES.c.assignment).where(chosen)).all()


class _Tail:
    """How far one table was read. Numbers that a database server gives to rows not committed yet are gaps, and are read later."""

    def __init__(self) -> None:
        self._last = 0
        self._gaps: dict[int, float] = {}

    def read(self, connection: Connection, columns: Select[Any], number: Any) -> list[Row[Any]]:
        now = time.monotonic()
        self._gaps = {gap: since for gap, since in self._gaps.items() if now - since < _GAP_SECONDS}
        start = min(self._gaps, default=self._last + 1)
        rows = []
        for row in connection.execute(columns.where(number >= start).order_by(number)):
            if row.number > self._last:
                self._gaps |= dict.fromkeys(range(self._last + 1, row.number), now)
                self._last = row.number
                rows.append(row)
            elif self._gaps.pop(row.number, None) is not None:
                rows.append(row)
        return rows


def _lot(item_id: str) -> float:
    """A number from 0 to 1 that belongs to the id, the same in every process."""
    return int.from_bytes(hashlib.sha256(item_id.encode()).digest()[:6]) / 2**48


def _put(into: set[int], item: int, inside: bool) -> None:
    if inside:
        into.add(item)
    else:
        into.discard(item)

"""What is read of a store: answers, labels, the log, and how far people are.

Owns these questions. What a page asks with every request goes by the `WorkList` and by indexes; only `answers` and `stream` read
everything. Writes nothing.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

from sqlalchemy import ColumnElement, Connection, func, select

from draftsmith.label.schema import Answer, Label
from draftsmith.label.store.database import PATIENCE_SECONDS, Database
from draftsmith.label.store.records import (
    BATCH,
    LogEntry,
    batches,
    item_row,
    log_entry,
    numbered_answers,
    numbered_labels,
    replaced_names,
    row_label,
)
from draftsmith.label.store.tables import ENTRIES, ITEMS
from draftsmith.label.store.work_list import Refine, WorkList


@dataclass(frozen=True)
class Progress:
    """How far an annotator is with the items that were assigned to them.

    Attributes:
        num_labelled: items with their label.
        num_released: items that they gave back.
        num_waiting: items that they could still get, the open one included.
        mean_seconds: that their labels took; None where none says it.
        last_entry: the number of the label that `Store.undo` would take back, or None.
    """

    num_labelled: int
    num_released: int
    num_waiting: int
    mean_seconds: float | None
    last_entry: int | None


class StoreReader:
    """A store that is only read; see `Store` for what else it can do.

    Args:
        place: a path (SQLite) or an SQLAlchemy URL.
        create: make the store where there is none.
        patience_seconds: how long a writer waits for another one.
        refine: which imported labels leave something to do for a person; see `WorkList`.
        with_first_rows: make a missing store together with its first answers; see `Database`.

    Raises:
        ValueError: see `Database`.
    """

    def __init__(
        self,
        place: str,
        create: bool = False,
        patience_seconds: float = PATIENCE_SECONDS,
        refine: Refine = "steps",
        with_first_rows: bool = False,
    ) -> None:
        self._database = Database(place, create, patience_seconds, with_first_rows)
        self._work = WorkList(refine)
        self.name = self._database.name

    def progress(self, annotator: str, shared: float = 0.0) -> Progress:
        """How far an annotator is.

        Args:
            annotator: their name.
            shared: the share of the items that two get (see `assign`).
        """
        with self._database.read() as connection, self._work.lock:
            self._work.catch_up(connection)
            mine = self._work.labelled(annotator)
            times = [label.seconds for label in mine if label.seconds is not None]
            return Progress(
                num_labelled=len(mine),
                num_released=self._work.num_released(annotator),
                num_waiting=self._work.num_open(annotator, shared),
                mean_seconds=statistics.fmean(times) if times else None,
                last_entry=self._work.last_entry(annotator),
            )

    def num_waiting(self, shared: float = 0.0) -> int:
        """How many items still need a look, by anybody.

        Args:
            shared: the share of them that needs two.
        """
        with self._database.read() as connection, self._work.lock:
            self._work.catch_up(connection)
            return len(self._work.waiting(shared))

    def waiting(self, shared: float = 0.0, after: int = 0) -> list[tuple[Answer, list[Label]]]:
        """The items that still need a look: each answer, and its imported labels that leave something to do.

        Args:
            shared: the share of them that needs two.
            after: only items behind this number (see `last_item`).
        """
        with self._database.read() as connection, self._work.lock:
            self._work.catch_up(connection)
            waiting = self._work.waiting(shared)
            numbers = [number for number in self._work.new_items(after) if number in waiting]
            answers = numbered_answers(connection, numbers)
            entries = {number: [label.number for label in self._work.imported(number).values()] for number in numbers}
            labels = numbered_labels(connection, [entry for some in entries.values() for entry in some])
        return [(answers[number], [labels[entry] for entry in entries[number]]) for number in numbers]

    def last_item(self) -> int:
        """The number of the item that was added last; 0 where there is none."""
        with self._database.read() as connection:
            return int(connection.scalar(select(func.max(ITEMS.c.number))) or 0)

    def imported(self, item_id: str) -> list[Label]:
        """The imported labels of an item that leave something to find out: a whole step, or no place.

        Args:
            item_id: of the answer.

        Raises:
            ValueError: no such item.
        """
        with self._database.read() as connection, self._work.lock:
            self._work.catch_up(connection)
            labels = self._work.imported(item_row(connection, item_id).number)
            return list(numbered_labels(connection, [label.number for label in labels.values()]).values())

    def answer(self, item_id: str) -> Answer:
        """One answer, without labels.

        Args:
            item_id: of the answer.

        Raises:
            ValueError: no such item.
        """
        with self._database.read() as connection:
            number = item_row(connection, item_id).number
            return numbered_answers(connection, [number])[number]

    def labels(self, item_id: str) -> dict[str, tuple[int, Label]]:
        """The labels of an item that stand, by author, each with the number of its entry.

        Args:
            item_id: of the answer.

        Raises:
            ValueError: no such item.
        """
        with self._database.read() as connection, self._work.lock:
            self._work.catch_up(connection)
            return self._labels(connection, item_row(connection, item_id).number)

    def with_several_labels(self) -> dict[int, dict[str, int]]:
        """The items that two or more have labelled: the number of each author's entry, by the item's number."""
        with self._database.read() as connection, self._work.lock:
            self._work.catch_up(connection)
            return {
                item: {author: label.number for author, label in self._work.labels(item).items()}
                for item in self._work.with_several()
            }

    def labelled_answers(self, items: Sequence[int]) -> dict[int, list[Answer]]:
        """Some answers with each author's current label.

        Args:
            items: their numbers.
        """
        with self._database.read() as connection, self._work.lock:
            self._work.catch_up(connection)
            answers = numbered_answers(connection, items)
            entries = {item: [label.number for label in self._work.labels(item).values()] for item in items}
            labels = numbered_labels(connection, [entry for some in entries.values() for entry in some])
        return {item: [replace(answers[item], label=labels[entry]) for entry in entries[item]] for item in items}

    def answers(self, unlabelled: bool = False) -> list[Answer]:
        """Every answer with each author's current label, in the order of their adding; with tokens if there is one set.

        Args:
            unlabelled: add the answers that nobody has labelled.
        """
        return list(self.stream(unlabelled))

    def stream(self, unlabelled: bool = False) -> Iterator[Answer]:
        """As `answers`, some hundred items at a time: memory does not grow with their number.

        No lock is held between them, so that others can write meanwhile. Items and labels that they add do not count.

        Args:
            unlabelled: add the answers that nobody has labelled.

        Yields:
            Each answer; those of one item stand together.
        """
        with self._database.read() as connection:
            last_entry = int(connection.scalar(select(func.max(ENTRIES.c.number))) or 0)
            last_item = int(connection.scalar(select(func.max(ITEMS.c.number))) or 0)
        item = 0
        while item < last_item:
            following = select(ITEMS.c.number).where(ITEMS.c.number > item, ITEMS.c.number <= last_item)
            with self._database.read() as connection:
                numbers = list(connection.scalars(following.order_by(ITEMS.c.number).limit(BATCH)))
                answers = numbered_answers(connection, numbers)
                labels = _labels_by_item(current_labels(connection, numbers, last_entry))
            for number in numbers:
                yield from (replace(answers[number], label=label) for label in labels.get(number, []))
                if unlabelled and number not in labels:
                    yield answers[number]
            item = numbers[-1] if numbers else last_item

    def history(self, item_id: str) -> list[LogEntry]:
        """The whole log of one item, oldest entry first.

        Args:
            item_id: of the answer.

        Raises:
            ValueError: no such item.
        """
        with self._database.read() as connection:
            item = item_row(connection, item_id)
            rows = connection.execute(
                select(ENTRIES).where(ENTRIES.c.item == item.number).order_by(ENTRIES.c.number)
            ).all()
            replaces = {row.number: replaced_names(connection, [row.number]) for row in rows}
            return [log_entry(row, item_id, replaces[row.number].get(row.number, ())) for row in rows]

    def num_entries(self) -> int:
        """How many entries the log has, those that were taken back included."""
        with self._database.read() as connection:
            return int(connection.scalar(select(func.count()).select_from(ENTRIES)) or 0)

    def close(self) -> None:
        """Closes the store; what was written is on the disk already."""
        self._database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _labels(self, connection: Connection, item: int) -> dict[str, tuple[int, Label]]:
        entries = {author: label.number for author, label in self._work.labels(item).items()}
        labels = numbered_labels(connection, list(entries.values()))
        return {author: (number, labels[number]) for author, number in entries.items()}


def _labels_by_item(labels: dict[tuple[int, str], Label]) -> dict[int, list[Label]]:
    by_item: dict[int, list[Label]] = {}
    for (item, _), label in labels.items():
        by_item.setdefault(item, []).append(label)
    return by_item


def current_labels(
    connection: Connection, items: Sequence[int], last_entry: int | None = None
) -> dict[tuple[int, str], Label]:
    """The label that stands, by item number and author.

    Args:
        connection: of a transaction.
        items: of these, as many as one query takes.
        last_entry: the number of the last entry of the log that counts; None: all count.
    """
    chosen: ColumnElement[bool] = ENTRIES.c.item.in_(items)
    if last_entry is not None:
        chosen &= ENTRIES.c.number <= last_entry
    undone = select(ENTRIES.c.undoes).where(ENTRIES.c.undoes.is_not(None), chosen)
    standing = select(ENTRIES).where(chosen, ENTRIES.c.undoes.is_(None), ENTRIES.c.number.not_in(undone))
    rows = connection.execute(standing.order_by(ENTRIES.c.number)).all()
    replaces: dict[int, tuple[str, ...]] = {}
    for some in batches([row.number for row in rows]):
        replaces |= replaced_names(connection, some)
    return {(row.item, row.labelled_by): row_label(row, replaces.get(row.number, ())) for row in rows}

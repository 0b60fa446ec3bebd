"""What is read of a store: answers, labels, the log, and how far people are.

Owns these questions. What a page asks with every request goes by the `WorkList` and by indexes; only `answers` reads everything. Writes
nothing.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self

from sqlalchemy import ColumnElement, Connection, Row, func, select

from draftsmith.label.schema import Answer, Label
from draftsmith.label.store.database import PATIENCE_SECONDS, Database
from draftsmith.label.store.records import (
    LogEntry,
    bare_answer,
    batches,
    item_references,
    item_row,
    last_tokens,
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

    Raises:
        ValueError: see `Database`.
    """

    def __init__(
        self,
        place: str,
        create: bool = False,
        patience_seconds: float = PATIENCE_SECONDS,
        refine: Refine = "steps",
    ) -> None:
        self._database = Database(place, create, patience_seconds)
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
        with self._database.read() as connection:
            labels: dict[int, list[Label]] = {}
            for (item, _), label in current_labels(connection).items():
                labels.setdefault(item, []).append(label)
            tokens, references = last_tokens(connection), item_references(connection)
            answers = []
            for row in connection.execute(select(ITEMS).order_by(ITEMS.c.number)):
                answer = bare_answer(row, tokens.get(row.number), references.get(row.number))
                answers += [replace(answer, label=label) for label in labels.get(row.number, [])]
                if unlabelled and row.number not in labels:
                    answers.append(answer)
        return answers

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


def current_labels(connection: Connection, items: Sequence[int] | None = None) -> dict[tuple[int, str], Label]:
    """The label that stands, by item number and author.

    Args:
        connection: of a transaction.
        items: of these, as many as one query takes; None: of all.
    """
    undone = select(ENTRIES.c.undoes).where(ENTRIES.c.undoes.is_not(None))
    chosen: ColumnElement[bool] = ENTRIES.c.undoes.is_(None)
    if items is not None:
        undone, chosen = undone.where(ENTRIES.c.item.in_(items)), chosen & ENTRIES.c.item.in_(items)
    standing = select(ENTRIES).where(chosen, ENTRIES.c.number.not_in(undone)).order_by(ENTRIES.c.number)
    if items is None:
        replaces = replaced_names(connection)
        rows: Iterable[Row[Any]] = connection.execute(standing)
    else:
        rows, replaces = connection.execute(standing).all(), {}
        for some in batches([row.number for row in rows]):
            replaces |= replaced_names(connection, some)
    return {(row.item, row.labelled_by): row_label(row, replaces.get(row.number, ())) for row in rows}

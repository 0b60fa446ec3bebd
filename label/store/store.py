"""The store of labels: answers, who is to look at which, and a log of what everybody said.

Owns what may be written and what the log means: the last entry of an author on an item that was not taken back is that
author's label. Nothing is overwritten: every change is one more row with its author and time. Any number of processes may
write. Knows nothing of file formats, of tokenizers, or of how a person is shown an item.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self

from sqlalchemy import Connection, Row, Table, func, insert, select

from draftsmith.label.schema import Answer, Label, Span, Tokens, check_answer, check_label
from draftsmith.label.store.assignments import Seat, free_seats, open_seat, seats_of, take
from draftsmith.label.store.database import PATIENCE_SECONDS, Conflict, Database, now
from draftsmith.label.store.tables import ASSIGNMENTS, ENTRIES, ITEMS, RELEASES, TOKENS

_BATCH = 400  # ids in one IN (...): SQLite's old limit is 999 parameters
_TRIES = 20  # of taking a seat that another process takes first


@dataclass(frozen=True)
class Added:
    """What `Store.add` did.

    Attributes:
        items: new answers.
        labels: new labels.
        known_labels: labels that said what their author had said already.
    """

    items: int
    labels: int
    known_labels: int


@dataclass(frozen=True)
class LogEntry:
    """One line of the log.

    Attributes:
        number: of the entry.
        item_id: of the answer.
        label: the label, or None where the entry takes another one back. `label.labelled_by` is whose judgement it is.
        undoes: the number of the entry that it takes back, or None.
        author: who wrote the entry; for a person at work the same as `label.labelled_by`.
        at: when, UTC.
        seconds: that the label took, or None.
    """

    number: int
    item_id: str
    label: Label | None
    undoes: int | None
    author: str
    at: str
    seconds: float | None


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


class NotOpen(ValueError):
    """The item, or the entry, is not this annotator's to change, or not any more. Nothing was written."""


class Store:
    """The answers of a store, their labels and who works on which.

    Args:
        place: a path (SQLite) or an SQLAlchemy URL.
        create: make the store where there is none.
        patience_seconds: how long a writer waits for another one.

    Raises:
        ValueError: see `Database`.
    """

    def __init__(self, place: str, create: bool = False, patience_seconds: float = PATIENCE_SECONDS) -> None:
        self._database = Database(place, create, patience_seconds)
        self.name = self._database.name

    def add(self, answers: Iterable[Answer], author: str) -> Added:
        """Adds answers with their labels and tokens, all of them or none. What is there already stays as it is.

        Args:
            answers: with labels or without.
            author: who adds them, for the log.

        Raises:
            ValueError: an answer breaks a rule, or its id belongs to another answer.
        """
        added = list(answers)
        for answer in added:
            check_answer(answer, answer.id)
        with self._database.write() as connection:
            numbers, num_new = self._add_items(connection, added, author)
            self._add_tokens(connection, added, numbers, author)
            current = _current_labels(connection)
            num_labels = num_known = 0
            for answer in added:
                if answer.label is None:
                    continue
                key = (numbers[answer.id], answer.label.labelled_by)
                if current.get(key) == answer.label:
                    num_known += 1
                    continue
                current[key] = answer.label
                connection.execute(insert(ENTRIES).values(_entry_values(key[0], answer.label, author, None)))
                num_labels += 1
        return Added(num_new, num_labels, num_known)

    def annotate(self, item_id: str, label: Label, seconds: float | None = None, assigned: bool = False) -> int:
        """Appends a label by `label.labelled_by`, which from now on is that author's label of the item.

        When this returns, the entry is on the disk. With `assigned`, a request can be sent twice: the label that is there already is not
        written again. Another label is an error.

        Args:
            item_id: of the answer.
            label: to append.
            seconds: that it took.
            assigned: the item must be assigned to that author, and still be open.

        Returns:
            the entry's number.

        Raises:
            NotOpen: the item is not assigned to the author, or has another label of theirs (`assigned` only).
            ValueError: no such item, or the label breaks a rule (a span outside of the response, say).
        """
        if seconds is not None and not 0 <= seconds < float("inf"):
            raise ValueError(f"{item_id}: seconds is {seconds}; a time is 0 or more; give the time it took, or None")
        with self._database.write() as connection:
            item = _item(connection, item_id)
            check_label(label, item.response, item_id)
            if assigned:
                _check_held(connection, item, label.labelled_by)
                standing = _standing(connection).get((item.number, label.labelled_by))
                if standing is not None and _label(standing) == label:
                    return int(standing.number)
                _check_unlabelled(standing, item_id, label.labelled_by)
            values = _entry_values(item.number, label, label.labelled_by, seconds)
            return _append(connection, ENTRIES, values)

    def undo(self, author: str, entry: int | None = None) -> str:
        """Takes back an author's last label, by another entry. Their label before it on that item, if any, counts again.

        With `entry`, the label must have that number, and its item must be assigned to the author. If that label was taken back already,
        nothing is written.

        Args:
            author: whose label.
            entry: its number; None takes the last one.

        Returns:
            the item's id.

        Raises:
            NotOpen: the label of that number is not the author's last one on an assigned item (`entry` only).
            ValueError: the author has no label to take back.
        """
        with self._database.write() as connection:
            if entry is not None and (done := _undone_item(connection, author, entry)) is not None:
                return done
            last = _last_label(connection, author, assigned=entry is not None)
            if entry is not None and (last is None or last.number != entry):
                raise NotOpen(
                    f"entry {entry} is not the last label of {author!r}; look at the last one again, and undo it"
                )
            if last is None:
                raise ValueError(f"{author!r} has no label to take back; label something first")
            values = {"item": last.item, "undoes": last.number, "labelled_by": author, "note": ""}
            connection.execute(insert(ENTRIES).values(values | {"author": author, "at": now()}))
            return str(connection.scalar(select(ITEMS.c.id).where(ITEMS.c.number == last.item)))

    def assign(self, annotator: str, shared: float = 0.0) -> Answer | None:
        """The item that an annotator is to label now, or None when there is none left for them.

        An item not yet labelled by them stays theirs until they label or release it. Else it is the first one that still needs a look: no
        label yet, or one that says only "wrong, somewhere". Two annotators never get the same item, except for the share `shared` of the
        items, chosen by their ids, which two get.

        Args:
            annotator: their name.
            shared: from 0 to 1.

        Raises:
            Conflict: other processes were quicker every time, or the database takes this name for another one's.
            ValueError: `shared` is not within 0 and 1, or the annotator has no name.
        """
        if not 0 <= shared <= 1:
            raise ValueError(f"shared is {shared}; it is the share of items that two annotators get; give 0 to 1")
        if not annotator.strip():
            raise ValueError(f"annotator is {annotator!r}; every assignment has a name to it; give one")
        # On SQLite writers go one after the other. Elsewhere two may choose the same seat: one of them fails on the
        # unique constraint, and looks again. Not for ever: to a database that ignores case, two names can be one.
        for _ in range(_TRIES - 1):
            with contextlib.suppress(Conflict):
                return self._assign(annotator, shared)
        return self._assign(annotator, shared)

    def release(self, item_id: str, annotator: str, reason: str) -> None:
        """Gives an assigned item back, for somebody else. This annotator does not get it again.

        Args:
            item_id: of the answer.
            annotator: who gives it back.
            reason: for the log.

        Raises:
            NotOpen: the item is not assigned to them, was given back already, or has their label.
            ValueError: no such item.
        """
        with self._database.write() as connection:
            item = _item(connection, item_id)
            _check_held(connection, item, annotator)
            _check_unlabelled(_standing(connection).get((item.number, annotator)), item_id, annotator)
            number = connection.scalar(
                select(ASSIGNMENTS.c.number).where(
                    ASSIGNMENTS.c.item == item.number, ASSIGNMENTS.c.annotator == annotator
                )
            )
            values = {"assignment": number, "reason": reason, "author": annotator, "at": now()}
            connection.execute(insert(RELEASES).values(values))

    def progress(self, annotator: str, shared: float = 0.0) -> Progress:
        """How far an annotator is.

        Args:
            annotator: their name.
            shared: the share of the items that two get (see `assign`).
        """
        with self._database.read() as connection:
            standing = _standing(connection)
            held, released = seats_of(connection, annotator)
            mine = [standing[seat.item, annotator] for seat in held if (seat.item, annotator) in standing]
            free = _free_seats(connection, annotator, shared, standing)
            times = [row.seconds for row in mine if row.seconds is not None]
            return Progress(
                num_labelled=len(mine),
                num_released=len(released),
                num_waiting=len(held) - len(mine) + sum(1 for _ in free),
                mean_seconds=statistics.fmean(times) if times else None,
                last_entry=max((int(row.number) for row in mine), default=None),
            )

    def num_waiting(self, shared: float = 0.0) -> int:
        """How many items still need a look, by anybody.

        Args:
            shared: the share of them that needs two.
        """
        with self._database.read() as connection:
            num_labels = Counter(item for item, _ in _placed(_standing(connection)))
            return sum(num_labels[item] < wanted for item, wanted in _wanted(connection, shared).items())

    def answer(self, item_id: str) -> Answer:
        """One answer, without labels.

        Args:
            item_id: of the answer.

        Raises:
            ValueError: no such item.
        """
        with self._database.read() as connection:
            return _answer(connection, _item(connection, item_id).number)

    def answers(self, unlabelled: bool = False) -> list[Answer]:
        """Every answer with each author's current label, in the order of their adding; with tokens if there is one set.

        Args:
            unlabelled: add the answers that nobody has labelled.
        """
        with self._database.read() as connection:
            labels: dict[int, list[Label]] = {}
            for (item, _), label in _current_labels(connection).items():
                labels.setdefault(item, []).append(label)
            tokens = _tokens(connection)
            answers = []
            for row in connection.execute(select(ITEMS).order_by(ITEMS.c.number)):
                answer = _from_item(row, tokens.get(row.number))
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
            item = _item(connection, item_id)
            rows = connection.execute(select(ENTRIES).where(ENTRIES.c.item == item.number).order_by(ENTRIES.c.number))
            return [_entry(row, item_id) for row in rows]

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

    def _assign(self, annotator: str, shared: float) -> Answer | None:
        with self._database.write() as connection:
            seat = open_seat(connection, annotator, set(_standing(connection)))
            if seat is None:
                seat = self._next_seat(connection, annotator, shared)
            return None if seat is None else _answer(connection, seat.item)

    def _next_seat(self, connection: Connection, annotator: str, shared: float) -> Seat | None:
        seat = next(_free_seats(connection, annotator, shared, _standing(connection)), None)
        if seat is not None:
            take(connection, seat)
        return seat

    def _add_items(self, connection: Connection, answers: list[Answer], author: str) -> tuple[dict[str, int], int]:
        """Gives the number of each answer's item, and how many items are new."""
        known = {}
        ids = list({answer.id for answer in answers})
        for start in range(0, len(ids), _BATCH):
            for row in connection.execute(select(ITEMS).where(ITEMS.c.id.in_(ids[start : start + _BATCH]))):
                known[row.id] = (row.number, _from_item(row, None))
        num_new = 0
        for answer in answers:
            bare = replace(answer, label=None, tokens=None)
            if answer.id not in known:
                values = _item_values(answer) | {"author": author, "at": now()}
                known[answer.id] = (_append(connection, ITEMS, values), bare)
                num_new += 1
            elif known[answer.id][1] != bare:
                raise ValueError(
                    f"{answer.id}: this id belongs to another answer in {self.name}; an answer is never overwritten; "
                    "give the new one an id of its own, or none"
                )
        return {key: number for key, (number, _) in known.items()}, num_new

    def _add_tokens(self, connection: Connection, answers: list[Answer], numbers: dict[str, int], author: str) -> None:
        known = {}
        for row in connection.execute(select(TOKENS.c.item, TOKENS.c.tokenizer, TOKENS.c.offsets)):
            known[row.item, row.tokenizer] = row.offsets
        for answer in answers:
            if answer.tokens is None:
                continue
            key = (numbers[answer.id], answer.tokens.tokenizer)
            offsets = json.dumps(answer.tokens.offsets)
            if key not in known:
                known[key] = offsets
                values = {"item": key[0], "tokenizer": key[1], "offsets": offsets, "author": author, "at": now()}
                connection.execute(insert(TOKENS).values(values))
            elif known[key] != offsets:
                raise ValueError(
                    f"{answer.id}: {self.name} has other offsets of the tokenizer {key[1][:16]} for this answer; they "
                    "are never overwritten; make the offsets anew with that very tokenizer"
                )


def _append(connection: Connection, table: Table, values: dict[str, Any]) -> int:
    """Adds a row and gives its number."""
    key = connection.execute(insert(table).values(values)).inserted_primary_key
    assert key is not None
    return int(key[0])


def _lot(item_id: str) -> float:
    """A number from 0 to 1 that belongs to the id, the same in every process."""
    return int.from_bytes(hashlib.sha256(item_id.encode()).digest()[:6]) / 2**48


def _standing(connection: Connection) -> dict[tuple[int, str], Row[Any]]:
    """The entry of the label that stands, by item number and author."""
    undone = select(ENTRIES.c.undoes).where(ENTRIES.c.undoes.is_not(None))
    rows = connection.execute(
        select(ENTRIES).where(ENTRIES.c.undoes.is_(None), ENTRIES.c.number.not_in(undone)).order_by(ENTRIES.c.number)
    )
    return {(row.item, row.labelled_by): row for row in rows}


def _current_labels(connection: Connection) -> dict[tuple[int, str], Label]:
    """The label that stands, by item number and author."""
    return {key: _label(row) for key, row in _standing(connection).items()}


def _placed(standing: dict[tuple[int, str], Row[Any]]) -> set[tuple[int, str]]:
    """(item, author) of the labels that leave nothing to find out."""
    return {key for key, row in standing.items() if row.verdict != "unplaced"}


def _wanted(connection: Connection, shared: float) -> dict[int, int]:
    """How many annotators each item is meant for, in the order of their adding."""
    rows = connection.execute(select(ITEMS.c.number, ITEMS.c.id).order_by(ITEMS.c.number))
    return {row.number: 2 if _lot(row.id) < shared else 1 for row in rows}


def _free_seats(
    connection: Connection, annotator: str, shared: float, standing: dict[tuple[int, str], Row[Any]]
) -> Iterator[Seat]:
    wanted = _wanted(connection, shared)
    unseen = {item: number for item, number in wanted.items() if (item, annotator) not in standing}
    return free_seats(connection, annotator, unseen, _placed(standing))


def _check_held(connection: Connection, item: Row[Any], annotator: str) -> None:
    held, _ = seats_of(connection, annotator)
    if item.number not in {seat.item for seat in held}:
        raise NotOpen(f"{item.id} is not assigned to {annotator!r}; work on the item that was assigned to you")


def _check_unlabelled(standing: Row[Any] | None, item_id: str, annotator: str) -> None:
    if standing is not None:
        raise NotOpen(f"{item_id} has a label of {annotator!r} already; take it back first, then change it")


def _last_label(connection: Connection, author: str, assigned: bool) -> Row[Any] | None:
    """The entry of the author's last label that stands, on an item that is assigned to them if so asked."""
    mine = {seat.item for seat in seats_of(connection, author)[0]}
    entries = [
        row for (item, by), row in _standing(connection).items() if by == author and (item in mine or not assigned)
    ]
    return max(entries, key=lambda row: int(row.number), default=None)


def _undone_item(connection: Connection, author: str, entry: int) -> str | None:
    """The id of the item whose label, the entry of this number, its author has taken back already; else None."""
    undone = select(ENTRIES.c.item).where(ENTRIES.c.undoes == entry, ENTRIES.c.author == author)
    item_id = connection.scalar(select(ITEMS.c.id).where(ITEMS.c.number.in_(undone)))
    return None if item_id is None else str(item_id)


def _tokens(connection: Connection, item: int | None = None) -> dict[int, Tokens]:
    """The tokens of each item, or of that one, that were added last."""
    chosen = select(TOKENS).order_by(TOKENS.c.number)
    return {
        row.item: Tokens(row.tokenizer, tuple((start, end) for start, end in json.loads(row.offsets)))
        for row in connection.execute(chosen if item is None else chosen.where(TOKENS.c.item == item))
    }


def _item(connection: Connection, item_id: str) -> Row[Any]:
    row = connection.execute(select(ITEMS).where(ITEMS.c.id == item_id)).first()
    if row is None:
        raise ValueError(f"there is no answer {item_id!r} in the store; add it first, or check the id")
    return row


def _answer(connection: Connection, number: int) -> Answer:
    row = connection.execute(select(ITEMS).where(ITEMS.c.number == number)).one()
    return _from_item(row, _tokens(connection, number).get(number))


def _from_item(row: Row[Any], tokens: Tokens | None) -> Answer:
    messages = tuple(json.loads(row.messages))
    return Answer(row.id, messages, row.response, row.model, row.licence, row.source, None, tokens)


def _item_values(answer: Answer) -> dict[str, Any]:
    messages = json.dumps([dict(message) for message in answer.messages], ensure_ascii=False)
    return {
        "id": answer.id,
        "messages": messages,
        "response": answer.response,
        "model": answer.model,
        "licence": answer.licence,
        "source": answer.source,
    }


def _entry_values(item: int, label: Label, author: str, seconds: float | None) -> dict[str, Any]:
    error_start, error_end = label.error or (None, None)
    checked_start, checked_end = label.checked or (None, None)
    return {
        "item": item,
        "verdict": label.verdict,
        "labelled_by": label.labelled_by,
        "how": label.how,
        "error_start": error_start,
        "error_end": error_end,
        "checked_start": checked_start,
        "checked_end": checked_end,
        "note": label.note,
        "seconds": seconds,
        "author": author,
        "at": now(),
    }


def _label(row: Row[Any]) -> Label:
    error: Span | None = None if row.error_start is None else (row.error_start, row.error_end)
    checked: Span | None = None if row.checked_start is None else (row.checked_start, row.checked_end)
    return Label(row.verdict, row.labelled_by, row.how, error, checked, row.note)


def _entry(row: Row[Any], item_id: str) -> LogEntry:
    label = None if row.undoes is not None else _label(row)
    return LogEntry(row.number, item_id, label, row.undoes, row.author, row.at, row.seconds)

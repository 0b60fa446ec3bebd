"""The store of labels: answers, who is to look at which, and a log of what everybody said.

Owns what may be written and what the log means: the last entry of an author on an item that was not taken back is that
author's label. Nothing is overwritten: every change is one more row with its author and time. Any number of processes may
write. Knows nothing of file formats, of tokenizers, or of how a person is shown an item.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self

from sqlalchemy import Connection, Row, Table, func, insert, select

from draftsmith.label.database import PATIENCE_SECONDS, Conflict, Database, now
from draftsmith.label.schema import Answer, Label, Span, Tokens, check_answer, check_label
from draftsmith.label.seats import Seat, free_seat, open_seat, take
from draftsmith.label.tables import ASSIGNMENTS, ENTRIES, ITEMS, RELEASES, TOKENS

_BATCH = 400  # ids in one IN (...): SQLite's old limit is 999 parameters


@dataclass(frozen=True)
class Added:
    """What `Store.add` did: new answers, new labels, and labels that said what their author had said already."""

    items: int
    labels: int
    known_labels: int


@dataclass(frozen=True)
class Entry:
    """One line of the log: a label, or (`undoes`) the number of the entry it takes back.

    `author` wrote the entry, `label.labelled_by` is whose judgement it is; for a person at work both are the same.
    """

    number: int
    item_id: str
    label: Label | None
    undoes: int | None
    author: str
    at: str
    seconds: float | None


class Store:
    """Opens a store: a path (SQLite) or an SQLAlchemy URL.

    Raises ValueError: see `Database`.
    """

    def __init__(self, place: str, create: bool = False, patience_seconds: float = PATIENCE_SECONDS) -> None:
        self._database = Database(place, create, patience_seconds)
        self.name = self._database.name

    def add(self, answers: Iterable[Answer], author: str) -> Added:
        """Adds answers with their labels and tokens, all of them or none. What is there already stays as it is.

        Raises ValueError: an answer breaks a rule, or its id belongs to another answer.
        """
        found = list(answers)
        for answer in found:
            check_answer(answer, answer.id)
        with self._database.write() as connection:
            numbers, num_new = self._add_items(connection, found, author)
            self._add_tokens(connection, found, numbers, author)
            current = _current_labels(connection)
            num_labels = num_known = 0
            for answer in found:
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

    def annotate(self, item_id: str, label: Label, seconds: float | None = None) -> int:
        """Appends a label by `label.labelled_by`, which from now on is that author's label of the item.

        `seconds` is the time it took. Returns the entry's number. When this returns, the entry is on the disk.

        Raises ValueError: no such item, or the label breaks a rule (a span outside of the response, say).
        """
        if seconds is not None and not 0 <= seconds < float("inf"):
            raise ValueError(f"{item_id}: seconds is {seconds}; a time is 0 or more; give the time it took, or None")
        with self._database.write() as connection:
            item = _item(connection, item_id)
            check_label(label, item.response, item_id)
            values = _entry_values(item.number, label, label.labelled_by, seconds)
            return _append(connection, ENTRIES, values)

    def undo(self, author: str) -> str:
        """Takes back the last label of `author` that still stands, by another entry. Returns the item's id.

        The author's label before it on that item, if any, stands again.

        Raises ValueError: nothing of this author's stands.
        """
        with self._database.write() as connection:
            undone = select(ENTRIES.c.undoes).where(ENTRIES.c.undoes.is_not(None))
            last = connection.execute(
                select(ENTRIES.c.number, ENTRIES.c.item, ITEMS.c.id)
                .join(ITEMS, ITEMS.c.number == ENTRIES.c.item)
                .where(ENTRIES.c.labelled_by == author, ENTRIES.c.undoes.is_(None), ENTRIES.c.number.not_in(undone))
                .order_by(ENTRIES.c.number.desc())
                .limit(1)
            ).first()
            if last is None:
                raise ValueError(f"{author!r} has no label to take back; label something first")
            values = {"item": last.item, "undoes": last.number, "labelled_by": author, "note": ""}
            connection.execute(insert(ENTRIES).values(values | {"author": author, "at": now()}))
            return str(last.id)

    def assign(self, annotator: str, shared: float = 0.0) -> Answer | None:
        """The item that `annotator` is to label now, or None when there is none left for them.

        An item not yet labelled by them stays theirs until they label or release it. Else it is the first one that still
        needs a look: no label yet, or one that says only "wrong, somewhere". Two annotators never get the same item,
        except for the share `shared` of the items, chosen by their ids, which two get.

        Raises ValueError: `shared` is not within 0 and 1, or the annotator has no name.
        """
        if not 0 <= shared <= 1:
            raise ValueError(f"shared is {shared}; it is the share of items that two annotators get; give 0 to 1")
        if not annotator.strip():
            raise ValueError(f"annotator is {annotator!r}; every assignment has a name to it; give one")
        while True:
            # On SQLite writers go one after the other. Elsewhere two may choose the same seat: one of them fails on the
            # unique constraint, and looks again.
            with contextlib.suppress(Conflict), self._database.write() as connection:
                seat = open_seat(connection, annotator, set(_current_labels(connection)))
                if seat is None:
                    seat = self._next_seat(connection, annotator, shared)
                return None if seat is None else _answer(connection, seat.item)

    def release(self, item_id: str, annotator: str, reason: str) -> None:
        """Gives an assigned item back, for somebody else; this annotator is not offered it again.

        Raises ValueError: the item is not assigned to them, or was given back already.
        """
        with self._database.write() as connection:
            released = select(RELEASES.c.assignment)
            number = connection.scalar(
                select(ASSIGNMENTS.c.number)
                .join(ITEMS, ITEMS.c.number == ASSIGNMENTS.c.item)
                .where(ITEMS.c.id == item_id, ASSIGNMENTS.c.annotator == annotator)
                .where(ASSIGNMENTS.c.number.not_in(released))
            )
            if number is None:
                raise ValueError(f"{item_id} is not assigned to {annotator!r}; only one's own item can be released")
            values = {"assignment": number, "reason": reason, "author": annotator, "at": now()}
            connection.execute(insert(RELEASES).values(values))

    def answers(self, unlabelled: bool = False) -> list[Answer]:
        """Every answer with each author's current label, in the order of their adding; with tokens if there is one set.

        `unlabelled` adds the answers that nobody has labelled.
        """
        with self._database.read() as connection:
            labels: dict[int, list[Label]] = {}
            for (item, _), label in _current_labels(connection).items():
                labels.setdefault(item, []).append(label)
            tokens = _tokens(connection)
            found = []
            for row in connection.execute(select(ITEMS).order_by(ITEMS.c.number)):
                answer = _from_item(row, tokens.get(row.number))
                found += [replace(answer, label=label) for label in labels.get(row.number, [])]
                if unlabelled and row.number not in labels:
                    found.append(answer)
        return found

    def history(self, item_id: str) -> list[Entry]:
        """The whole log of one item, oldest entry first.

        Raises ValueError: no such item.
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

    def _next_seat(self, connection: Connection, annotator: str, shared: float) -> Seat | None:
        current = _current_labels(connection)
        wanted = {
            row.number: 2 if _lot(row.id) < shared else 1
            for row in connection.execute(select(ITEMS.c.number, ITEMS.c.id).order_by(ITEMS.c.number))
        }
        placed = {key for key, label in current.items() if label.verdict != "unplaced"}
        seat = free_seat(connection, annotator, wanted, placed)
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


def _current_labels(connection: Connection) -> dict[tuple[int, str], Label]:
    """The label that stands, by item number and author."""
    undone = select(ENTRIES.c.undoes).where(ENTRIES.c.undoes.is_not(None))
    rows = connection.execute(
        select(ENTRIES).where(ENTRIES.c.undoes.is_(None), ENTRIES.c.number.not_in(undone)).order_by(ENTRIES.c.number)
    )
    return {(row.item, row.labelled_by): _label(row) for row in rows}


def _tokens(connection: Connection) -> dict[int, Tokens]:
    """The tokens of each item that were added last."""
    return {
        row.item: Tokens(row.tokenizer, tuple((start, end) for start, end in json.loads(row.offsets)))
        for row in connection.execute(select(TOKENS).order_by(TOKENS.c.number))
    }


def _item(connection: Connection, item_id: str) -> Row[Any]:
    row = connection.execute(select(ITEMS).where(ITEMS.c.id == item_id)).first()
    if row is None:
        raise ValueError(f"there is no answer {item_id!r} in the store; add it first, or check the id")
    return row


def _answer(connection: Connection, number: int) -> Answer:
    row = connection.execute(select(ITEMS).where(ITEMS.c.number == number)).one()
    return _from_item(row, _tokens(connection).get(number))


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


def _entry(row: Row[Any], item_id: str) -> Entry:
    label = None if row.undoes is not None else _label(row)
    return Entry(row.number, item_id, label, row.undoes, row.author, row.at, row.seconds)

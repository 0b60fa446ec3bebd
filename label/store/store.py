"""The store of labels: answers, who is to look at which, and a log of what everybody said.

Owns what may be written and what the log means: the last entry of an author on an item that was not taken back is that
author's label. Nothing is overwritten: every change is one more row with its author and time. Any number of processes may
write. Knows nothing of file formats, of tokenizers, or of how a person is shown an item.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import Connection, Row, insert, select

from draftsmith.label.schema import Answer, Label, check_answer, check_label
from draftsmith.label.store.assignments import take
from draftsmith.label.store.database import Conflict, now
from draftsmith.label.store.reader import Progress, StoreReader, current_labels
from draftsmith.label.store.records import (
    BATCH,
    LogEntry,
    append_label,
    append_labels,
    bare_answer,
    item_offsets,
    item_references,
    item_row,
    item_values,
    numbered_answers,
    numbered_labels,
)
from draftsmith.label.store.tables import ASSIGNMENTS, ENTRIES, ITEMS, REFERENCES, RELEASES, TOKENS

__all__ = ["Added", "LogEntry", "NotOpen", "Progress", "Store"]

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


class NotOpen(ValueError):
    """The item, or the entry, is not this annotator's to change, or not any more. Nothing was written."""


class Store(StoreReader):
    """The answers of a store, their labels and who works on which. See `StoreReader` for arguments and errors."""

    def add(self, answers: Iterable[Answer], author: str) -> Added:
        """Adds answers with their labels and tokens, all of them or none. What is there already stays as it is.

        The answers are taken a batch at a time, in one transaction: they may come from a generator, and memory does not grow with their
        number. An error that it raises undoes all.

        Args:
            answers: with labels or without.
            author: who adds them, for the log.

        Raises:
            ValueError: an answer breaks a rule, or its id belongs to another answer.
        """
        coming = iter(answers)
        added = Added(0, 0, 0)
        with self._database.write() as connection:
            while batch := list(itertools.islice(coming, BATCH)):
                for answer in batch:
                    check_answer(answer, answer.id)
                items, num_new = self._add_items(connection, batch, author)
                self._add_tokens(connection, batch, items, author)
                self._add_references(connection, batch, items, author)
                labels, num_known = _new_labels(connection, batch, items)
                append_labels(connection, labels, author)
                added = Added(added.items + num_new, added.labels + len(labels), added.known_labels + num_known)
        return added

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
            item = item_row(connection, item_id)
            check_label(label, item.response, item_id)
            if assigned:
                standing = self._own_label(connection, item, label.labelled_by)
                if standing is not None and standing[1] == label:
                    return standing[0]
                _check_unlabelled(standing is not None, item_id, label.labelled_by)
            return append_label(connection, item, label, label.labelled_by, seconds)

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
            last = _last_entry(connection, author) if entry is None else self._last_assigned(connection, author)
            if entry is not None and last != entry:
                raise NotOpen(
                    f"entry {entry} is not the last label of {author!r}; look at the last one again, and undo it"
                )
            if last is None:
                raise ValueError(f"{author!r} has no label to take back; label something first")
            return _take_back(connection, author, last)

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
            item = item_row(connection, item_id)
            standing = self._own_label(connection, item, annotator)
            _check_unlabelled(standing is not None, item_id, annotator)
            number = connection.scalar(
                select(ASSIGNMENTS.c.number).where(
                    ASSIGNMENTS.c.item == item.number, ASSIGNMENTS.c.annotator == annotator
                )
            )
            values = {"assignment": number, "reason": reason, "author": annotator, "at": now()}
            connection.execute(insert(RELEASES).values(values))

    def withhold(self, item_ids: Sequence[str]) -> None:
        """Offers some items to nobody, as long as this object is used. They are not counted as waiting. Nothing is written.

        Args:
            item_ids: of the answers.

        Raises:
            ValueError: no such item.
        """
        with self._database.read() as connection, self._work.lock:
            self._work.catch_up(connection)
            self._work.withhold([item_row(connection, item_id).number for item_id in item_ids])

    def decide(self, item_id: str, label: Label) -> int:
        """Appends a label that counts from now on in place of all others on its item. Sent twice, it is written once.

        Args:
            item_id: of the answer.
            label: by somebody who has no label of their own there; whom it replaces is filled in.

        Returns:
            the entry's number.

        Raises:
            NotOpen: fewer than two others have labelled the item, its author is one of them, or somebody else has decided.
            ValueError: no such item, or the label breaks a rule.
        """
        with self._database.write() as connection:
            item = item_row(connection, item_id)
            check_label(label, item.response, item_id)
            with self._work.lock:
                self._work.catch_up(connection)
                standing = self._labels(connection, item.number)
            number, own = standing.pop(label.labelled_by, (0, None))
            label = replace(label, replaces=tuple(sorted(standing)))
            if own == label:
                return number
            _check_may_decide(item_id, label.labelled_by, own, {name: other for name, (_, other) in standing.items()})
            return append_label(connection, item, label, label.labelled_by)

    def reopen(self, author: str, entry: int) -> str:
        """Takes back a label that decided, by another entry.

        Args:
            author: whose label.
            entry: its number.

        Returns:
            the item's id.

        Raises:
            NotOpen: it is not the author's, does not decide, or does not stand.
        """
        with self._database.write() as connection:
            if (done := _undone_item(connection, author, entry)) is not None:
                return done
            item = connection.scalar(select(ENTRIES.c.item).where(ENTRIES.c.number == entry))
            with self._work.lock:
                self._work.catch_up(connection)
                standing = self._work.labels(item).get(author) if item is not None else None
                is_held = item is not None and self._work.holds(author, item)
            if standing is None or standing.number != entry or not standing.decides or is_held:
                raise NotOpen(f"entry {entry} is no decision of {author!r} that stands; reload the page")
            return _take_back(connection, author, entry)

    def _assign(self, annotator: str, shared: float) -> Answer | None:
        with self._database.write() as connection:
            with self._work.lock:
                self._work.catch_up(connection)
                item = self._work.open_item(annotator)
                seat = self._work.free_seat(annotator, shared) if item is None else None
            if seat is not None:
                item = seat.item
                take(connection, seat)
            return None if item is None else numbered_answers(connection, [item])[item]

    def _own_label(self, connection: Connection, item: Row[Any], annotator: str) -> tuple[int, Label] | None:
        """The annotator's label of an item that is assigned to them, with its number."""
        with self._work.lock:
            self._work.catch_up(connection)
            is_held = self._work.holds(annotator, item.number)
            standing = self._work.labels(item.number).get(annotator)
        if not is_held:
            raise NotOpen(f"{item.id} is not assigned to {annotator!r}; work on the item that was assigned to you")
        return (
            None
            if standing is None
            else (standing.number, numbered_labels(connection, [standing.number])[standing.number])
        )

    def _last_assigned(self, connection: Connection, author: str) -> int | None:
        with self._work.lock:
            self._work.catch_up(connection)
            return self._work.last_entry(author)

    def _add_items(self, connection: Connection, answers: list[Answer], author: str) -> tuple[dict[str, int], int]:
        """Gives the number of each answer's item, by its id, and how many items are new."""
        rows = _rows_by_id(connection, answers)
        known = {item_id: bare_answer(row) for item_id, row in rows.items()}
        new = []
        for answer in answers:
            bare = replace(answer, label=None, tokens=None, reference=None)
            if answer.id not in known:
                new.append(item_values(answer) | {"author": author, "at": now()})
                known[answer.id] = bare
            elif known[answer.id] != bare:
                raise ValueError(
                    f"{answer.id}: this id belongs to another answer in {self.name}; an answer is never overwritten; "
                    "give the new one an id of its own, or none"
                )
        if new:
            connection.execute(insert(ITEMS), new)
            rows = _rows_by_id(connection, answers)
        return {item_id: row.number for item_id, row in rows.items()}, len(new)

    def _add_tokens(self, connection: Connection, answers: list[Answer], items: dict[str, int], author: str) -> None:
        numbers = [items[answer.id] for answer in answers if answer.tokens is not None]
        known = item_offsets(connection, numbers)
        new = []
        for answer in answers:
            if answer.tokens is None:
                continue
            key = (items[answer.id], answer.tokens.tokenizer)
            offsets = json.dumps(answer.tokens.offsets)
            if key not in known:
                known[key] = offsets
                new.append({"item": key[0], "tokenizer": key[1], "offsets": offsets, "author": author, "at": now()})
            elif known[key] != offsets:
                raise ValueError(
                    f"{answer.id}: {self.name} has other offsets of the tokenizer {key[1][:16]} for this answer; they "
                    "are never overwritten; make the offsets anew with that very tokenizer"
                )
        if new:
            connection.execute(insert(TOKENS), new)

    def _add_references(
        self, connection: Connection, answers: list[Answer], items: dict[str, int], author: str
    ) -> None:
        known = item_references(connection, [items[answer.id] for answer in answers if answer.reference is not None])
        new = []
        for answer in answers:
            if answer.reference is None:
                continue
            item = items[answer.id]
            if item not in known:
                known[item] = answer.reference
                new.append({"item": item, "reference": answer.reference, "author": author, "at": now()})
            elif known[item] != answer.reference:
                raise ValueError(
                    f"{answer.id}: {self.name} has another reference for this answer, {known[item]!r:.60}; it is never "
                    "overwritten; leave the new one out, or give the answer an id of its own"
                )
        if new:
            connection.execute(insert(REFERENCES), new)


def _new_labels(
    connection: Connection, answers: list[Answer], items: dict[str, int]
) -> tuple[list[tuple[int, str, Label]], int]:
    """The labels of answers that say something new, each with the number of its item and the response; and how many do not."""
    current = current_labels(connection, list(items.values()))
    new, num_known = [], 0
    for answer in answers:
        if answer.label is None:
            continue
        label = replace(answer.label, replaces=tuple(sorted(answer.label.replaces)))
        key = (items[answer.id], label.labelled_by)
        if current.get(key) == label:
            num_known += 1
            continue
        current[key] = label
        new.append((key[0], answer.response, label))
    return new, num_known


def _rows_by_id(connection: Connection, answers: list[Answer]) -> dict[str, Row[Any]]:
    ids = list({answer.id for answer in answers})
    return {row.id: row for row in connection.execute(select(ITEMS).where(ITEMS.c.id.in_(ids)))}


def _check_may_decide(item_id: str, author: str, own: Label | None, others: dict[str, Label]) -> None:
    if own is not None:
        raise NotOpen(
            f"{author!r} has labelled {item_id} already; somebody else decides, or take that label back first"
        )
    if len(others) < 2:
        raise NotOpen(
            f"{item_id} has {len(others)} labels; there is nothing to decide before two people have labelled it"
        )
    for name, label in others.items():
        if others.keys() - {name} <= set(label.replaces):
            raise NotOpen(f"{name!r} has decided on {item_id} already; they can take it back")


def _check_unlabelled(is_labelled: bool, item_id: str, annotator: str) -> None:
    if is_labelled:
        raise NotOpen(f"{item_id} has a label of {annotator!r} already; take it back first, then change it")


def _last_entry(connection: Connection, author: str) -> int | None:
    """The number of the author's last label that was not taken back."""
    undoing = ENTRIES.alias()
    is_undone = select(undoing.c.number).where(undoing.c.undoes == ENTRIES.c.number).exists()
    own = (ENTRIES.c.labelled_by == author) & ENTRIES.c.undoes.is_(None) & ~is_undone
    number = connection.scalar(select(ENTRIES.c.number).where(own).order_by(ENTRIES.c.number.desc()).limit(1))
    return None if number is None else int(number)


def _take_back(connection: Connection, author: str, entry: int) -> str:
    """Writes that a label is taken back, and gives the id of its item."""
    item = connection.scalar(select(ENTRIES.c.item).where(ENTRIES.c.number == entry))
    values = {"item": item, "undoes": entry, "labelled_by": author, "note": "", "author": author, "at": now()}
    connection.execute(insert(ENTRIES).values(values))
    return str(connection.scalar(select(ITEMS.c.id).where(ITEMS.c.number == item)))


def _undone_item(connection: Connection, author: str, entry: int) -> str | None:
    """The id of the item whose label, the entry of this number, its author has taken back already; else None."""
    undone = select(ENTRIES.c.item).where(ENTRIES.c.undoes == entry, ENTRIES.c.author == author)
    item_id = connection.scalar(select(ITEMS.c.id).where(ITEMS.c.number.in_(undone)))
    return None if item_id is None else str(item_id)

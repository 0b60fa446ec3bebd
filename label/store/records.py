"""Rows of a store as answers, labels and entries of the log, and back.

Owns this translation and what is read of one item. Every query here goes by an index.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, Table, func, insert, select

from draftsmith.label.schema import Answer, Label, Span, Tokens
from draftsmith.label.steps import is_step
from draftsmith.label.store.database import now
from draftsmith.label.store.tables import ENTRIES, ITEMS, REFERENCES, REPLACED, STEPS, TOKENS

BATCH = 400  # ids in one IN (...): SQLite's old limit is 999 parameters


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


def append(connection: Connection, table: Table, values: dict[str, Any]) -> int:
    """Adds a row and gives its number.

    Args:
        connection: of a transaction that writes.
        table: with a column `number`.
        values: of the other columns.
    """
    key = connection.execute(insert(table).values(values)).inserted_primary_key
    assert key is not None
    return int(key[0])


def append_label(
    connection: Connection, item: Row[Any], label: Label, author: str, seconds: float | None = None
) -> int:
    """Adds a label to the log and gives the entry's number.

    Args:
        connection: of a transaction that writes.
        item: the row of the answer.
        label: by its rules.
        author: who writes it.
        seconds: that it took.
    """
    number = append(connection, ENTRIES, _entry_values(item.number, label, author, seconds))
    _append_steps(connection, [(number, item.response, label)], author)
    return number


def append_labels(connection: Connection, labels: Sequence[tuple[int, str, Label]], author: str) -> None:
    """Adds labels to the log, in their order.

    Args:
        connection: of a transaction that writes.
        labels: the number of the item, the response and the label by its rules.
        author: who writes them.
    """
    if not labels:
        return
    values = [_entry_values(item, label, author, None) for item, _, label in labels]
    numbers = append_numbered(connection, values) if has_only_writer(connection) else append_each(connection, values)
    entries = [(number, response, label) for number, (_, response, label) in zip(numbers, labels, strict=True)]
    _append_steps(connection, entries, author)


def has_only_writer(connection: Connection) -> bool:
    """Whether nobody else can add a row before this transaction ends: SQLite has one write lock.

    Args:
        connection: of a transaction that writes.
    """
    return connection.dialect.name == "sqlite"


def append_numbered(connection: Connection, values: Sequence[dict[str, Any]]) -> Sequence[int]:
    """Adds entries to the log at once, and gives their numbers.

    Args:
        connection: of a transaction that writes, and is the only one that does.
        values: of the columns of each entry.
    """
    last = connection.scalar(select(func.max(ENTRIES.c.number))) or 0
    numbers = range(last + 1, last + 1 + len(values))
    connection.execute(insert(ENTRIES), [entry | {"number": at} for at, entry in zip(numbers, values, strict=True)])
    return numbers


def append_each(connection: Connection, values: Sequence[dict[str, Any]]) -> Sequence[int]:
    """As :func:`append_numbered`, entry by entry, where the database numbers them.

    Args:
        connection: of a transaction that writes.
        values: of the columns of each entry.
    """
    return [append(connection, ENTRIES, entry) for entry in values]


def _append_steps(connection: Connection, entries: Sequence[tuple[int, str, Label]], author: str) -> None:
    """Notes which labels call a whole step wrong, and whose labels they replace."""
    steps = [
        {"entry": number, "author": author, "at": now()}
        for number, response, label in entries
        if label.error is not None and is_step(response, label.error)
    ]
    replaced = [
        {"entry": number, "labelled_by": name, "author": author, "at": now()}
        for number, _, label in entries
        for name in label.replaces
    ]
    for table, rows in ((STEPS, steps), (REPLACED, replaced)):
        if rows:
            connection.execute(insert(table), rows)


def item_row(connection: Connection, item_id: str) -> Row[Any]:
    """The row of an answer.

    Args:
        connection: of a transaction.
        item_id: of the answer.

    Raises:
        ValueError: no such item.
    """
    row = connection.execute(select(ITEMS).where(ITEMS.c.id == item_id)).first()
    if row is None:
        raise ValueError(f"there is no answer {item_id!r} in the store; add it first, or check the id")
    return row


def numbered_answers(connection: Connection, numbers: Sequence[int]) -> dict[int, Answer]:
    """Answers without labels, with tokens and reference where they have any, by the item's number.

    Args:
        connection: of a transaction.
        numbers: of the items.
    """
    answers = {}
    for some in batches(numbers):
        tokens = last_tokens(connection, some)
        references = item_references(connection, some)
        for row in connection.execute(select(ITEMS).where(ITEMS.c.number.in_(some)).order_by(ITEMS.c.number)):
            answers[row.number] = bare_answer(row, tokens.get(row.number), references.get(row.number))
    return answers


def numbered_labels(connection: Connection, entries: Sequence[int]) -> dict[int, Label]:
    """Labels of the log by the numbers of their entries.

    Args:
        connection: of a transaction.
        entries: the numbers.
    """
    labels = {}
    for some in batches(entries):
        replaces = replaced_names(connection, some)
        for row in connection.execute(select(ENTRIES).where(ENTRIES.c.number.in_(some))):
            labels[row.number] = row_label(row, replaces.get(row.number, ()))
    return labels


def batches(numbers: Sequence[Any]) -> Iterator[Sequence[Any]]:
    """The values in portions that fit one query.

    Args:
        numbers: or other values.

    Yields:
        each portion.
    """
    for start in range(0, len(numbers), BATCH):
        yield numbers[start : start + BATCH]


def replaced_names(connection: Connection, entries: Sequence[int]) -> dict[int, tuple[str, ...]]:
    """Whose labels an entry replaces, by its number.

    Args:
        connection: of a transaction.
        entries: their numbers, as many as one query takes.
    """
    names: dict[int, list[str]] = {}
    chosen = select(REPLACED).order_by(REPLACED.c.entry, REPLACED.c.labelled_by)
    for row in connection.execute(chosen.where(REPLACED.c.entry.in_(entries))):
        names.setdefault(row.entry, []).append(row.labelled_by)
    return {entry: tuple(replaced) for entry, replaced in names.items()}


def last_tokens(connection: Connection, items: Sequence[int]) -> dict[int, Tokens]:
    """The tokens of each item that were added last.

    Args:
        connection: of a transaction.
        items: their numbers, as many as one query takes.
    """
    chosen = select(TOKENS).order_by(TOKENS.c.number)
    return {
        row.item: Tokens(row.tokenizer, tuple((start, end) for start, end in json.loads(row.offsets)))
        for row in connection.execute(chosen.where(TOKENS.c.item.in_(items)))
    }


def item_offsets(connection: Connection, items: Sequence[int]) -> dict[tuple[int, str], str]:
    """The offsets of tokens as they are written, by item and tokenizer.

    Args:
        connection: of a transaction.
        items: their numbers, as many as one query takes.
    """
    chosen = select(TOKENS.c.item, TOKENS.c.tokenizer, TOKENS.c.offsets).where(TOKENS.c.item.in_(items))
    return {(row.item, row.tokenizer): row.offsets for row in connection.execute(chosen)}


def item_references(connection: Connection, items: Sequence[int]) -> dict[int, str]:
    """The reference of each item that has one.

    Args:
        connection: of a transaction.
        items: their numbers, as many as one query takes.
    """
    chosen = select(REFERENCES.c.item, REFERENCES.c.reference)
    rows = connection.execute(chosen.where(REFERENCES.c.item.in_(items)))
    return {row.item: row.reference for row in rows}


def bare_answer(row: Row[Any], tokens: Tokens | None = None, reference: str | None = None) -> Answer:
    """The answer in a row of items, without a label.

    Args:
        row: of items.
        tokens: of the answer.
        reference: of the answer.
    """
    messages = tuple(json.loads(row.messages))
    return Answer(row.id, messages, row.response, row.model, row.licence, row.source, None, tokens, reference)


def item_values(answer: Answer) -> dict[str, Any]:
    """The columns of an answer's row.

    Args:
        answer: its label, tokens and reference go elsewhere.
    """
    messages = json.dumps([dict(message) for message in answer.messages], ensure_ascii=False)
    return {
        "id": answer.id,
        "messages": messages,
        "response": answer.response,
        "model": answer.model,
        "licence": answer.licence,
        "source": answer.source,
    }


def row_label(row: Row[Any], replaces: tuple[str, ...]) -> Label:
    """The label in a row of entries.

    Args:
        row: of entries.
        replaces: whose labels it replaces.
    """
    error: Span | None = None if row.error_start is None else (row.error_start, row.error_end)
    checked: Span | None = None if row.checked_start is None else (row.checked_start, row.checked_end)
    return Label(row.verdict, row.labelled_by, row.how, error, checked, row.note, replaces)


def log_entry(row: Row[Any], item_id: str, replaces: tuple[str, ...]) -> LogEntry:
    """A row of entries as a line of the log.

    Args:
        row: of entries.
        item_id: of its answer.
        replaces: whose labels it replaces.
    """
    label = None if row.undoes is not None else row_label(row, replaces)
    return LogEntry(row.number, item_id, label, row.undoes, row.author, row.at, row.seconds)


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

"""Many answers added to a store: taken a batch at a time, all of them or none, also where the process is killed."""

import os
import signal
import sqlite3
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import Connection

from draftsmith.label.schema import Answer, Label, Tokens
from draftsmith.label.store import records
from draftsmith.label.store.records import BATCH
from draftsmith.label.store.store import Added, Store

Make = Callable[..., Answer]

# Adds answers of 8 MB, more than SQLite holds in memory, and never comes to an end.
ENDLESS = """
import sys, time
from draftsmith.label.schema import Answer, Label
from draftsmith.label.store.store import Store

def answers():
    for number in range(2000):
        messages = ({"role": "user", "content": f"{number}?"},)
        yield Answer(f"n{number}", messages, "x" * 4000, "m", "MIT", "s", Label("correct", "set", "rule"))
    print("all", flush=True)
    time.sleep(600)

with Store(sys.argv[1], create=True) as store:
    store.add(answers(), "importer")
"""


def several(make: Make, count: int) -> Iterator[Answer]:
    """Answers with what an answer may have: a step, a mark that replaces others, tokens, a reference, none of it."""
    labels = (
        Label("wrong", "set", "person", (0, 2)),
        Label("wrong", "alice", "person", (1, 2), replaces=("set", "bob")),
        Label("correct", "set", "rule"),
        None,
    )
    for number in range(count):
        answer = make(f"n{number}", "ab\ncd", labels[number % 4])
        yield replace(answer, tokens=Tokens("t", ((0, 5),)), reference=str(number)) if number % 3 else answer


def test_answers_are_taken_a_batch_at_a_time_and_none_is_kept(store: Store, make: Make) -> None:
    alive: weakref.WeakSet[Answer] = weakref.WeakSet()
    most = 0

    class Counted(Answer):
        __hash__ = object.__hash__

    def coming() -> Iterator[Answer]:
        nonlocal most
        for number in range(5 * BATCH):
            answer = Counted(**vars(make(f"n{number}", label=Label("correct", "set", "rule"))))
            alive.add(answer)
            most = max(most, len(alive))
            yield answer

    assert store.add(coming(), "importer") == Added(items=5 * BATCH, labels=5 * BATCH, known_labels=0)
    assert BATCH <= most <= 2 * BATCH + 2


def test_batches_give_what_one_addition_gives_and_a_second_import_adds_nothing(store: Store, make: Make) -> None:
    count = 2 * BATCH + 50
    added = store.add(several(make, count), "importer")
    assert (added.items, added.known_labels) == (count, 0)
    unlabelled = [answer for answer in several(make, count) if answer.label is None]
    assert store.answers(unlabelled=True) == [
        answer if answer.label is None or not answer.label.replaces else _sorted(answer)
        for answer in several(make, count)
    ]
    assert added.labels == count - len(unlabelled)
    assert store.add(several(make, count), "importer") == Added(0, 0, added.labels)
    assert store.num_entries() == added.labels


def _sorted(answer: Answer) -> Answer:
    assert answer.label is not None
    return replace(answer, label=replace(answer.label, replaces=tuple(sorted(answer.label.replaces))))


def test_a_label_that_was_taken_back_is_added_again(store: Store, make: Make) -> None:
    label = Label("correct", "set", "rule")
    store.add([make("a", label=label), make("b", label=label)], "importer")
    store.undo("set")
    assert store.add([make("a", label=label), make("b", label=label)], "importer") == Added(0, 1, 1)


def test_an_error_in_a_late_batch_undoes_the_earlier_ones(store: Store, make: Make) -> None:
    def coming() -> Iterator[Answer]:
        yield from (make(f"n{number}") for number in range(3 * BATCH))
        raise ValueError("the file ends in the middle of a row")

    with pytest.raises(ValueError, match="ends in the middle"):
        store.add(coming(), "importer")
    assert store.answers(unlabelled=True) == []


def test_where_others_write_at_once_entries_are_numbered_by_the_database_and_are_the_same(
    tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = []
    for name, alone in (("a", True), ("b", False)):

        def only(connection: Connection, alone: bool = alone) -> bool:
            return alone

        monkeypatch.setattr(records, "has_only_writer", only)
        with Store(str(tmp_path / name), create=True) as store:
            store.add(several(make, 40), "importer")
            store.annotate("n0", Label("correct", "bob", "person"))
        with sqlite3.connect(tmp_path / name) as connection:
            tables = ("SELECT number, item, labelled_by, verdict FROM entries", "SELECT entry FROM steps ORDER BY 1")
            contents.append([connection.execute(query).fetchall() for query in tables])
            contents[-1].append(connection.execute("SELECT entry, labelled_by FROM replaced ORDER BY 1, 2").fetchall())
    assert contents[0] == contents[1]
    assert all(contents[0])


def test_an_import_that_is_killed_leaves_nothing_and_can_be_run_again(place: str, make: Make) -> None:
    process = subprocess.Popen([sys.executable, "-c", ENDLESS, place], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "all\n"
    assert Path(place).stat().st_size > 2_000_000, "much of it had reached the file"
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    with Store(place) as store:
        assert store.answers(unlabelled=True) == []
        assert store.add(several(make, 3), "importer").items == 3
    with sqlite3.connect(place) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)

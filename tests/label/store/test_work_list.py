"""The work list: the same as a full read of the log gives, at a cost that does not grow with the store."""

import itertools
import json
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine, event

from draftsmith.label.schema import Answer, Label
from draftsmith.label.store.store import Store
from draftsmith.label.store.work_list import WorkList

STEPS = "1+1=2\n2+2=5"
STEP = (6, 11)
NAMES = ("alice", "bob")
ITEMS = ("a", "b", "c", "step", "lost")
DONE = "correct"


def plain(store: Store, place: str, annotator: str, shared: float) -> tuple[int, int]:
    """How many items wait, and how many an annotator has open or could get: from all rows, by the rules as they are written down."""
    with sqlite3.connect(place) as connection:
        items = dict(connection.execute("SELECT number, id FROM items"))
        undone = {number for (number,) in connection.execute("SELECT undoes FROM entries WHERE undoes IS NOT NULL")}
        labels: dict[tuple[int, str], tuple[int, str, int | None]] = {}
        columns = "number, item, labelled_by, verdict, error_start"
        for number, item, author, verdict, start in connection.execute(
            f"SELECT {columns} FROM entries WHERE undoes IS NULL ORDER BY number"
        ):
            if number not in undone:
                labels[item, author] = (number, verdict, start)
        released = {number for (number,) in connection.execute("SELECT assignment FROM releases")}
        seats = connection.execute("SELECT number, item, annotator FROM assignments").fetchall()
    held = {(item, name) for number, item, name in seats if number not in released}
    left = {item for number, item, name in seats if number in released and name == annotator}
    waiting = opened = 0
    for item, item_id in items.items():
        wanted = 2 if shared == 1.0 else 1
        final = {
            name
            for (labelled, name), (_, verdict, start) in labels.items()
            if labelled == item
            and ((item, name) in held or not (verdict == "unplaced" or (item_id == "step" and start == STEP[0])))
        }
        sitting = {name for of, name in held if of == item}
        waiting += len(final) < wanted
        if (item, annotator) in held:
            opened += (item, annotator) not in labels
        elif item not in left and (item, annotator) not in labels:
            opened += len(final | sitting) < wanted
    return waiting, opened


def an_import(make: Callable[..., Answer]) -> list[Answer]:
    return [
        *(make(name) for name in "ab"),
        make("c", label=Label("correct", "set", "rule")),
        make("step", STEPS, Label("wrong", "set", "person", STEP)),
        make("lost", label=Label("unplaced", "set", "rule")),
    ]


ACTIONS = st.lists(
    st.tuples(st.sampled_from(["label", "unplaced", "skip", "undo", "import"]), st.sampled_from(NAMES)), max_size=14
)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(actions=ACTIONS, shared=st.sampled_from([0.0, 1.0]))
def test_after_every_action_the_counters_are_those_of_a_full_read(
    make: Callable[..., Answer], tmp_path_factory: pytest.TempPathFactory, actions: list[tuple[str, str]], shared: float
) -> None:
    place = str(tmp_path_factory.mktemp("store") / "labels.db")
    with Store(place, create=True) as store, Store(place) as watching:
        store.add(an_import(make), "importer")
        for number, (action, name) in enumerate(actions):
            act(store, make, action, name, shared, number)
            for reader in (store, watching):
                for person in NAMES:
                    waiting, opened = plain(reader, place, person, shared)
                    assert reader.num_waiting(shared) == waiting
                    assert reader.progress(person, shared).num_waiting == opened
        with Store(place) as afresh:
            for person in NAMES:
                assert afresh.progress(person, shared) == store.progress(person, shared)


def act(store: Store, make: Callable[..., Answer], action: str, name: str, shared: float, number: int) -> None:
    if action == "import":
        store.add([make(f"new-{number}")], "importer")
    elif action == "undo":
        entry = store.progress(name, shared).last_entry
        if entry is not None:
            store.undo(name, entry)
    elif (answer := store.assign(name, shared)) is not None:
        if action == "skip":
            store.release(answer.id, name, "skipped")
        else:
            verdict: Any = "unplaced" if action == "unplaced" else DONE
            store.annotate(answer.id, Label(verdict, name, "person"), seconds=1, assigned=True)


@pytest.mark.parametrize("query", [0, 1, 2, 3])
def test_rows_that_were_read_before_a_query_failed_are_read_again(
    make: Callable[..., Answer], tmp_path: Path, query: int
) -> None:
    place = str(tmp_path / "labels.db")
    with Store(place, create=True) as store, Store(place) as watching:
        store.add(an_import(make), "importer")
        assert watching.num_waiting() == 4
        act(store, make, "label", "alice", 0.0, 0)
        act(store, make, "skip", "alice", 0.0, 1)
        act(store, make, "import", "alice", 0.0, 2)
        with failing_query(query), pytest.raises(ValueError):
            watching.num_waiting()
        assert watching.num_waiting() == store.num_waiting()
        for name in NAMES:
            assert watching.progress(name) == store.progress(name)


@contextmanager
def failing_query(index: int) -> Iterator[None]:
    """The query of that number fails, as on a server that is gone."""
    count = itertools.count()

    def fail(*_: Any) -> None:
        if next(count) == index:
            raise sqlite3.OperationalError("the server is gone")

    event.listen(Engine, "before_cursor_execute", fail)
    try:
        yield
    finally:
        event.remove(Engine, "before_cursor_execute", fail)


# ---- 20,000 items -----------------------------------------------------------------------------------------------------------


def fill(place: str, num_items: int) -> None:
    """A store of long answers, half of them labelled by a set and an eighth by people, written past the store for speed."""
    Store(place, create=True).close()
    text = "so it is 4\n" * 200
    messages = json.dumps([{"role": "user", "content": "How many?"}])
    with sqlite3.connect(place) as connection:
        connection.executemany(
            "INSERT INTO items VALUES (?, ?, ?, ?, 'm', 'MIT', 's', 'me', '')",
            ((number, f"item-{number}", messages, text) for number in range(1, num_items + 1)),
        )
        connection.executemany(
            "INSERT INTO entries (item, verdict, labelled_by, how, error_start, error_end, note, author, at) "
            "VALUES (?, 'wrong', 'set', 'person', 0, 10, '', 'me', '')",
            ((number,) for number in range(1, num_items, 2)),
        )
        connection.execute("INSERT INTO steps SELECT number, 'me', '' FROM entries")
        for name, first in (("alice", 0), ("bob", 1)):
            chosen = range(1 + first, num_items // 8, 2)
            connection.executemany(
                "INSERT INTO assignments (item, seat, turn, annotator, at) VALUES (?, 0, 0, ?, '')",
                ((number, name) for number in chosen),
            )
            connection.executemany(
                "INSERT INTO entries (item, verdict, labelled_by, how, note, seconds, author, at) "
                "VALUES (?, 'correct', ?, 'person', '', 2, ?, '')",
                ((number, name, name) for number in chosen),
            )


@contextmanager
def counted_steps(store: Store) -> Iterator[list[int]]:
    """Counts the steps of SQLite's machine, in hundreds: they grow with every row that is read, in an index or a table."""
    steps = [0]

    def count() -> int:
        steps[0] += 1
        return 0

    engine: Engine = store._database.engine
    engine.dispose()  # connections of before do not count

    def connect(connection: sqlite3.Connection, _: object) -> None:
        connection.set_progress_handler(count, 100)

    event.listen(engine, "connect", connect)
    yield steps
    event.remove(engine, "connect", connect)
    engine.dispose()


def a_round(store: Store, shared: float) -> None:
    """What one answer costs: shown, labelled, taken back, labelled again, another one skipped, the counters after each."""
    answer = store.assign("alice", shared)
    assert answer is not None
    store.imported(answer.id)
    store.progress("alice", shared)
    entry = store.annotate(answer.id, Label("correct", "alice", "person"), 1, assigned=True)
    store.progress("alice", shared)
    assert store.undo("alice", entry) == answer.id
    store.progress("alice", shared)
    store.assign("alice", shared)
    store.annotate(answer.id, Label("unplaced", "alice", "person"), 1, assigned=True)
    skipped = store.assign("alice", shared)
    assert skipped is not None
    store.release(skipped.id, "alice", "skipped")
    store.progress("alice", shared)
    store.num_waiting(shared)
    store.with_several_labels()


@pytest.mark.parametrize("shared", [0.0, 0.3])
def test_a_request_reads_no_more_of_20000_items_than_of_200(tmp_path: Path, shared: float) -> None:
    hundreds, seconds = {}, {}
    for num_items in (200, 20_000):
        place = str(tmp_path / f"{num_items}.db")
        fill(place, num_items)
        with Store(place) as store:
            store.num_waiting(shared)  # the one full read: of numbers and names, when the page is started
            with counted_steps(store) as steps:
                a_round(store, shared)
                began = time.perf_counter()
                a_round(store, shared)
                seconds[num_items] = time.perf_counter() - began
                hundreds[num_items] = steps[0]
    assert hundreds[20_000] < 2 * hundreds[200] + 20, hundreds
    assert seconds[20_000] < 5, "some twenty requests, on a busy machine"


def test_finding_the_open_item_costs_no_more_for_each_label_when_there_are_thousands() -> None:
    work, count, seconds = WorkList(), 6000, list[float]()
    person = work._of("alice")
    person.held, person.labelled = dict.fromkeys(range(count), 1), set(range(count - 1))
    for _ in range(3):
        began = time.perf_counter()
        assert work.open_item("alice") == count - 1
        seconds.append(time.perf_counter() - began)
    assert min(seconds) < 0.02, "one union of thousands, not one for each label"


def test_no_query_of_a_request_scans_a_table(tmp_path: Path) -> None:
    place = str(tmp_path / "labels.db")
    fill(place, 400)
    statements: list[tuple[str, Any]] = []

    def note(_conn: Any, _cursor: Any, statement: str, parameters: Any, *_: object) -> None:
        statements.append((statement, parameters))

    with Store(place) as store:
        store.num_waiting()
        event.listen(store._database.engine, "before_cursor_execute", note)
        a_round(store, 0.0)
        with_two = store.answer("item-1")
        store.labels(with_two.id)
        store.labelled_answers([1, 3])
        event.remove(store._database.engine, "before_cursor_execute", note)
    selects = [pair for pair in statements if pair[0].lstrip().startswith("SELECT")]
    assert len(selects) > 20
    with sqlite3.connect(place) as connection:
        for statement, parameters in selects:
            plan = [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {statement}", parameters)]
            assert not any(scans(step) for step in plan), (statement, plan)


def scans(step: str) -> bool:
    return step.startswith("SCAN") and "CONSTANT ROW" not in step

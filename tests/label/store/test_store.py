import itertools
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import Connection
from sqlalchemy.dialects import registry
from sqlalchemy.exc import IntegrityError
from sqlalchemy.schema import CreateTable

from draftsmith.label.schema import Answer, Label, Tokens
from draftsmith.label.store import store as store_module
from draftsmith.label.store.assignments import Seat, take
from draftsmith.label.store.database import Conflict, Database, Unavailable
from draftsmith.label.store.store import Added, NotOpen, Progress, Store
from draftsmith.label.store.tables import METADATA


def test_what_is_added_comes_back(store: Store, make: Callable[..., Answer], wrong: Label) -> None:
    answers = [
        replace(make("a", label=wrong), tokens=Tokens("t", ((0, 4), (4, 11)))),
        make("b", "😀 <script>", Label("correct", "rule-1", "rule", None, (0, 3), "note")),
    ]
    assert store.add(answers, "importer") == Added(items=2, labels=2, known_labels=0)
    assert store.answers() == answers


def test_adding_the_same_again_changes_nothing(store: Store, make: Callable[..., Answer], wrong: Label) -> None:
    answers = [make("a", label=wrong), make("a", label=Label("correct", "bob", "person")), make("b")]
    store.add(answers, "importer")
    assert store.add(answers, "importer") == Added(items=0, labels=0, known_labels=2)
    assert store.num_entries() == 2
    assert len(store.answers(unlabelled=True)) == 3


def test_an_id_never_comes_to_mean_another_answer(store: Store, make: Callable[..., Answer], wrong: Label) -> None:
    store.add([make("a", label=wrong)], "importer")
    with pytest.raises(ValueError, match=r"a: this id belongs to another answer .* never overwritten"):
        store.add([make("new"), make("a", "another response")], "importer")
    assert [answer.id for answer in store.answers(unlabelled=True)] == ["a"], "all of an import or none of it"


def test_offsets_of_one_tokenizer_are_never_replaced(store: Store, make: Callable[..., Answer]) -> None:
    store.add([replace(make("a"), tokens=Tokens("t", ((0, 4),)))], "importer")
    with pytest.raises(ValueError, match="other offsets of the tokenizer t"):
        store.add([replace(make("a"), tokens=Tokens("t", ((0, 5),)))], "importer")


def test_a_label_with_a_span_outside_the_text_is_refused(store: Store, make: Callable[..., Answer]) -> None:
    store.add([make("a")], "importer")
    with pytest.raises(ValueError, match=r"a: error is \[4, 99\]; 0 <= start < end <= 11"):
        store.annotate("a", Label("wrong", "alice", "person", (4, 99)))
    with pytest.raises(ValueError, match="there is no answer 'b'"):
        store.annotate("b", Label("correct", "alice", "person"))
    with pytest.raises(ValueError, match="seconds is -1"):
        store.annotate("a", Label("correct", "alice", "person"), seconds=-1)
    assert store.num_entries() == 0


def test_the_last_label_of_an_author_stands_and_the_log_keeps_all(
    store: Store, make: Callable[..., Answer], wrong: Label
) -> None:
    store.add([make("a")], "importer")
    first = store.annotate("a", wrong, seconds=2.5)
    second = store.annotate("a", Label("correct", "alice", "person", note="looked again"))
    store.annotate("a", Label("unplaced", "bob", "person"))
    assert [answer.label.verdict for answer in store.answers() if answer.label] == ["correct", "unplaced"]
    log = store.history("a")
    assert [entry.label for entry in log][:1] == [wrong]
    assert [entry.number for entry in log][:2] == [first, second]
    assert [(entry.author, entry.seconds) for entry in log] == [("alice", 2.5), ("alice", None), ("bob", None)]
    assert all(entry.at.endswith("+00:00") for entry in log)


def test_undo_is_one_more_entry_and_the_label_before_stands_again(
    store: Store, make: Callable[..., Answer], wrong: Label
) -> None:
    store.add([make("a"), make("b")], "importer")
    store.annotate("a", wrong)
    second = store.annotate("a", Label("correct", "alice", "person"))
    store.annotate("b", Label("correct", "bob", "person"))
    assert store.undo("alice") == "a"
    assert store.history("a")[-1].undoes == second
    assert [answer.label for answer in store.answers() if answer.id == "a"] == [wrong]
    assert store.undo("alice") == "a"
    assert [answer.id for answer in store.answers()] == ["b"]
    with pytest.raises(ValueError, match="'alice' has no label to take back"):
        store.undo("alice")
    assert store.num_entries() == 5


def test_the_database_itself_refuses_to_change_or_delete_a_row(
    store: Store, place: str, make: Callable[..., Answer], wrong: Label
) -> None:
    store.add([replace(make("a", label=wrong), tokens=Tokens("t", ((0, 4),)), reference="2")], "importer")
    store.add([make("step", "1\n2", Label("wrong", "set", "person", (0, 1), replaces=("rule",)))], "importer")
    store.add([make("b")], "importer")
    store.assign("bob")
    store.release("b", "bob", "unclear")
    connection = sqlite3.connect(place)
    for table in METADATA.tables:
        column = "version" if table == "about" else "at"
        for statement in (f"UPDATE {table} SET {column} = '9'", f"DELETE FROM {table}"):
            with pytest.raises(sqlite3.IntegrityError, match=f"rows of {table} are never changed or deleted"):
                connection.execute(statement)
    connection.close()


def test_two_annotators_never_get_one_item(store: Store, make: Callable[..., Answer]) -> None:
    store.add([make(name) for name in "abc"], "importer")
    given = {name: store.assign(name) for name in ("alice", "bob", "carol", "dave")}
    assert [given[name].id for name in ("alice", "bob", "carol")] == ["a", "b", "c"]  # type: ignore[union-attr]
    assert given["dave"] is None


def test_a_seat_that_others_take_first_is_looked_for_again_but_not_for_ever(
    store: Store, make: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    store.add([make("a")], "importer")
    failures: Iterator[int] = iter(range(3))

    def late(connection: Connection, seat: Seat) -> None:
        if next(failures, None) is not None:
            raise IntegrityError("insert", None, Exception("UNIQUE constraint failed"))
        take(connection, seat)

    monkeypatch.setattr(store_module, "take", late)
    assert store.assign("alice") == make("a")
    store.release("a", "alice", "")
    failures = itertools.count()
    with pytest.raises(Conflict, match="nothing of this was written; try again"):
        store.assign("bob")


def test_an_assigned_item_stays_until_it_is_labelled(store: Store, make: Callable[..., Answer]) -> None:
    store.add([make("a"), make("b")], "importer")
    assert [store.assign("alice"), store.assign("alice")] == [make("a"), make("a")]
    store.annotate("a", Label("correct", "alice", "person"))
    assert store.assign("alice") == make("b")
    store.undo("alice")
    assert store.assign("alice") == make("a"), "what was taken back is to be done again"


def test_a_shared_item_goes_to_two_annotators_and_no_more(store: Store, make: Callable[..., Answer]) -> None:
    store.add([make("a")], "importer")
    assert [store.assign(name, shared=1.0) for name in ("alice", "bob", "carol")] == [make("a"), make("a"), None]


def test_about_the_asked_share_of_items_is_shared(store: Store, make: Callable[..., Answer]) -> None:
    store.add([make(f"item-{number}") for number in range(60)], "importer")
    count = {"alice": 0, "bob": 0}
    for name in count:
        while (answer := store.assign(name, shared=0.5)) is not None:
            store.annotate(answer.id, Label("correct", name, "person"))
            count[name] += 1
    assert count["alice"] == 60
    assert 15 <= count["bob"] <= 45


def test_a_released_item_goes_to_somebody_else(store: Store, make: Callable[..., Answer]) -> None:
    store.add([make("a")], "importer")
    store.assign("alice")
    store.release("a", "alice", "skipped")
    assert store.assign("alice") is None
    assert store.assign("bob") == make("a")
    with pytest.raises(ValueError, match="a is not assigned to 'alice'"):
        store.release("a", "alice", "again")


def test_a_label_of_an_assigned_item_is_taken_once_and_from_its_annotator_only(
    store: Store, make: Callable[..., Answer], wrong: Label
) -> None:
    store.add([make("a"), make("b")], "importer")
    with pytest.raises(NotOpen, match="a is not assigned to 'alice'"):
        store.annotate("a", wrong, assigned=True)
    store.assign("alice")
    number = store.annotate("a", wrong, assigned=True)
    assert store.annotate("a", wrong, seconds=9, assigned=True) == number, "the same request, sent again"
    with pytest.raises(NotOpen, match="a has a label of 'alice' already; take it back first"):
        store.annotate("a", Label("correct", "alice", "person"), assigned=True)
    with pytest.raises(NotOpen, match="a has a label of 'alice' already"):
        store.release("a", "alice", "too late")
    store.assign("bob")
    store.release("b", "bob", "skipped")
    with pytest.raises(NotOpen, match="b is not assigned to 'bob'"):
        store.annotate("b", Label("correct", "bob", "person"), assigned=True)
    assert store.num_entries() == 1


def test_undo_of_a_numbered_entry_happens_once_and_only_to_the_last(
    store: Store, make: Callable[..., Answer], wrong: Label
) -> None:
    store.add([make("a", label=Label("correct", "alice", "person")), make("b"), make("c")], "importer")
    numbers = {}
    for item in "bc":
        store.assign("alice")
        numbers[item] = store.annotate(item, wrong, assigned=True)
    with pytest.raises(NotOpen, match=f"entry {numbers['b']} is not the last label of 'alice'"):
        store.undo("alice", numbers["b"])
    assert [store.undo("alice", numbers["c"]), store.undo("alice", numbers["c"])] == ["c", "c"]
    assert store.undo("alice", numbers["b"]) == "b"
    with pytest.raises(NotOpen, match="entry 1 is not the last label"):
        store.undo("alice", 1)  # an import under the same name is not what was done at the page
    assert store.num_entries() == 5


def test_progress_counts_what_was_done_and_what_could_still_come(
    store: Store, make: Callable[..., Answer], wrong: Label
) -> None:
    store.add([make(name) for name in "abcde"], "importer")
    assert store.progress("alice") == Progress(0, 0, 5, None, None)
    store.assign("alice")
    number = store.annotate("a", wrong, seconds=3)
    store.assign("alice")
    store.release("b", "alice", "skipped")
    store.assign("alice")
    store.assign("bob")
    assert store.progress("alice") == Progress(1, 1, 3, 3.0, number), "c is open, d and e are free; bob has b"
    assert store.progress("bob") == Progress(0, 0, 3, None, None)
    assert store.progress("bob", shared=1.0).num_waiting == 5, "and those that alice has had or has"
    store.undo("alice")
    assert store.progress("alice") == Progress(0, 1, 4, None, None), "what was taken back waits again"


def test_waiting_are_the_items_that_nobody_or_too_few_have_looked_at(
    store: Store, make: Callable[..., Answer], wrong: Label
) -> None:
    unplaced = Label("unplaced", "rule-1", "rule")
    store.add([make("a", label=wrong), make("b", label=unplaced), make("c")], "importer")
    assert (store.num_waiting(), store.num_waiting(shared=1.0)) == (2, 3)
    store.assign("alice")
    assert store.num_waiting() == 2, "an item that somebody only looks at still waits"


def test_somebody_whose_name_an_import_has_used_is_not_offered_that_item(
    store: Store, make: Callable[..., Answer]
) -> None:
    store.add([make("a", label=Label("unplaced", "alice", "person")), make("b")], "importer")
    assert store.assign("alice") == make("b")
    assert store.assign("bob") == make("a")


def test_imported_labels_need_nobody_unless_the_place_is_unknown(store: Store, make: Callable[..., Answer]) -> None:
    store.add([make("a", label=Label("correct", "set", "rule"))], "importer")
    assert store.assign("alice") is None
    store.add([make("b", label=Label("unplaced", "set", "rule"))], "importer")
    assert store.assign("alice") == make("b")


@pytest.mark.parametrize(
    ("annotator", "shared", "told"), [("alice", 1.5, "shared is 1.5"), (" ", 0.0, "annotator is ' '")]
)
def test_an_impossible_assignment_is_refused(store: Store, annotator: str, shared: float, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        store.assign(annotator, shared)


def test_a_store_that_is_not_there_is_not_made_by_reading(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist; check the path, or import"):
        Store(str(tmp_path / "none.db"))
    assert not (tmp_path / "none.db").exists()


def test_a_file_that_is_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("words, " * 1000)
    with pytest.raises(ValueError, match=r"text\.db: file is not a database; the file is damaged or something else"):
        Store(str(tmp_path / "text.db"), create=True)
    connection = sqlite3.connect(tmp_path / "other.db")
    connection.execute("CREATE TABLE birds (name TEXT)")
    connection.close()
    with pytest.raises(ValueError, match=r"holds other tables \(birds\); name another database"):
        Store(str(tmp_path / "other.db"), create=True)
    (tmp_path / "empty.db").touch()
    with pytest.raises(ValueError, match="holds no label store"):
        Store(str(tmp_path / "empty.db"))


def test_a_store_of_another_version_is_refused(tmp_path: Path) -> None:
    place = tmp_path / "old.db"
    connection = sqlite3.connect(place)
    connection.execute("CREATE TABLE about (version INTEGER, at TEXT)")
    connection.execute("INSERT INTO about VALUES (7, '')")
    connection.commit()
    connection.close()
    with pytest.raises(ValueError, match="label store of version 7, this draftsmith reads versions 1 to 2"):
        Store(str(place))


def test_a_locked_store_is_told_and_nothing_is_written(store: Store, place: str, make: Callable[..., Answer]) -> None:
    other = sqlite3.connect(place, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(Unavailable, match=r"labels\.db: database is locked; another process has held it for long"):
        Store(place, patience_seconds=0.1)
    other.execute("ROLLBACK")
    other.execute("BEGIN IMMEDIATE")
    with Store(place, patience_seconds=0.1) as impatient, pytest.raises(Unavailable, match="nothing was written"):
        impatient.add([make("a")], "importer")
    other.execute("ROLLBACK")
    other.close()
    assert store.answers(unlabelled=True) == []


@pytest.mark.parametrize(
    ("place", "told"),
    [
        ("nosuchdb://host/labels", "nosuchdb"),
        (
            "postgresql+pg8000://me:secret@127.0.0.1:1/labels",
            "needs the Python package pg8000; run: .* -m pip install pg8000",
        ),
        ("://", "the store's URL cannot be read"),
    ],
)
def test_a_url_that_leads_nowhere_is_told_without_its_password(place: str, told: str) -> None:
    with pytest.raises(ValueError, match=told) as refusal:
        Store(place)
    assert "secret" not in str(refusal.value)


def test_a_url_and_a_path_open_the_same_store(place: str, make: Callable[..., Answer]) -> None:
    with Store(f"sqlite:///{place}", create=True) as store:
        store.add([make("a")], "importer")
    with Store(place) as store:
        assert store.answers(unlabelled=True) == [make("a")]


@pytest.mark.parametrize("dialect", ["postgresql", "mysql"])
def test_the_tables_can_be_made_in_other_databases(dialect: str) -> None:
    module = registry.load(dialect)
    for table in METADATA.sorted_tables:
        assert f"CREATE TABLE {table.name}" in str(CreateTable(table).compile(dialect=module()))


def test_opening_again_makes_no_table_anew(place: str, store: Store, make: Callable[..., Answer]) -> None:
    store.add([make("a")], "importer")
    Database(place, create=True).close()
    assert store.answers(unlabelled=True) == [make("a")]

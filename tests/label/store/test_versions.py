"""A store of an older version: it is read as it was, gets the new tables, and loses nothing."""

import sqlite3
from pathlib import Path

import pytest

from draftsmith.label.schema import Label, Tokens
from draftsmith.label.store.store import NotOpen, Store
from draftsmith.label.store.tables import METADATA

# As the first version wrote it: five answers, labels of a set, a rule and alice, one taken back, one answer given back.
VERSION_1 = Path(__file__).with_name("version_1.sql")


@pytest.fixture
def old(tmp_path: Path) -> str:
    place = str(tmp_path / "old.db")
    with sqlite3.connect(place) as connection:
        connection.executescript(VERSION_1.read_text(encoding="utf-8"))
    return place


def rows(place: str) -> dict[str, list[tuple[object, ...]]]:
    with sqlite3.connect(place) as connection:
        names = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        return {name: connection.execute(f"SELECT * FROM {name} ORDER BY 1").fetchall() for name in names}


def test_every_row_of_an_older_store_stays_as_it_was(old: str) -> None:
    before = rows(old)
    with Store(old) as store:
        answers = {(answer.id, answer.label and answer.label.labelled_by): answer for answer in store.answers(True)}
    after = rows(old)
    assert set(after) == set(METADATA.tables)
    assert [version for version, _ in after.pop("about")] == [1, 2]
    assert {name: after[name] for name in before if name != "about"} == {
        name: before[name] for name in before if name != "about"
    }
    assert set(answers) == {("a", "set"), ("b", "rule-1"), ("b", "alice"), ("c", None), ("d", None), ("e", "set")}
    assert answers["a", "set"].label == Label("wrong", "set", "person", (6, 11))
    assert answers["a", "set"].tokens == Tokens("t", ((0, 5), (5, 6), (6, 11)))
    assert answers["b", "rule-1"].label == Label("unplaced", "rule-1", "rule", note="it's")
    assert answers["b", "alice"].label == Label("wrong", "alice", "person", (4, 5))
    assert answers["e", "set"].label == Label("correct", "set", "person", None, (0, 1))


def test_an_imported_step_of_an_older_store_waits_to_be_refined(old: str) -> None:
    with Store(old) as store:
        assert store.num_waiting() == 3, "a's step, c and d"
        assert store.imported("a") == [Label("wrong", "set", "person", (6, 11))]
        assert store.assign("alice") == store.answer("a")
        assert store.assign("bob") == store.answer("c"), "who had it open has it still"
        store.annotate("a", Label("wrong", "alice", "person", (10, 11), replaces=("set",)), assigned=True)
        progress = store.progress("alice")
        assert (progress.num_labelled, progress.num_released, progress.num_waiting) == (2, 1, 1)
        with pytest.raises(NotOpen, match="c is not assigned to 'alice'"):
            store.release("c", "alice", "once more")


def test_the_new_tables_of_an_older_store_are_never_changed_either(old: str) -> None:
    Store(old).close()
    with sqlite3.connect(old) as connection:
        assert connection.execute("SELECT count(*) FROM steps").fetchone() == (1,)
        with pytest.raises(sqlite3.IntegrityError, match="rows of steps are never changed"):
            connection.execute("DELETE FROM steps")
    before = rows(old)
    Store(old).close()
    assert rows(old) == before, "a second opening changes nothing"

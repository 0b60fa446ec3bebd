"""All answers of a store, some hundred at a time: what one reading gives, in memory that does not grow, with no lock on others."""

import itertools
import sqlite3
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from draftsmith.label.schema import Answer, Label, Tokens
from draftsmith.label.store.records import BATCH
from draftsmith.label.store.store import Store

Make = Callable[..., Answer]
RIGHT = Label("correct", "set", "rule")


def several(make: Make, count: int, text: str = "ab\ncd") -> Iterator[Answer]:
    for number in range(count):
        answer = make(f"n{number}", text, Label("wrong", "set", "person", (0, 2)) if number % 2 else None)
        yield replace(answer, tokens=Tokens("t", ((0, 5),)), reference=str(number)) if number % 3 else answer


def test_a_stream_gives_each_label_that_stands_in_the_order_of_the_answers(store: Store, make: Make) -> None:
    count = 2 * BATCH + 7
    given = list(several(make, count))
    store.add(given, "importer")
    last = given[-2]
    assert last.label is not None
    mark = Label("wrong", "bob", "person", (1, 2), replaces=("set",))
    store.annotate(last.id, mark)
    store.annotate(given[0].id, RIGHT)
    store.undo("set")
    expected = [replace(given[0], label=None) if answer is given[0] else answer for answer in given]
    at = expected.index(last) + 1
    expected[at:at] = [replace(last, label=mark)]
    assert list(store.stream(unlabelled=True)) == expected
    assert list(store.stream()) == [answer for answer in expected if answer.label is not None]


def test_others_write_while_a_stream_is_read_and_what_they_add_does_not_count(
    store: Store, place: str, make: Make
) -> None:
    store.add(several(make, 2 * BATCH), "importer")
    before = list(store.stream(unlabelled=True))
    stream = store.stream(unlabelled=True)
    first = list(itertools.islice(stream, BATCH // 2))
    with Store(place, patience_seconds=0.1) as other:
        other.add([make("new", label=RIGHT)], "importer")
        other.annotate(before[-1].id, Label("correct", "alice", "person"))
    assert [*first, *stream] == before
    assert len(list(store.stream(unlabelled=True))) == len(before) + 2


def test_memory_does_not_grow_with_the_answers(tmp_path: Path, make: Make) -> None:
    peaks = []
    for count in (2 * BATCH, 8 * BATCH):
        with Store(str(tmp_path / f"{count}.db"), create=True) as store:
            store.add(several(make, count, "ab\n" * 300), "importer")
            sum(1 for _ in store.stream(unlabelled=True))  # what is kept once, such as compiled queries
            tracemalloc.start()
            assert sum(1 for _ in store.stream(unlabelled=True)) == count
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
    assert peaks[1] < 1.3 * peaks[0]


def test_a_first_addition_that_fails_leaves_no_store(place: str, make: Make) -> None:
    def broken() -> Iterator[Answer]:
        yield from (make(f"n{number}", "x" * 6000) for number in range(2 * BATCH))  # more than SQLite holds in memory
        raise ValueError("the file contradicts itself")

    with Store(place, create=True, with_first_rows=True) as store, pytest.raises(ValueError, match="contradicts"):
        store.add(broken(), "importer")
    assert list(Path(place).parent.iterdir()) == []
    with Store(place, create=True, with_first_rows=True) as store:
        assert store.add([make("a")], "importer").items == 1
        assert store.answers(unlabelled=True) == [make("a")]
    with Store(place, create=True, with_first_rows=True) as store:
        with pytest.raises(ValueError, match="contradicts"):
            store.add(broken(), "importer")
        assert store.answers(unlabelled=True) == [make("a")]


def test_an_interrupted_first_addition_leaves_no_store(place: str, make: Make) -> None:
    def interrupted() -> Iterator[Answer]:
        yield make("a")
        raise KeyboardInterrupt

    with Store(place, create=True, with_first_rows=True) as store, pytest.raises(KeyboardInterrupt):
        store.add(interrupted(), "importer")
    assert not Path(place).exists()


def test_no_answers_go_into_a_removed_file_when_another_lies_in_its_place(place: str, make: Make) -> None:
    with Store(place, create=True, with_first_rows=True) as store:
        Path(place).unlink()  # as a process does whose first addition fails
        with Store(place, create=True, with_first_rows=True) as other:
            other.add([make("a")], "importer")
        with pytest.raises(ValueError, match="was removed by another process that failed; try again"):
            store.add([make("b")], "importer")
        assert store.add([make("b")], "importer").items == 1
    with Store(place) as store:
        assert store.answers(unlabelled=True) == [make("a"), make("b")]


def test_a_file_that_another_process_is_about_to_fill_stays(place: str, make: Make) -> None:
    with Store(place, create=True, with_first_rows=True, patience_seconds=0.1) as store:
        other = sqlite3.connect(place, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(ValueError, match="nothing was written"):
            store.add([make("a")], "importer")
        assert Path(place).exists()
        other.execute("CREATE TABLE other (number INTEGER)")
        other.execute("COMMIT")
        other.close()
    assert Path(place).stat().st_size > 0

"""Commands that go through a whole store: the same files and counts as ever, in memory that does not grow with the answers."""

import json
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import pytest

from draftsmith import cli
from draftsmith.data.chats.messages import Message
from draftsmith.label.answer_rows import read_answers
from draftsmith.label.schema import Answer, Label
from draftsmith.label.store import reader, records
from draftsmith.label.store import store as store_module
from draftsmith.label.store.store import Store
from draftsmith.label.token_rows import read_rows

BATCH = 25
"""Answers in a batch of these tests. `label rows` tokenizes each answer, which takes milliseconds where memory is traced."""
SMALL, LARGE = 2 * BATCH, 12 * BATCH
TEXT = "Tom has 3.\n3 + 4 = 8" + " so it is 8" * 20


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """The store reads and writes few answers at a time, so that few answers are many batches."""
    for module in (reader, records, store_module):
        monkeypatch.setattr(module, "BATCH", BATCH)


def run(*words: object) -> int:
    return cli.main(["label", *map(str, words)])


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Stores of two sizes: two answers to each question, one right and one wrong."""
    folder, places = tmp_path_factory.mktemp("stores"), {}
    for count in (SMALL, LARGE):
        places[count] = folder / f"{count}.db"
        with Store(str(places[count]), create=True) as store:
            store.add((answer(number) for number in range(count)), "importer")
    return places


def answer(number: int) -> Answer:
    label = Label("wrong", "set", "person", (19, 20)) if number % 2 else Label("correct", "set", "person")
    messages = (Message(role="user", content=f"How many? {number // 2}"),)
    return Answer(f"n{number}", messages, TEXT, f"m{number % 2}", "MIT", "tests", label)


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(["export"], id="export"),
        pytest.param(["export", "--format", "label-studio", "--decided", "true"], id="label-studio"),
        pytest.param(["stats"], id="stats"),
        pytest.param(["rows"], id="rows"),
    ],
)
def test_memory_does_not_grow_with_the_answers(
    stores: dict[int, Path], tmp_path: Path, target: Path, words: list[str]
) -> None:
    options = {count: [*words, "--store", stores[count]] for count in (SMALL, LARGE)}
    for line in options.values():
        line += ["--out", tmp_path / "out"] if words[0] != "stats" else []
        line += ["--target", target] if words[0] == "rows" else []
    assert run(*options[LARGE]) == 0  # loads what is kept
    # A command that holds all answers takes 380 KB more for these 250.
    assert peak(options[LARGE]) < peak(options[SMALL]) + 150_000


def peak(words: Sequence[object]) -> int:
    """Bytes that a command holds at most."""
    tracemalloc.start()
    try:
        assert run(*words) == 0
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_each_command_counts_and_writes_all_answers(
    stores: dict[int, Path], tmp_path: Path, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place, half = stores[SMALL], SMALL // 2
    assert run("stats", "--store", place) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        f"{SMALL} answers to {half} questions, {SMALL} entries in the log: {half} correct, {half} wrong"
    )
    assert lines[1:] == [
        f"source tests (MIT): {half} correct, {half} wrong",
        f"model m0: {half} correct",
        f"model m1: {half} wrong",
        f"labelled by set (person): {half} correct, {half} wrong",
    ]
    assert run("export", "--store", place, "--out", tmp_path / "a.jsonl") == 0
    assert f"{SMALL} lines of {SMALL} answers" in capsys.readouterr().out
    assert list(read_answers(tmp_path / "a.jsonl")) == [answer(number) for number in range(SMALL)]
    assert run("export", "--store", place, "--out", tmp_path / "a.json", "--format", "label-studio") == 0
    tasks = json.loads((tmp_path / "a.json").read_text())
    assert [task["data"]["id"] for task in tasks] == [f"n{number}" for number in range(SMALL)]
    capsys.readouterr()
    assert run("rows", "--store", place, "--target", target, "--out", tmp_path / "rows.jsonl") == 0
    assert f"{SMALL} rows of {half} questions" in capsys.readouterr().out
    assert [row.id for row in read_rows(tmp_path / "rows.jsonl")] == [f"n{number}" for number in range(SMALL)]


def test_several_labels_of_one_answer_are_one_row_and_one_task(tmp_path: Path, target: Path) -> None:
    place, other = tmp_path / "labels.db", Label("wrong", "alice", "person", (19, 20), replaces=("set",))
    with Store(str(place), create=True) as store:
        store.add([answer(0), answer(1)], "importer")
        store.annotate("n0", other)
    assert run("rows", "--store", place, "--target", target, "--out", tmp_path / "rows.jsonl") == 0
    assert [row.id for row in read_rows(tmp_path / "rows.jsonl")] == ["n0", "n1"]
    assert run("export", "--store", place, "--out", tmp_path / "a.json", "--format", "label-studio") == 0
    assert [len(task["annotations"]) for task in json.loads((tmp_path / "a.json").read_text())] == [2, 1]
    assert run("export", "--store", place, "--out", tmp_path / "a.jsonl", "--decided", "true") == 0
    assert [line.label for line in read_answers(tmp_path / "a.jsonl")] == [other, answer(1).label]

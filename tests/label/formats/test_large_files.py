"""Files of many rows: read row by row, with the answers of a file that is read as a whole."""

import json
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from labelled_files import read_labelled

from draftsmith.label.formats import importers
from draftsmith.label.formats.importers import LabelledFile
from draftsmith.label.formats.repeats import Repeats
from draftsmith.label.schema import Answer, Label
from draftsmith.label.store.label_source import LabelSource

ORIGIN = LabelSource("in", "them", "MIT")
NUM_ROWS = 20_000


def rated(number: int) -> dict[str, Any]:
    return {"problem": f"q{number}", "steps": ["a", "b"], "ratings": [1, -1 if number % 2 else 0], "tail": ""}


def numbered(number: int) -> dict[str, Any]:
    return {"problem": f"q{number}", "steps": ["a", "b", "c"], "label": number % 4 - 1}


@pytest.mark.parametrize("row", [rated, numbered])
def test_of_twenty_thousand_rows_a_handful_is_held_at_a_time(
    tmp_path: Path, row: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Row(dict[str, Any]):
        __hash__ = object.__hash__  # type: ignore[assignment]

    rows: weakref.WeakSet[Row] = weakref.WeakSet()
    answers: weakref.WeakSet[Answer] = weakref.WeakSet()

    class Held(Answer):
        __hash__ = object.__hash__

    made = LabelSource.answer

    def held_answer(*args: Any, **named: Any) -> Answer:
        answer = Held(**vars(made(*args, **named)))
        answers.add(answer)
        return answer

    monkeypatch.setattr(LabelSource, "answer", held_answer)

    def generated(*args: Any, **named: Any) -> Iterator[tuple[str, Any]]:
        for number in range(NUM_ROWS):
            held = Row(row(number))
            rows.add(held)
            yield f"in.jsonl:{number + 1}", held
            del held

    monkeypatch.setattr(importers, "read_rows", generated)
    (tmp_path / "in.jsonl").touch()
    most_rows = most_answers = count = 0
    left_out: list[str] = []
    for answer in LabelledFile(tmp_path / "in.jsonl", "auto", ORIGIN).answers(left_out.append):
        assert isinstance(answer, Held)
        most_rows, most_answers, count = max(most_rows, len(rows)), max(most_answers, len(answers)), count + 1
    assert (count, left_out) == (NUM_ROWS, [])
    assert most_rows <= 4
    assert 1 <= most_answers <= 4


def test_answers_come_before_the_file_has_been_read_to_its_end(tmp_path: Path) -> None:
    """Its first answer is there although a later line could not be read: nothing waits for all."""
    file = tmp_path / "in.jsonl"
    file.write_text(json.dumps(rated(0)) + "\n" + "{broken\n" + json.dumps(rated(1)) + "\n")
    left_out: list[str] = []
    answers = LabelledFile(file, "prm800k", ORIGIN).answers(left_out.append)
    assert next(answers).messages[0]["content"] == "q0"
    assert left_out == []
    assert next(answers).messages[0]["content"] == "q1"
    assert left_out[0].startswith(f"{file}:2: not valid JSON")


def test_rows_are_left_out_in_the_order_of_the_file_whatever_the_reason(tmp_path: Path) -> None:
    file = tmp_path / "in.jsonl"
    lines = [rated(0) | {"ratings": [None, None]}, "{", rated(1) | {"ratings": [1]}, rated(2)]
    file.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    reasons = read_labelled(file, "auto", ORIGIN).left_out
    assert [reason.split(": ")[0] for reason in reasons] == [f"{file}:{line}" for line in (1, 2, 3)]
    assert [reason.split(": ")[1] for reason in reasons[:2]] == ["no step is rated", "not valid JSON"]


def test_a_full_temporary_folder_is_named_with_what_to_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SQLITE_TMPDIR", str(tmp_path))
    answer = ORIGIN.answer("q", "a", ORIGIN.label("person", None), "row")
    with Repeats() as repeats:
        repeats.execute("PRAGMA max_page_count = 3")
        numbered_answers = (replace(answer, id=f"a{number}") for number in range(10_000))
        with pytest.raises(ValueError, match="SQLITE_TMPDIR or TMPDIR") as caught:
            list(map(repeats.agreeing, numbered_answers))
    assert str(tmp_path) in str(caught.value)
    assert "is full" in str(caught.value)


Said = tuple[int, int, int, int | None]  # which answer, who labelled, what they said, and the reference


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 1), st.integers(0, 2), st.integers(0, 2) | st.none())))
def test_repeats_are_counted_as_if_all_answers_were_held(said: list[Said]) -> None:
    labels: dict[tuple[int, int], int] = {}
    references: dict[int, int] = {}
    num_labels = num_references = 0
    with Repeats() as repeats:
        for answer, person, label, reference in said:
            num_labels += labels.get((answer, person), label) != label
            labels[answer, person] = label
            if reference is not None:
                num_references += references.setdefault(answer, reference) != reference
            given_reference = None if reference is None else str(reference)
            agreeing = repeats.agreeing(
                Answer(
                    f"a{answer}", ({"role": "user", "content": "q"},), "abc", "m", "MIT", "s",
                    Label("wrong", f"p{person}", "person", (label, 3)), None, given_reference,
                )
            )  # fmt: skip
            assert agreeing.reference == (None if reference is None else str(references[answer]))
        notes = repeats.notes()
    assert [int(note.split()[0]) for note in notes] == [count for count in (num_labels, num_references) if count]

"""Rows with columns of other sets beside their own: which format reads them, and which step is wrong."""

import json
from pathlib import Path
from typing import Any

import pytest
from labelled_files import Imported, read_labelled

from draftsmith.label.formats.importers import detect
from draftsmith.label.store.label_source import LabelSource

STEPS = ["a", "b", "c", "d"]
BENCH = {"problem": "q", "steps": STEPS, "label": 1}


def read(tmp_path: Path, *rows: Any) -> Imported:
    file = tmp_path / "in.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_labelled(file, "auto", LabelSource("in", "them", "MIT"))


def wrong_steps(imported: Imported) -> list[str | None]:
    """The step that each answer's label calls wrong; None where there is none."""
    labels = [(answer, answer.label and answer.label.error) for answer in imported.answers]
    return [None if error is None else answer.response[slice(*error)] for answer, error in labels]


@pytest.mark.parametrize(
    "column",
    [
        {"ratings": [5, 4, 3]},
        {"ratings": [1, -1, None, None]},
        {"labels": ["algebra", "easy"]},
        {"labels": [1, 1, 1, 0]},
        {"step_labels": [0.4]},
        {"wrong_steps": [1]},
        {"error_steps": [2]},
    ],
)
def test_a_whole_number_in_label_is_processbenchs_whatever_lies_beside_it(
    tmp_path: Path, column: dict[str, Any]
) -> None:
    imported = read(tmp_path, BENCH | column, BENCH | column | {"problem": "r", "label": -1})
    assert (imported.format, imported.left_out) == ("processbench", [])
    assert wrong_steps(imported) == ["b", None]


def test_steps_that_hold_their_own_labels_are_read_by_them() -> None:
    inside = [{"text": step, "label": 1} for step in STEPS]
    assert detect({"question": "q", "steps": inside, "label": 0}, "here") == "step-labels"


def test_steps_and_ratings_are_prm800ks_whatever_a_label_says(tmp_path: Path) -> None:
    row = {"problem": "q", "steps": STEPS, "ratings": [1, 1, -1, None], "label": "algebra"}
    imported = read(tmp_path, row)
    assert (imported.format, wrong_steps(imported)) == ("prm800k", ["c"])


def test_a_blank_first_step_that_alone_is_rated_is_no_rated_step(tmp_path: Path) -> None:
    rows = [{"question": "q", "steps": ["", "b"], "labels": labels} for labels in ([1, None], [1, 1])]
    imported = read(tmp_path, *rows)
    assert len(imported.answers) == 1
    assert [reason.split(": ", 1)[1] for reason in imported.left_out] == ["no step is rated"]

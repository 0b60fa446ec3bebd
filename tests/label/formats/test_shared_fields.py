"""Fields that two formats share: the whole file decides what they mean, or import stops; notes name what it does not read."""

import json
from pathlib import Path
from typing import Any

import pytest
from labelled_files import Imported, read_labelled

from draftsmith.label.formats.counting import FirstStep
from draftsmith.label.formats.detection import Format
from draftsmith.label.store.label_source import LabelSource

STEPS = ["a", "b", "c"]
FIRSTS: list[tuple[FirstStep, int]] = [("zero", 0), ("one", 1)]
ALL, B, A, C = [1, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 0]


def read(
    tmp_path: Path, *rows: dict[str, Any], row_format: Format = "auto", first_step: FirstStep = "auto"
) -> Imported:
    file = tmp_path / "in.jsonl"
    asked = [{name: f"{value}{at}" if name in ("problem", "question") else value for name, value in row.items()}
             for at, row in enumerate(rows)]  # fmt: skip
    file.write_text("".join(json.dumps(row) + "\n" for row in asked))
    return read_labelled(file, row_format, LabelSource("in", "them", "MIT"), first_step)


def wrong(imported: Imported) -> list[str | None]:
    """What each answer's label calls wrong: a step, None, or `unplaced`."""
    labels = [(answer.response, answer.label) for answer in imported.answers if answer.label is not None]
    return [
        response[slice(*label.error)] if label.error else "unplaced" if label.verdict == "unplaced" else None
        for response, label in labels
    ]


def beside(*pairs: tuple[int, list[int]], name: str = "labels") -> list[dict[str, Any]]:
    """Rows of ProcessBench's shape with a whole number in `label` and a list beside it."""
    return [{"problem": "q", "steps": STEPS, "label": label, name: listed} for label, listed in pairs]


@pytest.mark.parametrize("name", ["labels", "step_labels", "ratings", "human_labels"])
@pytest.mark.parametrize(
    "pairs",
    [
        pytest.param([(1, ALL), (0, B), (0, A)], id="1 is right"),
        pytest.param([(0, ALL), (1, B), (1, A)], id="1 is wrong"),
    ],
)
def test_a_verdict_beside_labels_of_steps_is_no_number_of_a_step(
    tmp_path: Path, name: str, pairs: list[tuple[int, list[int]]]
) -> None:
    rows = beside(*pairs, name=name)
    imported = read(tmp_path, *rows)
    assert (imported.format, wrong(imported)) == ("step-labels", [None, "b", "a"])
    assert f"label is a verdict on the whole answer, which agrees with {name} in 3 rows" in imported.notes[0]
    assert "--format processbench" in imported.notes[0]
    assert read(tmp_path, *rows, row_format="processbench").format == "processbench"


@pytest.mark.parametrize(
    ("pairs", "first", "steps"),
    [
        pytest.param([(-1, ALL), (1, B), (0, A)], 0, [None, "b", "a"], id="from 0"),
        pytest.param([(0, ALL), (2, B), (1, A), (3, C)], 1, [None, "b", "a", "c"], id="from 1, 0 is none"),
        pytest.param([(2, B), (1, A)], 1, ["b", "a"], id="from 1, and no number says so"),
        pytest.param([(-1, ALL), (2, B)], 1, [None, "b"], id="from 1, -1 is none"),
    ],
)
def test_labels_of_steps_say_from_which_number_a_file_counts(
    tmp_path: Path, pairs: list[tuple[int, list[int]]], first: int, steps: list[str | None]
) -> None:
    imported = read(tmp_path, *beside(*pairs))
    assert (imported.format, wrong(imported)) == ("processbench", steps)
    assert imported.notes[0].startswith(f"steps are counted from {first}: label and labels then agree in")


def test_a_number_that_may_be_a_verdict_is_refused_and_either_format_reads_it(tmp_path: Path) -> None:
    rows = beside((1, ALL), (1, B), (0, ALL), (0, A), (0, C))
    with pytest.raises(ValueError, match=r"fits the number in 2 and the verdict in 3 of 5 rows; say --format processb"):
        read(tmp_path, *rows)
    assert wrong(read(tmp_path, *rows, row_format="processbench")) == ["b", "b", "a", "a", "a"]
    assert wrong(read(tmp_path, *rows, row_format="step-labels")) == [None, "b", None, "a", "c"]


@pytest.mark.parametrize(
    ("pairs", "counts"),
    [
        pytest.param([(2, B), (1, A), (3, C)] * 4 + [(1, C)], "in 0 of 13 rows .* and in 12 if", id="a slip from 1"),
        pytest.param([(2, B), (1, A), (-1, ALL), (1, B)], "in 2 of 4 rows .* and in 3 if", id="a slip, and -1 is none"),
    ],
)
def test_numbers_that_agree_with_the_lists_neither_way_stop_the_import_until_their_first_step_is_given(
    tmp_path: Path, pairs: list[tuple[int, list[int]]], counts: str
) -> None:
    rows = beside(*pairs)
    with pytest.raises(ValueError, match=f"first wrong step {counts} from 1; .*--first_step zero or one"):
        read(tmp_path, *rows)
    for first_step, first in FIRSTS:
        chosen = read(tmp_path, *rows, first_step=first_step)
        assert chosen.format == "processbench"
        meant = [(label, label - first) for label, _ in pairs]
        assert wrong(chosen) == [None if label < 0 else STEPS[index] for label, index in meant if index < len(STEPS)]


def test_a_slip_in_a_file_that_counts_from_0_does_not_stop_the_import(tmp_path: Path) -> None:
    imported = read(tmp_path, *beside((1, B), (0, A), (2, C), (-1, ALL), (2, A)))
    assert (imported.format, wrong(imported)) == ("processbench", ["b", "a", "c", None, "c"])


def test_who_gives_the_first_step_says_that_labels_are_numbers(tmp_path: Path) -> None:
    rows = beside((1, ALL), (1, ALL), (1, B))
    assert read(tmp_path, *beside((1, ALL), (0, B))).format == "step-labels"
    imported = read(tmp_path, *rows, first_step="one")
    assert (imported.format, wrong(imported)) == ("processbench", ["a", "a", "a"])


def test_in_a_list_with_a_minus_0_is_neutral_when_lists_are_compared(tmp_path: Path) -> None:
    row = {"question": "q", "steps": STEPS, "labels": [1, 0, -1]}
    imported = read(tmp_path, row | {"step_labels": [1, 1, 0]}, row | {"step_labels": [1, 0, 0]})
    assert wrong(imported) == ["c"]
    assert len(imported.left_out) == 1
    assert ":2: labels is [1, 0, -1]; step_labels says something else" in imported.left_out[0]


@pytest.mark.parametrize("names", [("first_error_step", "first_wrong_step"), ("first_wrong_step", "first_error_step")])
def test_two_fields_that_both_say_none_agree_whatever_their_order(tmp_path: Path, names: tuple[str, str]) -> None:
    row = {"question": "q", "model_output_steps": STEPS}
    pairs = [(-1, 0), (0, "N/A"), (-1, "N/A"), (None, 2), (2, 2), (2, "N/A"), (0, 2)]
    imported = read(tmp_path, *[row | dict(zip(names, pair, strict=True)) for pair in pairs], first_step="one")
    assert wrong(imported) == [None, None, None, "b", "b"]
    assert len(imported.left_out) == 2
    assert all("names other steps" in reason for reason in imported.left_out)


def test_what_another_format_would_read_is_said_with_its_rows(tmp_path: Path) -> None:
    imported = read(tmp_path, *beside((2, B), (-1, ALL), (2, C)))
    assert (imported.format, wrong(imported)) == ("processbench", ["c", None, "c"])
    assert "read as step-labels, 1 row would get another label" in imported.notes[-1]
    assert "--format step-labels changes that" in imported.notes[-1]
    numbers = {"question": "q", "steps": STEPS, "first_error_step": 2, "label": 0}
    imported = read(tmp_path, numbers, numbers | {"label": 1})
    assert (imported.format, wrong(imported)) == ("stepwise", ["b", "b"])
    assert "read as processbench, 1 row would get another label" in imported.notes[-1]


def test_where_formats_agree_nothing_is_said_of_them(tmp_path: Path) -> None:
    rows = [row | {"ratings": [1, 1, -1]} for row in beside((2, C), (2, C))]
    assert [note.split(":")[0] for note in read(tmp_path, *rows).notes] == ["steps are counted from 0"]


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("field", ["first_error_step", "mistake_index"])
def test_lists_of_labels_show_from_which_number_a_first_error_beside_them_counts(
    tmp_path: Path, field: str, index: int
) -> None:
    pairs = [(None, ALL), (0, A), (1, B), (1, B)]
    rows = [{"question": "q", "steps": STEPS, field: None if first is None else first + index, "labels": listed}
            for first, listed in pairs]  # fmt: skip
    imported = read(tmp_path, *rows)
    assert wrong(imported) == [None, "a", "b", "b"]
    assert imported.notes[0].startswith(f"steps are counted from {index}: the number and labels then agree in 4 rows")
    chosen = read(tmp_path, *rows[1:], first_step="zero" if index else "one")
    assert wrong(chosen) != wrong(read(tmp_path, *rows[1:]))


def test_ratings_of_1_and_0_are_right_and_wrong_unless_prm800ks_own_fields_lie_beside_them(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"question": "q", "steps": STEPS, "ratings": listed} for listed in (C, ALL)]
    imported = read(tmp_path, *rows)
    assert (imported.format, wrong(imported)) == ("step-labels", ["c", None])
    assert "--format prm800k reads 0 as neutral" in imported.notes[0]
    with_minus = read(tmp_path, *rows, rows[0] | {"ratings": [1, 0, -1]})
    assert (with_minus.format, wrong(with_minus)) == ("prm800k", [None, None, "c"])
    own = read(tmp_path, *[row | {"tail": ""} for row in rows])
    assert (own.format, wrong(own)) == ("prm800k", [None, None])
    assert "read as step-labels, 1 row would get another label" in own.notes[0]


def test_lists_that_say_something_else_of_the_steps_are_left_out_and_lists_of_other_things_do_not_count(
    tmp_path: Path,
) -> None:
    row = {"question": "q", "steps": STEPS, "labels": B}
    other = ["+", "+", "-"]
    imported = read(tmp_path, row | {"step_labels": ["+", "-", "-"]}, row | {"step_labels": other})
    assert wrong(imported) == ["b"]
    assert imported.left_out[0].endswith(
        ":2: labels is [1, 0, 0]; step_labels says something else of the steps; take out the one that does not count"
    )
    assert wrong(read(tmp_path, row | {"labels": ["algebra"], "step_labels": other})) == ["c"]
    inner = [{"text": step, "label": label} for step, label in zip(STEPS, B, strict=True)]
    assert "steps says something else" in read(tmp_path, row, row | {"steps": inner, "labels": C}).left_out[0]


def test_two_numbers_of_the_first_wrong_step_have_to_agree(tmp_path: Path) -> None:
    row = {"question": "q", "model_output_steps": STEPS, "first_error_step": 2, "first_wrong_step": 2}
    imported = read(tmp_path, row, row | {"first_wrong_step": 3}, row | {"first_wrong_step": "see below"})
    assert wrong(imported) == ["b", "b"]
    assert ":2: first_error_step is 2; first_wrong_step is 3, and names other steps" in imported.left_out[0]


def test_import_stops_where_more_rows_contradict_themselves_than_name_a_wrong_step(tmp_path: Path) -> None:
    """Else the right answers alone would be taken, which contradict nothing."""
    steps = {"question": "q", "model_output_steps": STEPS}
    pairs = [("N/A", -1), (3, 3), (2, 1), (3, 2)]
    numbers = [steps | {"first_error_step": first, "first_wrong_step": other} for first, other in pairs]
    with pytest.raises(
        ValueError, match=r"2 rows of .* contradict themselves, more than the 1 that .*:3: first_error_step is 2"
    ):
        read(tmp_path, *numbers)
    assert wrong(read(tmp_path, *numbers, numbers[1])) == [None, "c", "c"]
    verdicts = [steps | {"first_error_step": at, "solution_correctness": "correct"} for at in (3, 2)]
    with pytest.raises(ValueError, match=r"2 rows .* more than the 0 .*solution_correctness is 'correct'"):
        read(tmp_path, steps | {"first_error_step": "N/A"}, *verdicts)
    lists = [{"question": "q", "steps": STEPS, "labels": B, "ratings": listed} for listed in (C, A)]
    with pytest.raises(ValueError, match=r"2 rows .* more than the 0 .*ratings says something else"):
        read(
            tmp_path, {"question": "q", "steps": STEPS, "labels": ALL, "ratings": ALL}, *lists, row_format="step-labels"
        )


def test_lists_that_agree_with_0_as_neutral_are_left_out_and_do_not_stop_the_import(tmp_path: Path) -> None:
    """That 0 is neutral in a list, another row says."""
    row = {"question": "q", "steps": STEPS}
    neutral = row | {"labels": ALL, "step_ratings": [1, 0, 1]}
    placed = row | {"labels": C, "step_ratings": [1, 1, -1]}
    imported = read(tmp_path, neutral, placed, neutral)
    assert (imported.format, wrong(imported)) == ("step-labels", ["c"])
    assert [line.split("; ")[1] for line in imported.left_out] == ["step_ratings says something else of the steps"] * 2
    inner = [{"text": step, "rating": rating} for step, rating in zip(STEPS, (1, 1, -1), strict=True)]
    of_steps = row | {"steps": inner, "labels": C}
    inner_neutral = of_steps | {"steps": [inner[0], inner[1] | {"rating": 0}, inner[0]], "labels": ALL}
    assert wrong(read(tmp_path, inner_neutral, of_steps, inner_neutral)) == ["c"]
    # The -1 is in another list than the 0, and speaks of that one alone.
    signs = row | {"step_ratings": ["+", "+", "+"], "labels": B}
    with pytest.raises(ValueError, match=r"2 rows .* more than the 1 that name a wrong step"):
        read(tmp_path, signs, placed, signs)


def test_steps_in_one_text_with_a_mark_behind_each_are_cut_there(tmp_path: Path) -> None:
    for mark in ("\n\n\n\n\n", " \u043a\u0438\n"):
        row = {"question": "q", "process": f"a{mark}b{mark}c{mark}", "label": ["+", "-", "-"]}
        imported = read(tmp_path, row)
        assert (imported.format, wrong(imported)) == ("step-labels", ["b"])


def test_where_sections_begin_is_no_text_of_a_step(tmp_path: Path) -> None:
    row = {
        "question": "q",
        "sections": [{"begin": 0}, {"begin": 4}],
        "sections_content": "section1: a\nsection2: b",
        "reason_error_section_numbers": [2],
    }
    assert wrong(read(tmp_path, row)) == ["b"]


@pytest.mark.parametrize(
    "row",
    [
        pytest.param({"instruction": "q", "response": "a", "task": "Math"}, id="UltraInteract"),
        pytest.param({"question": "q", "answer": "7", "response": "a", "label": False}, id="CriticBench"),
        pytest.param({"question": "q", "step_idx": 1, "step": "a", "evidence": "b"}, id="a step without a label"),
    ],
)
def test_sets_that_mark_no_step_of_an_answer_are_refused_by_name(tmp_path: Path, row: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"no known format has the fields \[.*\]; name one with --format"):
        read(tmp_path, row)

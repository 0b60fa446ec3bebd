"""Rows of other shapes: answers inside objects, several annotators, a row for each step, pictures; each label on its step."""

import csv
import json
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from labelled_files import Imported, read_labelled

from draftsmith.label.answer_rows import write_answers
from draftsmith.label.formats.detection import Format
from draftsmith.label.formats.label_studio import write_tasks
from draftsmith.label.formats.row_shapes import unfolded
from draftsmith.label.schema import Answer
from draftsmith.label.store.label_source import LabelSource
from draftsmith.label.store.store import Store

STEPS = ["Take 3.", "So 3 + 4 = 8.", "It is 8."]
QUESTION = {"question": "How many?"}
VISUAL = {
    "image": ["images/1.png", "images/2.png"],
    "question": "How many are red?",
    "answer": "7",
    "response": {"steps": STEPS, "process_correctness": [1, 0, -1]},
    "policy_model": "some-vl",
    "data_source": "set",
}


def read(tmp_path: Path, *rows: Any, row_format: Format = "auto") -> Imported:
    file = tmp_path / "in.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_file(file, row_format)


def read_file(file: Path, row_format: Format = "auto") -> Imported:
    return read_labelled(file, row_format, LabelSource("in", "set", "MIT"))


def said(answer: Answer) -> str:
    """The text that an answer's label calls wrong; else its verdict, and what of the text was checked."""
    label = answer.label
    assert label is not None
    if label.error is not None:
        return answer.response[slice(*label.error)]
    return label.verdict if label.checked is None else f"{label.verdict}: {answer.response[slice(*label.checked)]}"


def labels(imported: Imported) -> list[str]:
    assert imported.left_out == []
    return [said(answer) for answer in imported.answers]


def by_person(imported: Imported) -> dict[str, str]:
    assert imported.left_out == []
    return {answer.label.labelled_by: said(answer) for answer in imported.answers if answer.label is not None}


# ---- answers inside objects ---------------------------------------------------------------------------------------------


def test_a_visual_answer_keeps_its_pictures_as_parts_and_its_0_is_neutral(tmp_path: Path) -> None:
    neutral = VISUAL | {"response": {"steps": STEPS, "process_correctness": [1, 0, 1]}}
    imported = read(tmp_path, VISUAL, neutral)
    assert (imported.format, labels(imported)) == ("step-labels", [STEPS[2], "correct"])
    answer = imported.answers[0]
    assert (answer.model, answer.reference) == ("some-vl", "7")
    pictures = [{"type": "image", "image": path} for path in VISUAL["image"]]
    text = {"type": "text", "text": "How many are red?"}
    assert answer.messages == ({"role": "user", "content": "How many are red?", "parts": [*pictures, text]},)
    assert labels(read(tmp_path, neutral)) == ["correct"], "0 is neutral in this field, whatever else the file has"


def test_pictures_pass_through_the_store_and_every_export(tmp_path: Path) -> None:
    answers = read(tmp_path, VISUAL).answers
    write_answers(tmp_path / "out.jsonl", answers)
    write_tasks(tmp_path / "tasks.json", answers)
    assert read_file(tmp_path / "out.jsonl").answers == answers
    assert read_file(tmp_path / "tasks.json").answers == answers
    [line] = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert [part["type"] for part in line["messages"][0]["content"]] == ["image", "image", "text"]
    with Store(str(tmp_path / "labels.db"), create=True) as store:
        store.add(answers, "me")
        assert store.answers() == answers


def test_other_pictures_make_another_question_and_none_makes_none(tmp_path: Path) -> None:
    rows = [VISUAL | {"image": image} for image in ("images/1.png", ["images/1.png"], "images/3.png", None, [], "")]
    answers = read(tmp_path, *rows).answers
    assert [answer.question() for answer in answers[:2]] == [answers[0].question()] * 2
    assert len({answer.id for answer in answers}) == 3
    assert ["parts" in answer.messages[0] for answer in answers] == [True] * 3 + [False] * 3


@pytest.mark.parametrize("flag", [False, True, [False]])
def test_a_flag_for_pictures_is_no_picture_and_costs_no_row(tmp_path: Path, flag: Any) -> None:
    imported = read(tmp_path, VISUAL | {"image": flag})
    assert labels(imported) == [STEPS[2]]
    assert "parts" not in imported.answers[0].messages[0]


def test_a_picture_of_bytes_alone_is_left_out_with_a_remedy(tmp_path: Path) -> None:
    rows = [VISUAL | {"image": {"bytes": b"\x89PNG", "path": path}} for path in ("images/1.png", None)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "in.parquet")
    imported = read_file(tmp_path / "in.parquet")
    assert imported.answers[0].messages[0]["parts"][0] == {"type": "image", "image": "images/1.png"}
    assert len(imported.answers) == 1
    assert "a picture, sound or video is a path or an address; write it into a file" in imported.left_out[0]


@pytest.mark.parametrize("name", ["response", "solution", "answer", "output"])
def test_steps_and_labels_inside_an_object_are_read_whatever_its_name(tmp_path: Path, name: str) -> None:
    inner = {"steps": STEPS, "labels": [1, 0, 0]}
    assert labels(read(tmp_path, QUESTION | {name: inner})) == [STEPS[1]]
    with_number = QUESTION | {name: {"steps": STEPS, "first_error_step": 2}, "model": "m"}
    imported = read(tmp_path, with_number)
    assert (imported.format, labels(imported), imported.answers[0].model) == ("stepwise", [STEPS[1]], "m")


def test_several_answers_of_a_row_are_several_answers(tmp_path: Path) -> None:
    answers = [{"steps": STEPS, "labels": [1, 0, 0], "model": "a"}, {"steps": ["7"], "labels": [1], "model": "b"}]
    imported = read(tmp_path, QUESTION | {"solutions": answers})
    assert labels(imported) == [STEPS[1], "correct"]
    assert [answer.model for answer in imported.answers] == ["a", "b"]


def test_tables_hold_the_objects_too(tmp_path: Path) -> None:
    expected = read(tmp_path, VISUAL).answers
    with open(tmp_path / "in.csv", "w", newline="") as file:
        table = csv.DictWriter(file, list(VISUAL))
        table.writeheader()
        table.writerow({name: value if isinstance(value, str) else json.dumps(value) for name, value in VISUAL.items()})
    pq.write_table(pa.Table.from_pylist([VISUAL]), tmp_path / "in.parquet")
    (tmp_path / "in.json").write_text(json.dumps([VISUAL]))
    for name in ("in.csv", "in.parquet", "in.json"):
        assert read_file(tmp_path / name).answers == expected


PROBLEM = {"problem": "How many?", "generator": "some-lm"}
OTHER_STEPS = {"steps": ["x", "y", "z"]}


@pytest.mark.parametrize(
    "beside",
    [
        pytest.param({"label": 1, "solution": OTHER_STEPS}, id="a reference beside ProcessBench's steps"),
        pytest.param({"label": 1, "solutions": [OTHER_STEPS, OTHER_STEPS]}, id="several references"),
        pytest.param({"labels": [1, 0, 0], "response": OTHER_STEPS}, id="a response beside labels"),
        pytest.param({"labels": [1, 0, 0], "response": {**OTHER_STEPS, "labels": [0, 0, 0]}}, id="a labelled response"),
        pytest.param({"ratings": [1, -1, 0], "tail": "t", "answer": OTHER_STEPS}, id="an answer beside PRM800K's steps"),
        pytest.param({"mistake_index": 1, "output": {"solution_steps": ["x"], "labels": [0]}}, id="other names of both"),
    ],
)  # fmt: skip
def test_steps_inside_an_object_do_not_replace_those_of_the_row(tmp_path: Path, beside: dict[str, Any]) -> None:
    imported = read(tmp_path, PROBLEM | {"steps": STEPS} | beside)
    assert labels(imported) == [STEPS[1]]
    assert imported.answers[0].response.startswith("\n".join(STEPS))


def test_labelled_steps_inside_an_object_count_beside_a_list_without_labels(tmp_path: Path) -> None:
    inner = {"solution_steps": STEPS, "labels": [1, 0, 0]}
    assert labels(read(tmp_path, QUESTION | {"steps": ["x", "y", "z"], "response": inner})) == [STEPS[1]]


def test_a_label_outside_several_answers_is_that_of_none(tmp_path: Path) -> None:
    row = QUESTION | {"labels": [1, 0, 0], "solutions": [{"steps": STEPS}, OTHER_STEPS]}
    good = QUESTION | {"steps": STEPS, "labels": [1, 1, 0]}
    imported = read(tmp_path, good, row)
    assert [said(answer) for answer in imported.answers] == [STEPS[2]]
    assert len(imported.left_out) == 1
    assert labels(read(tmp_path, row | {"solutions": [{"steps": STEPS}]})) == [STEPS[1]], "there is one answer"


# ---- several annotators -------------------------------------------------------------------------------------------------


def test_each_annotator_of_a_row_gives_a_label_under_their_own_name(tmp_path: Path) -> None:
    row = QUESTION | {"steps": STEPS}
    named = [{"annotator": "ann", "labels": [1, 0, 0]}, {"annotator_id": 7, "labels": [1, 1, 0]}]
    imported = read(tmp_path, row | {"annotations": named})
    assert by_person(imported) == {"set:ann": STEPS[1], "set:7": STEPS[2]}
    assert len({answer.id for answer in imported.answers}) == 1
    unnamed = [{"labels": [1, 0, 0]}, {"labels": [1, 1, 1]}]
    assert by_person(read(tmp_path, row | {"annotations": unnamed})) == {"set:1": STEPS[1], "set:2": "correct"}
    numbers = [{"annotator": "ann", "first_error_step": 2}, {"annotator": "bob", "first_error_step": None}]
    assert by_person(read(tmp_path, row | {"annotations": numbers})) == {"set:ann": STEPS[1], "set:bob": "correct"}


def test_annotations_that_are_no_labels_of_steps_leave_the_rows_own_label(tmp_path: Path) -> None:
    row = PROBLEM | {"steps": STEPS, "label": 1, "annotations": [{"label": "algebra"}]}
    assert by_person(read(tmp_path, row, row | {"problem": "q", "label": -1})) == {"set": "correct"}
    assert labels(read(tmp_path, row)) == [STEPS[1]]


def test_the_rows_own_label_stays_beside_those_of_its_annotators(tmp_path: Path) -> None:
    row = PROBLEM | {"steps": STEPS, "label": -1, "annotations": [{"label": 1}, {"annotator": "ann", "label": 2}]}
    assert by_person(read(tmp_path, row)) == {"set": "correct", "set:1": STEPS[1], "set:ann": STEPS[2]}
    inside = [{"text": text, "label": label} for text, label in zip(STEPS, (1, 1, 0), strict=True)]
    rated = QUESTION | {"steps": inside, "annotations": [{"labels": [1, 0, 0]}, {"labels": [1, 1, 1]}]}
    assert by_person(read(tmp_path, rated)) == {"set": STEPS[2], "set:1": STEPS[1], "set:2": "correct"}


def test_one_annotators_slip_costs_no_other_label(tmp_path: Path) -> None:
    row = QUESTION | {"steps": STEPS, "annotations": [{"labels": [1, 0, 0]}, {"labels": [1, "x", 0]}]}
    imported = read(tmp_path, row)
    assert [said(answer) for answer in imported.answers] == [STEPS[1]]
    assert 'labels[1] is "x"; a step is rated' in imported.left_out[0]


def test_rows_of_several_annotators_replace_no_label_of_another(tmp_path: Path) -> None:
    row = QUESTION | {"steps": STEPS}
    rows = [row | {"annotator": "ann", "labels": [1, 0, 0]}, row | {"annotator": "bob", "labels": [1, 1, 0]}]
    imported = read(tmp_path, *rows)
    assert by_person(imported) == {"set:ann": STEPS[1], "set:bob": STEPS[2]}
    assert not any("repeat an earlier answer" in note for note in imported.notes)


# ---- a row for each step ------------------------------------------------------------------------------------------------


def reveal(number: int, logic: str | None = None, attribution: str | None = None, **more: Any) -> dict[str, Any]:
    """A row of REVEAL: a step, and one source for it."""
    row = {
        "answer_id": "a1",
        "question": "Can it?",
        "answer_model": "some-lm",
        "step_idx": number,
        "step": f"s{number}",
    }
    return row | {"correctness_label": logic, "attribution_label": attribution} | more


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        pytest.param([reveal(0, None, "Fully"), reveal(1, "Correct")], "correct", id="all right"),
        pytest.param([reveal(0, None, "Fully"), reveal(1, "Incorrect"), reveal(2, "Correct")], "s1", id="logic"),
        pytest.param([reveal(0, "Correct"), reveal(1, None, "Contradictory")], "s1", id="a source against it"),
        pytest.param([reveal(0, "Correct"), reveal(1, None, "Unsupported")], "correct: s0", id="no source"),
        pytest.param([reveal(0, "Correct"), reveal(1, None, "Partially"), reveal(2, "Incorrect")], "correct: s0", id="half a source"),
        pytest.param([reveal(0, "Correct", "Unsupported"), reveal(1, "Correct")], None, id="nothing is sure"),
        pytest.param([reveal(1, "Incorrect"), reveal(0, "Correct")], "s1", id="in another order"),
        pytest.param([reveal(1, "Correct"), reveal(2, "Incorrect")], "s2", id="from 1"),
        pytest.param([reveal(0, None, "Contradictory"), reveal(0, None, "Fully"), reveal(1, "Correct")], None, id="sources differ"),
        pytest.param(
            [
                reveal(0, None, "Contradictory", is_final_rated_evidence_for_step=False),
                reveal(0, None, "Fully", is_final_rated_evidence_for_step=True),
            ],
            "correct",
            id="the last source counts",
        ),
    ],
)  # fmt: skip
def test_the_rows_of_an_answer_are_one_answer(tmp_path: Path, rows: list[dict[str, Any]], expected: str | None) -> None:
    other = reveal(0, "Incorrect", answer_id="a2", question="Other?")
    imported = read(tmp_path, *rows, other)
    assert imported.format == "step-rows"
    assert [said(answer) for answer in imported.answers] == [*([expected] if expected else []), "s0"]
    assert [line.split(": ", 1)[1] for line in imported.left_out] == [] if expected else ["no step is rated"]
    assert {answer.model for answer in imported.answers} == {"some-lm"}
    if expected:
        assert imported.answers[0].response.splitlines() == sorted({row["step"] for row in rows})


def test_a_table_of_steps_reads_as_its_lines_do(tmp_path: Path) -> None:
    rows = [reveal(0, None, "Fully"), reveal(1, "Incorrect"), reveal(0, "Correct", answer_id="a2", question="Other?")]
    expected = read(tmp_path, *rows).answers
    with open(tmp_path / "in.csv", "w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    assert read_file(tmp_path / "in.csv").answers == expected
    assert [said(answer) for answer in expected] == ["s1", "correct"]


@pytest.mark.parametrize("label", ["label", "rating", "is_correct"])
def test_rows_of_steps_may_have_any_usual_label(tmp_path: Path, label: str) -> None:
    rows = [
        {"question_id": answer, "question": f"q{answer}", "step_number": number, "text": f"s{number}", label: value}
        for answer, values in enumerate([(1, 0, 0), (1, 1, 1)])
        for number, value in enumerate(values, 1)
    ]
    imported = read(tmp_path, *rows)
    assert (imported.format, labels(imported)) == ("step-rows", ["s2", "correct"])
    assert imported.notes == ("a step rated 0 is wrong, because no step is rated -1",)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ([reveal(0, "Correct"), reveal(2, "Correct")], "step_idx is [0, 2]; the steps of an answer are numbered"),
        ([reveal(3, "Correct")], "step_idx is [3]; the steps of an answer are numbered from 0 or from 1"),
        ([reveal(0, "Correct"), reveal(0, "Correct", step="t")], 'step is ["s0", "t"]; a step is text, the same'),
        ([reveal(0, None, "Perhaps")], 'attribution_label is "Perhaps"; it is one of fully, partially'),
        ([reveal(0, "Correct"), reveal("x", "Correct")], 'step_idx is "x"; it is the number of a step'),  # type: ignore[arg-type]
    ],
)
def test_rows_of_steps_that_make_no_answer_are_left_out_with_the_reason(
    tmp_path: Path, bad: list[dict[str, Any]], reason: str
) -> None:
    imported = read(tmp_path, reveal(0, "Correct", answer_id="good"), *bad)
    assert len(imported.answers) == 1
    assert len(imported.left_out) == 1
    assert reason in imported.left_out[0]


def test_an_empty_column_hides_no_label_and_a_filled_one_is_not_mixed_with_another(tmp_path: Path) -> None:
    row = {"question": "q", "step_number": 1, "text": "s1", "label": None, "correct": True}
    wrong = row | {"step_number": 2, "text": "s2", "correct": False}
    assert labels(read(tmp_path, row, wrong)) == ["s2"]
    assert labels(read(tmp_path, row | {"label": 1}, wrong)) == ["correct: s1"], "nobody has rated the second step"


def test_an_answer_whose_rows_do_not_stand_together_stops_the_import(tmp_path: Path) -> None:
    rows = [reveal(0, "Correct"), reveal(0, "Correct", answer_id="a2"), reveal(1, "Incorrect")]
    with pytest.raises(
        ValueError, match=r"in\.jsonl:3: rows of the same answer stand at another place.*; sort the file"
    ):
        read(tmp_path, *rows)


@settings(max_examples=25, deadline=None)  # each reads two files
@given(st.lists(st.lists(st.sampled_from([1, 0]), min_size=1, max_size=5), min_size=1, max_size=5), st.integers(0, 1))
def test_a_row_for_each_step_says_what_a_row_for_each_answer_says(ratings: list[list[int]], first: int) -> None:
    """Whatever is right or wrong, and whether steps count from 0 or from 1: no label moves, and no answer is lost."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        answers: list[dict[str, Any]] = [
            {"question": f"q{at}", "steps": [f"s{number}" for number in range(len(listed))], "labels": listed}
            for at, listed in enumerate(ratings)
        ]
        rows = [
            {"question": answer["question"], "step_idx": number + first, "step": step, "label": rating}
            for answer in answers
            for number, (step, rating) in enumerate(zip(answer["steps"], answer["labels"], strict=True))
        ]
        assert read(folder, *rows).answers == read(folder, *answers).answers


# ---- words and names ----------------------------------------------------------------------------------------------------


def test_a_steps_own_number_is_not_its_text(tmp_path: Path) -> None:
    steps = [{"step": f"Step {at}", "reasoning": text, "label": at < 2} for at, text in enumerate(STEPS, 1)]
    assert labels(read(tmp_path, QUESTION | {"steps": steps})) == [STEPS[1]]
    numbers = [{"step": "7", "label": True}, {"step": "8", "label": False}]
    assert labels(read(tmp_path, QUESTION | {"steps": numbers})) == ["8"]


@pytest.mark.parametrize(
    "words", [["Valid", "Invalid", "valid"], ["correct.", "incorrect.", "correct."], ["ok", "error", "ok"]]
)
def test_labels_may_be_words(tmp_path: Path, words: list[str]) -> None:
    assert labels(read(tmp_path, QUESTION | {"steps": STEPS, "labels": words})) == [STEPS[1]]


def test_a_number_of_a_step_may_have_its_word_before_it_and_none_may_be_said_in_words(tmp_path: Path) -> None:
    rows = [
        {"question": str(at), "model_output_steps": STEPS, "first_error_step": written}
        for at, written in enumerate(["Step 2", "step 3", "No error", "no error.", "correct"])
    ]
    assert labels(read(tmp_path, *rows)) == [STEPS[1], STEPS[2], "correct", "correct", "correct"]


@pytest.mark.parametrize("field", ["label", "mistake_index"])
def test_a_number_behind_a_word_counts_from_1_or_not_at_all(tmp_path: Path, field: str) -> None:
    named, numbered = (PROBLEM | {"problem": str(at), "steps": STEPS, field: at} for at in ("Step 2", 1))
    imported = read(tmp_path, numbered, named)
    assert [said(answer) for answer in imported.answers] == [STEPS[1]]
    assert f'{field} is "Step 2"; the step with a number may be counted from 0 or from 1; write' in imported.left_out[0]
    file = tmp_path / "in.jsonl"
    for first_step, expected in (("one", STEPS[1]), ("zero", STEPS[2])):
        file.write_text(json.dumps(named))
        [answer] = read_labelled(file, "auto", LabelSource("in", "set", "MIT"), first_step).answers  # type: ignore[arg-type]
        assert said(answer) == expected


def test_a_less_known_name_does_not_count_in_a_file_with_the_usual_one(tmp_path: Path) -> None:
    wrong = {"input": "q", "steps": STEPS, "mistake_index": 1, "error_step": 2}
    right = {"input": "p", "steps": STEPS, "mistake_index": None, "error_step": None}
    other = {"input": "r", "steps": STEPS, "mistake_index": None, "error_step": 2}
    assert labels(read(tmp_path, other, wrong, right)) == ["correct", STEPS[1], "correct"]
    with pytest.raises(ValueError, match="may count its steps from 0 or from 1"):
        read(tmp_path, other, right)


@pytest.mark.parametrize("field", ["first_error_index", "error_step"])
def test_a_less_known_name_counts_as_the_rows_show_or_not_at_all(tmp_path: Path, field: str) -> None:
    def numbered(*numbers: int | None) -> list[dict[str, Any]]:
        return [QUESTION | {"steps": STEPS, field: number} for number in numbers]

    assert labels(read(tmp_path, *numbered(0, 2, -1, None))) == [STEPS[0], STEPS[2], "correct", "correct"]
    assert labels(read(tmp_path, *numbered(1, 3, -1))) == [STEPS[0], STEPS[2], "correct"]
    for numbers in ((1, 2, -1), (0, 2, 1), (0, 3, -1)):
        with pytest.raises(
            ValueError, match=r"may count its steps from 0 or from 1: the number is 0 in .* --first_step"
        ):
            read(tmp_path, *numbered(*numbers))


def test_a_number_beside_steps_that_are_objects_without_labels_is_that_of_a_step(tmp_path: Path) -> None:
    steps = [{"text": text} for text in STEPS]
    imported = read(tmp_path, QUESTION | {"steps": steps, "label": 1}, QUESTION | {"steps": steps, "label": -1})
    assert (imported.format, labels(imported)) == ("processbench", [STEPS[1], "correct"])
    with pytest.raises(ValueError, match="each step is an object with label"):
        read(tmp_path, QUESTION | {"steps": steps})


@pytest.mark.parametrize("verdicts", [(0, 1), (-1, 1)])
def test_numbers_that_are_verdicts_in_every_row_are_not_taken_for_steps(
    tmp_path: Path, verdicts: tuple[int, int]
) -> None:
    rows = [{"question": str(at), "steps": STEPS, "label": verdicts[at % 2]} for at in range(8)]
    with pytest.raises(ValueError, match=r"label is -?[01] or 1 in all 8 rows: .* say --format processbench if"):
        read(tmp_path, *rows)
    assert len(read(tmp_path, *rows, row_format="processbench").answers) == 8
    assert len(read(tmp_path, *rows, {"question": "q", "steps": STEPS, "label": 2}).answers) == 9


def test_a_cell_that_is_no_list_is_named_where_no_format_fits(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("question,steps,labels\nq,\"['a', 'b']\",[1 0]\n")
    with pytest.raises(ValueError, match=r"; labels cannot be read as a list; write it as JSON"):
        read_file(tmp_path / "in.csv")


def test_further_lists_count_only_where_no_usual_one_labels_the_steps(tmp_path: Path) -> None:
    row = QUESTION | {"steps": STEPS, "correctness": [1, 0, 1]}
    assert labels(read(tmp_path, row)) == [STEPS[1]]
    assert labels(read(tmp_path, row | {"labels": [1, 1, 0]})) == [STEPS[2]]
    inner = [{"text": text, "label": label} for text, label in zip(STEPS, (1, 1, 0), strict=True)]
    assert labels(read(tmp_path, row | {"steps": inner})) == [STEPS[2]]


STEPPED = {"steps": ["a"], "labels": [1]}
ROWS = st.dictionaries(
    st.sampled_from(["question", "steps", "labels", "response", "annotations", "solutions", "data", "annotator"]),
    st.sampled_from([None, True, 2, "a", "[]", "{}", [], ["a"], [1, 0], {}, [{}], [1, {}], STEPPED, [STEPPED] * 2]),
)


@settings(deadline=None)
@given(ROWS)
def test_a_row_of_the_usual_shape_stays_as_it_is_and_no_other_is_lost(row: dict[str, Any]) -> None:
    rows = unfolded(row)
    num_objects = sum(2 if value == [STEPPED] * 2 else 1 for value in row.values())
    assert 1 <= len(rows) <= 2**num_objects
    if not any(value in (STEPPED, [STEPPED] * 2) for value in row.values()):
        assert rows == [row]

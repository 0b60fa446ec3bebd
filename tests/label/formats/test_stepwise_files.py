"""Sets of steps as they are published and as tables hold them: which step a label lies on, and the reasons of rows left out."""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from labelled_files import Imported, read_labelled

from draftsmith.data.sources import read_rows
from draftsmith.label.answer_rows import write_answers
from draftsmith.label.formats.counting import FirstStep
from draftsmith.label.formats.fields import unpacked, whole
from draftsmith.label.formats.label_studio import write_tasks
from draftsmith.label.schema import Answer
from draftsmith.label.store.label_source import LabelSource

STEPS = ["Take 3.", "So 3 + 4 = 8.", "It is 8."]
BENCH = {"id": "gsm8k-0", "generator": "some-7b", "problem": "How many?", "steps": STEPS, "final_answer_correct": False}
NUMPY_CELL = "['Take 3.' 'So 3 + 4 = 8.']"
MARKED = "Tom has 3. How many? Step 1: 3 + 4 = 7 \u043a\u0438\nStep 2: 7 * 2 = 15 \u043a\u0438\nStep 3: It is 15 \u043a\u0438"


def read_file(file: Path, first_step: FirstStep = "auto") -> Imported:
    return read_labelled(file, "auto", LabelSource("in", "them", "MIT"), first_step)


def read(tmp_path: Path, *rows: Any, first_step: FirstStep = "auto") -> Imported:
    file = tmp_path / "in.jsonl"
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return read_file(file, first_step)


def wrong(answer: Answer) -> str | None:
    """The text that an answer's label calls wrong; its verdict where there is none."""
    assert answer.label is not None
    return answer.label.verdict if answer.label.error is None else answer.response[slice(*answer.label.error)]


def numbered(*labels: Any, **changes: Any) -> list[dict[str, Any]]:
    """ProcessBench's rows with these labels, each of another question."""
    return [BENCH | {"problem": f"How many? {at}", "label": label} | changes for at, label in enumerate(labels)]


@pytest.mark.parametrize(
    ("labels", "steps"),
    [
        ([0, 2, -1], [STEPS[0], STEPS[2], "correct"]),
        (["0", "2", "-1"], [STEPS[0], STEPS[2], "correct"]),
        ([0.0, 2.0, -1.0], [STEPS[0], STEPS[2], "correct"]),
        (["0.0", "2.0", "-1.0"], [STEPS[0], STEPS[2], "correct"]),
    ],
)
def test_a_number_is_the_same_step_however_a_table_writes_it(
    tmp_path: Path, labels: list[Any], steps: list[str]
) -> None:
    imported = read(tmp_path, *numbered(*labels))
    assert [wrong(answer) for answer in imported.answers] == steps
    assert {answer.model for answer in imported.answers} == {"some-7b"}


@pytest.mark.parametrize("value", [True, 1.5, "two", None, [1], 1e300, 10**30])
def test_what_is_no_number_of_a_step_is_left_out_with_its_value(tmp_path: Path, value: Any) -> None:
    imported = read(tmp_path, *numbered(0, value))
    assert len(imported.answers) == 1
    assert imported.left_out[0].startswith(f"{tmp_path / 'in.jsonl'}:2: label is ")
    assert "it is -1 or the index of one of the 3 steps, from 0; correct it" in imported.left_out[0]


def test_numbers_that_only_fit_from_1_are_counted_from_1_and_that_is_said(tmp_path: Path) -> None:
    imported = read(tmp_path, *numbered(1, 3, -1, 3))
    assert [wrong(answer) for answer in imported.answers] == [STEPS[0], STEPS[2], "correct", STEPS[2]]
    assert (
        "steps are counted from 1: the number equals that of the steps in 2 rows, and it is never 0"
        in imported.notes[0]
    )


def test_numbers_that_fit_neither_way_are_left_out_with_the_option_that_changes_it(tmp_path: Path) -> None:
    imported = read(tmp_path, *numbered(0, 3, -1))
    assert [wrong(answer) for answer in imported.answers] == [STEPS[0], "correct"]
    assert "--first_step one if the file counts from 1" in imported.left_out[0]
    assert "but the number equals that of the steps in 1 row" in imported.notes[0]


def test_the_user_may_say_from_which_number_steps_are_counted(tmp_path: Path) -> None:
    by_choice = [read(tmp_path, *numbered(1, 2), first_step=choice) for choice in ("zero", "one")]  # type: ignore[arg-type]
    assert [[wrong(answer) for answer in imported.answers] for imported in by_choice] == [STEPS[1:], STEPS[:2]]
    with pytest.raises(ValueError, match="first_step is one; only mistake, processbench"):
        read(tmp_path, {"question": "q", "m": {"solution": "7", "is_correct": True}}, first_step="one")


def test_mr_gsm8k_counts_from_1_and_a_wrong_solution_without_a_step_is_unplaced(tmp_path: Path) -> None:
    base = {"ground_truth_solution": "3 + 4 = 7", "ground_truth_answer": "7", "model_output_steps": STEPS}
    rows = [
        base | {"question": f"{at}", f"{name}_correctness": verdict, f"{name}_first_error_step": step}
        for name in ("model_output_solution",)
        for at, (verdict, step) in enumerate(
            [("wrong", 2), ("wrong", "3"), ("correct", "N/A"), ("wrong", "N/A"), ("correct", 1)]
        )
    ]
    imported = read(tmp_path, *rows)
    assert [wrong(answer) for answer in imported.answers] == [STEPS[1], STEPS[2], "correct", "unplaced"]
    assert {answer.reference for answer in imported.answers} == {"3 + 4 = 7"}
    assert "the steps are right: model_output_solution_correctness is 'correct'" in imported.left_out[0]


@pytest.mark.parametrize(
    ("verdicts", "label"),
    [(("wrong", False, 0, 0.0, "0.0", "0"), "unplaced"), (("correct", True, 1, 1.0, "1.0", "1", None), "correct")],
)
def test_a_verdict_counts_however_a_table_writes_it(tmp_path: Path, verdicts: tuple[Any, ...], label: str) -> None:
    row = {"model_output_steps": STEPS, "first_error_step": "N/A"}
    rows = [row | {"question": str(at), "solution_correctness": verdict} for at, verdict in enumerate(verdicts)]
    assert [wrong(answer) for answer in read(tmp_path, *rows).answers] == [label] * len(verdicts)


@pytest.mark.parametrize("question", ["problem", "question", "prompt", "input", "instruction"])
def test_flat_ratings_have_their_question_under_any_usual_name(tmp_path: Path, question: str) -> None:
    imported = read(tmp_path, {question: "How many?", "steps": STEPS, "ratings": [1, 0, -1]})
    assert (imported.format, imported.answers[0].messages[0]["content"]) == ("prm800k", "How many?")
    assert wrong(imported.answers[0]) == STEPS[2]


def test_mr_ben_shows_the_options_that_the_model_saw(tmp_path: Path) -> None:
    row = {"Question": "Which?", "Options": "A: 7\nB: 8", "Sampled_Model": "some-7b", "Model_Solution_Steps": STEPS}
    row |= {
        "Model_Solution_Correctness": "incorrect",
        "Model_Solution_First_Error_Step": "2",
        "Ground_Truth_Answer": "A",
    }
    [answer] = read(tmp_path, row).answers
    assert (wrong(answer), answer.model, answer.reference) == (STEPS[1], "some-7b", "A")
    assert answer.messages[0]["content"] == "Which?\nA: 7\nB: 8"


def test_the_first_of_several_wrong_steps_is_the_error(tmp_path: Path) -> None:
    prm = {"question": "q", "original_process": ["a", "7"], "modified_process": ["a", "8", "c"], "error_steps": [3, 2]}
    delta = {
        "question": "d",
        "sections_content": "section1: a\n\nsection 2: b\nmore",
        "reason_error_section_numbers": [2],
    }
    none = delta | {"question": "e", "reason_error_section_numbers": []}
    first, right, *sections = read(tmp_path, prm, delta, none).answers
    assert (wrong(first), wrong(right), right.response) == ("8", "correct", "a\n7")
    assert [wrong(answer) for answer in sections] == ["b\nmore", "correct"]


def test_math_shepherds_minus_is_an_error_that_a_rule_found(tmp_path: Path) -> None:
    signs = MARKED.replace("\u043a\u0438", "+", 1).replace("\u043a\u0438", "-")
    imported = read(tmp_path, {"input": MARKED, "label": signs}, {"input": MARKED, "label": signs.replace("15", "16")})
    [answer] = imported.answers
    assert answer.label is not None
    assert (wrong(answer), answer.label.how, imported.format) == ("Step 2: 7 * 2 = 15", "rule", "math-shepherd")
    assert answer.messages[0]["content"] == "Tom has 3. How many?"
    assert answer.response.splitlines() == ["Step 1: 3 + 4 = 7", "Step 2: 7 * 2 = 15", "Step 3: It is 15"]
    assert "in place of each \u043a\u0438; step 2 differs" in imported.left_out[0]


@pytest.mark.parametrize(
    ("ratings", "expected", "said"),
    [
        ([1, 0, 1], "So 3 + 4 = 8.", "a step rated 0 is wrong"),
        (["good", "neutral", "ok"], "correct", None),
        (["good", "neutral", 0], "It is 8.", "a step rated 0 is wrong"),
        (["+", "0", "-"], "It is 8.", "a step rated 0 is neither right nor wrong"),
        ([1, 0, -1], "It is 8.", "a step rated 0 is neither right nor wrong"),
        ([True, False, True], "So 3 + 4 = 8.", None),
        (["+", "+", "-"], "It is 8.", None),
        ([1.0, 1.0, -1.0], "It is 8.", None),
        ([1, 1, 1], "correct", None),
    ],
)
def test_a_label_a_step_stands_in_the_step_or_beside_it(
    tmp_path: Path, ratings: list[Any], expected: str, said: str | None
) -> None:
    inside = [{"text": step, "label": rating} for step, rating in zip(STEPS, ratings, strict=True)]
    for row in ({"question": "q", "steps": inside}, {"prompt": "q", "completions": STEPS, "labels": ratings}):
        imported = read(tmp_path, row)
        assert imported.format == "step-labels"
        assert [wrong(answer) for answer in imported.answers] == [expected]
        assert (said is None and not imported.notes) or (said is not None and said in imported.notes[0])


def test_steps_that_nobody_rated_are_not_checked_and_a_share_is_no_label(tmp_path: Path) -> None:
    rated = {"question": "q", "steps": [{"text": "a", "label": 1}, {"text": "b", "label": None}]}
    imported = read(tmp_path, rated, {"question": "q", "steps": [{"text": "a", "label": 0.4}]})
    [answer] = imported.answers
    assert answer.label is not None
    assert (wrong(answer), answer.label.checked) == ("correct", (0, 1))
    assert "steps[0].label is 0.4" in imported.left_out[0]
    assert "write 1 or 0" in imported.left_out[0]


@pytest.mark.parametrize("bad", [False, "wrong", "no"])
def test_a_word_elsewhere_in_a_file_does_not_make_a_0_neutral(tmp_path: Path, bad: Any) -> None:
    words = {"question": "q", "steps": [{"text": "a", "label": True}, {"text": "b", "label": bad}]}
    zero = {"question": "q", "steps": [{"text": "c", "label": 1}, {"text": "d", "label": 0}]}
    assert [wrong(answer) for answer in read(tmp_path, words, zero).answers] == ["b", "d"]


def test_where_only_a_blank_step_is_rated_nothing_is_checked_and_the_row_is_left_out(tmp_path: Path) -> None:
    blank = {"question": "q", "steps": ["", "b"], "labels": [1, None]}
    imported = read(tmp_path, blank | {"labels": [1, 1]}, blank)
    assert len(imported.answers) == 1
    assert imported.left_out == [f"{tmp_path / 'in.jsonl'}:2: no step is rated"]


@pytest.mark.parametrize(
    "more",
    [{"ratings": [1, -1, 1]}, {"ratings": [1]}, {"labels": [1, -1, 1]}, {"labels": ["algebra"]}, {"wrong_steps": [1]}],
)
def test_a_number_beside_the_steps_counts_and_lists_beside_it_do_not(tmp_path: Path, more: dict[str, Any]) -> None:
    imported = read(tmp_path, *[row | more for row in numbered(1, 0, -1)])
    assert imported.format == "processbench"
    assert [wrong(answer) for answer in imported.answers] == [STEPS[1], STEPS[0], "correct"]


def test_a_flat_row_of_prm800k_may_have_a_label_beside_its_ratings(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(json.dumps(BENCH | {"ratings": [1, -1, 1], "label": 2}) + "\n")
    [answer] = read_labelled(tmp_path / "in.jsonl", "prm800k", LabelSource("in", "them", "MIT")).answers
    assert wrong(answer) == STEPS[1]


def test_a_null_under_one_name_does_not_hide_the_number_under_another(tmp_path: Path) -> None:
    row = {"question": "q", "model_output_steps": STEPS, "first_error_step": None}
    [answer] = read(tmp_path, row | {"model_output_solution_first_error_step": 2}).answers
    assert wrong(answer) == STEPS[1]


def test_the_rule_for_a_bad_number_counts_as_the_user_says(tmp_path: Path) -> None:
    imported = read(tmp_path, *numbered(1, "two"), first_step="one")
    assert "it is the number of one of the 3 steps, from 1" in imported.left_out[0]
    lists = [{"question": str(at), "process": STEPS, "error_steps": given} for at, given in enumerate([[0], ["two"]])]
    imported = read(tmp_path, *lists, first_step="zero")
    assert [wrong(answer) for answer in imported.answers] == [STEPS[0]]
    assert "it lists numbers of the 3 steps, from 0" in imported.left_out[0]


def test_a_file_is_read_row_by_row_and_no_row_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Held(dict[str, Any]):
        alive = most = 0

        def __init__(self, row: Any) -> None:
            super().__init__(row)
            Held.alive += 1
            Held.most = max(Held.most, Held.alive)

        def __del__(self) -> None:
            Held.alive -= 1

    def watched(*args: Any, **named: Any) -> Iterator[tuple[str, Any]]:
        for place, row in read_rows(*args, **named):
            held = Held(row)
            del row
            yield place, held
            del held

    monkeypatch.setattr("draftsmith.label.formats.importers.read_rows", watched)
    steps = [{"text": "a", "label": 1}, {"text": "b", "label": 0}]
    for rows in (numbered(*[0, 2, -1] * 20), [{"question": str(at), "steps": steps} for at in range(60)]):
        Held.most = 0
        assert len(read(tmp_path, *rows).answers) == 60
        assert 1 <= Held.most <= 4


def test_a_blank_step_keeps_the_numbers_of_the_others_and_cannot_be_wrong(tmp_path: Path) -> None:
    imported = read(tmp_path, *numbered(2, 1, steps=["a", "", "c"]))
    assert [wrong(answer) for answer in imported.answers] == ["c"]
    assert 'steps[1] is ""' in imported.left_out[0]


def cells(rows: list[dict[str, Any]], write: Any) -> str:
    text = io.StringIO()
    table = csv.DictWriter(text, list(rows[0]))
    table.writeheader()
    table.writerows(
        [{name: write(value) if isinstance(value, list) else value for name, value in row.items()} for row in rows]
    )
    return text.getvalue()


@pytest.mark.parametrize("kind", ["jsonl", "crlf.jsonl", "json", "csv", "repr.csv", "parquet"])
def test_every_kind_of_file_gives_the_same_answers(tmp_path: Path, kind: str) -> None:
    rows = numbered(0, 2, -1, steps=['It\'s 3,\n"so" \\frac{1}{2}', "", "7 \U0001f600"])
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    tables = [{**row, "label": float(row["label"])} for row in rows]
    content = {
        "jsonl": lines.encode(),
        "crlf.jsonl": b"\xef\xbb\xbf" + lines.replace("\n", "\r\n").encode(),
        "json": json.dumps(rows).encode(),
        "csv": cells(rows, json.dumps).encode("utf-8-sig"),
        "repr.csv": cells(tables, repr).encode(),
    }
    file = tmp_path / f"other.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(tables), file)
    else:
        file.write_bytes(content[kind])
    assert read_file(file).answers == read(tmp_path, *rows).answers


def test_a_cell_in_which_numpy_wrote_a_list_is_no_single_step(tmp_path: Path) -> None:
    assert unpacked(NUMPY_CELL) == NUMPY_CELL
    assert unpacked("['a', 'b']") == ["a", "b"]
    (tmp_path / "in.csv").write_text(f'problem,steps,label\nq,"{NUMPY_CELL}",1\n')
    with pytest.raises(ValueError, match=r"steps is .*; it is a list; correct it; in a table write it as JSON"):
        read_file(tmp_path / "in.csv")


def test_a_cell_with_keys_that_json_has_not_is_left_out_in_words(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("problem,steps,label\nq,\"[{(1, 2): 3}]\",1\nq,\"['a', 'b']\",1\n")
    imported = read_file(tmp_path / "in.csv")
    assert [wrong(answer) for answer in imported.answers] == ["b"]
    assert "steps[0] is {}; a step is text, or an object with text" in imported.left_out[0]


@given(st.integers(-(10**8), 10**8))
def test_a_whole_number_is_read_from_every_way_of_writing_it(number: int) -> None:
    assert {whole(value) for value in (number, float(number), str(number), f"{number}.0", f" {number} ")} == {number}
    assert whole(number + 0.5) is whole(f"{number}.5") is whole(True) is None


def test_an_answer_that_a_file_labels_twice_is_said(tmp_path: Path) -> None:
    imported = read(tmp_path, *[BENCH | {"label": label, "answer": str(label)} for label in (0, 1, 1)])
    assert "1 rows repeat an earlier answer with another label" in imported.notes[1]
    assert {answer.reference for answer in imported.answers} == {"0"}, (
        "a store keeps one reference, and takes no second"
    )


def test_right_steps_with_a_wrong_end_are_said(tmp_path: Path) -> None:
    mistake = {"input": "q", "steps": STEPS, "mistake_index": None, "target": "7", "answer": "8"}
    assert "1 answers have a wrong end, and the file names no wrong step" in read(tmp_path, mistake).notes[1]
    assert len(read(tmp_path, mistake | {"answer": " 7"}).notes) == 1


def test_a_labellers_own_step_that_a_table_fills_with_nulls_is_none(tmp_path: Path) -> None:
    step = {"completions": [{"text": "a", "rating": 1.0}], "human_completion": {"text": None}, "chosen_completion": 0.0}
    row = {"labeler": "L", "question": {"problem": "q"}, "label": {"steps": [step], "finish_reason": "solution"}}
    [answer] = read(tmp_path, row).answers
    assert (answer.response, wrong(answer)) == ("a", "correct")


def test_a_model_without_a_solution_costs_the_others_nothing(tmp_path: Path) -> None:
    row = {
        "question": "q",
        "a": {"solution": "7", "is_correct": 1},
        "b": {"solution": None, "is_correct": None},
        "c": None,
    }
    assert [answer.model for answer in read(tmp_path, row).answers] == ["a"]


def test_what_was_imported_comes_back_from_both_kinds_of_export(tmp_path: Path) -> None:
    rows = [*numbered(0, 2, -1, steps=["\u202e\u00e9\U0001f600\r\nline", "", "$\\frac{1}{2}$"])]
    answers = read(tmp_path, *rows).answers
    write_answers(tmp_path / "out.jsonl", answers)
    write_tasks(tmp_path / "tasks.json", answers)
    assert read_file(tmp_path / "out.jsonl").answers == answers
    assert read_file(tmp_path / "tasks.json").answers == answers

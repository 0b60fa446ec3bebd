import json
from pathlib import Path
from typing import Any

import pytest
from labelled_files import Imported, read_labelled

from draftsmith.label.schema import Answer, Label
from draftsmith.label.store.label_source import LabelSource

JUDGE = Path(__file__).parents[4] / "shared" / "data" / "judge"

MISTAKE = {"input": "Sort.", "steps": ["ab", "cde", "f"], "mistake_index": 1, "target": "x", "answer": "y"}
RATED = {"problem": "Solve.", "steps": ["ab", "cde", "f"], "ratings": [1, 0, -1], "tail": "", "problem_in_MATH": True}
SOLUTIONS = {
    "question": "How many?",
    "ground_truth": "7",
    "small": {"is_correct": False, "solution": "3 + 4 = <<3+4=8>>8"},
    "large": {"is_correct": True, "solution": "3 + 4 = <<3+4=7>>7"},
    "other": {"is_correct": False, "solution": "9"},
}
MINED = {"question": "How many?", "prefix": "It is", "draft_token": " 8", "target_token": " 7", "important": True}


def read(tmp_path: Path, *rows: Any, licence: str | None = "MIT", model: str | None = None) -> Imported:
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_labelled(tmp_path / "in.jsonl", "auto", LabelSource("in", "them", licence, model))


def one(tmp_path: Path, row: Any) -> Answer:
    [answer] = read(tmp_path, row).answers
    return answer


def refused(tmp_path: Path, good: Any, bad: Any) -> str:
    """Why the second row is left out; the first one is read."""
    [reason] = read(tmp_path, good, bad).left_out
    assert "in.jsonl:2: " in reason
    return reason


def test_the_step_of_a_mistake_is_the_error(tmp_path: Path) -> None:
    answer = one(tmp_path, MISTAKE)
    assert (answer.response, answer.label) == ("ab\ncde\nf", Label("wrong", "them", "person", (3, 6)))
    assert answer.response[3:6] == "cde"
    assert answer.messages == ({"role": "user", "content": "Sort."},)
    assert (answer.model, answer.licence, answer.source) == ("unknown", "MIT", "in")


def test_no_mistake_is_correct(tmp_path: Path) -> None:
    assert one(tmp_path, MISTAKE | {"mistake_index": None}).label == Label("correct", "them", "person")


PROCESS = {"id": "gsm8k-1", "problem": "Solve.", "steps": ["ab", "cde", "f"], "label": 1, "final_answer_correct": False}
STEPWISE = {"question": "Solve.", "model_output_steps": ["ab", "cde", "f"], "first_error_step": 2}


@pytest.mark.parametrize(
    ("row", "format", "none"),
    [(PROCESS, "processbench", {"label": -1}), (STEPWISE, "stepwise", {"first_error_step": None})],
)
def test_sets_of_steps_are_known_by_their_fields(tmp_path: Path, row: Any, format: str, none: Any) -> None:
    imported = read(tmp_path, row, row | none)
    assert imported.format == format
    wrong, correct = imported.answers
    assert (wrong.response, wrong.label) == ("ab\ncde\nf", Label("wrong", "them", "person", (3, 6)))
    assert wrong.messages == ({"role": "user", "content": "Solve."},)
    assert correct.label == Label("correct", "them", "person")


@pytest.mark.parametrize(
    ("number", "span"), [(1, (0, 2)), (3, (7, 8)), ("3", (7, 8)), (0, None), (-1, None), ("N/A", None)]
)
def test_stepwise_errors_count_from_one(tmp_path: Path, number: Any, span: Any) -> None:
    for field in ("first_error_step", "model_output_solution_first_error_step"):
        row = {key: value for key, value in STEPWISE.items() if key != "first_error_step"} | {field: number}
        label = one(tmp_path, row).label
        assert label is not None
        assert label.error == span


def test_a_solution_that_is_wrong_nowhere_in_particular_is_unplaced(tmp_path: Path) -> None:
    label = one(tmp_path, STEPWISE | {"first_error_step": None, "model_output_solution_correctness": "wrong"}).label
    assert label == Label("unplaced", "them", "person")


@pytest.mark.parametrize(
    ("good", "bad", "told"),
    [
        (PROCESS, {"label": 3}, "label is 3; it is -1 or the index of one of the 3 steps, from 0"),
        (PROCESS, {"label": True}, "label is true"),
        (STEPWISE, {"first_error_step": 4}, "first_error_step is 4; it is the number of one of the 3 steps, from 1"),
        (STEPWISE, {"first_error_step": False}, "first_error_step is false"),
        (STEPWISE, {"model_output_steps": "ab"}, "it is a list"),
    ],
)
def test_steps_that_are_none_are_left_out(tmp_path: Path, good: Any, bad: Any, told: str) -> None:
    assert told in refused(tmp_path, good, good | bad)


def test_the_first_step_rated_wrong_is_the_error_and_neutral_is_none(tmp_path: Path) -> None:
    answer = one(tmp_path, RATED | {"tail": "more"})
    assert (answer.response, answer.label) == ("ab\ncde\nf\nmore", Label("wrong", "them", "person", (7, 8)))


def test_what_nobody_rated_is_not_checked(tmp_path: Path) -> None:
    good = RATED | {"ratings": [1, 0, 1]}
    assert one(tmp_path, good).label == Label("correct", "them", "person")
    assert one(tmp_path, good | {"tail": "more"}).label == Label("correct", "them", "person", None, (0, 8))
    assert one(tmp_path, good | {"ratings": [1, None, -1]}).label == Label("correct", "them", "person", None, (0, 2))
    nothing = read(tmp_path, good, good | {"ratings": [None, 1, 1]})
    assert (len(nothing.answers), nothing.left_out) == (1, [f"{tmp_path / 'in.jsonl'}:2: no step is rated"])


def published(*steps: dict[str, Any], finish: str = "solution", planned: list[str] | None = None) -> dict[str, Any]:
    question = {"problem": "Solve.", "pre_generated_steps": planned}
    return {"labeler": "L1", "question": question, "label": {"steps": list(steps), "finish_reason": finish}}


def step(*candidates: tuple[str, int | None], chosen: int | None = 0, human: str | None = None) -> dict[str, Any]:
    completions = [{"text": text, "rating": rating, "flagged": None} for text, rating in candidates]
    written = None if human is None else {"text": human, "rating": None, "source": "human"}
    return {"completions": completions, "human_completion": written, "chosen_completion": chosen}


def test_the_published_layout_follows_what_was_chosen(tmp_path: Path) -> None:
    row = published(step(("no", -1), ("ab", 1), chosen=1), step(("bad", -1), chosen=None, human="cde"), step(("f", 0)))
    answer = one(tmp_path, row)
    assert (answer.response, answer.label) == ("ab\ncde\nf", Label("correct", "L1", "person"))


def test_the_published_layout_ends_with_the_error_and_keeps_what_was_planned(tmp_path: Path) -> None:
    row = published(
        step(("ab", 1)), step(("ok", 0), ("cde", -1), chosen=None), finish="found_error", planned=["ab", "cde", "f"]
    )
    answer = one(tmp_path, row)
    assert (answer.response, answer.label) == ("ab\ncde\nf", Label("wrong", "L1", "person", (3, 6)))


def test_the_published_layout_leaves_broken_problems_out(tmp_path: Path) -> None:
    imported = read(tmp_path, published(step(("ab", 1)), finish="bad_problem"))
    assert (imported.answers, len(imported.left_out)) == ([], 1)


def test_each_models_solution_is_an_answer_and_the_wrong_sum_its_error(tmp_path: Path) -> None:
    small, large, other = read(tmp_path, SOLUTIONS).answers
    assert [answer.model for answer in (small, large, other)] == ["small", "large", "other"]
    assert (small.response, small.label) == ("3 + 4 = 8", Label("wrong", "them", "rule", (8, 9)))
    assert (large.response, large.label) == ("3 + 4 = 7", Label("correct", "them", "rule"))
    assert other.label == Label("unplaced", "them", "rule"), "wrong, and nobody has said where"
    assert small.question() == large.question()


def test_a_reference_of_calculations_alone_is_none(tmp_path: Path) -> None:
    assert {answer.reference for answer in read(tmp_path, SOLUTIONS).answers} == {"7"}
    bare = SOLUTIONS | {"ground_truth": "<<3+4=7>>"}
    assert {answer.reference for answer in read(tmp_path, bare).answers} == {None}
    assert {answer.reference for answer in read(tmp_path, bare | {"answer": "7"}).answers} == {"7"}


def test_autojudges_important_tokens_are_wrong_here(tmp_path: Path) -> None:
    important, unimportant = read(tmp_path, MINED, MINED | {"important": False}).answers
    assert important.response == "It is 8"
    assert important.label == Label("wrong", "them", "mined", (5, 7), (5, 7))
    assert unimportant.label == Label("correct", "them", "mined", None, (5, 7))
    assert read(tmp_path, MINED | {"important": 1}).answers[0].label == important.label


@pytest.mark.parametrize(
    ("good", "changes", "told"),
    [
        (MISTAKE, {"mistake_index": 3}, "mistake_index is 3; it is null or the index of one of the 3 steps, from 0"),
        (MISTAKE, {"mistake_index": True}, "mistake_index is true"),
        (MISTAKE, {"steps": "ab"}, 'steps is "ab"; it is a list'),
        (MISTAKE, {"steps": ["ab", ""]}, 'steps[1] is ""; a step is text'),
        (MISTAKE, {"input": 3}, "the question is 3; it is text"),
        (MISTAKE, {"input": " "}, 'messages[0].content is " "'),
        (RATED, {"ratings": [1, 1]}, "ratings is [1, 1]; it is a list of one rating a step, and there are 3 steps"),
        (RATED, {"ratings": [1, 2, 1]}, "ratings[1] is 2; a rating is 1, 0, -1 or null"),
        (RATED, {"ratings": [1, True, 1]}, "ratings[1] is true"),
        (
            SOLUTIONS,
            {"large": {"is_correct": "yes", "solution": "7"}},
            'large.is_correct is "yes"; it is true or false',
        ),
        (SOLUTIONS, {"large": {"is_correct": True, "solution": 7}}, "large.solution is 7; it is text"),
        (MINED, {"important": "yes"}, 'important is "yes"; it is true or false'),
        (
            MINED,
            {"draft_token": 17},
            "draft_token is 17; it is text (only the prefix may be empty); decode the token ids",
        ),
        (published(step(("a", 1))), {"label": 3}, "label is 3; it is an object"),
        (
            published(step(("a", 1))),
            {"label": {"steps": [step(("a", 1), chosen=4)]}},
            "label.steps[0].chosen_completion is 4; it is null or the index of one of 1 completions",
        ),
    ],
)
def test_a_bad_row_is_refused_with_its_place(
    tmp_path: Path, good: dict[str, Any], changes: dict[str, Any], told: str
) -> None:
    assert told in refused(tmp_path, good, good | changes)


def test_a_missing_field_names_those_that_are_there(tmp_path: Path) -> None:
    bad = {key: value for key, value in MISTAKE.items() if key != "mistake_index"}
    assert "mistake_index is missing; the row has ['answer', 'input', 'steps', 'target']" in refused(
        tmp_path, MISTAKE, bad
    )


def test_an_unknown_format_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no known format has the fields \['x'\]; name one with --format \(answers, "):
        read(tmp_path, {"x": 1})


def test_a_licence_that_nobody_told_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"in\.jsonl:1: the licence is not in the file; .* give it with --licence"):
        read(tmp_path, MISTAKE, licence=None)


def test_the_user_names_the_model_where_the_file_does_not(tmp_path: Path) -> None:
    assert read(tmp_path, MISTAKE, model="M").answers[0].model == "M"
    assert read(tmp_path, SOLUTIONS, model="M").answers[0].model == "small"


# Rows and errors as the README beside the data says them; verdicts of solutions as counted in the file's own is_correct.
@pytest.mark.parametrize(
    ("file", "row_format", "rows", "answers", "errors"),
    [
        ("prm800k_slice.jsonl", "prm800k", 1339, 1339, 1110),
        ("bbm_multistep_arithmetic.jsonl", "mistake", 300, 300, 238),
        ("bbm_tracking_shuffled_objects.jsonl", "mistake", 300, 300, 260),
        ("bbm_word_sorting.jsonl", "mistake", 300, 300, 266),
        ("gsm8k_model_solutions.jsonl", "solutions", 1319, 1319 * 4, 3275),
    ],
)
def test_the_real_sets_import_whole(file: str, row_format: str, rows: int, answers: int, errors: int) -> None:
    path = JUDGE / file
    if not path.exists():
        pytest.skip(f"{path} is not here: the labelled sets are not part of the project")
    imported = read_labelled(path, "auto", LabelSource(path.stem, path.stem, "MIT"))
    assert imported.format == row_format
    assert len(path.read_text().splitlines()) == rows
    assert (len(imported.answers), imported.left_out) == (answers, [])
    labels = [answer.label for answer in imported.answers if answer.label is not None]
    assert sum(label.verdict != "correct" for label in labels) == errors
    assert len({(answer.id) for answer in imported.answers}) == answers
    if row_format != "solutions":
        assert all(label.verdict != "unplaced" for label in labels)

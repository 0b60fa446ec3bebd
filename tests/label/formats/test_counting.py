"""From which number a file counts its steps: what decides it, what leaves it in doubt, and that nothing is read one step off."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from labelled_files import read_labelled

from draftsmith.label.formats.counting import StepNumber, counting
from draftsmith.label.store.label_source import LabelSource

STEPS = ["s0", "s1", "s2", "s3"]
DOUBT = r"may count its steps from 0 or from 1: .*; say --first_step zero if .*, else --first_step one"


def bench(*labels: int | None, **changes: Any) -> list[dict[str, Any]]:
    rows = [
        {"generator": "m", "problem": "p", "steps": STEPS, "final_answer_correct": False, "label": n} for n in labels
    ]
    return [row | changes for row in rows]


def ends(*pairs: tuple[bool, int]) -> list[dict[str, Any]]:
    """ProcessBench's rows of a right or wrong end and a label."""
    return [row | {"final_answer_correct": right} for right, n in pairs for row in bench(n)]


def bare(*labels: int) -> list[dict[str, Any]]:
    return [{"question": "q", "steps": STEPS, "label": label} for label in labels]


def mistakes(*indices: int | None, answer: str = "x") -> list[dict[str, Any]]:
    return [{"input": "q", "steps": STEPS, "mistake_index": n, "target": "x", "answer": answer} for n in indices]


def judged(*pairs: tuple[str | None, Any]) -> list[dict[str, Any]]:
    """MR-GSM8K's rows of a verdict on the steps and the first wrong one."""
    row = {"question": "q", "model_output_steps": STEPS}
    field = "model_output_solution_correctness"
    return [row | {field: verdict, "model_output_solution_first_error_step": n} for verdict, n in pairs]


def listed(*numbers: list[int]) -> list[dict[str, Any]]:
    return [{"question": "q", "process": STEPS, "error_steps": given} for given in numbers]


def errors(folder: Path, rows: list[dict[str, Any]], first_step: Any = "auto") -> list[str]:
    """The wrong step of each answer, or its verdict."""
    file = folder / "in.jsonl"
    asked = [{name: f"{text}{at}" if name in ("problem", "question", "input") else text for name, text in row.items()}
             for at, row in enumerate(rows)]  # fmt: skip
    file.write_text("".join(json.dumps(row) + "\n" for row in asked))
    answers = read_labelled(file, "auto", LabelSource("in", "them", "MIT"), first_step).answers
    return [
        answer.label.verdict if answer.label.error is None else answer.response[slice(*answer.label.error)]
        for answer in answers
        if answer.label is not None
    ]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        pytest.param(
            bench(0, 0, 2, 1, final_answer_correct=True), ["s0", "s0", "s2", "s1"], id="right end, wrong step"
        ),
        pytest.param(mistakes(0, 0, 2), ["s0", "s0", "s2"], id="answer is the target"),
        pytest.param(bench(0, 2, 4, -1), ["s0", "s2", "correct"], id="one number too high"),
        pytest.param(mistakes(0, 3, None, answer="y"), ["s0", "s3", "correct"], id="as published"),
        pytest.param(
            ends((True, 0), (True, 0), (False, 4), (False, 2)), ["correct", "correct", "s3", "s1"], id="0 is right"
        ),
        pytest.param(bare(1, 4, 2), ["s0", "s3", "s1"], id="never 0"),
        pytest.param(
            judged(("correct", 0), ("correct", 0), ("correct", "N/A"), ("wrong", 2)),
            ["correct", "correct", "correct", "s1"],
            id="0 and null for none",
        ),
        pytest.param(
            judged(("wrong", 2), ("correct", "N/A"), ("wrong", 4)), ["s1", "correct", "s3"], id="as published"
        ),
        pytest.param(judged(("wrong", 0), ("wrong", 0), ("correct", "N/A")), ["s0", "s0", "correct"], id="wrong at 0"),
        pytest.param(judged(("wrong", 0), ("wrong", 4)), ["unplaced", "s3"], id="a wrong answer without a step"),
        pytest.param(listed([0], [0, 2], [3]), ["s0", "s0", "s3"], id="lists with 0"),
        pytest.param(listed([1, 4], [2], []), ["s0", "s1", "correct"], id="lists as published"),
    ],
)
def test_the_rows_show_from_which_number_a_file_counts(
    tmp_path: Path, rows: list[dict[str, Any]], expected: list[str]
) -> None:
    assert errors(tmp_path, rows) == expected


@pytest.mark.parametrize(
    ("rows", "zero", "one"),
    [
        pytest.param(
            bare(0, 0, 0, 1, 2, 4),
            ["s0", "s0", "s0", "s1", "s2"],
            ["correct", "correct", "correct", "s0", "s1", "s3"],
            id="0 and the last, without a word on 0",
        ),
        pytest.param(
            bench(0, 0, 4, 4, final_answer_correct=None),
            ["s0", "s0"],
            ["correct", "correct", "s3", "s3"],
            id="two rows against ProcessBench",
        ),
        pytest.param(
            bench(0, 4, 4, 4, -1),
            ["s0", "correct"],
            ["correct", "s3", "s3", "s3", "correct"],
            id="most rows against it",
        ),
        pytest.param(
            ends((True, 0), (True, 0), (False, 1)),
            ["s0", "s0", "s1"],
            ["correct", "correct", "s0"],
            id="all right are 0",
        ),
        pytest.param(
            judged((None, 0), (None, 0), (None, None), (None, 2)),
            ["s0", "s0", "correct", "s2"],
            ["correct", "correct", "correct", "s1"],
            id="0 and null without a verdict",
        ),
        pytest.param(
            judged(("wrong", 0), ("wrong", 2), ("wrong", 3), ("correct", "N/A")),
            ["s0", "s2", "s3", "correct"],
            ["unplaced", "s1", "s2", "correct"],
            id="a single wrong answer with 0",
        ),
        pytest.param(listed([0], [2], [3]), ["s0", "s2", "s3"], ["s1", "s2"], id="a single list with 0"),
        pytest.param(listed([0], [0], [4]), ["s0", "s0"], ["s3"], id="more lists with 0 than with the last"),
    ],
)
def test_a_file_in_doubt_is_refused_and_the_option_reads_it(
    tmp_path: Path, rows: list[dict[str, Any]], zero: list[str], one: list[str]
) -> None:
    with pytest.raises(ValueError, match=DOUBT):
        errors(tmp_path, rows)
    assert errors(tmp_path, rows, "zero") == zero
    assert errors(tmp_path, rows, "one") == one


PLACED = st.tuples(st.integers(0, 5), st.integers(6, 9))  # the index of a wrong step, and the number of steps
FAR = [(0, 6), (0, 7), (5, 6), (6, 7)]


@given(st.lists(PLACED), st.integers(0, 9), st.booleans(), st.booleans())
def test_a_file_that_counts_as_its_format_says_is_never_read_one_step_off(
    wrong: list[tuple[int, int]], num_right: int, has_verdicts: bool, zero_is_none: bool
) -> None:
    """Whatever first, last, right or wrong rows it lacks: it is read as it counts, or refused where a 0 may mean either."""
    for first in (0, 1):
        verdict = True if has_verdicts else None
        none = 0 if first == 1 and zero_is_none else -1
        rows = [StepNumber((index + first,), num_steps, verdict) for index, num_steps in wrong]
        rows += [StepNumber((none,), 6, False if has_verdicts else None)] * num_right
        assert counting(rows, first, "set", "auto", need=2).first == first


@given(st.lists(PLACED), st.integers(0, 9), st.sampled_from([0, 1]), st.sampled_from([0, 1]), st.booleans())
def test_a_file_with_its_first_and_last_step_wrong_is_never_read_one_step_off(
    wrong: list[tuple[int, int]], num_right: int, first: int, published: int, zero_is_none: bool
) -> None:
    """Whatever the format says, where verdicts say what a 0 means."""
    none = 0 if first == 1 and zero_is_none else -1
    rows = [StepNumber((index + first,), num_steps, True) for index, num_steps in [*wrong, *FAR]]
    rows += [StepNumber((none,), 6, False)] * num_right
    assert counting(rows, published, "set", "auto", need=2).first == first


@given(st.lists(PLACED), st.integers(0, 9), st.sampled_from([0, 1]), st.sampled_from([0, 1]), st.booleans())
def test_without_verdicts_it_is_refused_rather_than_read_one_step_off(
    wrong: list[tuple[int, int]], num_right: int, first: int, published: int, zero_is_none: bool
) -> None:
    none = 0 if first == 1 and zero_is_none else -1
    rows = [StepNumber((index + first,), num_steps) for index, num_steps in [*wrong, *FAR]]
    rows += [StepNumber((none,), 6)] * max(num_right, 1)
    try:
        assert counting(rows, published, "set", "auto", need=2).first == first
    except ValueError:
        assert first != published

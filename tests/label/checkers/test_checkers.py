import random
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from draftsmith.embedded.checker import check
from draftsmith.embedded.grading import grade
from draftsmith.embedded.problems import distinct_problems
from draftsmith.embedded.wordings import ALL_WORDINGS, render
from draftsmith.label.checkers.checkers import Checked, load_checker
from draftsmith.label.checkers.final_answers import chosen_letter, final_number
from draftsmith.label.checkers.sums_answers import judge, problem_of
from draftsmith.label.checkers.unit_tests import code_of, row_tests


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 1,234 eggs are left.", "1234"),
        ("-$1,234.50", "-2469/2"),
        ("$-6", "-6"),
        ("x = \u22123", "-3"),
        ("5.0.", "5"),
        ("50%", "50"),
        ("0.50", "1/2"),
        ("1 1/2 cups", "3/2"),
        (r"so \boxed{\frac{3}{4}}, not 9", "3/4"),
        (r"so \boxed{-1{,}234{,}567}.", "-1234567"),
        (r"12,\!000 of 3", "3"),
        (r"it is \boxed{\$12,\!000}", "12000"),
        (r"the point \boxed{(3,\!4)}", "4"),
        ("10-3=7", "7"),
        ("which leaves 7 - 3", "3"),
        ("12\n#### 5\nThat took 3 steps.", "5"),
        ("#### Step 2\nso it is 7", "7"),
        ("#### $1,000", "1000"),
        ("1e3", "1000"),
        ("9" * 50, None),
        ("1/0", None),
        ("none at all", None),
        ("", None),
    ],
)
def test_the_final_number_has_one_form_however_it_is_written(text: str, number: str | None) -> None:
    assert final_number(text) == number


@settings(deadline=None)
@given(st.integers(-(10**12), 10**12), st.sampled_from(["{}", "{:,}", "{}.0", "so #### {}", "{:,}.00%"]))
def test_every_whole_number_is_read_back(number: int, form: str) -> None:
    assert final_number("It was 3 + 4 = 7. " + form.format(number)) == str(number)


@settings(deadline=None)
@given(st.text())
def test_no_text_breaks_a_reader(text: str) -> None:
    final_number(text)
    chosen_letter(text, "ABCD")
    code_of(text)


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("The answer is (B).", "B"),
        ("**Answer:** D", "D"),
        ("I took A for right, but the correct answer is **C**", "C"),
        ("B", "B"),
        ("(B) because of\nA dog", "B"),
        ("The answer is a matter of taste", None),
        ("The answer is E", None),
        ("A. this\nB. that", None),
    ],
)
def test_the_letter_chosen_is_the_last_one_said_to_be_the_answer(text: str, letter: str | None) -> None:
    assert chosen_letter(text, "ABCD") == letter


@pytest.mark.parametrize(
    "text", ["answer" + " " * 20_000, "option" + "*" * 20_000 + "!", "\n" * 50_000, " \n" * 50_000]
)
def test_a_long_run_of_spaces_or_signs_takes_no_time(text: str) -> None:
    begun = time.monotonic()
    assert chosen_letter(text, "ABCDE") is None
    assert final_number(text) is None
    assert time.monotonic() - begun < 5


def test_final_number_compares_with_the_answer_or_the_reference() -> None:
    check_number = load_checker("final-number").check
    row: dict[str, Any] = {"messages": [{"role": "user", "content": "?"}], "reference": ["2+3 is 5.\n#### 5"]}
    assert check_number(row, "It is 5.00") == Checked("correct")
    assert check_number({"answer": 5}, "It is 6") == Checked("unplaced", None, "the number is 6, the reference 5")
    assert check_number({"answer": 5}, "no idea") == Checked("unplaced", None, "no number was found")


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("final-number", {}, "has no reference answer"),
        ("final-number", {"answer": True}, "has no reference answer"),
        ("final-number", {"answer": "five"}, "needs a number"),
        ("multiple-choice", {"answer": "F"}, "needs one of the letters A, B, C, D, E"),
        ("multiple-choice", {"answer": "C", "choices": ["x", "y"]}, "needs one of the letters A, B"),
        ("multiple-choice", {"answer": "A", "choices": "xy"}, "list of 2 to 26"),
        ("embedded", {"messages": [{"role": "user", "content": "Why?"}]}, "problems of the sums corpus"),
        ("unit-tests", {"tests": []}, "has no tests"),
    ],
)
def test_a_row_that_cannot_be_judged_by_is_refused(name: str, row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_checker(name).check(row, "")


def test_multiple_choice_knows_the_rows_own_choices() -> None:
    check_letter = load_checker("multiple-choice").check
    assert check_letter({"answer": "B"}, "The answer is B.").verdict == "correct"
    assert check_letter({"answer": "B", "choices": {"text": ["x", "y"]}}, "The answer is C.").verdict == "unplaced"
    assert check_letter({"answer": "B"}, "The answer is A.").note == "the letter is A, the reference B"


def test_every_problem_is_read_back_from_its_question_alone() -> None:
    for problem in distinct_problems("train", 400, 3):
        found = problem_of(problem.question)
        assert found is not None
        assert (found.template, found.numbers, found.answer) == (problem.template, problem.numbers, problem.answer)
        told = [(step.op, step.left, step.right, step.result, step.needs) for step in found.steps]
        assert told == [(step.op, step.left, step.right, step.result, step.needs) for step in problem.steps]


def test_the_embedded_checker_places_the_error_within_the_wrong_line() -> None:
    check_sums, rng = load_checker("embedded").check, random.Random(1)
    for problem in distinct_problems("test", 200, 1):
        row = {"messages": [{"role": "user", "content": problem.question}]}
        assert check_sums(row, render(problem, ALL_WORDINGS, rng)) == Checked("correct")
        text = grade(problem, ALL_WORDINGS, rng, wrong_share=1.0).solution.text
        line = check(problem, text).error_span
        found = check_sums(row, text)
        assert (found.verdict, line is None, found.error is None) == ("wrong", False, False)
        assert line is not None
        assert found.error is not None
        assert line[0] <= found.error[0] < found.error[1] <= line[1]
        assert " " not in text[slice(*found.error)]
    assert check_sums(row, "I do not know.") == Checked("unplaced", None, "no answer line was found")


@pytest.mark.parametrize(
    "marked",
    [
        "First, 54 minus 36 is 1[7] stickers left.",
        "First, 54 [plus] 36 is 90 stickers.",
        "First, taking 3[5] from 54 makes 19 stickers left.",
        "First, 54 - 36 = 18 stickers left.\nThen 18 + 2 = 2[1] stickers now.",
        "[1]8 + 2 = 20 stickers now.",
        "54 - 36 = 1 [stickers] left.",
        "54 - 36 = 18 stickers left.\n18 + 2 = 20 stickers now.\nThe answer is 2[2].\n#### 20",
        "54 - 36 = 18 stickers left.\n#### [1]8",
    ],
)
def test_an_error_stands_at_the_first_word_or_digit_where_a_line_leaves_every_right_one(marked: str) -> None:
    question = "Ivy had 54 stickers and sold 36. Then Lily gave Ivy 2 more. How many stickers does Ivy have now?"
    problem = problem_of(question)
    assert problem is not None
    start, end = marked.index("["), marked.index("]") - 1
    assert judge(problem, marked.replace("[", "").replace("]", "")).error_span == (start, end)


@pytest.mark.parametrize(
    ("response", "code"),
    [
        ("So:\n```python\nx = 1\n```\nprints\n```\n1\n```", "x = 1\n"),
        ("```\nx = 1\n```", "x = 1\n"),
        ("```py\nx = 1\n```\nand\n```Python\ny = 2\n```", "x = 1\n\ny = 2\n"),
        ("def f(x):\n    return x", "def f(x):\n    return x"),
        ("I cannot.", None),
        ("word", None),
    ],
)
def test_the_code_of_a_response_is_found(response: str, code: str | None) -> None:
    assert code_of(response) == code


def test_tests_are_found_under_the_names_that_sets_give_them() -> None:
    assert row_tests({"tests": "assert f(1)"}) == "assert f(1)"
    assert row_tests({"test_list": ["a", "b"]}) == "a\nb"
    assert row_tests({"test": "def check(f): ...", "entry_point": "g"}) == "def check(f): ...\ncheck(g)"


@pytest.mark.usefixtures("sandbox")
@pytest.mark.parametrize(
    ("response", "passed", "note"),
    [
        ("```python\ndef f(x):\n    return x * x\n```", True, ""),
        (
            "```python\ndef f(x):\n    return x + 2\n```",
            False,
            "the tests failed with AssertionError at 'assert f(3) == 9'",
        ),
        ("```python\ndef f(:\n```", False, "the code failed with SyntaxError"),
        ("```python\nimport sys\nsys.exit(0)\n```", False, "the code failed with SystemExit: 0"),
        ("```python\nimport os\nos._exit(0)\n```", False, "the code ended itself (exit code 0)"),
        ("```python\nwhile True: pass\n```", False, "not done after 3 seconds"),
        ("I cannot.", False, "no Python code was found"),
    ],
)
def test_unit_tests_pass_only_when_the_tests_have_run_to_their_end(response: str, passed: bool, note: str) -> None:
    row = {"tests": ["assert f(2) == 4", "assert f(3) == 9"]}
    found = load_checker("unit-tests", timeout_s=3).check(row, response)
    assert found.verdict == ("correct" if passed else "unplaced")
    assert found.note.startswith(note)


def test_a_function_of_the_user_is_a_checker(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "from draftsmith.label.checkers.checkers import Checked\n"
        "def short(row, response):\n"
        "    return Checked('wrong', (0, 1)) if len(response) > row['most'] else Checked('correct')\n"
    )
    checker = load_checker(f"{path}:short")
    assert checker.check({"most": 2}, "abc") == Checked("wrong", (0, 1))
    assert checker.check({"most": 2}, "ab") == Checked("correct")
    with pytest.raises(ValueError, match="failed with KeyError: 'most'"):
        checker.check({}, "ab")
    path.write_text(path.read_text().replace("> row", ">= row"))
    assert load_checker(f"{path}:short").code != checker.code
    assert load_checker("draftsmith.label.checkers.final_answers:final_number").name.endswith(":final_number")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("final_number", "use one of final-number, multiple-choice, unit-tests, embedded"),
        ("nowhere.py:f", "nowhere.py is not a file"),
        ("no.such.module:f", "cannot be loaded"),
        ("draftsmith.label.schema:no_such", "has no function 'no_such'"),
    ],
)
def test_an_unknown_checker_is_one_clear_error(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_checker(spec)


def test_what_is_no_checked_is_refused() -> None:
    with pytest.raises(ValueError, match="a checker returns a Checked"):
        load_checker("builtins:isinstance").check({}, dict)  # type: ignore[arg-type]

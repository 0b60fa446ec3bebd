"""The checker against right, corrupted and senseless texts, and graded solutions against the checker."""

import itertools
import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from draftsmith.embedded import ALL_WORDINGS, TARGET_STYLE, Problem, Step, check, sample_problems
from draftsmith.embedded.checker import SaidStep, Verdict, read_step
from draftsmith.embedded.grading import RIGHT_VERDICT, corrupt_step, grade
from draftsmith.embedded.wordings import STEP_WORDINGS, word_steps

# 3 jars of 4, 2 bags of 5: independent products, then their sum.
SHOP = Problem(
    "shop/0",
    "shop",
    (3, 4, 2, 5),
    "3 jars of 4 pens and 2 bags of 5 pens. How many pens?",
    (Step("*", 3, 4, 12, "pens"), Step("*", 2, 5, 10, "pens"), Step("+", 12, 10, 22, "pens in all", (0, 1))),
    22,
)
RIGHT = "First, 3 * 4 = 12 pens.\nThen 2 times 5 is 10 pens.\nSo 12 and 10 make 22 pens in all.\n#### 22"


def span_of(text: str, line: str) -> tuple[int, int]:
    return text.index(line), text.index(line) + len(line)


def test_a_right_solution_has_its_answer_and_no_error() -> None:
    assert check(SHOP, RIGHT) == Verdict(22, True, None)


def test_independent_steps_may_come_in_another_order_and_operands_may_swap() -> None:
    assert check(SHOP, "5 * 2 = 10 pens.\n4 lots of 3 make 12 pens.\n10 + 12 = 22 pens.\n#### 22").error_span is None


@pytest.mark.parametrize(
    "line",
    [
        "So 12 and 10 make 23 pens in all.",  # wrong arithmetic
        "So 12 - 10 = 2 pens in all.",  # right arithmetic, no step of this problem
        "So 12 and 12 make 24 pens in all.",  # an operand that is not the step's
        "So 12 and 10 make about 22.5 pens.",  # no number of the corpus
        "The answer is 23.",  # a closing with another number
        "I think 7 of them.",  # digits that say nothing
    ],
)
def test_the_first_wrong_line_is_the_error(line: str) -> None:
    text = f"3 * 4 = 12 pens.\n  2 * 5 = 10 pens.\n  {line} \nThen 1 + 1 = 3 pens.\n#### 22"
    assert check(SHOP, text) == Verdict(22, True, span_of(text, line))


def test_a_step_told_before_what_it_needs_is_wrong() -> None:
    text = "3 * 4 = 12 pens.\n12 + 10 = 22 pens in all.\n2 * 5 = 10 pens.\n#### 22"
    assert check(SHOP, text).error_span == span_of(text, "12 + 10 = 22 pens in all.")


def test_a_wrong_answer_is_the_error_where_all_steps_are_right() -> None:
    text = RIGHT.replace("#### 22", "#### 32")
    assert check(SHOP, text) == Verdict(32, False, span_of(text, "#### 32"))


def test_words_without_digits_repeated_steps_and_text_after_the_answer_are_no_error() -> None:
    text = "Let us see.\n" + RIGHT.replace("\n#### ", "\n3 * 4 = 12 pens.\n#### ") + "\n1 + 1 = 3 pens."
    assert check(SHOP, text) == Verdict(22, True, None)


def test_an_unfinished_last_line_is_not_judged_but_a_finished_one_is() -> None:
    assert check(SHOP, "3 * 4 = 12 pens.\nThen 2 times 5 is 1").error_span is None
    assert check(SHOP, "3 * 4 = 12 pens.\nThen 2 times 5 is 1\n").error_span is not None


@settings(max_examples=200, deadline=None)
@given(text=st.one_of(st.text(max_size=80), st.text(alphabet="0123456789 +-*/=#.\n٣-,apesgiv", max_size=80)))
def test_any_text_gets_a_verdict(text: str) -> None:
    verdict = check(SHOP, text)
    assert verdict.correct == (verdict.answer == 22)
    if verdict.error_span is not None:
        start, end = verdict.error_span
        assert 0 <= start < end <= len(text)
        assert "\n" not in text[start:end]


def test_numbers_too_long_to_be_meant_are_wrong_and_harmless() -> None:
    text = f"3 * 4 = {'9' * 10_000} pens.\n#### {'9' * 10_000}"
    assert check(SHOP, text) == Verdict(None, False, (0, text.index("\n")))


def test_every_wording_is_read_back_as_its_own_operation() -> None:
    for op, wordings in STEP_WORDINGS.items():
        for wording in wordings:
            line = "Now " + wording.format(a=8, b=2, c=5, w="pens in all")
            assert read_step(line) == SaidStep(op, 8, 2, 5)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), data=st.data())
def test_any_single_corrupted_number_of_a_step_is_found_at_that_step(seed: int, data: st.DataObject) -> None:
    problem = next(sample_problems("train", seed))
    solution = word_steps(problem.steps, ALL_WORDINGS, random.Random(seed))
    start, end = solution.step_spans[data.draw(st.integers(0, len(solution.step_spans) - 1))]
    numbers = list(re.finditer(r"\d+", solution.text[start:end]))[:3]
    number = data.draw(st.sampled_from(numbers))
    wrong = data.draw(st.integers(0, 250).filter(lambda value: value != int(number.group())))
    line = solution.text[start : start + number.start()] + str(wrong) + solution.text[start + number.end() : end]
    text = solution.text[:start] + line + solution.text[end:]
    verdict = check(problem, text)
    assert verdict.error_span == (start, start + len(line))
    assert verdict.correct, "the answer line is untouched"


def test_a_corrupted_solution_differs_in_the_named_step_and_is_carried_on_or_not() -> None:
    carried = kept = 0
    rng = random.Random(0)
    for problem in itertools.islice(sample_problems("train", 1), 300):
        steps = corrupt_step(problem, 0, rng)
        assert steps[0] != problem.steps[0]
        assert len(steps) == len(problem.steps)
        carried += steps[-1].result != problem.answer
        kept += steps[-1].result == problem.answer
    assert min(carried, kept) > 60


def test_verdicts_name_the_step_at_which_the_checker_sees_the_first_error() -> None:
    rng = random.Random(0)
    wrong = 0
    for problem in itertools.islice(sample_problems("train", 2), 300):
        graded = grade(problem, TARGET_STYLE, rng)
        span = check(problem, graded.solution.text).error_span
        if graded.wrong_step is None:
            assert (span, graded.verdict) == (None, RIGHT_VERDICT)
        else:
            wrong += 1
            assert span == graded.solution.step_spans[graded.wrong_step - 1]
            assert graded.verdict == f"Check: wrong at step {graded.wrong_step}."
    assert 100 < wrong < 200

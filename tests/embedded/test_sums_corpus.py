"""Sums problems and their wordings: size, arithmetic, splits, freedom of phrasing."""

import itertools
import json
import random
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from draftsmith.embedded import ALL_WORDINGS, DRAFT_STYLE, TARGET_STYLE, check, render, sample_problems, write_prompts
from draftsmith.embedded.problems import SPLITS, Problem, compute, distinct_problems, parse_plan, split_of
from draftsmith.embedded.templates import TEMPLATES
from draftsmith.embedded.wordings import CLOSINGS, LEADS, STEP_WORDINGS


def problems(split: str, count: int, seed: int = 0) -> list[Problem]:
    return list(itertools.islice(sample_problems(split, seed), count))  # type: ignore[arg-type]


def test_there_are_forty_structures_of_two_to_five_steps_over_all_four_operations() -> None:
    plans = [parse_plan(template) for template in TEMPLATES]
    assert len({template.name for template in TEMPLATES}) == len(TEMPLATES) >= 40
    assert {len(plan) for plan in plans} == {2, 3, 4, 5}
    assert {step.op for plan in plans for step in plan} == {"+", "-", "*", "/"}


def test_every_structure_is_drawn_in_every_split() -> None:
    for split in SPLITS:
        assert {problem.template for problem in problems(split, 600)} == {template.name for template in TEMPLATES}


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_steps_are_right_use_known_numbers_and_end_in_the_answer(seed: int) -> None:
    for problem in problems("train", 20, seed):
        known = set(problem.numbers) | {2, 3, 4, 5}
        for index, step in enumerate(problem.steps):
            assert step.is_right()
            assert 2 <= step.result <= 120
            assert {step.left, step.right} <= known
            assert all(need < index for need in step.needs)
            known.add(step.result)
        assert problem.answer == problem.steps[-1].result
        assert all(str(number) in problem.question for number in problem.numbers)
        assert "{" not in problem.question + problem.steps[0].label
        assert "[" not in problem.question


def test_the_same_seed_draws_the_same_problems_and_another_seed_others() -> None:
    assert problems("test", 30, seed=4) == problems("test", 30, seed=4)
    assert problems("test", 30, seed=4) != problems("test", 30, seed=5)


def test_no_pair_of_structure_and_numbers_is_in_two_splits() -> None:
    found = {split: {(p.template, p.numbers) for p in problems(split, 900)} for split in SPLITS}
    for one, other in itertools.combinations(SPLITS, 2):
        assert found[one].isdisjoint(found[other])


def test_numbers_held_out_for_the_test_are_held_out_of_every_structure() -> None:
    train = {p.numbers for p in problems("train", 5000)}
    for problem in problems("test", 1000):
        assert problem.numbers not in train
        assert problem.split == split_of(problem.numbers) == "test"


def test_most_number_combinations_belong_to_the_train_split() -> None:
    counts = Counter(split_of((a, b, c)) for a in range(2, 22) for b in range(2, 22) for c in range(2, 22))
    assert 0.88 < counts["train"] / 8000 < 0.92
    assert min(counts["validation"], counts["test"]) > 200


def test_an_unknown_split_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"'dev'.*train, validation, test"):
        next(sample_problems("dev", 0))  # type: ignore[arg-type]


@pytest.mark.parametrize(("op", "left", "right", "result"), [("/", 6, 3, 2), ("/", 7, 3, None), ("/", 7, 0, None)])
def test_a_division_counts_only_where_it_comes_out_even(op: str, left: int, right: int, result: int | None) -> None:
    assert compute(op, left, right) == result  # type: ignore[arg-type]


def test_one_solution_can_be_said_in_hundreds_of_ways() -> None:
    assert all(len(set(wordings)) >= 4 for wordings in STEP_WORDINGS.values())
    problem = next(p for p in problems("train", 50) if len(p.steps) == 3)
    rng = random.Random(0)
    assert len({render(problem, ALL_WORDINGS, rng) for _ in range(400)}) > 300


def test_wordings_of_the_steps_of_one_solution_are_chosen_independently() -> None:
    problem = next(p for p in problems("train", 50) if [s.op for s in p.steps] == ["*", "*", "+"])
    seen: dict[bool, Counter[bool]] = defaultdict(Counter)
    rng = random.Random(0)
    for _ in range(600):
        lines = render(problem, ALL_WORDINGS, rng).split("\n")
        seen["times" in lines[0]]["times" in lines[1]] += 1
    shares = [seen[first][True] / seen[first].total() for first in (True, False)]
    assert abs(shares[0] - shares[1]) < 0.15


def test_the_house_styles_differ_in_every_table() -> None:
    for op in STEP_WORDINGS:
        assert TARGET_STYLE.steps[op] != DRAFT_STYLE.steps[op]
    for place in LEADS:
        assert TARGET_STYLE.leads[place] != DRAFT_STYLE.leads[place]
    assert CLOSINGS[TARGET_STYLE.closing] != CLOSINGS[DRAFT_STYLE.closing]


def test_a_house_style_is_a_strong_preference_and_not_a_rule() -> None:
    problem = next(p for p in problems("train", 50) if len(p.steps) == 3)
    rng = random.Random(0)
    said = Counter(render(problem, TARGET_STYLE, rng) for _ in range(300))
    assert 0.6 < said.most_common(1)[0][1] / 300 < 0.98


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_every_rendering_in_every_style_checks_right(seed: int) -> None:
    rng = random.Random(seed)
    for problem in problems("validation", 5, seed):
        for style in (ALL_WORDINGS, TARGET_STYLE, DRAFT_STYLE):
            text = render(problem, style, rng)
            verdict = check(problem, text)
            assert text.endswith(f"#### {problem.answer}")
            assert (verdict.answer, verdict.correct, verdict.error_span) == (problem.answer, True, None)


def test_prompt_files_hold_distinct_problems_of_their_split(tmp_path: Path) -> None:
    write_prompts(tmp_path / "prompts.jsonl", "test", 40, seed=3)
    rows = [json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    wanted = distinct_problems("test", 40, seed=3)
    assert len({row["messages"][0]["content"] for row in rows}) == 40
    assert [row["answer"] for row in rows] == [problem.answer for problem in wanted]
    assert rows[0] == {
        "id": wanted[0].id,
        "messages": [{"role": "user", "content": wanted[0].question}],
        "split": "test",
        "source": f"sums/{wanted[0].template}",
        "answer": wanted[0].answer,
    }


def test_an_empty_prompt_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="count is 0"):
        write_prompts(tmp_path / "prompts.jsonl", "test", 0)

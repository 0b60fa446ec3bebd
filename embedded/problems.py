"""Sums problems: drawing numbers and words for a template, and the split a problem belongs to.

Owns ``Step``, ``Problem`` and the seeded sampler. Does not know how a solution is worded or checked.

Splits. The split is a hash of the problem's given numbers alone, so a combination of numbers held out for the test is
held out of *every* structure, and no (structure, numbers) pair can be in two splits.
"""

import hashlib
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from draftsmith.embedded.templates import CONTAINERS, NAMES, TEMPLATES, THINGS, Template

Op = Literal["+", "-", "*", "/"]
Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")

_MAX_RESULT = 120
_ATTEMPTS = 5000
_STEP_FORM = re.compile(r"(#?\w)([-+*/])(#?\w) (.+)")
_CHOICE_FORM = re.compile(r"\[([^]]*)\]")


@dataclass(frozen=True)
class Step:
    """``left op right = result``, counting ``label``; ``needs`` are the indices of the steps whose results it uses."""

    op: Op
    left: int
    right: int
    result: int
    label: str
    needs: tuple[int, ...] = ()

    def is_right(self) -> bool:
        """Whether the arithmetic holds; a division must come out even."""
        return compute(self.op, self.left, self.right) == self.result


@dataclass(frozen=True)
class Problem:
    """A word problem and its solution. ``numbers`` are the given numbers in the template's order."""

    id: str
    template: str
    numbers: tuple[int, ...]
    question: str
    steps: tuple[Step, ...]
    answer: int

    @property
    def split(self) -> Split:
        return split_of(self.numbers)


@dataclass(frozen=True)
class _StepPlan:
    op: Op
    left: str
    right: str
    label: str


def compute(op: Op, left: int, right: int) -> int | None:
    """``left op right``, or None where it is not a whole number."""
    if op == "+":
        return left + right
    if op == "-":
        return left - right
    if op == "*":
        return left * right
    return left // right if right != 0 and left % right == 0 else None


def split_of(numbers: tuple[int, ...]) -> Split:
    """The split that owns this combination of given numbers: 90 % train, 4 % validation, 6 % test."""
    digest = hashlib.sha256(repr(tuple(numbers)).encode()).digest()
    bucket = int.from_bytes(digest[:4], "big") % 100
    if bucket < 90:
        return "train"
    return "validation" if bucket < 94 else "test"


def parse_plan(template: Template) -> tuple[_StepPlan, ...]:
    """The template's steps with operands still symbolic."""
    plans = []
    for part in template.steps.split(";"):
        match = _STEP_FORM.fullmatch(part.strip())
        assert match is not None, f"template {template.name}: step {part!r} is not 'operand op operand label'"
        left, op, right, label = match.groups()
        plans.append(_StepPlan(op, left, right, label))  # type: ignore[arg-type]
    return tuple(plans)


def sample_problems(split: Split, seed: int) -> Iterator[Problem]:
    """An endless stream of problems of one split, the same for the same seed. Templates are drawn evenly.

    Raises:
        ValueError: the split is unknown.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is not known; use one of {', '.join(SPLITS)}")
    rng = random.Random(f"sums/{split}/{seed}")
    plans = [parse_plan(template) for template in TEMPLATES]
    while True:
        index = rng.randrange(len(TEMPLATES))
        drawn = _draw_numbers(plans[index], split, rng)
        if drawn is not None:
            yield _problem_of(TEMPLATES[index], plans[index], drawn, rng)


def distinct_problems(split: Split, count: int, seed: int) -> list[Problem]:
    """The first ``count`` problems of the stream whose questions differ."""
    by_question: dict[str, Problem] = {}
    for problem in sample_problems(split, seed):
        if len(by_question) >= count:
            break
        by_question.setdefault(problem.question, problem)
    return list(by_question.values())


def _draw_numbers(plans: tuple[_StepPlan, ...], split: Split, rng: random.Random) -> tuple[int, ...] | None:
    """Numbers of the wanted split whose every step stays in the corpus's range, or None after many misses."""
    ranges = _number_ranges(plans)
    for _ in range(_ATTEMPTS):
        numbers = tuple(rng.randint(low, high) for low, high in ranges)
        if _steps_fit(plans, numbers) and split_of(numbers) == split:
            return numbers
    return None


def _number_ranges(plans: tuple[_StepPlan, ...]) -> list[tuple[int, int]]:
    """Factors and divisors are small; a number divided at once, or one a result is taken from, may be large."""
    highs: dict[str, int] = {}
    for plan in plans:
        for side, operand in (("left", plan.left), ("right", plan.right)):
            if operand.isdigit():
                highs.setdefault(operand, _highest(plan, side, operand))
    return [(2, highs[str(index)]) for index in range(len(highs))]


def _highest(plan: _StepPlan, side: str, operand: str) -> int:
    other = plan.right if side == "left" else plan.left
    if plan.op == "*":
        return 12 if operand < other or other.isalpha() or other.startswith("#") else 9
    if plan.op == "/":
        return 90 if side == "left" else 9
    if plan.op == "-" and side == "left":
        return 100 if other.isalpha() else 60
    return 40


def _steps_fit(plans: tuple[_StepPlan, ...], numbers: tuple[int, ...]) -> bool:
    results: list[int] = []
    for plan in plans:
        left, right = _value(plan.left, numbers, results), _value(plan.right, numbers, results)
        result = compute(plan.op, left, right)
        if result is None or not 2 <= result <= _MAX_RESULT:
            return False
        if plan.op == "*" and (min(left, right) > 9 or max(left, right) > 20):
            return False
        if plan.op == "/" and (right > 9 or result > 45 or (right > 2 and result > 20)):
            return False
        results.append(result)
    return True


def _value(operand: str, numbers: tuple[int, ...], results: list[int]) -> int:
    if operand.startswith("#"):
        return int(operand[1:])
    return numbers[int(operand)] if operand.isdigit() else results[ord(operand) - ord("a")]


def _problem_of(
    template: Template, plans: tuple[_StepPlan, ...], numbers: tuple[int, ...], rng: random.Random
) -> Problem:
    words = _draw_words(rng)
    shown = {str(index): str(number) for index, number in enumerate(numbers)}
    story = _CHOICE_FORM.sub(lambda match: rng.choice(match.group(1).split("|")), template.story)
    question = _fill(story, words | shown)
    results: list[int] = []
    steps: list[Step] = []
    for plan in plans:
        left, right = _value(plan.left, numbers, results), _value(plan.right, numbers, results)
        result = compute(plan.op, left, right)
        assert result is not None
        results.append(result)
        needs = tuple(ord(operand) - ord("a") for operand in (plan.left, plan.right) if operand.isalpha())
        steps.append(Step(plan.op, left, right, result, _fill(plan.label, words), needs))
    digest = hashlib.sha256(question.encode()).hexdigest()[:8]
    identity = f"{template.name}/{'-'.join(map(str, numbers))}/{digest}"
    return Problem(identity, template.name, numbers, question, tuple(steps), results[-1])


def _draw_words(rng: random.Random) -> dict[str, str]:
    people = rng.sample(NAMES, 3)
    things = rng.sample(THINGS, 2)
    container, containers = rng.choice(CONTAINERS)
    return dict(zip("ABCxy", people + things, strict=True)) | {"k": container, "ks": containers}


def _fill(text: str, values: dict[str, str]) -> str:
    return re.sub(r"\{(\w+)\}", lambda match: values[match.group(1)], text)

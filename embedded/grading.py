"""Graded solutions: a solution, right or with one corrupted step, and the verdict that names the wrong step.

They give a model a reason to recognise an error where it stands. Owns the corruption of steps and the wording of
requests and verdicts. Does not know tokens or training.
"""

import random
from dataclasses import dataclass, replace

from draftsmith.embedded.checker import check
from draftsmith.embedded.problems import Problem, Step, compute
from draftsmith.embedded.wordings import Solution, Style, word_steps

REQUESTS = ("Check it.", "Is that right?", "Please check.", "Any mistake?")
RIGHT_VERDICT = "Check: all right."
_ATTEMPTS = 20


@dataclass(frozen=True)
class GradedSolution:
    """A worded solution and its verdict. ``wrong_step`` counts its steps from 1; None where all are right."""

    solution: Solution
    request: str
    verdict: str
    wrong_step: int | None


def grade(problem: Problem, style: Style, rng: random.Random, wrong_share: float = 0.5) -> GradedSolution:
    """A solution that is wrong in one step with probability ``wrong_share``, worded in ``style``, with its verdict.

    The verdict is the checker's: the step named is the one at which ``check`` sees the first error.
    """
    request = rng.choice(REQUESTS)
    if rng.random() < wrong_share:
        for _ in range(_ATTEMPTS):
            solution = word_steps(corrupt_step(problem, rng.randrange(len(problem.steps)), rng), style, rng)
            span = check(problem, solution.text).error_span
            if span in solution.step_spans:
                wrong_step = solution.step_spans.index(span) + 1
                return GradedSolution(solution, request, f"Check: wrong at step {wrong_step}.", wrong_step)
    return GradedSolution(word_steps(problem.steps, style, rng), request, RIGHT_VERDICT, None)


def corrupt_step(problem: Problem, index: int, rng: random.Random) -> tuple[Step, ...]:
    """The problem's steps with step ``index`` (from 0) made wrong: its result miscalculated, or an operand misread.

    Half the time the later steps continue from the wrong result, where that gives whole positive numbers; else they are
    the true ones, as if the wrong result had never been written.
    """
    step = problem.steps[index]
    wrong = _misread(step, rng) if rng.random() < 0.4 else None
    steps = list(problem.steps)
    steps[index] = wrong if wrong is not None else replace(step, result=_miscalculate(step.result, rng))
    if rng.random() < 0.5:
        return tuple(steps)
    carried = _carry_on(problem.steps, steps, index)
    return carried if carried is not None else tuple(steps)


def _miscalculate(result: int, rng: random.Random) -> int:
    """A near miss, a slip of ten, or two digits swapped."""
    swapped = int(str(result)[::-1])
    candidates = [result + delta for delta in (-10, -3, -2, -1, 1, 2, 3, 10)] + [swapped]
    return rng.choice([number for number in candidates if number > 0 and number != result])


def _misread(step: Step, rng: random.Random) -> Step | None:
    """The step with one operand off and its arithmetic right, or None where that gives no whole positive number."""
    shift = rng.choice((-10, -2, -1, 1, 2, 10))
    left, right = (step.left + shift, step.right) if rng.random() < 0.5 else (step.left, step.right + shift)
    result = compute(step.op, left, right) if min(left, right) > 0 else None
    return replace(step, left=left, right=right, result=result) if result is not None and result > 0 else None


def _carry_on(true_steps: tuple[Step, ...], steps: list[Step], index: int) -> tuple[Step, ...] | None:
    """Later steps recalculated from the results as written, or None where one would not be whole and positive."""
    carried = steps[: index + 1]
    for step in true_steps[index + 1 :]:
        left, right = step.left, step.right
        for need in step.needs:
            if left == true_steps[need].result:
                left = carried[need].result
            elif right == true_steps[need].result:
                right = carried[need].result
        result = compute(step.op, left, right)
        if result is None or result <= 0:
            return None
        carried.append(replace(step, left=left, right=right, result=result))
    return tuple(carried)

"""The sums corpus seen from outside: the problem behind a question, and the exact place of the first error in an answer.

Owns reading a problem back from its question, and narrowing a wrong line to the word or digit where it leaves every right line.
The embedded checker decides what is right. Knows no files and no models.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import count, takewhile

from draftsmith.embedded.checker import Verdict, check, read_step
from draftsmith.embedded.problems import Problem, Step, compute, parse_plan
from draftsmith.embedded.templates import TEMPLATES, Template
from draftsmith.embedded.wordings import STEP_WORDINGS

Span = tuple[int, int]

_SLOT = re.compile(r"\{(\w+)\}|\[([^]]*)\]")
_WORD_SLOT = re.compile(r"\{(\w+)\}")
_DIGITS = re.compile(r"\d+")
_PIECE = re.compile(r"\d|[^\W\d]+|[^\w\s]")  # digit by digit: "56" for "53" goes wrong at the 6


def problem_of(question: str) -> Problem | None:
    """The problem that a question of the corpus asks, or None for any other text.

    Its steps say what they count, as the solutions of the corpus do. The checker judges numbers and operations only.

    Args:
        question: text.
    """
    for index, form in enumerate(_forms()):
        match = form.fullmatch(question.strip())
        if match is not None:
            said = {name: value for name, value in match.groupdict().items() if value is not None}
            given = {name[1:]: int(value) for name, value in said.items() if name.startswith("n")}
            numbers = tuple(given[str(place)] for place in range(len(given)))
            words = {name.partition("_")[2]: value for name, value in said.items() if name.startswith("w")}
            return _solved(TEMPLATES[index], numbers, words, question)
    return None


def judge(problem: Problem, text: str) -> Verdict:
    """The embedded checker's verdict, its span narrowed to the first wrong word, digit or sign of the wrong line.

    A line goes wrong where it stops being the beginning of any right line in its wording. In "Then 7 - 2 = 6 pens." after "So 7 ..." that
    is the 6. Where the step should have been a sum, it is the minus. A line that cannot be read so far keeps its whole span.

    Args:
        problem: from `problem_of`.
        text: the answer.
    """
    verdict = check(problem, text)
    if verdict.error_span is None:
        return verdict
    start, end = verdict.error_span
    narrow = _departure(problem, _steps_done(problem, text[:start]), text[start:end])
    if narrow is None:
        return verdict
    return Verdict(verdict.answer, verdict.correct, (start + narrow[0], start + narrow[1]))


def _departure(problem: Problem, done: set[int], line: str) -> Span | None:
    """Where a wrong line leaves the right ones, within the line."""
    said = read_step(line)
    if said is None:
        numbers = list(_DIGITS.finditer(line))
        return _wrong_digit(numbers[0], str(problem.answer)) if len(numbers) == 1 else None
    first = _opening(line)
    if first is None:
        return None
    right = [words for step in problem.steps if set(step.needs) <= done for words in _said_rightly(step)]
    pieces = list(_PIECE.finditer(line, first))
    shared = max((_num_shared([piece[0].lower() for piece in pieces], words) for words in right), default=0)
    return pieces[shared].span() if shared < len(pieces) else None


def _wrong_digit(number: re.Match[str], right: str) -> Span:
    """The first digit that differs from the right number. All of a number that only lacks its end, or is right where none should be."""
    shared = _num_shared(list(number[0]), list(right))
    return (number.start() + shared, number.start() + shared + 1) if shared < len(number[0]) else number.span()


def _opening(line: str) -> int | None:
    """Where the words of a step begin, behind the words that lead to it."""
    return min((match.start() for form in _wording_forms() if (match := form.search(line)) is not None), default=None)


def _steps_done(problem: Problem, before: str) -> set[int]:
    """The steps in the right lines before the wrong one."""
    done: set[int] = set()
    for line in before.split("\n"):
        said = read_step(line)
        for index, step in enumerate(problem.steps):
            same = said is not None and (said.op, said.result) == (step.op, step.result)
            if said is None or not same or not set(step.needs) <= done:
                continue
            if sorted((said.left, said.right)) == sorted((step.left, step.right)):
                done.add(index)
    return done


def _said_rightly(step: Step) -> list[list[str]]:
    """A step in every wording, as pieces in small letters; sums and products with their operands in either order."""
    orders = [(step.left, step.right)]
    if step.op in "+*":
        orders.append((step.right, step.left))
    return [
        _PIECE.findall(wording.removesuffix(" {w}.").format(a=left, b=right, c=step.result).lower())
        for wording in STEP_WORDINGS[step.op]
        for left, right in orders
    ]


def _num_shared(first: list[str], second: list[str]) -> int:
    """How many pieces two lists have in common from the start."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


@cache
def _wording_forms() -> tuple[re.Pattern[str], ...]:
    forms = []
    for wording in (wording for wordings in STEP_WORDINGS.values() for wording in wordings):
        words = re.escape(wording.removesuffix(" {w}."))
        for slot in "abc":
            words = words.replace(re.escape("{" + slot + "}"), r"\d+")
        forms.append(re.compile(rf"(?<!\w){words}", re.IGNORECASE))
    return tuple(forms)


@cache
def _forms() -> tuple[re.Pattern[str], ...]:
    """One pattern a template: its numbers and words as named groups, any word for a person or thing, each choice of words."""
    return tuple(re.compile(_pattern(template.story, count())) for template in TEMPLATES)


def _pattern(story: str, numbering: Iterator[int]) -> str:
    """Numbers are the groups n0, n1, ...; words are wN_A, wN_x, ..., where N tells the places of one word apart."""
    pattern, last = "", 0
    for slot in _SLOT.finditer(story):
        pattern += re.escape(story[last : slot.start()])
        name, choices = slot.groups()
        if choices is not None:
            pattern += "(?:" + "|".join(_pattern(choice, numbering) for choice in choices.split("|")) + ")"
        else:
            group = rf"(?P<n{name}>\d{{1,4}})" if name.isdigit() else rf"(?P<w{next(numbering)}_{name}>\w+)"
            pattern += group
        last = slot.end()
    return pattern + re.escape(story[last:])


def _solved(template: Template, numbers: tuple[int, ...], words: Mapping[str, str], question: str) -> Problem | None:
    """The problem with these numbers; None where a division does not come out."""
    steps: list[Step] = []
    for plan in parse_plan(template):
        needs = tuple(ord(operand) - ord("a") for operand in (plan.left, plan.right) if operand.isalpha())
        left, right = (_operand(operand, numbers, steps) for operand in (plan.left, plan.right))
        result = compute(plan.op, left, right)
        if result is None:
            return None
        label = _WORD_SLOT.sub(lambda slot: words.get(slot[1], ""), plan.label)
        steps.append(Step(plan.op, left, right, result, label, needs))
    return Problem(question, template.name, numbers, question, tuple(steps), steps[-1].result)


def _operand(operand: str, numbers: tuple[int, ...], steps: list[Step]) -> int:
    """`#2` is the constant 2, `0` the first given number, `a` the first step's result."""
    if operand.startswith("#"):
        return int(operand[1:])
    return numbers[int(operand)] if operand.isdigit() else steps[ord(operand) - ord("a")].result

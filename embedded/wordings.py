"""How a solution of a sums problem words its steps: wordings, connectives, closing sentences, and the styles that prefer
some of them.

Owns the phrases and ``render``. Does not know which problems exist, and never checks a text (``checker`` reads the
same phrase tables, so that it can parse whatever ``render`` writes).
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from draftsmith.embedded.problems import Op, Problem, Step

Place = Literal["first", "middle", "last"]
Span = tuple[int, int]
"""Characters from the first up to and without the second."""

#: Phrase tables. ``a op b = c``; ``w`` says what ``c`` counts. Every phrase is written as it stands after a connective.
STEP_WORDINGS: dict[Op, tuple[str, ...]] = {
    "+": (
        "{a} + {b} = {c} {w}.",
        "adding {b} to {a} gives {c} {w}.",
        "{a} and {b} make {c} {w}.",
        "{a} plus {b} is {c} {w}.",
        "the sum of {a} and {b} is {c} {w}.",
    ),
    "-": (
        "{a} - {b} = {c} {w}.",
        "taking {b} from {a} makes {c} {w}.",
        "{a} less {b} gives {c} {w}.",
        "{a} minus {b} is {c} {w}.",
        "{b} off {a} leaves {c} {w}.",
    ),
    "*": (
        "{a} * {b} = {c} {w}.",
        "multiplying {a} by {b} gives {c} {w}.",
        "{a} lots of {b} make {c} {w}.",
        "{a} times {b} is {c} {w}.",
        "the product of {a} and {b} is {c} {w}.",
    ),
    "/": (
        "{a} / {b} = {c} {w}.",
        "splitting {a} by {b} gives {c} {w}.",
        "{a} over {b} makes {c} {w}.",
        "{a} divided by {b} is {c} {w}.",
        "sharing {a} by {b} yields {c} {w}.",
    ),
}
LEADS: dict[Place, tuple[str, ...]] = {
    "first": ("First, ", "To start, ", "At first ", "We see: ", ""),
    "middle": ("Then ", "Next, ", "After that, ", "Now ", ""),
    "last": ("Finally, ", "So ", "At last ", "In the end, ", ""),
}
CLOSINGS = ("The answer is {c}.", "That gives {c}.", "So we get {c}.", "It is {c}.", "")


@dataclass(frozen=True)
class Style:
    """A preference over wordings. Each choice is the preferred one with probability ``strength``, else any at all.

    ``steps``, ``leads``, ``closing`` are indices into the phrase tables. ``strength`` 0 is the style of all wordings,
    in which operands of sums and products and the order of independent steps are free too.
    """

    name: str
    strength: float
    steps: dict[Op, int] = field(default_factory=dict)
    leads: dict[Place, int] = field(default_factory=dict)
    closing: int = 0


ALL_WORDINGS = Style("all", 0.0)
TARGET_STYLE = Style(
    "target", 0.97, {"+": 0, "-": 1, "*": 0, "/": 1}, {"first": 0, "middle": 0, "last": 0}, closing=0
)  # fmt: skip
DRAFT_STYLE = Style(
    "draft", 0.97, {"+": 3, "-": 3, "*": 3, "/": 3}, {"first": 1, "middle": 1, "last": 1}, closing=1
)  # fmt: skip


@dataclass(frozen=True)
class Solution:
    """A worded solution. ``step_spans[i]`` are the characters of the i-th step line; ``order[i]`` the step it
    tells; ``foreign_spans`` what chooses another wording than the solution's own (``mixed_wordings``)."""

    text: str
    step_spans: tuple[Span, ...]
    order: tuple[int, ...]
    foreign_spans: tuple[Span, ...] = ()


@dataclass(frozen=True)
class Line:
    """A line of a solution; empty where a closing is left out. ``foreign_spans`` as in ``Solution``, from the line's start."""

    text: str
    foreign_spans: tuple[Span, ...] = ()


def render(problem: Problem, style: Style, rng: random.Random) -> str:
    """The problem's solution, worded in a style, one step a line, ending in ``#### answer``."""
    return word_steps(problem.steps, style, rng).text


def word_steps(steps: Sequence[Step], style: Style, rng: random.Random) -> Solution:
    """Says the given steps, right or wrong; the last step's result is the answer."""
    order = told_order(steps, style, rng)
    lines = [
        Line(word_step(steps[index], place_of(position, len(order)), style, rng))
        for position, index in enumerate(order)
    ]
    return joined(lines, order, Line(closing_of(style, rng).format(c=steps[-1].result)), steps[-1].result)


def joined(lines: Sequence[Line], order: tuple[int, ...], closing: Line, answer: int) -> Solution:
    """The solution of these lines, the closing and the answer."""
    spans, foreign_spans, start = [], [], 0
    for line in (*lines, closing):
        spans.append((start, start + len(line.text)))
        foreign_spans += [(start + first, start + end) for first, end in line.foreign_spans]
        start += len(line.text) + 1
    texts = [line.text for line in (*lines, closing) if line.text]
    return Solution("\n".join([*texts, f"#### {answer}"]), tuple(spans[: len(lines)]), order, tuple(foreign_spans))


def told_order(steps: Sequence[Step], style: Style, rng: random.Random) -> tuple[int, ...]:
    """The order in which a style tells the steps."""
    return _free_order(steps, rng) if rng.random() >= style.strength else tuple(range(len(steps)))


def place_of(position: int, count: int) -> Place:
    """Where a step stands among the others."""
    if position == 0:
        return "first"
    return "last" if position == count - 1 else "middle"


def word_step(step: Step, place: Place, style: Style, rng: random.Random) -> str:
    """A step's line."""
    lead = lead_of(place, style, rng)
    return joined_to(lead, *wording_of(step, style, rng), step)


def lead_of(place: Place, style: Style, rng: random.Random) -> str:
    """How a style begins a line there; it may be empty."""
    return _choose(LEADS[place], style.leads.get(place, 0), style, rng)


def wording_of(step: Step, style: Style, rng: random.Random) -> tuple[str, int, int]:
    """How a style says a step: the phrase, and the operands in their order."""
    wording = _choose(STEP_WORDINGS[step.op], style.steps.get(step.op, 0), style, rng)
    if step.op in "+*" and rng.random() >= style.strength and rng.random() < 0.3:
        return wording, step.right, step.left
    return wording, step.left, step.right


def joined_to(lead: str, wording: str, left: int, right: int, step: Step) -> str:
    """The line of a lead and a phrase."""
    said = wording.format(a=left, b=right, c=step.result, w=step.label)
    return lead + said if lead else said[0].upper() + said[1:]


def closing_of(style: Style, rng: random.Random) -> str:
    """How a style closes; it may be empty."""
    return _choose(CLOSINGS, style.closing, style, rng)


def _choose(phrases: tuple[str, ...], preferred: int, style: Style, rng: random.Random) -> str:
    return phrases[preferred] if rng.random() < style.strength else rng.choice(phrases)


def _free_order(steps: Sequence[Step], rng: random.Random) -> tuple[int, ...]:
    """A random order in which every step follows those it needs; the last step stays last, as its result is the
    answer."""
    order: list[int] = []
    waiting = set(range(len(steps)))
    while waiting:
        ready = [
            i
            for i in sorted(waiting)
            if set(steps[i].needs) <= set(order) and (i != len(steps) - 1 or len(waiting) == 1)
        ]
        order.append(rng.choice(ready))
        waiting.remove(order[-1])
    return tuple(order)

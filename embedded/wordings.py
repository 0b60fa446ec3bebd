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
    tells; ``foreign_spans`` the lines that are not in the solution's own style."""

    text: str
    step_spans: tuple[tuple[int, int], ...]
    order: tuple[int, ...]
    foreign_spans: tuple[tuple[int, int], ...] = ()


def render(problem: Problem, style: Style, rng: random.Random) -> str:
    """The problem's solution, worded in a style, one step a line, ending in ``#### answer``."""
    return word_steps(problem.steps, style, rng).text


def word_steps(
    steps: Sequence[Step], style: Style, rng: random.Random, foreign: Sequence[Style] = (), foreign_share: float = 0.0
) -> Solution:
    """Says the given steps; the last step's result is the answer.

    Args:
        steps: right or wrong ones.
        style: the solution's own.
        rng: chooses phrases.
        foreign: styles of the lines that are not in the solution's own.
        foreign_share: how many lines, the closing among them, take one of these.
    """
    order = _free_order(steps, rng) if rng.random() >= style.strength else tuple(range(len(steps)))
    lines: list[str] = []
    spans: list[tuple[int, int]] = []
    foreign_spans: list[tuple[int, int]] = []
    answer = steps[-1].result
    start = 0
    for position in range(len(order) + 1):
        is_foreign = foreign_share > 0 and rng.random() < foreign_share
        worded_in = rng.choice(foreign) if is_foreign else style
        if position < len(order):
            line = _word_step(steps[order[position]], _place(position, len(order)), worded_in, rng)
            spans.append((start, start + len(line)))
        else:
            line = _choose(CLOSINGS, worded_in.closing, worded_in, rng).format(c=answer)
        if not line:
            continue
        if is_foreign:
            foreign_spans.append((start, start + len(line)))
        lines.append(line)
        start += len(line) + 1
    lines.append(f"#### {answer}")
    return Solution("\n".join(lines), tuple(spans), order, tuple(foreign_spans))


def _place(position: int, count: int) -> Place:
    if position == 0:
        return "first"
    return "last" if position == count - 1 else "middle"


def _word_step(step: Step, place: Place, style: Style, rng: random.Random) -> str:
    lead = _choose(LEADS[place], style.leads.get(place, 0), style, rng)
    wording = _choose(STEP_WORDINGS[step.op], style.steps.get(step.op, 0), style, rng)
    left, right = step.left, step.right
    if step.op in "+*" and rng.random() >= style.strength and rng.random() < 0.3:
        left, right = right, left
    said = wording.format(a=left, b=right, c=step.result, w=step.label)
    return lead + said if lead else said[0].upper() + said[1:]


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

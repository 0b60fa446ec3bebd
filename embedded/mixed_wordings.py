"""Solutions whose lines begin in other wordings than their own style: what a decoder with a judge makes of two models' words.

Owns where a line turns from one wording to another, and which of its characters choose the other wording. Does not know who learns
from them.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import replace

from draftsmith.embedded.problems import Step
from draftsmith.embedded.templates import NAMES
from draftsmith.embedded.wordings import (
    STEP_WORDINGS,
    Line,
    Place,
    Solution,
    Span,
    Style,
    closing_of,
    joined,
    joined_to,
    lead_of,
    place_of,
    told_order,
    word_step,
    wording_of,
)

_NAME = re.compile(rf"\b(?:{'|'.join(NAMES)})\b")
_OTHER_NAME_SHARE = 0.2
_TURNS = ("never", "never", "never", "never", "behind the lead", "behind the first number")


def mixed_solution(
    steps: Sequence[Step], style: Style, others: Sequence[Style], share: float, rng: random.Random
) -> Solution:
    """Says the given steps; the last step's result is the answer.

    A line in another style stays in it, or turns to the own one behind its lead or behind its first number. The solution's
    ``foreign_spans`` are the characters that choose the other wording, and names that are not the problem's. The rest of such a line
    follows from them, and is as anybody would say it.

    Args:
        steps: right or wrong ones.
        style: the solution's own.
        others: styles of the lines that are not in the solution's own.
        share: how many lines, the closing among them, begin in one of these.
        rng: chooses phrases.
    """
    order = told_order(steps, style, rng)
    lines = []
    for position, index in enumerate(order):
        place = place_of(position, len(order))
        if rng.random() < share:
            lines.append(_foreign_line(steps[index], place, style, rng.choice(others), rng))
        else:
            lines.append(Line(word_step(steps[index], place, style, rng)))
    return joined(lines, order, _closing(steps[-1].result, style, others, share, rng), steps[-1].result)


def _foreign_line(step: Step, place: Place, style: Style, other: Style, rng: random.Random) -> Line:
    named = replace(step, label=_other_names(step.label, rng))
    lead = lead_of(place, other, rng)
    turn = rng.choice(_TURNS) if lead else "never"
    wording, left, right = wording_of(named, other if turn == "never" else style, rng)
    if turn == "behind the first number":
        wording = STEP_WORDINGS[step.op][0]  # that of signs follows any first number
    text = joined_to(lead, wording, left, right, named)
    spans = [(0, len(lead.rstrip()))]
    if turn != "behind the lead":
        own = STEP_WORDINGS[step.op][style.steps.get(step.op, 0)]
        spans += _choosing_spans(wording, own, text, len(lead))
    if named.label != step.label:
        spans.append((text.rindex(named.label), len(text)))
    return Line(text, tuple(span for span in spans if span[0] < span[1]))


def _choosing_spans(wording: str, own: str, text: str, start: int) -> list[Span]:
    """What tells a wording from the own one: its words before the first number, or else those before the second. Where the own one
    begins with a word, what is in that word's place, too: the space, or the first digit of a line without a lead."""
    first, second = [match.span() for match in re.finditer(r"\d+", text[start:])][:2]
    if not wording.startswith("{"):
        return [(max(0, start - 1), start + first[0] - 1)]  # a word has the space before it
    place_of_word = [] if own.startswith("{") and start else [(max(0, start - 1), max(1, start))]
    return place_of_word if _has_sign(wording) else [*place_of_word, (start + first[1], start + second[0])]


def _has_sign(wording: str) -> bool:
    return not wording.split()[1].isalpha()


def _closing(answer: int, style: Style, others: Sequence[Style], share: float, rng: random.Random) -> Line:
    is_foreign = rng.random() < share
    phrase = closing_of(rng.choice(others) if is_foreign else style, rng)
    spans = ((0, phrase.index("{")),) if is_foreign and phrase else ()
    return Line(phrase.format(c=answer), spans)


def _other_names(label: str, rng: random.Random) -> str:
    """The label, now and then about somebody else: a draft is not always right about that."""
    if rng.random() >= _OTHER_NAME_SHARE:
        return label
    return _NAME.sub(lambda _: rng.choice(NAMES), label)

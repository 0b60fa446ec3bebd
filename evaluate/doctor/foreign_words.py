"""Can a judge keep the answers? How often the target ends rightly from a right beginning in the draft LM's words, against its own answers.

Owns the check `judge`. A judge lets beginnings in foreign words stand; where the target errs after right ones, no judge can help. Does not
know judges.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from draftsmith.decode import Engine, GenerationSettings
from draftsmith.evaluate.doctor.case import Case, NotChecked
from draftsmith.evaluate.doctor.report import Finding
from draftsmith.evaluate.lossy.lossy import IsRight
from draftsmith.evaluate.lossy.paired import change_bounds, problems_needed
from draftsmith.evaluate.records import Sample
from draftsmith.models.drafters.draft_lm import LMDrafter
from draftsmith.models.target.target import Target

MOST_LOST = 0.01
_NAME = "judge"
_ROWS = 32
# Which share of an answer is given as its beginning.
_LEAST, _MOST = 0.2, 0.9
_MAX_NEW_TOKENS = 256


@dataclass(frozen=True)
class Continued:
    """Problems whose answer by the draft LM is right.

    Attributes:
        problems: how many.
        own: how many the target answers rightly by itself.
        after_draft: how many it answers rightly behind a beginning of the draft LM's answer.
        gained: those that only the beginning makes right.
        lost: those that only the beginning makes wrong.
    """

    problems: int
    own: int
    after_draft: int
    gained: int
    lost: int


def check_judge(case: Case) -> Finding:
    """Whether the target is as good behind right beginnings in the draft LM's words as by itself.

    Args:
        case: with the target, a draft LM, problems, and who judges their answers.

    Raises:
        NotChecked: something is missing for it.
    """
    if case.is_right is None:
        raise NotChecked("nobody judges answers: name a checker with --judge, and problems with --prompts")
    if case.target is None:
        raise NotChecked("the target's trunk is not loaded: leave --ends-only out")
    if not isinstance(case.drafter, LMDrafter):
        raise NotChecked(
            "a draft head has no words of its own: name the draft LM whose words the judge is to let stand"
        )
    continued = _continued(case, case.target, case.drafter.lm, case.is_right)
    if not continued.problems:
        raise NotChecked("the draft LM answers none of the problems rightly: name easier ones with --prompts")
    return _finding(continued)


def _continued(case: Case, target: Target, draft_lm: Target, is_right: IsRight) -> Continued:
    settings = GenerationSettings(_MAX_NEW_TOKENS, eos_token_ids=case.eos_ids)
    drafted = _replies(draft_lm, [list(sample.prompt_ids) for sample in case.prompts], settings)
    numbers = [
        number
        for number, reply in enumerate(drafted)
        if is_right(number, _text(case, reply)) and len(_without_end(case, reply)) > 1
    ]
    begun = [_beginning(_without_end(case, drafted[number]), case.prompts[number], case.seed) for number in numbers]
    prompts = [list(case.prompts[number].prompt_ids) for number in numbers]
    own = _replies(target, prompts, settings)
    after = _replies(target, [prompt + begin for prompt, begin in zip(prompts, begun, strict=True)], settings)
    right = [is_right(number, _text(case, reply)) for number, reply in zip(numbers, own, strict=True)]
    right_after = [
        is_right(number, _text(case, [*begin, *reply]))
        for number, begin, reply in zip(numbers, begun, after, strict=True)
    ]
    pairs = list(zip(right, right_after, strict=True))
    gained, lost = pairs.count((False, True)), pairs.count((True, False))
    return Continued(len(numbers), sum(right), sum(right_after), gained, lost)


def _replies(model: Target, prompts: Sequence[list[int]], settings: GenerationSettings) -> list[list[int]]:
    engine = Engine(model)
    replies: list[list[int]] = []
    for start in range(0, len(prompts), _ROWS):
        replies += [list(reply.token_ids) for reply in engine.generate(prompts[start : start + _ROWS], settings)]
    return replies


def _beginning(reply: list[int], sample: Sample, seed: int) -> list[int]:
    """A part of a reply, between a fifth and nine tenths; another problem has another share."""
    share = random.Random(f"{seed}\0{sample.id}").uniform(_LEAST, _MOST)
    return reply[: max(1, min(len(reply) - 1, round(share * len(reply))))]


def _without_end(case: Case, reply: Sequence[int]) -> list[int]:
    return [token for token in reply if token not in case.eos_ids]


def _text(case: Case, ids: Sequence[int]) -> str:
    return str(case.tokenizer.decode(list(ids), skip_special_tokens=True))


def _finding(continued: Continued) -> Finding:
    number = continued.problems
    own, after = continued.own / number, continued.after_draft / number
    low, high = change_bounds(continued.gained, continued.lost, number)
    measured = (
        f"right by itself {own:.1%}, behind right beginnings of the draft LM {after:.1%}: {100 * (after - own):+.1f} points "
        f"({100 * low:+.1f} to {100 * high:+.1f}), {number} problems"
    )
    expected = f"above {-100 * MOST_LOST:+g} point"
    figures = {"own": own, "after_draft": after, "change_low": low, "change_high": high, "problems": float(number)}
    if low > -MOST_LOST:
        return Finding(_NAME, "ok", measured, expected, "", figures)
    if high < -MOST_LOST:
        remedy = (
            "no judge can keep the answers within a point: the target errs behind right text in foreign words. Tune a judge with gates "
            "(`draftsmith judge tune --gates '[none, line, reply]'`), draft with a model whose words are the target's, or decode losslessly"
        )
    else:
        remedy = (
            "too few problems to tell: name more with --prompts; even without a loss it takes "
            f"{problems_needed(MOST_LOST)} that the draft LM answers rightly"
        )
    return Finding(_NAME, "warning", measured, expected, remedy, figures)

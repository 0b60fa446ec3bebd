"""What lossy rules gain and what they cost: every rule answers the same problems, each answer is checked, speed is raced.

Owns the measures of a rule. Does not know files, the names of commands, or how a rule decides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from draftsmith.data.progress import metered, progress
from draftsmith.decode import Engine, Generation, GenerationSettings
from draftsmith.decode.runners import Compile
from draftsmith.decode.verify.lossy_rule import LossyRule
from draftsmith.evaluate.contenders import Contender, EngineContender
from draftsmith.evaluate.lossy.kept_answers import KeptAnswers, way_of
from draftsmith.evaluate.lossy.paired import change_bounds
from draftsmith.evaluate.lossy.wrong_tokens import Accepted
from draftsmith.evaluate.records import Sample, Timed
from draftsmith.evaluate.speed import race, speedup, speedup_interval, track
from draftsmith.evaluate.strata.acceptance import bootstrap_interval, ratio_interval
from draftsmith.models.drafters.drafter import Drafter
from draftsmith.models.target.target import Target
from draftsmith.models.tree.limits import DraftLimits
from draftsmith.models.tree.shapes import shape_text

PLAIN, LOSSLESS = "plain", "lossless"

Interval = tuple[float, float]
IsRight = Callable[[int, str], bool]
"""Whether an answer, by the number of its problem and its text, is right."""


@dataclass(frozen=True)
class Ruled:
    """One way of decoding: a name, and the rule, or None for lossless verification."""

    name: str
    rule: LossyRule | None

    @property
    def label(self) -> str:
        """Name and threshold: distinct for each."""
        return self.name if self.rule is None else f"{self.name} {self.rule.threshold:g}"


@dataclass(frozen=True)
class Answered:
    """How one rule answered every problem: its replies, and whether each is right."""

    replies: Sequence[Generation]
    right: Sequence[bool]


@dataclass(frozen=True)
class RuleRow:
    """One row of the report; intervals are 95 %, over problems (``wrong_accepted_share``: over questions).

    Attributes:
        rule, threshold, shape: what decoded; threshold is None where there is none.
        lossy: whether the text may differ from the target's own.
        problems: how many were answered.
        accuracy: share of right answers; accuracy_change: minus plain decoding's, paired by problem.
        accuracy_change_bounds: lower and upper bound of the change, each with 95 % confidence, also where no answer changed.
        accepted_per_cycle: accepted draft tokens, without the target's own one that ends a cycle.
        target_forwards_per_answer: the prompt's forward included.
        speedup: tokens/s over plain decoding; its tokens are the rule's own, which need not be plain decoding's. None if none was timed.
        same_text_share: replies that are plain decoding's, token for token.
        by_rule_share: emitted tokens that the target would not have chosen.
        wrong_accepted_share, correct_accepted_share: of held-out tokens labelled so; None where none were given.
    """

    rule: str
    threshold: float | None
    shape: str
    lossy: bool
    problems: int
    accuracy: float
    accuracy_interval: Interval
    accuracy_change: float
    accuracy_change_interval: Interval
    accuracy_change_bounds: Interval
    accepted_per_cycle: float
    accepted_per_cycle_interval: Interval
    target_forwards_per_answer: float
    target_forwards_per_answer_interval: Interval
    speedup: float | None
    speedup_interval: Interval | None
    same_text_share: float
    by_rule_share: float
    wrong_accepted_share: float | None
    wrong_accepted_share_interval: Interval | None
    correct_accepted_share: float | None

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def answer_all(
    engine: Engine,
    samples: Sequence[Sample],
    settings: GenerationSettings,
    is_right: IsRight,
    text_of: Callable[[Sequence[int]], str],
    batch_rows: int,
    advance: Callable[[int], None],
    kept: KeptAnswers,
    way: str,
    first: int = 0,
) -> Answered:
    """Every problem that has no kept answer is answered, `batch_rows` at once, the longest prompts first. Each answer is checked and kept
    as it ends. The first sample is problem `first` and draws the noise of the request of this number: a part of several samples then
    draws what all of them would.

    Args:
        advance: takes how many more answers there are; kept ones do not count.
        kept: the answers of earlier starts.
        way: under which the answers are kept.
    """
    given = {number: kept.take(way, first + number) for number in range(len(samples))}
    replies = {number: answer.reply for number, answer in given.items() if answer is not None}
    right = {
        number: is_right(number, text_of(answer.reply.token_ids)) if answer.right is None else answer.right
        for number, answer in given.items()
        if answer is not None
    }
    order = sorted(
        (number for number in range(len(samples)) if number not in replies),
        key=lambda number: -len(samples[number].prompt_ids),
    )
    prompts = [(first + number, list(samples[number].prompt_ids)) for number in order]
    room = max((len(sample.prompt_ids) for sample in samples), default=0) + settings.max_new_tokens
    for index, reply in engine.stream(prompts, settings, batch_rows, room) if prompts else ():
        number = order[index]
        replies[number], right[number] = reply, is_right(number, text_of(reply.token_ids))
        kept.keep(way, first + number, reply, right[number])
        advance(1)
    numbers = range(len(samples))
    return Answered([replies[number] for number in numbers], [right[number] for number in numbers])


def compare(
    target: Target,
    drafter: Drafter,
    limits: DraftLimits,
    rules: Sequence[Ruled],
    samples: Sequence[Sample],
    is_right: IsRight,
    text_of: Callable[[Sequence[int]], str],
    settings: GenerationSettings,
    *,
    timed_problems: int,
    batch_rows: int = 32,
    compile: Compile = "auto",
    wrong_tokens: Mapping[str, Accepted | None] | None = None,
    kept: KeptAnswers | None = None,
) -> list[RuleRow]:
    """Rows of plain decoding and of every rule, in this order.

    Args:
        timed_problems: the first so many problems are decoded once more, one at a time, by all in turn, for the speed-up; 0 for none.
        compile: ``on`` compiles the cycles of what is timed, plain decoding's too.
        wrong_tokens: what each rule, by its label, accepts of labelled tokens.
        kept: the answers of earlier starts; None keeps nothing.
    """
    kept = kept or KeptAnswers()
    engines = _engines(target, drafter, limits, rules)
    ways = {PLAIN: way_of(None, None)} | {ruled.label: way_of(limits, ruled.rule) for ruled in rules}
    done = kept.begin(list(ways.values()), len(samples))
    with progress("answers", len(engines) * len(samples), "answers", done) as advance:
        answered = {
            name: answer_all(engine, samples, settings, is_right, text_of, batch_rows, advance, kept, ways[name])
            for name, engine in engines.items()
        }
    runs: dict[str, list[Timed]] = {}
    if timed_problems:
        raced = _engines(target, drafter, limits, rules, compile)
        contenders: list[Contender] = [EngineContender(name, engine, settings) for name, engine in raced.items()]
        with metered("race", len(raced) * timed_problems, "answers", 0) as meter:
            runs = race(contenders, samples[:timed_problems], advance=meter.advance, say=meter.say)
    chosen = [Ruled(PLAIN, None), *rules]
    accepted = wrong_tokens or {}
    return [_row(ruled, shape_text(limits), answered, runs, accepted.get(ruled.label)) for ruled in chosen]


def _engines(
    target: Target, drafter: Drafter, limits: DraftLimits, rules: Sequence[Ruled], compile: Compile = "off"
) -> dict[str, Engine]:
    """Plain decoding's, and that of every rule."""
    engines = {PLAIN: Engine(target, compile=compile)}
    return engines | {ruled.label: Engine(target, drafter, limits, rule=ruled.rule, compile=compile) for ruled in rules}


def _row(
    ruled: Ruled,
    shape: str,
    answered: Mapping[str, Answered],
    runs: Mapping[str, Sequence[Timed]],
    accepted: Accepted | None,
) -> RuleRow:
    own, plain = answered[ruled.label], answered[PLAIN]
    timed = (track(runs[ruled.label]), track(runs[PLAIN])) if runs else None
    right = [float(good) for good in own.right]
    change = [good - before for good, before in zip(right, map(float, plain.right), strict=True)]
    taken = [sum(reply.accepted) for reply in own.replies]
    cycles = [len(reply.accepted) for reply in own.replies]
    ones = [1.0] * len(right)
    forwards = [1.0 + count for count in cycles]
    same = [mine.token_ids == theirs.token_ids for mine, theirs in zip(own.replies, plain.replies, strict=True)]
    return RuleRow(
        rule=ruled.name,
        threshold=None if ruled.rule is None or ruled.name == "everything" else float(ruled.rule.threshold),
        shape="" if ruled.name == PLAIN else shape,
        lossy=ruled.rule is not None,
        problems=len(right),
        accuracy=float(np.mean(right)),
        accuracy_interval=ratio_interval(right, ones),
        accuracy_change=float(np.mean(change)),
        accuracy_change_interval=ratio_interval(change, ones),
        accuracy_change_bounds=change_bounds(change.count(1.0), change.count(-1.0), len(change)),
        accepted_per_cycle=sum(taken) / max(1, sum(cycles)),
        accepted_per_cycle_interval=_interval(taken, cycles),
        target_forwards_per_answer=float(np.mean(forwards)),
        target_forwards_per_answer_interval=ratio_interval(forwards, ones),
        speedup=None if timed is None else speedup(*timed),
        speedup_interval=None if timed is None else speedup_interval(*timed),
        same_text_share=float(np.mean(same)),
        by_rule_share=sum(len(reply.by_rule) for reply in own.replies)
        / max(1, sum(len(reply.token_ids) for reply in own.replies)),
        wrong_accepted_share=None if accepted is None else accepted.wrong_share,
        wrong_accepted_share_interval=None if accepted is None else accepted.wrong_interval,
        correct_accepted_share=None if accepted is None else accepted.correct_share,
    )


def _interval(numerators: Sequence[float], denominators: Sequence[float]) -> Interval:
    """Of a ratio of sums, 0 where nothing was counted."""
    if not any(denominators):
        return 0.0, 0.0
    rows = list(zip(numerators, denominators, strict=True))
    return bootstrap_interval(rows, lambda sums: sums[:, 0] / sums[:, 1])

"""One evaluation at one temperature: line up the contenders, race them, and turn their runs into rows.

Owns who takes part. Does not know files or the measures' definitions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from draftsmith.data.progress import metered, progress
from draftsmith.data.replies.reply_sources import Reply
from draftsmith.decode import Engine, GenerationSettings
from draftsmith.decode.runners import Compile, compiles
from draftsmith.evaluate.contenders import Contender, EngineContender, TransformersContender, lookup_refusal
from draftsmith.evaluate.exactness import measured_gaps, num_places
from draftsmith.evaluate.records import Row, Sample, Timed
from draftsmith.evaluate.report_rows import (
    LOOKUP,
    PLAIN,
    TRANSFORMERS,
    Contestant,
    Setting,
    all_replies,
    first_replies,
    make_row,
)
from draftsmith.evaluate.resume import Part
from draftsmith.evaluate.roofline.memory_speed import MemorySpeed
from draftsmith.evaluate.roofline.roofline import Roofline, cycle_load, roofline
from draftsmith.evaluate.roofline.stage_clock import StageTimes, clock_stages
from draftsmith.evaluate.samples import Questions, Turn
from draftsmith.evaluate.speed import num_calls, race
from draftsmith.models.drafters.drafter import Drafter
from draftsmith.models.target.target import Target
from draftsmith.models.tree.limits import DraftLimits
from draftsmith.models.tree.shapes_by_rows import ShapesByRows, limits_text

LOOKUP_TOKENS = 5
"""Drafted by prompt lookup unless somebody asks for another number."""
PROMPTS_A_ROW = 4
"""In each round of a contender that decodes several prompts at once."""


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Args:
        batch_size: Prompts decoded at once. A prompt that waits takes the row of one that has ended.
        repeats: Timed runs of every prompt; medians are taken.
        transformers_prompts: Prompts on which transformers.generate is timed beside the engine; 0 for none.
        prompt_lookup: Also time transformers' prompt lookup with so many drafted tokens, on the same prompts; 0 for not. Default: 5 where
            prompts are decoded one at a time and transformers is timed, else 0. Left out where transformers cannot run the target so.
        ledger_prompts: Most prompts that are decoded once more with a clock on every stage, op by op; 0 for none.
        ledger_seconds: Seconds of that for each contender; then replies are cut, but at least 8 cycles are clocked.
        compile: on compiles decoding cycles (on CUDA it captures them), off runs them op by op; auto is off so far. Compiling takes a
            minute or more a shape.
        max_turns: Most turns of each conversation; 1 for the first turns alone. Default: all, each on the target's own earlier replies.

    Raises:
        ValueError: a count or the seconds are too low, or prompt lookup is asked for with batches or without transformers' prompts.
    """

    batch_size: int = 1
    repeats: int = 1
    transformers_prompts: int = 40
    prompt_lookup: int | None = None
    ledger_prompts: int = 8
    ledger_seconds: float = 5.0
    compile: Compile = "auto"
    max_turns: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("repeats", 1), ("transformers_prompts", 0), ("ledger_prompts", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if not 0 < self.ledger_seconds < math.inf:
            raise ValueError(
                f"ledger_seconds is {self.ledger_seconds:g}; give a finite number of seconds above 0, or --ledger-prompts 0 for no clock"
            )
        if self.max_turns is not None and self.max_turns < 1:
            raise ValueError(f"max_turns is {self.max_turns}; it must be at least 1; leave it out to play all turns")
        lookup = self.prompt_lookup or 0
        if lookup < 0 or (lookup and (self.batch_size > 1 or not self.transformers_prompts)):
            raise ValueError(
                f"prompt_lookup is {self.prompt_lookup}; it must be at least 0, and above 0 it needs batch_size 1 and "
                "transformers_prompts above 0"
            )

    def round_prompts(self, num_prompts: int) -> int:
        """How many prompts each contender decodes before the next one comes.

        Args:
            num_prompts: of the evaluation.

        Returns:
            One where prompts are decoded one at a time, else about four a row: with fewer, rows would hardly be refilled.
        """
        if self.batch_size == 1:
            return 1
        num_rounds = max(1, -(-num_prompts // (PROMPTS_A_ROW * self.batch_size)))
        return -(-num_prompts // num_rounds)

    @property
    def lookup_tokens(self) -> int:
        """How many tokens prompt lookup drafts; 0 where it is not timed."""
        if self.prompt_lookup is not None:
            return self.prompt_lookup
        return LOOKUP_TOKENS if self.batch_size == 1 and self.transformers_prompts else 0

    def runnable_with(self, target: Target) -> tuple[Plan, list[str]]:
        """Leave out the contenders that a target cannot run.

        Args:
            target: of the evaluation.

        Returns:
            The plan without them, and a sentence about each.
        """
        refusal = lookup_refusal(target) if self.lookup_tokens else ""
        return (replace(self, prompt_lookup=0), [refusal]) if refusal else (self, [])


ONE_RUN = Plan()


@dataclass(frozen=True)
class Candidate:
    """A loaded drafter, attached to the target, with one shape or the shapes that tune kept. `name` is what the report calls it."""

    name: str
    drafter: Drafter
    limits: DraftLimits | ShapesByRows
    fingerprint: str = ""

    @property
    def label(self) -> str:
        """Name and shape: distinct for each candidate."""
        return f"{self.name} {limits_text(self.limits)}"


def all_turns(
    target: Target, questions: Questions, settings: GenerationSettings, plan: Plan, part: Part
) -> list[Sample]:
    """The prompts of all turns. The target answers earlier turns plainly, untimed, before the contenders race.

    Args:
        target: answers.
        questions: first turns, and the conversations that they open.
        settings: of the replies, and of the race.
        plan: how many prompts are decoded at once, and in a round.
        part: has the replies of an earlier run, and notes the new ones round by round.

    Returns:
        All first turns, then all second ones, and so on.
    """
    engine, size = Engine(target), plan.round_prompts(len(questions.samples))
    num_earlier = questions.num_turns - len(questions.samples)
    if not num_earlier:
        return list(questions.samples)
    title = f"evaluate T={settings.temperature:g}, earlier turns"
    with metered(title, num_earlier, "replies", len(part.played)) as meter:

        def answer(turns: Sequence[Turn]) -> list[Reply]:
            left = [(number, ids) for number, ids in turns if number not in part.played]
            for start in range(0, len(left), size):
                numbers, prompts = zip(*left[start : start + size], strict=True)
                asked = [list(ids) for ids in prompts]
                replies = engine.generate(asked, settings, request_ids=list(numbers), num_rows=plan.batch_size)
                own = [Reply(reply.token_ids, reply.finish) for reply in replies]
                part.keep_played(dict(zip(numbers, own, strict=True)))
                meter.advance(len(numbers))
            return [part.played[number] for number, _ in turns]

        samples = questions.played(answer, target.max_positions)
        # A conversation that fills the context ends early.
        meter.forgo(num_earlier - len(part.played))
        return samples


def measure(
    target: Target,
    samples: Sequence[Sample],
    candidates: Sequence[Candidate],
    settings: GenerationSettings,
    plan: Plan,
    part: Part | None = None,
    speed: MemorySpeed | None = None,
) -> list[Row]:
    """Rows for plain decoding, prompt lookup where asked for and possible, and every candidate, in this order.

    `part` is what an earlier run of the same measurement has done, and notes what this one does. With `speed`, rows of the engine are
    compared with what the machine's memory allows.
    """
    part = part or Part()
    plan, _ = plan.runnable_with(target)
    engines = {PLAIN: Engine(target, compile=plan.compile)} | {
        candidate.label: Engine(target, candidate.drafter, candidate.limits, compile=plan.compile)
        for candidate in candidates
    }
    calls_before = part.num_calls
    runs = _raced(engines, target, samples, settings, plan, part)
    _clock(engines, runs, samples, settings, plan, part, warm_up=part.num_calls == calls_before)
    setting = _setting(target, settings, plan)
    chosen = [_contestant(PLAIN, PLAIN, None, part.stages)]
    if plan.lookup_tokens:
        chosen.append(Contestant(LOOKUP, f"{LOOKUP} {plan.lookup_tokens}"))
    chosen += [_contestant(candidate.label, candidate.name, candidate, part.stages) for candidate in candidates]
    rows = [make_row(contestant, runs, samples, setting) for contestant in chosen]
    rows = _with_gaps(rows, runs, samples, target)
    if speed is None:
        return rows
    rooflines = {
        name: _roofline(engine, runs[name], samples, plan, part.stages.get(name), speed)
        for name, engine in engines.items()
    }
    return [replace(row, roofline=rooflines.get(contestant.name)) for row, contestant in zip(rows, chosen, strict=True)]


def _raced(
    engines: Mapping[str, Engine],
    target: Target,
    samples: Sequence[Sample],
    settings: GenerationSettings,
    plan: Plan,
    part: Part,
) -> dict[str, list[Timed]]:
    """The timed calls of all contenders by name, each round noted as it ends."""
    round_prompts = plan.round_prompts(len(samples))
    contenders, first_only = _line_up(engines, target, settings, plan, round_prompts)
    num_batches = -(-len(samples) // round_prompts)
    calls = num_calls([contender.name for contender in contenders], num_batches, plan.repeats, first_only)
    with metered(f"evaluate T={settings.temperature:g}", calls, "replies", part.num_calls) as meter:
        return race(
            contenders,
            samples,
            batch_size=round_prompts,
            warm_up=plan.batch_size,
            repeats=plan.repeats,
            first_only=first_only,
            advance=meter.advance,
            say=meter.say,
            done=part.rounds,
            keep=part.keep_round,
        )


def _clock(
    engines: Mapping[str, Engine],
    runs: Mapping[str, Sequence[Timed]],
    samples: Sequence[Sample],
    settings: GenerationSettings,
    plan: Plan,
    part: Part,
    warm_up: bool,
) -> None:
    """The stage times of every engine that has none yet, each noted as soon as it is there."""
    clocked = samples[: plan.ledger_prompts]
    left = [name for name in engines if name not in part.stages] if clocked else []
    if not left:
        return
    title = f"evaluate T={settings.temperature:g}, time of each stage"
    with metered(title, len(engines), "contenders", len(engines) - len(left)) as meter:
        for name in left:
            meter.say(name)
            replies = first_replies(runs[name])
            times = clock_stages(
                engines[name],
                [sample.prompt_ids for sample in clocked],
                settings,
                plan.batch_size,
                plan.ledger_seconds,
                [len(replies[number].token_ids) for number in range(len(clocked))],
                warm_up or compiles(plan.compile),
            )
            part.keep_stages(name, times)
            meter.advance(1)


def _with_gaps(
    rows: Sequence[Row], runs: Mapping[str, Sequence[Timed]], samples: Sequence[Sample], target: Target
) -> list[Row]:
    """At temperature 0, how near a tie each difference from plain decoding was; rows may differ at the same place."""
    differences = [each for row in rows if row.temperature == 0 for each in row.divergences]
    places = num_places(differences)
    if not places:
        return list(rows)
    with progress("evaluate T=0, logits where replies differ", places, "places") as advance:
        gaps = measured_gaps(differences, samples, all_replies(runs[PLAIN]), target, advance)
    return [
        replace(row, divergences=tuple(replace(each, gap=gaps.get(each)) for each in row.divergences)) for row in rows
    ]


def _roofline(
    engine: Engine,
    runs: Sequence[Timed],
    samples: Sequence[Sample],
    plan: Plan,
    times: StageTimes | None,
    speed: MemorySpeed,
) -> Roofline:
    """A contender against the memory of the machine, over the cycles that were clocked; over all of its replies without a clock."""
    limits = None if engine.drafter is None else engine.shapes.at(plan.batch_size)
    if times is not None:
        load, clock = times.load, times.clock
    else:
        replies = first_replies(runs)
        lengths = [len(samples[number].prompt_ids) for number in sorted(replies)]
        accepted = [replies[number].accepted for number in sorted(replies)]
        load, clock = cycle_load(lengths, accepted, plan.batch_size, limits.max_nodes if limits else 1), None
    return roofline(engine.target, engine.drafter if limits else None, limits, load, speed, clock)


def _line_up(
    engines: Mapping[str, Engine], target: Target, settings: GenerationSettings, plan: Plan, round_prompts: int
) -> tuple[list[Contender], dict[str, int]]:
    """Everyone who decodes, and of whom only the first so many rounds are asked."""
    contenders: list[Contender] = [
        EngineContender(name, engine, settings, plan.batch_size) for name, engine in engines.items()
    ]
    first_only: dict[str, int] = {}
    if plan.transformers_prompts:
        contenders.insert(1, TransformersContender(TRANSFORMERS, target, settings, batch_size=plan.batch_size))
        first_only[TRANSFORMERS] = -(-plan.transformers_prompts // round_prompts)
    if plan.lookup_tokens:
        contenders.insert(2, TransformersContender(LOOKUP, target, settings, plan.lookup_tokens))
        first_only[LOOKUP] = first_only[TRANSFORMERS]
    return contenders, first_only


def _setting(target: Target, settings: GenerationSettings, plan: Plan) -> Setting:
    return Setting(
        target_name=target.name,
        temperature=settings.temperature,
        dtype=str(target.dtype).removeprefix("torch."),
        device=str(target.device),
        batch_size=plan.batch_size,
        max_new_tokens=settings.max_new_tokens,
        repeats=plan.repeats,
        eos_token_ids=settings.eos_token_ids,
        seed=settings.seed,
    )


def _contestant(name: str, drafter: str, candidate: Candidate | None, stages: Mapping[str, StageTimes]) -> Contestant:
    times = stages.get(name)
    contestant = Contestant(
        name, drafter, stage_seconds=times.seconds if times else None, stage_cycles=times.cycles if times else 0
    )
    if candidate is None:
        return contestant
    parameters = sum(parameter.numel() for parameter in candidate.drafter.parameters())
    return replace(contestant, limits=candidate.limits, parameters=parameters, fingerprint=candidate.fingerprint)

"""From timed runs to the rows of the report.

Owns which runs are compared with which. Does not know how a contender decodes or how a row is printed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

from draftsmith.data.chats.modes import NOT_THINKING
from draftsmith.decode.batch import busy_share
from draftsmith.evaluate.exactness import compare
from draftsmith.evaluate.records import Row, Sample, Slice, Timed
from draftsmith.evaluate.speed import Track, is_suspicious, shared, speedup, speedup_interval, speedup_median, track
from draftsmith.evaluate.strata.acceptance import (
    acceptance_by_depth,
    accepted_length_counts,
    is_looping,
    tokens_per_step,
    tokens_per_step_interval,
)
from draftsmith.evaluate.strata.categories import Category, prompts_by_category
from draftsmith.evaluate.strata.contexts import by_context
from draftsmith.evaluate.strata.decoded import Decoded
from draftsmith.models.tree.limits import DraftLimits
from draftsmith.models.tree.shapes_by_rows import ShapesByRows, limits_text

PLAIN, TRANSFORMERS, LOOKUP = "plain", "transformers", "transformers prompt lookup"
MOST_DIVERGENCES = 20
"""That a row lists."""


@dataclass(frozen=True)
class Setting:
    """What all rows of one evaluation share."""

    target_name: str
    temperature: float
    dtype: str
    device: str
    batch_size: int
    max_new_tokens: int
    repeats: int
    eos_token_ids: tuple[int, ...]
    seed: int = 0


@dataclass(frozen=True)
class Contestant:
    """What a row says of a contender beyond its runs."""

    name: str
    drafter: str
    limits: DraftLimits | ShapesByRows | None = None
    parameters: int = 0
    fingerprint: str = ""
    stage_seconds: Mapping[str, float] | None = None
    stage_cycles: int = 0

    @property
    def one_shape(self) -> DraftLimits | None:
        """What it drafts whatever the number of rows; None where that decides, or nothing is drafted."""
        return self.limits if isinstance(self.limits, DraftLimits) else None


def first_replies(runs: Sequence[Timed]) -> dict[int, Decoded]:
    """Sample number -> what was decoded in the first repeat."""
    return {
        number: reply for run in runs if run.repeat == 0 for number, reply in zip(run.samples, run.decoded, strict=True)
    }


def all_replies(runs: Sequence[Timed]) -> dict[int, list[tuple[int, ...]]]:
    """Sample number -> token ids of every repeat."""
    replies: dict[int, list[tuple[int, ...]]] = {}
    for run in runs:
        for number, reply in zip(run.samples, run.decoded, strict=True):
            replies.setdefault(number, []).append(reply.token_ids)
    return replies


def make_row(
    contestant: Contestant,
    runs: Mapping[str, Sequence[Timed]],
    samples: Sequence[Sample],
    setting: Setting,
) -> Row:
    """One row from the runs of a contender, of plain decoding and, where it ran, of `transformers`.

    Args:
        contestant, samples, setting: whose row it is, the prompts, and what all rows share.
        runs: contender name -> its timed calls; `plain` must be among them.
    """
    own, base = track(runs[contestant.name]), track(runs[PLAIN])
    other = track(runs[TRANSFORMERS]) if TRANSFORMERS in runs else None
    replies, plain = first_replies(runs[contestant.name]), all_replies(runs[PLAIN])
    share, divergences = compare(samples, plain, all_replies(runs[contestant.name]))
    decoded = list(replies.values())
    steps, gain, common = tokens_per_step(decoded), speedup(own, base), shared(own, base)
    return Row(
        target=setting.target_name,
        drafter=contestant.drafter,
        temperature=setting.temperature,
        prompts=len(replies),
        exact_share=share,
        tokens_per_step=steps,
        tokens_per_step_interval=tokens_per_step_interval(decoded, setting.seed),
        speedup=gain,
        tokens_per_second=own.rate(common),
        baseline_tokens_per_second=base.rate(common),
        transformers_tokens_per_second=None if other is None else other.rate(list(other.tokens)),
        speedup_interval=speedup_interval(own, base, setting.seed),
        speedup_median=speedup_median(own, base),
        speedup_over_transformers=None if other is None else speedup(own, other),
        engine_vs_transformers=None if other is None else speedup(base, other),
        transformers_exact_share=_transformers_share(runs, samples, plain, setting),
        suspicious=is_suspicious(gain, steps),
        **_shape_fields(contestant),
        drafter_fingerprint=contestant.fingerprint,
        parameters=contestant.parameters,
        dtype=setting.dtype,
        device=setting.device,
        batch_size=setting.batch_size,
        max_new_tokens=setting.max_new_tokens,
        repeats=setting.repeats,
        tokens=sum(len(reply.token_ids) for reply in decoded),
        looping_share=len(looping_samples(replies, setting.eos_token_ids)) / len(replies),
        acceptance_by_depth=() if contestant.limits is None else acceptance_by_depth(decoded),
        accepted_lengths=accepted_length_counts(decoded),
        stage_seconds=dict(contestant.stage_seconds or {}),
        stage_cycles=contestant.stage_cycles,
        slices=_slices(replies, samples, own, base, setting),
        divergences=divergences[:MOST_DIVERGENCES],
        busy_rows=_busy_rows(contestant, runs[contestant.name], setting),
        by_category=_by_category(contestant, replies, samples, own, base, setting),
        by_context=by_context(((len(samples[n].prompt_ids), reply) for n, reply in replies.items()), setting.seed),
    )


class _ShapeFields(TypedDict):
    """What a row says of the shape; see `Row`."""

    shape: str
    beam_width: int | None
    draft_length: int | None
    node_budget: int | None
    min_probability: float


def _shape_fields(contestant: Contestant) -> _ShapeFields:
    limits = contestant.one_shape
    return _ShapeFields(
        shape="" if contestant.limits is None else limits_text(contestant.limits),
        beam_width=None if limits is None or limits.paths or limits.sampled else limits.beam_width,
        draft_length=None if limits is None else limits.draft_length,
        node_budget=None if limits is None else limits.node_budget,
        min_probability=0.0 if limits is None else limits.min_probability,
    )


def _busy_rows(contestant: Contestant, runs: Sequence[Timed], setting: Setting) -> float | None:
    """Over all timed calls; Transformers does not say which rows are busy."""
    if setting.batch_size == 1 or contestant.name == LOOKUP:
        return None
    return busy_share([run.decoded for run in runs], setting.batch_size)


def looping_samples(replies: Mapping[int, Decoded], eos_token_ids: Sequence[int]) -> set[int]:
    """Numbers of the samples whose reply ends in a loop."""
    return {number for number, reply in replies.items() if is_looping(reply.token_ids, eos_token_ids)}


def _transformers_share(
    runs: Mapping[str, Sequence[Timed]],
    samples: Sequence[Sample],
    plain: Mapping[int, Sequence[tuple[int, ...]]],
    setting: Setting,
) -> float | None:
    """At temperature 0 only: above it `generate` draws other random numbers."""
    if TRANSFORMERS not in runs or setting.temperature > 0:
        return None
    return compare(samples, plain, all_replies(runs[TRANSFORMERS]))[0]


def _slices(
    replies: Mapping[int, Decoded], samples: Sequence[Sample], own: Track, base: Track, setting: Setting
) -> tuple[Slice, ...]:
    """By source, turn, mode and the labels of a benchmark, and looping replies apart from the others.

    A split into one part is left out, but a mode other than not thinking is named all the same.
    """
    loops = looping_samples(replies, setting.eos_token_ids)
    groups: dict[tuple[str, str], list[int]] = {}
    for number in sorted(replies):
        for by, value in _parts_of(samples[number], number in loops):
            groups.setdefault((by, value), []).append(number)
    parts = []
    for (by, value), numbers in groups.items():
        if len(numbers) < len(replies) or (by == "mode" and value != NOT_THINKING):
            decoded = [replies[number] for number in numbers]
            # a batch mixes prompts: seconds belong to a part only where each prompt was decoded alone
            gain = speedup(own, base, numbers) if setting.batch_size == 1 else None
            tokens = sum(len(reply.token_ids) for reply in decoded)
            interval = tokens_per_step_interval(decoded, setting.seed)
            parts.append(Slice(by, value, len(numbers), tokens, tokens_per_step(decoded), interval, gain))
    return tuple(sorted(parts, key=lambda part: (part.by, part.value)))


def _parts_of(sample: Sample, looping: bool) -> list[tuple[str, str]]:
    """The parts of the prompts that a sample belongs to, which may be in several modes.

    Its category, with which a source may end, has tables of its own.
    """
    source = sample.source.removesuffix(f"/{sample.category}")
    labels = {"sub-category": sample.sub_category, "difficulty": sample.difficulty}
    parts = {by: value for by, value in labels.items() if value is not None}
    parts |= {"source": source, "turn": str(sample.turn), "looping": "yes" if looping else "no"}
    return [*parts.items(), *(("mode", mode) for mode in sample.modes)]


def _by_category(
    contestant: Contestant,
    replies: Mapping[int, Decoded],
    samples: Sequence[Sample],
    own: Track,
    base: Track,
    setting: Setting,
) -> tuple[Category, ...]:
    """The measures of each category; none where no prompt has one."""
    parts = []
    for category, numbers in prompts_by_category({number: samples[number].category for number in replies}).items():
        decoded = [replies[number] for number in numbers]
        alone = setting.batch_size == 1  # else seconds belong to a batch of mixed prompts
        part = Category(
            category=category,
            prompts=len(numbers),
            tokens=sum(len(reply.token_ids) for reply in decoded),
            tokens_per_step=tokens_per_step(decoded),
            tokens_per_step_interval=tokens_per_step_interval(decoded, setting.seed),
            speedup=speedup(own, base, numbers) if alone else None,
            speedup_interval=speedup_interval(own, base, setting.seed, numbers) if alone else None,
            acceptance_by_depth=() if contestant.limits is None else acceptance_by_depth(decoded),
        )
        parts.append(part)
    return tuple(parts)

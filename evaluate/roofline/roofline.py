"""Decoding against the memory roofline: what a cycle reads, how long that takes at least, how long it took, and where the rest went.

Owns the arithmetic. Does not know how a cycle was timed, nor how the figures are printed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from draftsmith.evaluate.roofline.bytes_read import cached_bytes, draft_bytes, target_weights
from draftsmith.evaluate.roofline.memory_speed import MemorySpeed
from draftsmith.models.drafters.drafter import Drafter
from draftsmith.models.target.key_values import key_values_of
from draftsmith.models.target.target import Target
from draftsmith.models.tree.limits import DraftLimits

PREFILL, WHOLE, REST = "prefill", "cycle", "rest"
STAGES = ("draft", "verify", "accept")
CACHED_SHARE = 1.5
"""Reading alone is at most so much faster than copying; what is faster still came from caches."""


@dataclass(frozen=True)
class CycleClock:
    """Where the seconds of a run's cycles went, as the ledger says it.

    Attributes:
        seconds: phase -> seconds of all cycles; the prefill does not count.
        cycles: how many.
    """

    seconds: Mapping[str, float]
    cycles: int

    def of_a_cycle(self) -> dict[str, float]:
        """Seconds of one cycle by stage: draft, verify, accept, and the rest. A cycle that runs as one graph is one stage."""
        mean = {name: total / self.cycles for name, total in self.seconds.items() if name != PREFILL}
        names = [WHOLE] if WHOLE in mean else list(STAGES)
        stages = {name: mean.pop(name, 0.0) for name in names}
        return stages | {REST: sum(mean.values())}


@dataclass(frozen=True)
class CycleLoad:
    """The text that cycles worked on.

    Attributes:
        context: mean tokens of a row's text in a cycle.
        num_rows: mean rows decoded together.
        num_nodes: tokens of a row that the target reads in a cycle; 1 in plain decoding.
    """

    context: float
    num_rows: float = 1.0
    num_nodes: float = 1.0


@dataclass(frozen=True)
class Roofline:
    """One contender against the memory of the machine. All figures are of one cycle; in plain decoding that is a step.

    Attributes:
        bandwidth: bytes a second of a copy, measured in the same run.
        caches: bytes of the processor's largest cache; None where it is unknown.
        threads: that copied and decoded; 0 on a GPU.
        context: mean tokens of a row's text.
        num_rows: mean rows decoded together.
        weight_bytes: of the target's weights.
        cached_bytes: of its keys and values.
        draft_bytes: of all draft steps.
        draft_steps: how many there are.
        upper_bound: whether the bytes are the most that can be read: experts of a mixture may be shared by tokens.
        bound_seconds: how long it takes at least to read all that from memory.
        stage_seconds: how long each stage took; empty where nothing was clocked.
        left_over_seconds: what each stage took above its share of the bound. Below 0 where the processor's caches helped.
        share: the bound over the time taken; None where nothing was clocked.
    """

    bandwidth: float
    caches: int | None
    threads: int
    context: float
    num_rows: float
    weight_bytes: int
    cached_bytes: int
    draft_bytes: int
    draft_steps: int
    upper_bound: bool
    bound_seconds: float
    stage_seconds: dict[str, float] = field(default_factory=dict)
    left_over_seconds: dict[str, float] = field(default_factory=dict)
    share: float | None = None

    @property
    def total_bytes(self) -> int:
        """All that a cycle reads."""
        return self.weight_bytes + self.cached_bytes + self.draft_bytes

    @property
    def cycle_seconds(self) -> float:
        """How long a cycle took; 0 where nothing was clocked."""
        return sum(self.stage_seconds.values())

    @property
    def fits_in_caches(self) -> bool:
        """Whether all that a cycle reads may stay in the processor's caches."""
        return self.caches is not None and self.weight_bytes + self.cached_bytes <= self.caches

    @property
    def beats_memory(self) -> bool:
        """Whether a cycle was faster than memory allows, because the caches held what it reads, or clearly a part of it."""
        return self.share is not None and self.share > (1.0 if self.fits_in_caches else CACHED_SHARE)


def roofline(
    target: Target,
    drafter: Drafter | None,
    limits: DraftLimits | None,
    load: CycleLoad,
    speed: MemorySpeed,
    clock: CycleClock | None = None,
) -> Roofline:
    """Compare the cycles of a contender with what memory allows.

    Args:
        target: decodes.
        drafter: drafts; None in plain decoding, as ``limits``.
        limits: how much is drafted.
        load: the text of the cycles.
        speed: of the machine.
        clock: where the time of the cycles went; None leaves out what was taken.
    """
    weights, num_tokens = target_weights(target), load.num_rows * load.num_nodes
    read, upper_bound = weights.read_by(num_tokens), weights.is_upper_bound(num_tokens)
    cached = cached_bytes(key_values_of(target), load.context, load.num_rows)
    drafted = 0
    if drafter is not None and limits is not None:
        draft = draft_bytes(drafter, limits, load.context, load.num_rows)
        drafted, upper_bound = draft.total, upper_bound or draft.upper_bound
    bounds = {"draft": drafted / speed.bandwidth, "verify": (read + cached) / speed.bandwidth}
    stages = clock.of_a_cycle() if clock is not None and clock.cycles else {}
    bound, taken = sum(bounds.values()), sum(stages.values())
    return Roofline(
        bandwidth=speed.bandwidth,
        caches=speed.caches,
        threads=speed.threads,
        context=load.context,
        num_rows=load.num_rows,
        weight_bytes=read,
        cached_bytes=cached,
        draft_bytes=drafted,
        draft_steps=0 if limits is None else limits.draft_length,
        upper_bound=upper_bound,
        bound_seconds=bound,
        stage_seconds=stages,
        left_over_seconds={
            name: seconds - (bound if name == WHOLE else bounds.get(name, 0.0)) for name, seconds in stages.items()
        },
        share=bound / taken if taken else None,
    )


def cycle_load(
    prompt_lengths: Sequence[int], accepted: Sequence[Sequence[int]], batch_size: int, num_nodes: float = 1.0
) -> CycleLoad:
    """The mean text of cycles, from what each reply accepted.

    Example: a prompt of 10 tokens and two plain steps, which accept nothing, read texts of 11 and 12 tokens: 11.5 in the mean.

    Args:
        prompt_lengths: tokens of each prompt.
        accepted: of each reply, how many draft tokens each cycle accepted.
        batch_size: consecutive prompts that decode together; a batch has as many cycles as its longest reply.
        num_nodes: tokens of a row that the target reads in a cycle.
    """
    contexts = []
    for length, counts in zip(prompt_lengths, accepted, strict=True):
        text = length + 1
        for count in counts:
            contexts.append(text)
            text += count + 1
    forwards = sum(max(map(len, accepted[start : start + batch_size])) for start in range(0, len(accepted), batch_size))
    if not forwards:
        return CycleLoad(sum(prompt_lengths) / max(1, len(prompt_lengths)) + 1, 1.0, num_nodes)
    return CycleLoad(sum(contexts) / len(contexts), len(contexts) / forwards, num_nodes)

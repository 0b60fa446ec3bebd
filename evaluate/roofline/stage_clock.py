"""Where the seconds of a contender's cycles go: a few replies with the ledger on, for a few seconds whatever the size of the target.

Owns how much is decoded for it, and what is kept of it. Knows neither bytes nor how the figures are printed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from draftsmith.decode import Engine, Generation, GenerationSettings, Ledger
from draftsmith.evaluate.roofline.roofline import PREFILL, CycleClock, CycleLoad, cycle_load

LEAST_CYCLES = 8
"""Clocked of each contender, however slow they are."""


@dataclass(frozen=True)
class StageTimes:
    """What the clock of one contender says.

    Attributes:
        seconds: phase -> seconds. Where the last replies were cut, the prefill counts in proportion to the tokens that were decoded.
        cycles: how many were clocked.
        replies: how many were begun.
        context: mean tokens of a row's text in a cycle.
        num_rows: mean rows decoded together.
        num_nodes: tokens of a row that the target read in a cycle.
    """

    seconds: dict[str, float]
    cycles: int
    replies: int
    context: float
    num_rows: float
    num_nodes: float

    @property
    def load(self) -> CycleLoad:
        """The text that the cycles worked on."""
        return CycleLoad(self.context, self.num_rows, self.num_nodes)

    @property
    def clock(self) -> CycleClock:
        """The seconds of the cycles."""
        return CycleClock(self.seconds, self.cycles)


def clock_stages(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings,
    batch_size: int,
    most_seconds: float,
    reply_lengths: Sequence[int],
    warm_up: bool = False,
    now: Callable[[], float] = time.perf_counter,
) -> StageTimes:
    """Decode prompts op by op with a clock on every stage, batch by batch, until there are none left or the time is over.

    Apart from the race, since on a GPU the clock waits for the device after each stage.

    Args:
        engine: of the contender; it stays as it is.
        prompts: token ids of each, at least one; their places say which noise they draw.
        settings: of the replies.
        batch_size: consecutive prompts that decode together.
        most_seconds: after so many, replies are cut; :data:`LEAST_CYCLES` are clocked all the same.
        reply_lengths: tokens of each prompt's whole reply.
        warm_up: whether the first batch is begun once beforehand, untimed, because nothing has been decoded in this process.
        now: seconds.
    """
    ledger = Ledger()
    clocked = Engine(engine.target, engine.drafter, engine.shapes)
    batches = [range(start, min(start + batch_size, len(prompts))) for start in range(0, len(prompts), batch_size)]

    def decode(batch: Sequence[int], asked: GenerationSettings) -> list[Generation]:
        return clocked.generate([list(prompts[n]) for n in batch], asked, request_ids=list(batch), until=is_over)

    def is_over(_index: int, reply: list[int]) -> bool:
        # the first token is the prefill's; the cycle at hand is counted after its tokens
        return now() >= deadline and len(reply) > 1 and ledger.cycles + 1 >= LEAST_CYCLES

    deadline = float("inf")
    if warm_up:
        decode(batches[0], replace(settings, max_new_tokens=2))
    clocked.ledger, deadline = ledger, now() + most_seconds
    replies: list[Generation] = []
    for batch in batches:
        if ledger.cycles >= LEAST_CYCLES and now() >= deadline:
            break
        replies += decode(batch, settings)
    whole, decoded = sum(reply_lengths[: len(replies)]), sum(len(reply.token_ids) for reply in replies)
    seconds = dict(ledger.seconds)
    if PREFILL in seconds and decoded < whole:
        seconds[PREFILL] *= decoded / whole
    lengths = [len(prompt) for prompt in prompts[: len(replies)]]
    num_nodes = ledger.nodes / ledger.cycles if ledger.cycles else 1.0
    load = cycle_load(lengths, [reply.accepted for reply in replies], batch_size, num_nodes)
    return StageTimes(seconds, ledger.cycles, len(replies), load.context, load.num_rows, load.num_nodes)

"""Timing several contenders fairly: interleaved prompt by prompt, the order rotated, warm-up left out.

Owns the clock and the order. A machine that slows down for a minute slows all contenders alike, and the caches that
one leaves behind help each of the others equally often. Does not know what is decoded or reported.
"""

import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from draftsmith.decode.ledger import device_clock
from draftsmith.evaluate.contenders import Contender
from draftsmith.evaluate.records import Place, Round, Sample, Timed
from draftsmith.evaluate.strata.acceptance import bootstrap_interval


@dataclass(frozen=True)
class Track:
    """A contender's times: tokens and seconds of each batch it decoded, the seconds being the median over repeats."""

    tokens: Mapping[int, int]
    seconds: Mapping[int, float]

    def rate(self, batches: Sequence[int]) -> float:
        """Pooled tokens/s over some batches."""
        return sum(self.tokens[batch] for batch in batches) / sum(self.seconds[batch] for batch in batches)


def race(
    contenders: Sequence[Contender],
    samples: Sequence[Sample],
    *,
    batch_size: int = 1,
    warm_up: int | None = None,
    repeats: int = 1,
    first_only: Mapping[str, int] | None = None,
    clock: Callable[[], float] | None = None,
    advance: Callable[[int], None] = lambda count: None,
    say: Callable[[str], None] = lambda note: None,
    done: Mapping[Place, Round] | None = None,
    keep: Callable[[Place, Round], None] = lambda place, finished: None,
) -> dict[str, list[Timed]]:
    """Decode all samples with all contenders, each batch by one after the other before the next batch comes.

    Args:
        contenders: who decodes. Batch b starts with contender b modulo their number, then goes round.
        samples: prompts, cut into consecutive batches of `batch_size`.
        warm_up: most prompts of the untimed call; a whole batch by default.
        repeats: how often the whole round is run.
        first_only: contenders (by name) that decode only the first so many batches.
        clock: seconds now; the default one waits for the devices that hold tensors after the warm-up.
        advance: called with 1 after each call.
        say: called before each call with what follows: the contender, and whether it only warms up.
        done: rounds of an earlier run, which are not decoded again.
        keep: given each round as it is finished.

    Every contender decodes its first batch once beforehand, untimed.
    """
    batches = [range(start, min(start + batch_size, len(samples))) for start in range(0, len(samples), batch_size)]
    chosen = [[samples[number] for number in batch] for batch in batches]
    limits, rounds = dict(first_only or {}), dict(done or {})
    left = [place for place in itertools.product(range(repeats), range(len(batches))) if place not in rounds]

    def takes_part(contender: Contender, index: int) -> bool:
        return index < limits.get(contender.name, len(batches))

    for contender in contenders:
        first = next((index for _, index in left if takes_part(contender, index)), None)
        if first is not None:
            say(f"{contender.name} warms up, untimed")
            contender.decode(chosen[first][:warm_up], list(batches[first])[:warm_up])
    now = clock or device_clock()
    for repeat, index in left:
        turn = (index + repeat) % len(contenders)
        finished: dict[str, Timed] = {}
        for contender in [*contenders[turn:], *contenders[:turn]]:
            if takes_part(contender, index):
                say(contender.name)
                started = now()
                decoded = contender.decode(chosen[index], list(batches[index]))
                finished[contender.name] = Timed(tuple(batches[index]), index, repeat, now() - started, decoded)
                advance(1)
        rounds[repeat, index] = finished
        keep((repeat, index), finished)
    return {
        contender.name: [rounds[place][contender.name] for place in sorted(rounds) if contender.name in rounds[place]]
        for contender in contenders
    }


def num_calls(contenders: Sequence[str], num_batches: int, repeats: int, first_only: Mapping[str, int]) -> int:
    """How many timed calls `race` makes."""
    return repeats * sum(min(first_only.get(name, num_batches), num_batches) for name in contenders)


def track(runs: Sequence[Timed]) -> Track:
    """Tokens of each batch, and its seconds at the median pace of its repeats."""
    tokens: dict[int, int] = {}
    pace: dict[int, list[float]] = {}
    for run in runs:
        count = sum(len(reply.token_ids) for reply in run.decoded)
        tokens.setdefault(run.batch, count)
        pace.setdefault(run.batch, []).append(run.seconds / count)
    return Track(tokens, {batch: statistics.median(paces) * tokens[batch] for batch, paces in pace.items()})


def shared(first: Track, second: Track) -> list[int]:
    """Batches that both decoded."""
    return sorted(first.tokens.keys() & second.tokens.keys())


def speedup(fast: Track, base: Track, batches: Sequence[int] | None = None) -> float:
    """Pooled tokens/s of `fast` over that of `base`, on the batches that both decoded."""
    common = shared(fast, base) if batches is None else batches
    return fast.rate(common) / base.rate(common)


def speedup_median(fast: Track, base: Track) -> float:
    """Median over batches of the ratio of tokens/s."""
    return statistics.median(fast.rate([batch]) / base.rate([batch]) for batch in shared(fast, base))


def speedup_interval(
    fast: Track, base: Track, seed: int = 0, batches: Sequence[int] | None = None
) -> tuple[float, float]:
    """95 % bootstrap interval of the pooled speed-up over batches: those that both decoded, or the given ones."""
    common = shared(fast, base) if batches is None else batches
    columns = [[fast.tokens[batch], fast.seconds[batch], base.tokens[batch], base.seconds[batch]] for batch in common]

    def ratio_of_rates(sums: np.ndarray) -> np.ndarray:
        return (sums[:, 0] / sums[:, 1]) / (sums[:, 2] / sums[:, 3])

    return bootstrap_interval(columns, ratio_of_rates, seed=seed)


def is_suspicious(faster_by: float, steps: float | None) -> bool:
    """Whether a speed-up exceeds its tokens per step, which saving target forwards alone cannot give."""
    return steps is not None and faster_by > steps

"""Emitted tokens and cycles of every prompt, counted in batches: what the machine does beside it changes neither."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from draftsmith.decode.engine import Engine
from draftsmith.decode.sampling import GenerationSettings
from draftsmith.evaluate.strata.acceptance import ratio_interval
from draftsmith.files import atomic_write

ROWS = 32
_RESAMPLES = 2000


@dataclass(frozen=True)
class Counted:
    """Of P prompts.

    Attributes:
        emitted: tokens of each prompt's replies, without each reply's first.
        cycles: cycles that they took.
    """

    emitted: tuple[float, ...]
    cycles: tuple[float, ...]

    @property
    def tokens_per_step(self) -> float:
        """Over all prompts."""
        return sum(self.emitted) / sum(self.cycles)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % bootstrap over prompts."""
        return ratio_interval(self.emitted, self.cycles)

    def cell(self) -> str:
        """Tokens per step with the interval, for a table."""
        low, high = self.interval
        return f"{self.tokens_per_step:.2f} ({low:.2f} to {high:.2f})"


class KeptCounts:
    """Counts by name, kept in a file between runs.

    Args:
        file: JSON; written after every count.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._kept = json.loads(file.read_text()) if file.is_file() else {}

    def counted(self, name: str, make: Callable[[], Counted]) -> Counted:
        """What is kept under a name; counted now where nothing is."""
        if name not in self._kept:
            counted = make()
            self._kept[name] = asdict(counted)
            atomic_write(self._file, json.dumps(self._kept))
            print(f"{time.strftime('%H:%M')} {name}: {counted.tokens_per_step:.2f}", flush=True)
        return Counted(**{field: tuple(values) for field, values in self._kept[name].items()})


def count(engine: Engine, prompts: Sequence[list[int]], temperature: float, num_tokens: int, seeds: int = 1) -> Counted:
    """Decode all prompts, with each seed where tokens are drawn.

    Args:
        engine: with the drafter and its shape.
        prompts: token ids.
        temperature: 0 is greedy.
        num_tokens: the most that a reply has.
        seeds: how many times each prompt is answered above temperature 0.
    """
    emitted, cycles = [0.0] * len(prompts), [0.0] * len(prompts)
    for seed in range(seeds if temperature > 0.0 else 1):
        settings = GenerationSettings(max_new_tokens=num_tokens, temperature=temperature, seed=seed)
        for place, reply in enumerate(engine.generate(prompts, settings, num_rows=ROWS)):
            emitted[place] += len(reply.token_ids) - 1
            cycles[place] += len(reply.accepted)
    return Counted(tuple(emitted), tuple(cycles))


def paired_ratio(ours: Counted, theirs: Counted) -> tuple[float, float, float]:
    """Our tokens per step over theirs on the same prompts, with a 95 % bootstrap over prompts."""
    table_P4 = np.array([ours.emitted, ours.cycles, theirs.emitted, theirs.cycles]).T
    drawn = np.random.default_rng(0).integers(len(table_P4), size=(_RESAMPLES, len(table_P4)))
    sums_R4 = table_P4[drawn].sum(axis=1)
    ratios_R = sums_R4[:, 0] / sums_R4[:, 1] * sums_R4[:, 3] / sums_R4[:, 2]
    low, high = np.quantile(ratios_R, (0.025, 0.975))
    return ours.tokens_per_step / theirs.tokens_per_step, float(low), float(high)

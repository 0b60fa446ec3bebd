"""Where the time of real training steps goes, and what their matrix products alone would have taken, in turns.

A round is some steps as they are, then one step whose products are recorded, then those products alone; so both sides see the same machine.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.profilers import Profiler

from benchmarks.train.products import Recorder, Replay

PHASES = {
    "loading": "[_TrainingEpochLoop].train_dataloader_next",
    "to device": "[Strategy]SingleDeviceStrategy.batch_to_device",
    "forward": "[Strategy]SingleDeviceStrategy.training_step",
    "backward": "[Strategy]SingleDeviceStrategy.backward",
}
"""What Lightning's profiler calls the parts of a step; what is left is the optimiser, clipping, callbacks and the loop."""


class PhaseProfiler(Profiler):
    """Seconds of named parts since the last reading."""

    def __init__(self) -> None:
        super().__init__()
        self._names = {action: phase for phase, action in PHASES.items()}
        self._started: dict[str, float] = {}
        self._seconds: dict[str, float] = defaultdict(float)

    def start(self, action_name: str) -> None:
        """Called by Lightning."""
        self._started[action_name] = time.perf_counter()

    def stop(self, action_name: str) -> None:
        """Called by Lightning."""
        if action_name in self._names and action_name in self._started:
            self._seconds[self._names[action_name]] += time.perf_counter() - self._started[action_name]

    def read(self) -> dict[str, float]:
        """Seconds by phase, which are forgotten."""
        seconds, self._seconds = dict(self._seconds), defaultdict(float)
        return seconds

    def summary(self) -> str:
        """Nothing: the benchmark prints."""
        return ""


@dataclass(frozen=True)
class Round:
    """One round: seconds of a token in real steps and in bare products, seconds of a real token by phase, operations of a token."""

    real: float
    bare: float
    phases: dict[str, float]
    flops: float


class StepClock(pl.Callback):
    """Measures rounds of steps, the first `warm` steps left out.

    Args:
        profiler: the trainer's.
        count: tokens of a batch, as a function of it.
        timed: steps of a round that are timed as they are; one more is recorded.
        warm: steps before the first round.
    """

    def __init__(self, profiler: PhaseProfiler, count: Callable[[Any], int], timed: int = 4, warm: int = 8) -> None:
        self.profiler, self.count, self.timed, self.warm = profiler, count, timed, warm
        self.rounds: list[Round] = []
        self._number = -warm
        self._tokens, self._since = 0, 0.0
        self._window: tuple[float, dict[str, float]] = (0.0, {})
        self._recorder: Recorder | None = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Records the last step of a round."""
        if self._number == self.timed:
            self._recorder = Recorder().__enter__()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts, and ends a round."""
        if 0 <= self._number < self.timed:
            self._tokens += self.count(batch)
        self._number += 1
        if self._number == self.timed:
            self._window = (time.perf_counter() - self._since, self.profiler.read())
        elif self._recorder is not None:
            self._recorder.__exit__(None, None, None)
            self.rounds.append(self._round(self._recorder, self.count(batch)))
            self._recorder, self._number = None, 0
        if self._number == 0:
            self.profiler.read()
            self._tokens, self._since = 0, time.perf_counter()

    def _round(self, recorder: Recorder, recorded_tokens: int) -> Round:
        replay = Replay(recorder.products)
        replay.run()
        bare = statistics.median(replay.run() for _ in range(3))
        seconds, phases = self._window
        by_phase = {name: value / self._tokens for name, value in phases.items()}
        return Round(seconds / self._tokens, bare / recorded_tokens, by_phase, recorder.flops / recorded_tokens)

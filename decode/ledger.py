"""The timing ledger: where the seconds of decoding go, by phase.

Owns the clock. An engine without a ledger never reads it.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch


@dataclass
class Ledger:
    """Seconds by phase, and how many cycles they cover.

    On a CUDA device the host waits for the device at the end of each phase, so that phases are charged what they cost; decoding with a
    ledger is therefore slower there than without.

    Attributes:
        seconds: phase name (prefill, draft, verify, accept, host) -> seconds.
        cycles: draft-verify-accept cycles.
        nodes: tree nodes verified, the roots included.
    """

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    cycles: int = 0
    nodes: int = 0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Charge the time of the block to a phase."""
        started = time.perf_counter()
        yield
        wait_for_devices()
        self.seconds[name] += time.perf_counter() - started

    def count(self, nodes: int) -> None:
        """Note one cycle over so many tree nodes."""
        self.cycles += 1
        self.nodes += nodes


def wait_for_devices() -> None:
    """Wait until every CUDA device that holds tensors has done what was queued; the current device may be none of them."""
    for index in range(torch.cuda.device_count()):
        if torch.cuda.memory_allocated(index) > 0:
            torch.cuda.synchronize(index)


def phase(ledger: Ledger | None, name: str) -> AbstractContextManager[None]:
    """The ledger's phase, or nothing."""
    return nullcontext() if ledger is None else ledger.phase(name)

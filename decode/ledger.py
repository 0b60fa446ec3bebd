"""The timing ledger: where the seconds of decoding go, by phase.

Owns the clock. An engine without a ledger never reads it.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch


@dataclass
class Ledger:
    """Seconds by phase, and how many cycles they cover.

    On a CUDA device the host waits for the device at the end of each phase, so that phases are charged what they cost; decoding with a
    ledger is therefore slower there than without. It waits for the devices that hold tensors when its first phase begins.

    Attributes:
        seconds: phase name (prefill, draft, verify, accept, host) -> seconds.
        cycles: draft-verify-accept cycles.
        nodes: tree nodes verified, the roots included.
    """

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    cycles: int = 0
    nodes: int = 0
    _devices: Sequence[int] | None = field(default=None, init=False, repr=False, compare=False)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Charge the time of the block to a phase."""
        if self._devices is None:
            self._devices = devices_in_use()
        started = time.perf_counter()
        yield
        _wait_for(self._devices)
        self.seconds[name] += time.perf_counter() - started

    def count(self, nodes: int) -> None:
        """Note one cycle over so many tree nodes."""
        self.cycles += 1
        self.nodes += nodes


def devices_in_use() -> list[int]:
    """The CUDA devices that hold tensors now; the current device may be none of them. Asking takes longer than waiting."""
    return [index for index in range(torch.cuda.device_count()) if torch.cuda.memory_allocated(index) > 0]


def device_clock() -> Callable[[], float]:
    """A clock that waits for the devices first that hold tensors now: what was only queued is not yet done.

    Returns:
        A function that gives the seconds now.
    """
    devices = devices_in_use()

    def now() -> float:
        _wait_for(devices)
        return time.perf_counter()

    return now


def _wait_for(devices: Sequence[int]) -> None:
    """Wait until CUDA devices have done what was queued."""
    for index in devices:
        torch.cuda.synchronize(index)


def phase(ledger: Ledger | None, name: str) -> AbstractContextManager[None]:
    """The ledger's phase, or nothing."""
    return nullcontext() if ledger is None else ledger.phase(name)

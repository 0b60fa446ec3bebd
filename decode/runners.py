"""The ways of running a cycle: eagerly, compiled, or captured as one CUDA graph.

Owns the choice among them and what each needs. All run the same function, so what they emit is the same up to rounding. Knows neither
drafters nor queues.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Literal, Protocol, get_args

import torch

from draftsmith.decode.batch import Batch
from draftsmith.decode.cycle import CycleReport, DecodeCycle
from draftsmith.decode.ledger import Ledger, phase
from draftsmith.decode.sampling import GenerationSettings
from draftsmith.models.drafters.drafter import Drafter
from draftsmith.models.slots.constants import holding
from draftsmith.models.target.target import Target

Compile = Literal["auto", "on", "off"]


class Runner(Protocol):
    """Runs cycles.

    Attributes:
        runs_ahead: whether a call returns before its cycle has run, so that the next one should begin before the host reads this one.
    """

    @property
    def runs_ahead(self) -> bool: ...

    def __call__(self, batch: Batch, settings: GenerationSettings, ledger: Ledger | None = None) -> CycleReport:
        """As :class:`~draftsmith.decode.cycle.DecodeCycle`."""
        ...


class CompiledRunner:
    """Runs cycles through ``torch.compile``: one graph for a batch's shapes, made in its first cycle.

    Where the compiler fails, cycles run op by op, and a warning says why.

    Args:
        cycle: with fixed shapes.
        backend: of ``torch.compile``.
    """

    runs_ahead = False

    def __init__(self, cycle: DecodeCycle, backend: str | Callable[..., Any] = "inductor") -> None:
        from torch._dynamo.exc import TorchDynamoException  # the compiler takes seconds to import

        self._failure = TorchDynamoException
        self._cycle = cycle
        self._run: Callable[[Batch, GenerationSettings], CycleReport] = torch.compile(
            cycle.__call__, fullgraph=True, dynamic=False, backend=backend
        )

    def __call__(self, batch: Batch, settings: GenerationSettings, ledger: Ledger | None = None) -> CycleReport:
        """Run one cycle; a ledger is charged for it as a whole."""
        if self._run == self._cycle:
            return self._cycle(batch, settings, ledger)
        try:
            with phase(ledger, "cycle"):
                return self._run(batch, settings)
        except self._failure as error:  # nothing has run then
            _warn_of_failure("compiled", error)
            self._run = self._cycle
        return self._cycle(batch, settings, ledger)


class CapturedRunner:
    """Runs cycles as one CUDA graph, captured in a batch's second cycle: no kernel is launched by itself afterwards.

    Where the capture fails, cycles run op by op, and a warning says why.

    Args:
        cycle: with fixed shapes.
    """

    runs_ahead = True

    def __init__(self, cycle: DecodeCycle) -> None:
        self._cycle = cycle
        self._batch: Callable[[], Batch | None] = lambda: None
        self._settings: GenerationSettings | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._report: CycleReport | None = None
        self._constants: list[Any] = []
        self._has_failed = False

    def __call__(self, batch: Batch, settings: GenerationSettings, ledger: Ledger | None = None) -> CycleReport:
        """Run one cycle; once it is captured, a ledger is charged for it as a whole."""
        if batch is not self._batch() or settings != self._settings:
            # The first cycle runs eagerly, so that libraries make what they need outside of a capture.
            self._batch, self._settings = weakref.ref(batch), settings
            self._graph, self._report, self._constants = None, None, []
            return self._first(batch, settings, ledger)
        if self._graph is None and not self._has_failed:
            self._capture(batch, settings)
        if self._graph is None:
            return self._cycle(batch, settings, ledger)
        with phase(ledger, "cycle"):
            self._graph.replay()
        assert self._report is not None
        return self._report

    def _first(self, batch: Batch, settings: GenerationSettings, ledger: Ledger | None) -> CycleReport:
        """Run a cycle op by op. Attention that skips slots needs a compiler; where that fails, all slots are attended to from now on.

        Raises:
            RuntimeError: the cycle's, where the target's attention skips no slots and so is not to blame.
        """
        try:
            return self._cycle(batch, settings, ledger)
        except RuntimeError as error:  # no row has moved on
            from torch._dynamo.exc import TorchDynamoException  # the compiler takes seconds to import

            if not isinstance(error, TorchDynamoException) or not self._cycle.target.skips_slots:
                raise
            warnings.warn(f"attention reads empty slots too: it cannot be compiled ({_reason(error)})", stacklevel=4)
            self._cycle.target.attend_to_all_slots()
        return self._cycle(batch, settings, ledger)

    def _capture(self, batch: Batch, settings: GenerationSettings) -> None:
        """Record the cycle's kernels; none of them runs, so the batch stays as it is."""
        try:
            graph = torch.cuda.CUDAGraph()
            with holding() as constants, _capturing(graph, self._cycle.target.device):
                report = self._cycle(batch, settings)
        except RuntimeError as error:  # CUDA's errors have no class of their own in every version
            _warn_of_failure("captured", error)
            self._has_failed = True
        else:
            self._graph, self._report, self._constants = graph, report, constants


@contextmanager
def _capturing(graph: torch.cuda.CUDAGraph, device: torch.device) -> Iterator[None]:
    """Capture what is done inside.

    The outer stream is the current one, and is so again where the end of a capture fails. What other threads do with the device meanwhile,
    such as pinning memory, spoils nothing.
    """
    with (
        torch.cuda.device(device),
        torch.cuda.stream(torch.cuda.current_stream(device)),
        torch.cuda.graph(graph, stream=_capture_stream(device), capture_error_mode="thread_local"),
    ):
        yield


@lru_cache(maxsize=16)
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of a device's captures.

    Torch has its own on the device of the first capture. With one for each capture, workspaces of matrix products would stay in memory.
    """
    return torch.cuda.Stream(device)


def _warn_of_failure(how: str, error: Exception) -> None:
    warnings.warn(f"cycles run op by op: they cannot be {how} ({_reason(error)})", stacklevel=4)


def _reason(error: Exception) -> str:
    return " ".join(str(error).split("\n\n")[0].split()) or type(error).__name__


def check_compile(compile: str) -> None:
    """Raise for what is no way of compiling.

    Raises:
        ValueError: it is none of auto, on and off.
    """
    if compile not in get_args(Compile):
        raise ValueError(f"compile is {compile!r}; give one of {', '.join(get_args(Compile))}")


def compiles(compile: Compile) -> bool:
    """Whether cycles are compiled or captured. ``auto`` is ``off`` on every device, as long as no GPU has measured the captured cycle."""
    return compile == "on"


def needs_host(target: Target, drafter: Drafter | None, settings: GenerationSettings) -> str:
    """Why the cycles of a request cannot run as one function; empty where they can."""
    if settings.constraints is not None:
        return "the model's generation config sets constraints, which Transformers computes on the host"
    if target.keeps_state:
        return f"{target.name} keeps a recurrent state, which is copied and restored on the host's word"
    if target.factors_follow_length:
        return f"the rotary factors of {target.name} follow the length of the text"
    if len(set(getattr(target.model, "hf_device_map", {}).values())) > 1:
        return f"{target.name} lies on several devices"
    return "" if drafter is None else drafter.needs_host()


def whole_cycle_runner(cycle: DecodeCycle) -> Runner:
    """The way of running a cycle of fixed shapes: captured on CUDA, compiled elsewhere."""
    return CapturedRunner(cycle) if cycle.target.device.type == "cuda" else CompiledRunner(cycle)

"""Batches that are made ready while the step before them runs.

Owns: the look-ahead by one batch, in the caller's thread or in one of its own, and copies to a device that hold up nobody. Does not know:
what makes a batch (a cache, or the target in the loop), losses, optimisers.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from draftsmith.models.drafters.rollout import PackedBatch
from draftsmith.train.batches.cache_subset import CacheBatch


class PlacedBatch(CacheBatch):
    """A batch that lies where it is wanted, so that there are no two of it."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> CacheBatch:
        """Itself, on its own device; Lightning calls this."""
        here = self.packed.input_ids.device
        return self if torch.device(device) == here else super().to(device, non_blocking)


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """The values on a device. On a GPU the copy comes from pinned memory and does not hold up this process.

    Args:
        values: of any shape and dtype.
        device: where to.
    """
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def without_states(packed: PackedBatch, device: torch.device) -> PackedBatch:
    """A batch on a device, but for the target's states and greedy tokens, which stay where they are.

    Args:
        packed: the batch.
        device: where to.
    """
    return replace(
        packed,
        input_ids=to_device(packed.input_ids, device),
        loss_mask=to_device(packed.loss_mask, device),
        document_ids=to_device(packed.document_ids, device),
        positions=to_device(packed.positions, device),
    )


def placed(batch: CacheBatch, device: torch.device) -> CacheBatch:
    """All of a cache's batch on a device.

    Args:
        batch: as it was read.
        device: where to.
    """
    packed = batch.packed
    hidden = {layer: to_device(states, device) for layer, states in packed.hidden.items()}
    greedy = None if packed.greedy_ids is None else to_device(packed.greedy_ids, device)
    return PlacedBatch(replace(without_states(packed, device), hidden=hidden, greedy_ids=greedy), batch.sample_ids)


class LookAheadLoader:
    """A loader whose batches have their states where they are wanted; on a GPU the next one is made ready while the caller works.

    Before the caller gets batch i, the loader queues what makes batch i + 1 on a stream of its own. That work waits for everything
    that the caller queued for batch i - 1, and runs beside step i. Without `ahead`, the same batches come in the same order, each made
    when the caller asks for it. A batch loses its states when the caller asks for the next one. So at most two batches have
    states at any time, or one without `ahead`.

    Args:
        rounds: gives what each batch is made of, such as batches without states.
        states: makes a batch; what it returns must be of the same batch, whenever it is called.
        ahead: whether to run ahead by one batch.
        device: whose stream is used; on others than CUDA there is none, and running ahead in the caller's thread only changes the order
            of calls.
        threaded: with `ahead`, read and make the next batch in a thread of its own. Only for `states` without collectives.
        reading: held while `rounds` reads. Loaders that read the same files share one.
    """

    def __init__(
        self,
        rounds: DataLoader,
        states: Callable[[Any], CacheBatch],
        ahead: bool,
        device: torch.device,
        threaded: bool = False,
        reading: AbstractContextManager[Any] | None = None,
    ) -> None:
        self.rounds, self.states, self.ahead, self.device = rounds, states, ahead, device
        self.threaded, self.reading = threaded, reading or nullcontext()

    @property
    def sampler(self) -> object:
        """What Lightning tells the epoch's number."""
        return self.rounds.sampler

    @property
    def batch_sampler(self) -> None:
        """Lightning asks for it where there is a sampler: the sampler gives whole batches itself."""
        return None

    def __len__(self) -> int:
        return len(self.rounds)

    def __iter__(self) -> Iterator[CacheBatch]:
        stream = torch.cuda.Stream(self.device) if self.ahead and self.device.type == "cuda" else None
        rounds = iter(self.rounds)
        return self._in_a_thread(rounds, stream) if self.ahead and self.threaded else self._in_turn(rounds, stream)

    def _in_turn(self, rounds: Iterator[Any], stream: torch.cuda.Stream | None) -> Iterator[CacheBatch]:
        launched: deque[_Launched] = deque()
        handed: Callable[[], CacheBatch | None] = _nothing
        while (batches := self._read(rounds)) is not None:
            _forget(handed())
            launched.append(_launch(self.states, batches, stream, _queued(stream)))
            if len(launched) > self.ahead:
                handed = weakref.ref(launched[0].batch)
                yield launched.popleft().arrived()
        while launched:
            _forget(handed())
            handed = weakref.ref(launched[0].batch)
            yield launched.popleft().arrived()

    def _in_a_thread(self, rounds: Iterator[Any], stream: torch.cuda.Stream | None) -> Iterator[CacheBatch]:
        def make(queued: torch.cuda.Event | None) -> _Launched | None:
            batches = self._read(rounds)
            return None if batches is None else _launch(self.states, batches, stream, queued)

        handed: Callable[[], CacheBatch | None] = _nothing
        with ThreadPoolExecutor(1, "look-ahead") as thread:
            pending: Future[_Launched | None] = thread.submit(make, _queued(stream))
            # An error of the thread is raised here, when the caller asks for the batch that it belongs to.
            while (launched := pending.result()) is not None:
                _forget(handed())
                pending = thread.submit(make, _queued(stream))
                handed = weakref.ref(launched.batch)
                yield launched.arrived()

    def _read(self, rounds: Iterator[Any]) -> Any:
        """What the next batch is made of; None behind the last one."""
        with self.reading:
            return next(rounds, None)


def _nothing() -> None:
    return None


def _forget(batch: CacheBatch | None) -> None:
    """Lets go of the states of a batch that somebody may still hold: Lightning's validation does while it asks for the next."""
    if batch is not None:
        batch.packed.hidden.clear()


@dataclass(frozen=True)
class _Launched:
    batch: CacheBatch
    done: torch.cuda.Event | None

    def arrived(self) -> CacheBatch:
        """The batch, once the stream that it is used on waits for its states; this process does not wait."""
        if self.done is not None:
            stream = torch.cuda.current_stream(self.batch.packed.input_ids.device)
            stream.wait_event(self.done)
            for values in _tensors(self.batch.packed):
                values.record_stream(stream)
        return self.batch


def _queued(stream: torch.cuda.Stream | None) -> torch.cuda.Event | None:
    """All that the caller has queued so far."""
    return None if stream is None else torch.cuda.current_stream(stream.device).record_event()


def _launch(
    states: Callable[[Any], CacheBatch], batches: Any, stream: torch.cuda.Stream | None, queued: torch.cuda.Event | None
) -> _Launched:
    if stream is None or queued is None:
        return _Launched(states(batches), None)
    with torch.cuda.stream(stream):
        # Behind the step before this one, so that memory stays bounded however far this process is ahead of the device.
        stream.wait_event(queued)
        batch = states(batches)
        return _Launched(batch, stream.record_event())


def _tensors(packed: PackedBatch) -> list[Tensor]:
    plain = [packed.input_ids, packed.loss_mask, packed.document_ids, packed.positions, *packed.hidden.values()]
    return plain if packed.greedy_ids is None else [*plain, packed.greedy_ids]

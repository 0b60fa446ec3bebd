"""States of a target that several processes hold together: the first one has the samples, all run the forwards.

Owns: how samples reach the other processes, and when these are done. Does not know: files, corpora, how a target is divided.

No collective but those of the forwards passes between devices: ids travel over gloo, in main memory.

Shape legend: n samples, T tokens of all of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor, distributed

from draftsmith.data.cache.features import features
from draftsmith.data.chats.tokenized_samples import TokenizedSample
from draftsmith.data.shards.manifest import CacheIdentity
from draftsmith.data.shards.shards import ShardContent
from draftsmith.models.target.target import Target

# The others wait in a broadcast while the first process surveys a corpus or hashes what is there of a cache, for hours where
# these are large. Should it die, the launcher ends them.
_LONGEST_WAIT = timedelta(days=7)

Features = Callable[[Sequence[TokenizedSample], CacheIdentity, Callable[[int], None]], ShardContent]


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Join the processes that torchrun started, as a group, for as long as it is needed.

    Yields:
        Once, nothing.

    Raises:
        ValueError: no launcher has said which process this is.
    """
    if distributed.is_initialized():
        yield
        return
    if not distributed.is_torchelastic_launched():
        raise ValueError(
            "a target that processes hold together needs all of them at once; start them with torchrun --nproc-per-node"
        )
    distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        distributed.destroy_process_group()


@contextlib.contextmanager
def leading(target: Target) -> Iterator[Features]:
    """Give the first process a function that computes states as `features` does, with all the others. These are released at the end.

    Args:
        target: this process's part of it.

    Yields:
        The function.
    """
    group = _new_group()

    def together(
        samples: Sequence[TokenizedSample], identity: CacheIdentity, advance: Callable[[int], None]
    ) -> ShardContent:
        _send([len(sample.input_ids) for sample in samples], group)
        _send([token for sample in samples for token in sample.input_ids], group)
        state.listening = False
        content = features(target, samples, identity, advance)
        state.listening = True
        return content

    state = _Followers()
    try:
        yield together
    finally:
        # Where a forward has failed here, the others have failed too or wait within it: they would not hear, and the launcher ends them.
        if state.listening:
            _send([], group)


@dataclass
class _Followers:
    """Whether they wait for the next samples."""

    listening: bool = True


def follow(target: Target, identity: CacheIdentity) -> None:
    """Run the forwards that the first process runs, and keep nothing, until it is done.

    Args:
        target: this process's part of it.
        identity: as much as forwards depend on.
    """
    group = _new_group()
    while len(lengths := _receive(group)):
        ids = _receive(group).split(lengths.tolist())
        features(target, [TokenizedSample("", own.tolist(), [True] * len(own)) for own in ids], identity)


def _new_group() -> distributed.ProcessGroup:
    """All processes, over main memory, patient with the first one."""
    return distributed.new_group(backend="gloo", timeout=_LONGEST_WAIT)


def _send(numbers: Sequence[int], group: distributed.ProcessGroup) -> None:
    distributed.broadcast(torch.tensor([len(numbers)]), 0, group)
    if numbers:
        distributed.broadcast(torch.tensor(numbers), 0, group)


def _receive(group: distributed.ProcessGroup) -> Tensor:
    count = torch.zeros(1, dtype=torch.int64)
    distributed.broadcast(count, 0, group)
    numbers = torch.zeros(int(count), dtype=torch.int64)
    if len(numbers):
        distributed.broadcast(numbers, 0, group)
    return numbers

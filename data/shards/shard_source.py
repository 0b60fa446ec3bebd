"""Where the shards of a cache come from: the one protocol of a folder on this machine and of a URL."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from torch import Tensor

from draftsmith.data.shards.manifest import Manifest


class ShardFile(Protocol):
    """A shard's file, which stays where it is until it is released.

    Attributes:
        path: the file.
    """

    path: Path

    def release(self) -> None:
        """Let the file go. Twice is harmless."""


class ShardSource(Protocol):
    """The shards of one cache.

    Attributes:
        manifest: of the cache.
        fetches: whether shards are fetched before they are read. Then it pays to read shard by shard.
        most_open: files that a process keeps open at a time.
    """

    manifest: Manifest
    fetches: bool
    most_open: int

    def prepare(self) -> None:
        """Check what can be seen without reading.

        Raises:
            ValueError: a shard is missing or cut off.
        """

    def unchecked(self) -> list[int]:
        """List the shards whose sha256 is to be compared before they are served.

        Returns:
            Their numbers.
        """

    def check(self, shard: int) -> None:
        """Compare a shard's sha256 if that is still to be done.

        Args:
            shard: its number.

        Raises:
            ValueError: it was altered.
        """

    def hold(self, shard: int, *, give_way: Callable[[], bool]) -> ShardFile:
        """Give a shard's file.

        Args:
            shard: its number.
            give_way: releases another file and says whether there was one; called where room is short.

        Returns:
            The file.

        Raises:
            ValueError: it cannot be read or is not what the manifest says.
        """

    def lengths(self) -> np.ndarray | None:
        """Give the tokens of each sample.

        Returns:
            int32 [N]; None where no file says so: the shards do.

        Raises:
            ValueError: the file is damaged or belongs to another cache.
        """

    def texts(self, shards: Sequence[int], vocab_size: int | None) -> Iterator[list[Tensor]] | None:
        """Read ids and masks of shards without their states.

        Args:
            shards: their numbers.
            vocab_size: ids must be below it; None checks nothing.

        Returns:
            `offsets`, `input_ids` and `loss_mask` of each shard. None where opening a shard reads no states anyway.

        Raises:
            ValueError: a shard cannot be read, or is at odds with itself or with its manifest.
        """

    def need(self, shards: Sequence[int], reader: object) -> None:
        """Say which shards a reader reads or will soon.

        Args:
            shards: their numbers, most urgent first; empty where it is done.
            reader: who asks.
        """

    def forget_parents(self) -> None:
        """Release, in a forked process, what its parent fetches ahead."""

    def close(self) -> None:
        """End what is fetched ahead."""

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
        """Lets the file go. Twice is harmless."""


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
        """Looks at what can be seen without reading. Raises ValueError for a shard that is missing or cut off."""

    def unchecked(self) -> list[int]:
        """Shards whose sha256 is to be compared before they are served."""

    def check(self, shard: int) -> None:
        """Compares a shard's sha256 if that is still to be done. Raises ValueError for one that was altered."""

    def hold(self, shard: int, *, give_way: Callable[[], bool]) -> ShardFile:
        """A shard's file.

        Args:
            shard: its number.
            give_way: lets go of another file and says whether there was one; called where room is short.

        Raises:
            ValueError: it cannot be read or is not what the manifest says.
        """

    def lengths(self) -> np.ndarray | None:
        """int32 [N]: tokens of each sample. None where no file says so: the shards do."""

    def texts(self, shards: Sequence[int], vocab_size: int | None) -> Iterator[list[Tensor]] | None:
        """`offsets`, `input_ids` and `loss_mask` of each shard without its states. None where opening a shard reads none anyway."""

    def need(self, shards: Sequence[int], reader: object) -> None:
        """Which shards a reader reads or will soon, most urgent first. An empty list means that it is done."""

    def forget_parents(self) -> None:
        """A forked process lets go of what its parent fetches ahead."""

    def close(self) -> None:
        """Ends what is fetched ahead."""

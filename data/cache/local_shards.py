"""The shards of a cache in a folder on this machine.

Owns: which of them are still to be compared with their sha256. Does not know: samples, networks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from draftsmith.data.shards.lengths import LENGTHS_FILE, read_lengths
from draftsmith.data.shards.manifest import Manifest
from draftsmith.data.shards.shard_names import safe_shard_name
from draftsmith.data.shards.shards import check_digest, check_size


@dataclass
class LocalFile:
    """A file that stays where it is anyway."""

    path: Path

    def release(self) -> None:
        """Nothing to let go."""


class LocalShards:
    """The shards of a finished cache in a folder.

    Args:
        path: the folder.
        checked: whether the shards' sha256 are compared before they are served.

    Raises:
        ValueError: the folder holds no cache, or its manifest is broken.
    """

    fetches, most_open = False, 4096

    def __init__(self, path: Path, checked: bool) -> None:
        self.path = path
        self.manifest = Manifest.load(path)
        self._unchecked = set(range(len(self.manifest.shards))) if checked else set()

    def prepare(self) -> None:
        """Compare the sizes of all shards.

        Raises:
            ValueError: one is missing or cut off.
        """
        for shard in self.manifest.shards:
            check_size(self.path / shard.name, shard)

    def unchecked(self) -> list[int]:
        """See ShardSource."""
        return sorted(self._unchecked)

    def check(self, shard: int) -> None:
        """See ShardSource."""
        if shard in self._unchecked:
            check_digest(self._file(shard), self.manifest.shards[shard])
            self._unchecked.discard(shard)

    def hold(self, shard: int, *, give_way: Callable[[], bool]) -> LocalFile:
        """See ShardSource; a folder is never short of room."""
        return LocalFile(self._file(shard))

    def lengths(self) -> np.ndarray | None:
        """int32 [N], from the folder's file of lengths, if it has one.

        Returns:
            Tokens of each sample, or None.

        Raises:
            ValueError: the file is damaged or belongs to another cache.
        """
        file = self.path / LENGTHS_FILE
        return read_lengths(file.read_bytes(), self.manifest, str(file)) if file.is_file() else None

    def texts(self, shards: Sequence[int], vocab_size: int | None) -> None:
        """None: an opened shard is a memory map, of which only what is used is read."""

    def need(self, shards: Sequence[int], reader: object) -> None:
        """Nothing is fetched."""

    def forget_parents(self) -> None:
        """A forked process shares its parent's maps."""

    def close(self) -> None:
        """Nothing runs ahead."""

    def _file(self, shard: int) -> Path:
        return self.path / safe_shard_name(self.manifest.shards[shard].name)

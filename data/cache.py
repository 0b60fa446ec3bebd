"""Reading a hidden-state cache: refuses what is incomplete, altered or foreign before it serves anything.

Owns: opening, checking and indexing a cache. Does not know: how it is made (`hidden_states.py`), how samples are
batched (`packing.py`).
"""

import bisect
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from draftsmith.data.manifest import Manifest
from draftsmith.data.shards import CachedSample, ShardReader, check_digest, check_size

Check = Literal["open", "lazy", "off"]


class HiddenStateCache:
    """A finished cache as a sequence of samples.

    Args:
        path: the folder that `draftsmith data extract` wrote.
        check: when every shard's sha256 is compared with the manifest: all of them at `open`, each one before its
            first sample is served (`lazy`, for caches of terabytes), or not at all (`off`). Sizes are always checked.

    Raises ValueError, with the file and the remedy, for a cache that is missing, unfinished, cut off or altered.

    Copies sent to worker processes open the files anew and do not check again what was checked here.
    """

    def __init__(self, path: Path | str, *, check: Check = "open") -> None:
        self.path = Path(path)
        self.manifest = Manifest.load(self.path)
        if not self.manifest.complete:
            done = sum(shard.num_samples for shard in self.manifest.shards)
            raise ValueError(
                f"{self.path} is incomplete: {done} of {self.manifest.num_samples} samples; "
                "run the same `draftsmith data extract` again, it continues at the next shard"
            )
        for shard in self.manifest.shards:
            check_size(self.path / shard.name, shard)
        self._starts = list(itertools.accumulate((s.num_samples for s in self.manifest.shards), initial=0))
        self._readers: dict[int, ShardReader] = {}
        self._unchecked = set(range(len(self.manifest.shards))) if check != "off" else set()
        if check == "open":
            self.verify_integrity()

    def __len__(self) -> int:
        return self.manifest.num_samples

    def __getitem__(self, index: int) -> CachedSample:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of a cache with {len(self)}")
        shard = bisect.bisect_right(self._starts, index) - 1
        return self._reader(shard)[index - self._starts[shard]]

    def __iter__(self) -> Iterator[CachedSample]:
        return (self[index] for index in range(len(self)))

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_readers": {}}

    @property
    def sample_lengths(self) -> list[int]:
        """Tokens of each sample, in order."""
        readers = (self._open(shard) for shard in range(len(self.manifest.shards)))
        return [stop - start for reader in readers for start, stop in itertools.pairwise(reader.offsets)]

    def verify_integrity(self) -> None:
        """Compares the sha256 of every shard not checked yet. Raises ValueError at the first that differs."""
        for shard in sorted(self._unchecked):
            self._check(shard)

    def check_target(self, fingerprint: str) -> None:
        """Refuses to serve another target's features. Raises ValueError naming both."""
        own = self.manifest.identity.target_fingerprint
        if own != fingerprint:
            raise ValueError(
                f"{self.path} holds states of {self.manifest.identity.target} ({own[:16]}), but this run's target is "
                f"{fingerprint[:16]}; extract a cache with this target"
            )

    def check_tokenizer(self, fingerprint: str) -> None:
        """Refuses token ids of another tokenizer. Raises ValueError naming both."""
        own = self.manifest.identity.tokenizer_fingerprint
        if own != fingerprint:
            raise ValueError(
                f"{self.path} was made with the tokenizer {own[:16]}, but this run's is {fingerprint[:16]}; "
                "extract a cache with this tokenizer"
            )

    def _reader(self, shard: int) -> ShardReader:
        if shard in self._unchecked:
            self._check(shard)
        return self._open(shard)

    def _open(self, shard: int) -> ShardReader:
        """Maps a shard without hashing it: enough for lengths, which its record already vouches for in sum."""
        if shard not in self._readers:
            record = self.manifest.shards[shard]
            self._readers[shard] = ShardReader(self.path / record.name, record, self.manifest.identity.layers)
        return self._readers[shard]

    def _check(self, shard: int) -> None:
        record = self.manifest.shards[shard]
        check_digest(self.path / record.name, record)
        self._unchecked.discard(shard)

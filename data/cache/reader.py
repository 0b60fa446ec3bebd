"""Reading a hidden-state cache: checks that it is complete, unaltered and the target's own before it serves anything.

Owns: the samples, their numbers, the open files, and when each check comes. Does not know: where shards come from (a `ShardSource`), how
a cache is made (`extract.py`), how samples are batched (`packing.py`).

Shape legend: N samples, T tokens.
"""

import bisect
import itertools
import os
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from torch import Tensor

from draftsmith.data.cache.local_shards import LocalShards
from draftsmith.data.progress import progress
from draftsmith.data.remote.node_folder import ShardFolder
from draftsmith.data.remote.remote_folder import RemoteFolder, Retry, location
from draftsmith.data.remote.remote_shards import RemoteShards
from draftsmith.data.shards.shard_checks import check_lengths_agree
from draftsmith.data.shards.shard_source import ShardFile, ShardSource
from draftsmith.data.shards.shards import CachedSample, ShardReader

Check = Literal["open", "lazy", "off"]


class HiddenStateCache:
    """A finished cache as a sequence of samples.

    Copies sent to worker processes open the files anew and do not check again what was checked here.

    Args:
        path: the folder that `draftsmith data extract` wrote, or the URL it was copied to: `s3://bucket/cache`, `gs://...`,
            whatever fsspec knows. Shards behind a URL are fetched as a whole when they are needed and kept in `shard_cache`.
        check: when every shard's sha256 is compared with the manifest. `open` compares all of them at once, `lazy` each one before its
            first sample is served (for caches of terabytes), `off` none. Sizes are always checked, and a shard's
            own tensors whenever it is opened. Behind a URL each shard is hashed when it arrives, whatever this says. A process that
            finds it fetched hashes it again; `off` skips that in a folder that only this user may write in.
        shard_cache: the node's folder for fetched shards, shared by all its processes. None: `draftsmith/shards` in
            `$XDG_CACHE_HOME` or `~/.cache`, which nobody else may write in.
        shard_cache_gib: how much it may hold; what was not used for longest is dropped.
        retry: how often and after which pauses a failing network is tried.
        finite: refuse states that are NaN or infinite when they are read; False serves them, for who looks for them.

    Raises:
        ValueError: the cache is missing, unfinished, cut off or altered; the message has the file and the remedy.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        check: Check = "open",
        shard_cache: Path | None = None,
        shard_cache_gib: float = 50.0,
        retry: Retry | None = None,
        finite: bool = True,
    ) -> None:
        self.path: Path | str = location(path)
        self._finite = finite
        self.shards: ShardSource
        if isinstance(self.path, str):
            folder = ShardFolder(shard_cache, int(shard_cache_gib * 2**30), check=check != "off")
            self.shards = RemoteShards(RemoteFolder(self.path, retry), folder)
        else:
            self.shards = LocalShards(self.path, checked=check != "off")
        self.manifest = self.shards.manifest
        if not self.manifest.complete:
            done = sum(shard.num_samples for shard in self.manifest.shards)
            raise ValueError(
                f"{self.path} is incomplete: {done} of {self.manifest.num_samples} samples; "
                "run the same `draftsmith data extract` again, it continues at the next shard"
            )
        self._starts = list(itertools.accumulate((s.num_samples for s in self.manifest.shards), initial=0))
        self._readers: OrderedDict[int, tuple[ShardReader, ShardFile]] = OrderedDict()
        self._owner = os.getpid()
        self._vocab_size = self.manifest.identity.vocab_size
        self.keep_open = self.shards.most_open
        self.shards.prepare()
        if check == "open":
            self.verify_integrity()

    def __len__(self) -> int:
        return self.manifest.num_samples

    def __getitem__(self, index: int) -> CachedSample:
        return self._sample(index, self._reader)

    def __iter__(self) -> Iterator[CachedSample]:
        return (self[index] for index in range(len(self)))

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_readers": OrderedDict()}

    @property
    def sample_lengths(self) -> list[int]:
        """Tokens of each sample, in order."""
        return self.lengths.tolist()

    @cached_property
    def lengths(self) -> np.ndarray:
        """int32 [N]: tokens of each sample, in order. Caches that do not say so in one file are asked shard by shard."""
        known = self.shards.lengths()
        if known is not None:
            return known
        readers = (self._open(shard) for shard in range(len(self.manifest.shards)))
        lengths = [np.diff(reader.offsets) for reader in readers]
        return np.concatenate(lengths or [np.zeros(0, dtype=np.int64)]).astype(np.int32)

    @cached_property
    def shard_of(self) -> np.ndarray:
        """int32 [N]: the shard of each sample, never falling."""
        counts = np.diff(self._starts)
        return np.repeat(np.arange(len(counts), dtype=np.int32), counts)

    def texts(self, indices: Sequence[int] | np.ndarray) -> Iterator[tuple[Tensor, Tensor]]:
        """Read ids and masks of some samples, without their states.

        No states are read, nor fetched from behind a URL, so no sha256 is compared: sizes and layout are. What `check` asks for
        is done when the samples themselves are served.

        Args:
            indices: of samples, rising.

        Yields:
            `input_ids` int64 [T] and `loss_mask` bool [T] of each.

        Raises:
            IndexError: there is no such sample.
            ValueError: a shard is missing or damaged.
        """
        own = np.asarray(indices, dtype=np.int64)
        for index in own[(own < 0) | (own >= len(self))].tolist():
            raise _no_sample(index, len(self))
        parts = np.split(own, np.flatnonzero(np.diff(self.shard_of[own])) + 1) if len(own) else []
        shards = [int(self.shard_of[part[0]]) for part in parts]
        texts = self.shards.texts(shards, self._vocab_size)
        if texts is None:
            for index in own.tolist():
                sample = self._sample(index, self._open)
                yield sample.input_ids, sample.loss_mask
            return
        for shard, part, (offsets, ids, mask) in zip(shards, parts, texts, strict=True):
            bounds = offsets.tolist()
            for number in (part - self._starts[shard]).tolist():
                start, stop = bounds[number], bounds[number + 1]
                yield ids[start:stop].long(), mask[start:stop]

    def need(self, shards: Sequence[int], reader: object) -> None:
        """Say which shards a reader reads or will soon: behind a URL they are fetched ahead and kept.

        They stay until this reader asks for others. An empty list means that it is done.

        Args:
            shards: their numbers, most urgent first.
            reader: who asks.
        """
        self._forget_parents()
        self.shards.need(shards, reader)

    def read_next(self, indices: np.ndarray) -> None:
        """Say which samples a reader reads now: behind a URL the files of all others are released, so that they can be dropped.

        A process may read few shards of a window; those of many windows would add up to more than the node's folder holds.

        Args:
            indices: of samples, int64.
        """
        if not self.shards.fetches:
            return
        self._forget_parents()
        wanted = set(self.shard_of[indices].tolist())
        for shard in self._readers.keys() - wanted:
            self._drop(shard)

    def close(self) -> None:
        """Close all files and end what is fetched ahead; further reads open them anew."""
        while self._readers:
            self._drop_oldest()
        self.shards.close()

    def verify_integrity(self) -> None:
        """Compare the sha256 of every shard not checked yet, and open it.

        A cache behind a URL has none: its shards are checked when they are fetched.

        Raises:
            ValueError: at the first shard that is not as it should be.
        """
        unchecked = self.shards.unchecked()
        if unchecked and "lengths" not in self.__dict__ and (known := self.shards.lengths()) is not None:
            self.lengths = known  # which offsets are then compared with
        with progress(f"check {self.path}", len(unchecked), "shards", brief=True) as advance:
            for shard in unchecked:
                self.shards.check(shard)
                self._examined(shard, self.shards.hold(shard, give_way=self._give_way).path)
                advance(1)

    def verify_states(self) -> None:
        """Read every state of every shard.

        Raises:
            ValueError: for the first that is NaN or infinite, with file, sample and layer.
        """
        with progress(f"read all states of {self.path}", len(self.manifest.shards), "shards", brief=True) as advance:
            for shard in range(len(self.manifest.shards)):
                self._open(shard).check_states()
                advance(1)

    def check_target(self, fingerprint: str, quantization: str | None = None, vocab_size: int | None = None) -> None:
        """Check that the states are a target's. Warns where its weights had other bits.

        Args:
            fingerprint: of the target.
            quantization: of its weights, `8bit` or `4bit`; None for whole ones.
            vocab_size: of the target. Token ids must be below it, in what is open and in all that is opened later. None checks nothing.

        Raises:
            ValueError: the states are another target's, naming both; or a token id is outside, with shard and id.
        """
        own = self.manifest.identity.target_fingerprint
        if own != fingerprint:
            raise ValueError(
                f"{self.path} holds states of {self.manifest.identity.target} ({own[:16]}), but this run's target is "
                f"{fingerprint[:16]}; extract a cache with this target"
            )
        if vocab_size is not None:
            self._vocab_size = min(vocab_size, self._vocab_size or vocab_size)
            for reader, _ in self._readers.values():
                reader.check_vocabulary(self._vocab_size)
        made_with = self.manifest.identity.target_quantization
        if made_with != quantization:
            warnings.warn(
                f"{self.path} holds states of {self.manifest.identity.target} with {made_with or 'whole'} weights, this run's target "
                f"has {quantization or 'whole'} ones: what is learnt from them fits the former; decode with those, or extract again",
                stacklevel=2,
            )

    def check_tokenizer(self, fingerprint: str) -> None:
        """Check that the token ids are of a tokenizer.

        Args:
            fingerprint: of the tokenizer.

        Raises:
            ValueError: they are another's; the message names both.
        """
        own = self.manifest.identity.tokenizer_fingerprint
        if own != fingerprint:
            raise ValueError(
                f"{self.path} was made with the tokenizer {own[:16]}, but this run's is {fingerprint[:16]}; "
                "extract a cache with this tokenizer"
            )

    def _sample(self, index: int, reader: Callable[[int], ShardReader]) -> CachedSample:
        if not 0 <= index < len(self):
            raise _no_sample(index, len(self))
        shard = bisect.bisect_right(self._starts, index) - 1
        return reader(shard)[index - self._starts[shard]]

    def _reader(self, shard: int) -> ShardReader:
        self.shards.check(shard)
        return self._open(shard)

    def _open(self, shard: int) -> ShardReader:
        """Maps a shard without hashing it: enough for lengths and texts, which are checked for sense."""
        self._forget_parents()
        if shard in self._readers:
            self._readers.move_to_end(shard)
            return self._readers[shard][0]
        file = self.shards.hold(shard, give_way=self._give_way)
        try:
            self._readers[shard] = self._examined(shard, file.path), file
        except ValueError:
            file.release()
            raise
        while len(self._readers) > max(1, self.keep_open):
            self._drop_oldest()
        return self._readers[shard][0]

    def _examined(self, shard: int, path: Path) -> ShardReader:
        """A shard whose own tensors agree with each other, with its record, and with the lengths as far as they were read."""
        reader = ShardReader(path, self.manifest.shards[shard], self.manifest.identity, self._vocab_size, self._finite)
        lengths = self.__dict__.get("lengths")
        if lengths is not None:
            check_lengths_agree(reader.offsets, lengths[self._starts[shard] : self._starts[shard + 1]], str(path))
        return reader

    def _drop_oldest(self) -> None:
        self._drop(next(iter(self._readers)))

    def _drop(self, shard: int) -> None:
        _, file = self._readers.pop(shard)
        file.release()

    def _give_way(self) -> bool:
        """Release the file not read for longest, if there is one."""
        if self._readers:
            self._drop_oldest()
            return True
        return False

    def _forget_parents(self) -> None:
        """Release, in a forked worker, its parent's files: they would take up the disk until the worker ends."""
        if self._owner == os.getpid():
            return
        self._owner = os.getpid()
        self.shards.forget_parents()
        while self.shards.fetches and self._readers:
            self._drop_oldest()


def _no_sample(index: int, num_samples: int) -> IndexError:
    return IndexError(f"sample {index} of a cache with {num_samples}")

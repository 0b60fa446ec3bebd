"""The shards of a cache behind a URL: fetched into a folder of this node, or only as much of them as texts take.

Owns: which shards are fetched ahead, and reading lengths and texts without states. Does not know: how files come over a network
(`remote_folder.py`), what a node keeps (`node_folder.py`), samples.
"""

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import numpy as np
from torch import Tensor

from draftsmith.data.remote.node_folder import HeldFile, ShardFolder
from draftsmith.data.remote.prefetch import Prefetcher
from draftsmith.data.remote.remote_folder import RemoteFolder
from draftsmith.data.shards.lengths import LENGTHS_FILE, check_lengths, read_lengths, write_lengths
from draftsmith.data.shards.manifest import MANIFEST_FILE, Manifest, ShardRecord
from draftsmith.data.shards.shard_checks import TEXT, check_layout, check_text

_HEADER_THREADS = 16


class RemoteShards:
    """The shards of a cache behind a URL, those in use in a folder of this node. A `ShardSource`.

    Args:
        source: the cache behind the URL.
        folder: the node's.

    Raises:
        ValueError: there is no cache, it cannot be read, or its manifest is broken.
    """

    fetches, most_open = True, 64

    def __init__(self, source: RemoteFolder, folder: ShardFolder) -> None:
        self.source, self.folder = source, folder
        self.manifest = self._manifest()
        self._prefetcher: tuple[int, Prefetcher] | None = None
        self._needed: dict[int, list[int]] = {}

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_prefetcher": None}

    def prepare(self) -> None:
        """Do nothing: sizes are compared when shards are fetched."""

    def unchecked(self) -> list[int]:
        """None: each shard is hashed when it arrives."""
        return []

    def check(self, shard: int) -> None:
        """See unchecked."""

    def hold(self, shard: int, *, give_way: Callable[[], bool]) -> HeldFile:
        """Give a shard's file, fetched unless it is there.

        Args:
            shard: its number.
            give_way: releases another file and says whether there was one.

        Returns:
            The file.

        Raises:
            ValueError: it cannot be read or is not what the manifest says; the message has the shard's address.
        """
        file = self._hold(shard, True, give_way)
        assert file is not None, "a patient reader gets the file or an error"
        return file

    def _hold(self, shard: int, patient: bool, give_way: Callable[[], bool] = lambda: False) -> HeldFile | None:
        """See `ShardFolder.hold`.

        Raises:
            ValueError: it cannot be read or is not what the manifest says; the message has the shard's address.
        """
        record = self.manifest.shards[shard]

        def fill(into: int) -> None:
            self.source.fetch(record.name, record.sha256, record.num_bytes, into)

        return self.folder.hold(record.sha256, record.num_bytes, fill, patient, give_way)

    def need(self, shards: Sequence[int], reader: object) -> None:
        """Fetch these ahead, and keep them until this reader needs others.

        Args:
            shards: their numbers, most urgent first.
            reader: who asks.
        """
        self._needed[id(reader)] = list(shards)
        if self._prefetcher is None:
            self._prefetcher = os.getpid(), Prefetcher(lambda shard: self._hold(shard, patient=False))
        # The latest reader's first.
        everyones = [*shards, *(shard for needed in self._needed.values() for shard in needed)]
        self._prefetcher[1].want(list(dict.fromkeys(everyones)))

    def forget_parents(self) -> None:
        """Release, in a forked worker, what its parent fetches ahead: dropped files would take up the disk until the worker ends."""
        if self._prefetcher is not None and self._prefetcher[0] != os.getpid():
            self._prefetcher[1].abandon()
            self._prefetcher, self._needed = None, {}

    def close(self) -> None:
        """End what is fetched ahead."""
        self.forget_parents()
        if self._prefetcher is not None:
            self._prefetcher[1].close()
        self._prefetcher, self._needed = None, {}

    def lengths(self) -> np.ndarray:
        """Read the cache's own file of lengths, or the heads of all shards.

        Returns:
            int32 [N], tokens of each sample.

        Raises:
            ValueError: as `hold`.
        """
        name = self.source.address(LENGTHS_FILE)
        try:
            return read_lengths(self.source.read(LENGTHS_FILE), self.manifest, name)
        except FileNotFoundError:
            return self._lengths_of_shards()

    def _lengths_of_shards(self) -> np.ndarray:
        """Asked for once a node: there may be many shards."""
        if not self.folder.prepare():  # what others may have put there would be taken for the shards' own word
            return self._offsets_of_shards()
        known = hashlib.sha256("".join(record.sha256 for record in self.manifest.shards).encode()).hexdigest()
        folder = self.folder.path / f"lengths-{known[:16]}"
        with self.folder.in_turn(folder.name):
            if (folder / LENGTHS_FILE).is_file():
                return read_lengths((folder / LENGTHS_FILE).read_bytes(), self.manifest, str(folder / LENGTHS_FILE))
            lengths = self._offsets_of_shards()
            write_lengths(folder, lengths)
        return lengths

    def _offsets_of_shards(self) -> np.ndarray:
        with ThreadPoolExecutor(_HEADER_THREADS) as pool:
            texts = pool.map(partial(self._text, vocab_size=None), self.manifest.shards)
            lengths = np.concatenate([np.diff(text[0].numpy()) for text in texts]).astype(np.int32)
        check_lengths(lengths, self.manifest, self.source.url)
        return lengths

    def texts(self, shards: Sequence[int], vocab_size: int | None) -> Iterator[list[Tensor]]:
        """Read ids and masks of shards without their states, a few shards ahead.

        Args:
            shards: their numbers.
            vocab_size: ids must be below it; None checks nothing.

        Yields:
            `offsets` int64, `input_ids` int32 and `loss_mask` bool of each shard.

        Raises:
            ValueError: as `hold`, and for a shard that is at odds with itself or with its manifest.
        """
        ahead: deque[Future[list[Tensor]]] = deque()
        with ThreadPoolExecutor(_HEADER_THREADS) as pool:
            for shard in shards:
                ahead.append(pool.submit(self._text, self.manifest.shards[shard], vocab_size))
                if len(ahead) > _HEADER_THREADS:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()

    def _text(self, record: ShardRecord, vocab_size: int | None) -> list[Tensor]:
        place = self.source.address(record.name)
        try:
            header = self.source.header(record.name, record.num_bytes)
            kinds = {name: entry.kind for name, entry in header.entries.items()}
            check_layout(kinds, self.manifest.identity, record, place)
            offsets, input_ids, loss_mask = (self.source.tensor(record.name, header, name) for name in TEXT)
        except FileNotFoundError as error:
            raise ValueError(f"{place} is missing; copy the whole cache there again") from error
        check_text(offsets, input_ids, loss_mask, record, vocab_size, place)
        return [offsets, input_ids, loss_mask]

    def _manifest(self) -> Manifest:
        try:
            content = self.source.read(MANIFEST_FILE)
        except FileNotFoundError as error:
            raise ValueError(
                f"{self.source.url} is no hidden-state cache: it has no {MANIFEST_FILE}; copy one there that "
                "`draftsmith data extract` made"
            ) from error
        return Manifest.parse(content, self.source.address(MANIFEST_FILE))

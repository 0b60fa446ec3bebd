"""Some samples of a hidden-state cache as packed batches.

Owns: what a batch holds. Does not know: which samples a batch takes, drafters, losses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from draftsmith.data.cache.reader import HiddenStateCache
from draftsmith.data.shards.packing import pack
from draftsmith.models.drafters.rollout import PackedBatch


class CacheBatch:
    """A packed batch and the ids of its samples.

    Deliberately no dataclass: Lightning's precision plugins would walk into one and cast its fields.

    Args:
        packed: the samples end to end.
        sample_ids: in the same order.
    """

    def __init__(self, packed: PackedBatch, sample_ids: tuple[str, ...]) -> None:
        self.packed = packed
        self.sample_ids = sample_ids

    @property
    def num_labelled(self) -> int:
        """Tokens that the loss is about (those of the assistant)."""
        return int(self.packed.loss_mask.sum())

    def to(self, device: torch.device | str, non_blocking: bool = False) -> CacheBatch:
        """The same batch on another device; Lightning calls this.

        Args:
            device: where to.
            non_blocking: ignored.
        """
        return CacheBatch(self.packed.to(device), self.sample_ids)


class CacheSubset(Dataset):
    """Some samples of a cache; indexing with a list of numbers gives them packed.

    Args:
        cache: where they are.
        indices: int64 [N], rising.
        pad_to: see `pack`.
    """

    def __init__(self, cache: HiddenStateCache, indices: Sequence[int] | np.ndarray, pad_to: int | None = None) -> None:
        self.cache, self.indices, self.pad_to = cache, np.asarray(indices), pad_to
        self.layers: tuple[str, ...] | None = None
        self.lengths = cache.lengths[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def sample(self, number: int) -> Any:
        """One CachedSample."""
        return self.cache[int(self.indices[number])]

    def __getitem__(self, numbers: Sequence[int]) -> CacheBatch:
        self.cache.read_next(self.indices[np.asarray(numbers)])
        samples = [self.sample(number) for number in numbers]
        return CacheBatch(pack(samples, self.layers, self.pad_to), tuple(sample.id for sample in samples))


def check_same_origin(cache: HiddenStateCache, val_cache: HiddenStateCache) -> None:
    """Checks that two caches belong to one target and tokenizer.

    Raises:
        ValueError: they do not.
    """
    val_cache.check_target(cache.manifest.identity.target_fingerprint)
    val_cache.check_tokenizer(cache.manifest.identity.tokenizer_fingerprint)

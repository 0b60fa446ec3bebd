"""Which samples of a cache are held out for validation.

Owns: their order and number. Does not know: batches, training.

Shape legend: N samples.
"""

from __future__ import annotations

import numpy as np
import torch
from pytorch_lightning.utilities import rank_zero_info

from draftsmith.data.cache.reader import HiddenStateCache


def split_order(cache: HiddenStateCache, seed: int, by_shard: bool) -> np.ndarray:
    """The random order of all samples, whose first ones are held out.

    Args:
        cache: the samples.
        seed: of the order.
        by_shard: keep the samples of a shard together, because the run reads shard by shard.

    Returns:
        int64 [N], sample numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    if not by_shard:
        return torch.randperm(len(cache), generator=generator).numpy()
    shards = torch.randperm(len(cache.manifest.shards), generator=generator).numpy()
    ranks = np.empty_like(shards)
    ranks[shards] = np.arange(len(shards))
    return np.argsort(ranks[cache.shard_of], kind="stable")


def num_held_out(cache: HiddenStateCache, order: np.ndarray, fraction: float, by_shard: bool) -> int:
    """How many samples are held out, from the start of the order: whole shards where the run reads shard by shard.

    Args:
        cache: the samples.
        order: int64 [N], from `split_order`.
        fraction: the share wanted, above 0 and below 1.
        by_shard: see `split_order`.

    Returns:
        at least 1.
    """
    wanted = max(1, round(fraction * len(order)))
    if not by_shard or len(cache.manifest.shards) < 2:
        return wanted
    ends = np.flatnonzero(np.diff(cache.shard_of[order])) + 1
    number = int(ends[min(int(np.searchsorted(ends, wanted)), len(ends) - 1)])
    if number > 2 * wanted:
        rank_zero_info(
            f"{number} of {len(order)} samples are held out for validation instead of {wanted}, because whole shards are: extract with "
            "a smaller --shard-mib, or give val_cache"
        )
    return number

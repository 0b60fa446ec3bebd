"""The caches of a batch whose model keeps a recurrent state: each row has a cache of the model's own.

A recurrent state has read its text, and cannot take a token back. So the cache is copied before a draft is read. Where some of the draft
is rejected, the copy takes the place of the cache, and the accepted tokens are *pending*: they are read again with the next draft.

Owns the caches, their copies and the pending tokens. Knows no model and no verification.

Shape legend: B batch rows, N nodes of a chain, P pending tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from draftsmith.models.slots.row_state import ReplacedRows
from draftsmith.models.slots.slot_cache import KeptRows

_REPLACED = ("keys", "values")
"""What a layer of Transformers' dynamic cache replaces by new tensors; it writes its other tensors in place."""


def snapshot(cache: Cache) -> Cache:
    """Copy a cache so that further tokens change the one and not the other.

    Keys and values are shared: a dynamic cache never writes into them. Recurrent states and those of convolutions are copied.

    Args:
        cache: one of Transformers' dynamic caches.

    Returns:
        The copy.
    """
    copied = copy.copy(cache)
    copied.layers = [_copied_layer(layer) for layer in cache.layers]
    return copied


@dataclass
class RowCache:
    """What is cached of one row.

    Attributes:
        cache: the model's own; it has read ``num_read`` tokens.
        num_read: how many tokens.
        pending: int64 [P], the tokens behind them that were accepted and are to be read again.
        before: copies of the cache from within the last draft, by how many of its tokens they have read; none where nothing can be
            rejected.
    """

    cache: Cache
    num_read: int
    pending: Tensor
    before: dict[int, tuple[Cache, int]] = field(default_factory=dict)

    def remember(self, num_drafted: int) -> None:
        """Keep what is cached now, since what is read next may be rejected.

        Args:
            num_drafted: how many tokens of the draft have been read.
        """
        self.before[num_drafted] = (snapshot(self.cache), self.num_read)

    def end_draft(self, tokens_N: Tensor, count: int) -> None:
        """Keep the accepted tokens of the draft that was read last.

        Args:
            tokens_N: int64, all of it.
            count: how many of them, from the first on, were accepted.
        """
        known = max((place for place in self.before if place <= count), default=None)
        if count == len(tokens_N) or known is None:
            self.pending = tokens_N[:0]
        else:
            self.cache, self.num_read = self.before[known]
            self.pending = torch.cat([self.pending if known == 0 else tokens_N[:0], tokens_N[known:count]])
        self.before = {}


class RowCaches:
    """What is cached of the rows of a batch, as far as :class:`~draftsmith.models.slots.slot_cache.SlotCache` offers the same.

    Args:
        num_rows: B.
        make: makes an empty cache of the model's own.
        device: where token ids go in.
        in_steps: whether the model reads one token a forward behind its prompt.

    Attributes:
        rows: of the batch, in order.
        in_steps: as above.
    """

    def __init__(self, num_rows: int, make: Callable[[], Cache], device: torch.device, in_steps: bool = False) -> None:
        self.in_steps = in_steps
        self.rows = [RowCache(make(), 0, torch.empty(0, dtype=torch.int64, device=device)) for _ in range(num_rows)]

    def keep(self, tokens_BN: Tensor, counts_B: Tensor) -> None:
        """Keep the accepted tokens of the draft that was read last.

        Args:
            tokens_BN: int64, the nodes of the chain.
            counts_B: int64, how many of them were accepted.
        """
        for row, tokens_N, count in zip(self.rows, tokens_BN, counts_B.tolist(), strict=True):
            row.end_draft(tokens_N, count)

    def replace_rows(self, fresh: RowCaches, replaced: ReplacedRows) -> RowCaches:
        """Put another batch's rows in the place of some of these.

        Args:
            fresh: the new rows.
            replaced: which rows they replace, in their order.

        Returns:
            These caches.
        """
        for row, new in zip(replaced.rows, fresh.rows, strict=True):
            self.rows[row] = new
        return self

    def shrink(self, kept: KeptRows) -> None:
        """Keep some rows.

        Args:
            kept: which rows, and where they go.
        """
        self.rows = [self.rows[row] for row in kept.order]


def _copied_layer(layer: Any) -> Any:  # the layers of caches have no common class
    copied = copy.copy(layer)
    for name, value in vars(layer).items():
        if name not in _REPLACED:
            setattr(copied, name, _copied(value))
    return copied


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    return {key: _copied(part) for key, part in value.items()} if isinstance(value, dict) else value

"""Attention of a drafter's simulated steps: every anchor sees its own text up to itself, and its own earlier steps.

Owns EAGLE-3's training-time-test mask (arXiv:2503.01840, section 3.2): causal over the text's keys, diagonal over those of each further
step. It is what a drafter sees in decoding, where the target's states reach as far as the root and everything below is its own.
Knows nothing of layers or losses.

Shape legend: T packed tokens, A anchors, H heads, G key/value heads, Dh head size, P documents, L longest document, J further steps.
"""

from __future__ import annotations

import math
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Pair = tuple[Tensor, Tensor]


class RolloutAttention:
    """Attention over one packed batch.

    Args:
        document_ids: int64 [T].
        positions: int64 [T], inside each document.
        anchors: int64 [A], packed positions of the queries.
        keys: [T, G, Dh] of the text's own tokens, at step 0.
        values: [T, G, Dh].
        flexible: compute with ``flex_attention``, which never holds a score matrix; None does so on CUDA devices.
    """

    def __init__(
        self,
        document_ids: Tensor,
        positions: Tensor,
        anchors: Tensor,
        keys: Tensor,
        values: Tensor,
        flexible: bool | None = None,
    ) -> None:
        self.document_ids, self.positions, self.anchors = document_ids, positions, anchors
        self.keys, self.values = keys, values
        self.flexible = keys.device.type == "cuda" if flexible is None else flexible

    def __call__(self, queries: Tensor, further: list[Pair]) -> Tensor:
        """[A, H, Dh] -> [A, H, Dh]; ``further``: keys and values [A, G, Dh] of each anchor's steps from 1 on."""
        if not len(self.anchors):  # the sum keeps every weight in the graph, which data-parallel training waits for
            return queries + 0.0 * (self.keys.sum() + self.values.sum())
        if self.flexible:
            return self._flexible(queries, further)
        if not further:
            return self._causal(queries)
        return self._dense(queries, further)

    @cached_property
    def _grid(self) -> tuple[int, int, Tensor]:
        """P, L and int64 [T]: the place of each packed token in the flattened [P, L]."""
        documents, longest = int(self.document_ids.max()) + 1, int(self.positions.max()) + 1
        return documents, longest, self.document_ids * longest + self.positions

    @cached_property
    def _grid_pair(self) -> Pair:
        """Keys and values as [P, G, L, Dh]."""
        place_T = self._grid[2]
        return self._on_grid(self.keys, place_T), self._on_grid(self.values, place_T)

    def _on_grid(self, rows: Tensor, places: Tensor) -> Tensor:
        """[n, H, Dh] -> [P, H, L, Dh], zeros where there is no row."""
        documents, longest, _ = self._grid
        grid = rows.new_zeros(documents * longest, *rows.shape[1:]).index_copy(0, places, rows)
        return grid.unflatten(0, (documents, longest)).transpose(1, 2)

    def _from_grid(self, grid: Tensor) -> Tensor:
        """[P, H, L, Dh] -> [A, H, Dh] at the anchors."""
        return grid.transpose(1, 2).flatten(0, 1)[self._grid[2][self.anchors]]

    def _causal(self, queries: Tensor) -> Tensor:
        keys, values = self._grid_pair
        grid = self._on_grid(queries, self._grid[2][self.anchors])
        return self._from_grid(F.scaled_dot_product_attention(grid, keys, values, is_causal=True, enable_gqa=True))

    def _dense(self, queries: Tensor, further: list[Pair]) -> Tensor:
        """With every score in memory: [P, H, L, L] over the text and [A, H, J] over the steps."""
        keys, values = (_per_head(part, queries.shape[1], dim=1) for part in self._grid_pair)
        scale = 1.0 / math.sqrt(queries.shape[-1])
        places_A = self._grid[2][self.anchors]
        over_text = (self._on_grid(queries, places_A) * scale) @ keys.transpose(-1, -2)
        longest = self._grid[1]
        future_LL = torch.ones(longest, longest, dtype=torch.bool, device=queries.device).triu(1)
        over_text = self._from_grid(over_text.masked_fill(future_LL, -torch.inf))  # [A, H, L]
        own_keys = torch.stack([_per_head(key, queries.shape[1], dim=1) for key, _ in further], dim=2)
        own_values = torch.stack([_per_head(value, queries.shape[1], dim=1) for _, value in further], dim=2)
        over_own = (own_keys @ (queries * scale)[..., None]).squeeze(-1)  # [A, H, J]
        weights = torch.cat([over_text, over_own], dim=-1).softmax(-1, dtype=torch.float32).to(queries.dtype)
        of_text = self._from_grid(self._on_grid(weights[..., :longest], places_A) @ values)
        return of_text + (weights[..., None, longest:] @ own_values).squeeze(-2)

    def _flexible(self, queries: Tensor, further: list[Pair]) -> Tensor:
        keys = torch.cat([self.keys, *(key for key, _ in further)])
        values = torch.cat([self.values, *(value for _, value in further)])
        num_tokens, num_anchors = len(self.keys), len(self.anchors)
        document_ids, anchors = self.document_ids, self.anchors

        def sees(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            at = key.clamp(max=num_tokens - 1)
            of_text = (key < num_tokens) & (at <= anchors[query]) & (document_ids[at] == document_ids[anchors[query]])
            return of_text | ((key >= num_tokens) & ((key - num_tokens) % num_anchors == query))

        flex_attention, create_block_mask = _flex(queries.device.type)
        mask = create_block_mask(sees, None, None, num_anchors, len(keys), device=queries.device)
        layout = (part.transpose(0, 1)[None] for part in (queries, keys, values))
        return flex_attention(*layout, block_mask=mask, enable_gqa=True)[0].transpose(0, 1)


@lru_cache(maxsize=2)
def _flex(device_type: str) -> tuple[Any, Any]:
    """flex_attention and its mask's maker, compiled where a compiler for the device is worth its time."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    return (torch.compile(flex_attention, dynamic=True) if device_type == "cuda" else flex_attention), create_block_mask


def _per_head(grouped: Tensor, heads: int, dim: int) -> Tensor:
    """Repeat key/value heads so that every query head has its own."""
    return grouped.repeat_interleave(heads // grouped.shape[dim], dim=dim)

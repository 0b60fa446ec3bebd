"""Attention of a drafter's simulated steps: every anchor sees its own text up to itself, and its own earlier steps.

Owns the mask of the training-time test (arXiv:2503.01840, section 3.2): causal over the text's keys, diagonal over those of each further
step. It is what a drafter sees in decoding, where the target's states reach as far as the root and everything below is its own.
Knows nothing of layers or losses.

No path holds the scores of a whole batch. On CUDA ``flex_attention`` holds none. Elsewhere documents of similar length are taken
together. Where their scores would still be many, a block of queries is taken at a time, and the backward pass computes its scores again.

Shape legend: T packed tokens, A anchors, H heads, G key/value heads, Dh head size, J further steps.
P documents of a group, L its longest document, C queries of a block, S keys they can see.
Q and B blocks of queries and of keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

Pair = tuple[Tensor, Tensor]
_BLOCK = 128


class RolloutAttention:
    """Attention over one packed batch.

    Args:
        document_ids: int64 [T]; a document's tokens lie together.
        positions: int64 [T], inside each document.
        anchors: int64 [A], packed positions of the queries.
        keys: [T, G, Dh] of the text's own tokens, at step 0.
        values: [T, G, Dh].
        flexible: compute with ``flex_attention``, which never holds a score matrix; None does so on CUDA devices.
        block_scores: scores in memory at a time without it.
    """

    def __init__(
        self,
        document_ids: Tensor,
        positions: Tensor,
        anchors: Tensor,
        keys: Tensor,
        values: Tensor,
        flexible: bool | None = None,
        block_scores: int = 2**23,
    ) -> None:
        self.document_ids, self.positions, self.anchors = document_ids, positions, anchors
        self.keys, self.values = keys, values
        self.flexible = keys.device.type == "cuda" if flexible is None else flexible
        self.block_scores = block_scores

    def __call__(self, queries: Tensor, further: list[Pair]) -> Tensor:
        """Attend from every anchor.

        Args:
            queries: [A, H, Dh].
            further: keys and values [A, G, Dh] of each anchor's steps from 1 on.

        Returns:
            [A, H, Dh].
        """
        if not len(self.anchors):  # the sum keeps every weight in the graph, which data-parallel training waits for
            return queries + 0.0 * (self.keys.sum() + self.values.sum())
        if self.flexible:
            return self._flexible(queries, further)
        own = _own_rows(further)
        attended = torch.cat([self._in_group(group, queries, own) for group in self._groups])
        return attended[self._back_to_anchors]

    @cached_property
    def _groups(self) -> list[_Group]:
        """Documents that have anchors, those of similar length together: at most half of a group's grid is padding."""
        lengths = torch.bincount(self.document_ids)
        documents = torch.unique(self.document_ids[self.anchors])
        kinds = lengths[documents].log2().ceil().long()
        return [self._group(documents[kinds == kind], lengths) for kind in kinds.unique().tolist()]

    def _group(self, documents: Tensor, lengths: Tensor) -> _Group:
        longest = int(lengths[documents].max())
        row_of = documents.new_full((len(lengths),), -1)
        row_of[documents] = torch.arange(len(documents), device=documents.device)
        places_T = row_of[self.document_ids] * longest + self.positions
        tokens = torch.nonzero(row_of[self.document_ids] >= 0).squeeze(1)
        anchors = torch.nonzero(row_of[self.document_ids[self.anchors]] >= 0).squeeze(1)
        grid = _Grid(len(documents), longest)
        on_grid = (grid.put(part[tokens], places_T[tokens]) for part in (self.keys, self.values))
        return _Group(grid, anchors, places_T[self.anchors[anchors]], *on_grid)

    @cached_property
    def _back_to_anchors(self) -> Tensor:
        """int64 [A]: where each anchor is among those of all groups."""
        return torch.cat([group.anchors for group in self._groups]).argsort()

    def _in_group(self, group: _Group, queries: Tensor, own: Pair | None) -> Tensor:
        """[A', H, Dh] at the group's anchors; ``own``: keys and values [A, J, G, Dh] of the anchors' further steps."""
        grid, anchors, places = group.grid, group.anchors, group.places
        queries_PHLD = grid.put(queries[anchors], places)
        if own is None:
            attended = F.scaled_dot_product_attention(
                queries_PHLD, group.keys, group.values, is_causal=True, enable_gqa=True
            )
            return grid.take(attended, places)
        own_PLJGD = [grid.put(part[anchors].flatten(1, 2), places).transpose(1, 2) for part in own]
        own_PLJGD = [part.unflatten(2, own[0].shape[1:3]) for part in own_PLJGD]
        return grid.take(self._by_blocks(queries_PHLD, group, *own_PLJGD), places)

    def _by_blocks(self, queries: Tensor, group: _Group, own_keys: Tensor, own_values: Tensor) -> Tensor:
        documents, heads, longest, _ = queries.shape
        per_query = heads * longest
        num_queries = min(longest, max(1, self.block_scores // per_query))
        num_rows = min(documents, max(1, self.block_scores // (per_query * num_queries)))
        # What fits at once is kept for the backward pass, as all of it was computed together.
        attend = _attend if num_rows == documents and num_queries == longest else _attend_again_in_backward
        rows = []
        for first in range(0, documents, num_rows):
            row = slice(first, first + num_rows)
            keys, values = group.keys[row], group.values[row]
            blocks = [
                attend(
                    queries[row, :, start : start + num_queries],
                    keys[:, :, : start + num_queries],
                    values[:, :, : start + num_queries],
                    own_keys[row, start : start + num_queries],
                    own_values[row, start : start + num_queries],
                    start,
                )
                for start in range(0, longest, num_queries)
            ]
            rows.append(torch.cat(blocks, dim=2))
        return torch.cat(rows)

    def _flexible(self, queries: Tensor, further: list[Pair]) -> Tensor:
        keys = torch.cat([self.keys, *(key for key, _ in further)])
        values = torch.cat([self.values, *(value for _, value in further)])
        layout = (part.transpose(0, 1)[None] for part in (queries, keys, values))
        mask = self.block_mask(len(further))
        return _flex(queries.device.type)(*layout, block_mask=mask, enable_gqa=True)[0].transpose(0, 1)

    def sees(self) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """Make ``flex_attention``'s mask function. Its keys are the text's T first, and then A of each further step.

        Returns:
            Of a batch row, a head, a query and a key, int each: whether the query sees the key.
        """
        num_tokens, num_anchors = len(self.keys), len(self.anchors)
        document_ids, anchors = self.document_ids, self.anchors

        def sees(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            at = key.clamp(max=num_tokens - 1)
            of_text = (key < num_tokens) & (at <= anchors[query]) & (document_ids[at] == document_ids[anchors[query]])
            return of_text | ((key >= num_tokens) & ((key - num_tokens) % num_anchors == query))

        return sees

    def block_mask(self, num_further: int) -> BlockMask:
        """Which blocks of keys each block of queries sees, in part or in full, worked out from where documents and anchors lie.

        ``create_block_mask`` asks about every pair of query and key instead, in tensors of A x (T + A J).

        Args:
            num_further: J.

        Returns:
            The mask over A queries and T + A J keys.
        """
        from torch.nn.attention.flex_attention import BlockMask

        num_tokens, num_anchors = len(self.keys), len(self.anchors)
        num_keys = num_tokens + num_further * num_anchors
        starts_A = self.anchors - self.positions[self.anchors]
        first_Q, last_Q = _extremes(self.anchors)
        first_start_Q, last_start_Q = _extremes(starts_A)
        begin_B = torch.arange(0, num_keys, _BLOCK, device=self.anchors.device)
        end_B = begin_B + _BLOCK  # behind the last
        seen_QB = (begin_B < num_tokens) & (end_B > first_start_Q[:, None]) & (begin_B <= last_Q[:, None])
        whole_Q = (torch.arange(len(first_Q), device=begin_B.device) + 1) * _BLOCK <= num_anchors
        of_one_Q = whole_Q & (first_start_Q == last_start_Q)
        full_QB = of_one_Q[:, None] & (begin_B >= last_start_Q[:, None]) & (end_B - 1 <= first_Q[:, None])
        begin_Q = torch.arange(0, num_anchors, _BLOCK, device=begin_B.device)
        for step in range(num_further):
            own_Q = num_tokens + step * num_anchors + begin_Q
            own_end_Q = num_tokens + step * num_anchors + (begin_Q + _BLOCK).clamp(max=num_anchors)
            seen_QB = seen_QB | ((end_B > own_Q[:, None]) & (begin_B < own_end_Q[:, None]))
        return BlockMask.from_kv_blocks(
            *_listed(seen_QB & ~full_QB),
            *_listed(full_QB),
            BLOCK_SIZE=_BLOCK,
            mask_mod=self.sees(),
            seq_lengths=(num_anchors, num_keys),
        )


@dataclass(frozen=True)
class _Grid:
    """Rows of documents, each as long as the longest."""

    documents: int
    longest: int

    def put(self, rows: Tensor, places: Tensor) -> Tensor:
        """[n, H, Dh] -> [P, H, L, Dh], zeros where there is no row."""
        grid = rows.new_zeros(self.documents * self.longest, *rows.shape[1:]).index_copy(0, places, rows)
        return grid.unflatten(0, (self.documents, self.longest)).transpose(1, 2)

    def take(self, grid: Tensor, places: Tensor) -> Tensor:
        """[P, H, L, Dh] -> [n, H, Dh]."""
        return grid.transpose(1, 2).flatten(0, 1)[places]


@dataclass(frozen=True)
class _Group:
    """Documents of similar length: their anchors int64 [A'] (numbers among all), where these lie, keys and values [P, G, L, Dh]."""

    grid: _Grid
    anchors: Tensor
    places: Tensor
    keys: Tensor
    values: Tensor


def _own_rows(further: list[Pair]) -> Pair | None:
    """Keys and values [A, J, G, Dh] of the further steps, or None without any."""
    if not further:
        return None
    return torch.stack([key for key, _ in further], dim=1), torch.stack([value for _, value in further], dim=1)


def _attend(
    queries_PHCD: Tensor, keys_PGSD: Tensor, values_PGSD: Tensor, own_keys: Tensor, own_values: Tensor, start: int
) -> Tensor:
    """[P, H, C, Dh] with every score in memory, [P, H, C, S] over the text and [P, H, C, J] over the own steps.

    The queries stand at ``start`` and on; own_keys and own_values are [P, C, J, G, Dh].
    """
    heads, num_keys = queries_PHCD.shape[1], keys_PGSD.shape[2]
    keys, values = _per_head(keys_PGSD, heads, dim=1), _per_head(values_PGSD, heads, dim=1)
    own_keys, own_values = _per_head(own_keys, heads, dim=3), _per_head(own_values, heads, dim=3)
    scaled = queries_PHCD * (1.0 / math.sqrt(queries_PHCD.shape[-1]))
    over_text = scaled @ keys.transpose(-1, -2)
    future = torch.ones(over_text.shape[-2:], dtype=torch.bool, device=scaled.device).triu(start + 1)
    over_text = over_text.masked_fill(future, -torch.inf)
    over_own = torch.einsum("phcd,pcjhd->phcj", scaled, own_keys)
    weights = torch.cat([over_text, over_own], dim=-1).softmax(-1, dtype=torch.float32).to(queries_PHCD.dtype)
    of_own = torch.einsum("phcj,pcjhd->phcd", weights[..., num_keys:], own_values)
    return weights[..., :num_keys] @ values + of_own


def _attend_again_in_backward(*arguments: Tensor | int) -> Tensor:
    """As `_attend`, whose scores live no longer than the call, here and in the backward pass."""
    if not torch.is_grad_enabled():
        return _attend(*arguments)  # type: ignore[arg-type]
    return checkpoint(_attend, *arguments, use_reentrant=False, preserve_rng_state=False)


def _extremes(values_A: Tensor) -> Pair:
    """int64 [Q] twice: the smallest and the largest of each block of queries."""
    missing = -len(values_A) % _BLOCK
    blocks = torch.cat([values_A, values_A[-1:].expand(missing)]).unflatten(0, (-1, _BLOCK))
    return blocks.amin(1), blocks.amax(1)


def _listed(seen_QB: Tensor) -> Pair:
    """int32 [1, 1, Q] and [1, 1, Q, B]: how many blocks of keys each block of queries sees, and which, these first."""
    order = seen_QB.int().argsort(dim=1, descending=True, stable=True)
    return seen_QB.sum(1, dtype=torch.int32)[None, None], order.to(torch.int32)[None, None]


@lru_cache(maxsize=2)
def _flex(device_type: str) -> Any:
    """flex_attention, compiled where a compiler for the device is worth its time."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True) if device_type == "cuda" else flex_attention


def _per_head(grouped: Tensor, heads: int, dim: int) -> Tensor:
    """Repeat key/value heads so that every query head has its own."""
    return grouped.repeat_interleave(heads // grouped.shape[dim], dim=dim)

"""Attention of a drafter's simulated steps: every anchor sees its own text up to itself, and its own earlier steps.

Owns the mask of the training-time test (arXiv:2503.01840, section 3.2): causal over the text's keys, diagonal over those of each further
step. It is what a drafter sees in decoding, where the target's states reach as far as the root and everything below is its own.
Knows nothing of layers or losses.

No path holds the scores of a whole batch. On CUDA ``flex_attention`` holds none. Elsewhere each document is computed by itself (short
neighbours together), a block of queries at a time. Where the batch has more scores than fit, the backward pass computes each block again.

Why not one ``scaled_dot_product_attention`` a document: an anchor's own steps are one key each for it, but to that function they are a
column for every anchor. With 7 steps and documents of 256 tokens, forward and backward then take twice the time on a CPU.

Shape legend: T packed tokens, A anchors, H heads, G key/value heads, R query heads that share one of these, Dh head size, J further steps.
C queries of a block, S keys of the text that they can see. Q and B blocks of queries and of keys.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
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
        anchors: int64 [A], packed positions of the queries, rising.
        keys: [T, G, Dh] of the text's own tokens, at step 0.
        values: [T, G, Dh].
        flexible: compute with ``flex_attention``, which never holds a score matrix; None does so on CUDA devices.
        block_scores: scores in memory at a time without it.
        sliding_window: a query sees only so many of the last positions, its own among them; None for all. Steps are fewer.
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
        sliding_window: int | None = None,
    ) -> None:
        self.document_ids, self.positions, self.anchors = document_ids, positions, anchors
        self.keys, self.values = keys, values
        self.flexible = keys.device.type == "cuda" if flexible is None else flexible
        self.block_scores = block_scores
        self.sliding_window = sliding_window

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
        return self._by_runs(queries, further)

    def at(self, rows: Tensor) -> RolloutAttention:
        """The same attention from some of the anchors alone.

        Args:
            rows: int64, which anchors, rising.
        """
        return self.from_anchors(self.anchors[rows])

    def from_anchors(self, anchors: Tensor) -> RolloutAttention:
        """The same attention from other anchors.

        Args:
            anchors: int64, packed positions, rising.
        """
        other = copy.copy(self)
        other.__dict__.pop("_runs", None)
        other.anchors = anchors
        return other

    @cached_property
    def _runs(self) -> tuple[list[int], list[int]]:
        """How many tokens and how many anchors each run has: a document, or several short ones, which need fewer calls together."""
        runs: list[int] = []
        for length in torch.unique_consecutive(self.document_ids, return_counts=True)[1].tolist():
            if runs and runs[-1] + length <= _BLOCK:
                runs[-1] += length
            else:
                runs.append(length)
        ends = torch.tensor(runs, device=self.anchors.device).cumsum(0)
        num_before = torch.searchsorted(self.anchors, ends)
        return runs, num_before.diff(prepend=num_before.new_zeros(1)).tolist()

    def _by_runs(self, queries: Tensor, further: list[Pair]) -> Tensor:
        lengths, counts = self._runs
        num_heads = queries.shape[1]
        num_scores = num_heads * sum(length * count for length, count in zip(lengths, counts, strict=True))
        attend = _attend if num_scores <= self.block_scores else _attend_again_in_backward
        starts = self._first_seen(len(further))
        of_anchors = (queries, starts, self.anchors, *self._own_steps(further), self._own_hidden(queries, further))
        anchors_of = zip(*(part.split(counts) for part in of_anchors), strict=True)
        text_of = zip(self.keys.split(lengths), self.values.split(lengths), strict=True)
        attended, first = [], 0
        for anchors, (keys, values) in zip(anchors_of, text_of, strict=True):
            num_queries = max(1, self.block_scores // (num_heads * len(keys)))
            blocks = zip(*(part.split(num_queries) for part in anchors), strict=True)
            for queries_C, starts_C, last_C, own_keys, own_values, own_hidden in blocks:
                if len(last_C):
                    end = int(last_C[-1]) + 1 - first
                    own, text = (own_keys, own_values, own_hidden), (keys[:end], values[:end])
                    attended.append(attend(queries_C, starts_C - first, last_C - first, *own, *text))
            first += len(keys)
        return torch.cat(attended)

    def _first_seen(self, num_further: int) -> Tensor:
        """int64 [A]: the first packed position of the text that each anchor's query sees so many steps further."""
        starts_A = self.anchors - self.positions[self.anchors]
        if self.sliding_window is None:
            return starts_A
        return torch.maximum(starts_A, self.anchors + num_further - self.sliding_window + 1)

    def _own_steps(self, further: list[Pair]) -> Pair:
        """Keys and values [A, J, G, Dh] of the anchors' further steps."""
        if not further:
            return (self.keys.new_empty(len(self.anchors), 0, *self.keys.shape[1:]),) * 2
        return torch.stack([key for key, _ in further], dim=1), torch.stack([value for _, value in further], dim=1)

    def _own_hidden(self, queries: Tensor, further: list[Pair]) -> Tensor:
        """bool [A, J]: which of its own further keys a query does not see; here it sees all."""
        return torch.zeros(len(queries), len(further), dtype=torch.bool, device=queries.device)

    def _own_keys(self, begin_Q: Tensor, end_Q: Tensor, step: int) -> Pair:
        """int64 [Q] twice: the first key of a further step that queries from ``begin_Q`` to ``end_Q - 1`` see, and the end of these keys.

        Numbers are those of :meth:`sees`.
        """
        before = len(self.keys) + step * len(self.anchors)
        return before + begin_Q, before + end_Q

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

    def _sees_within(self, first_A: Tensor) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """The mask function without the text before each query's first packed position."""
        sees, num_tokens = self.sees(), len(self.keys)

        def within(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return sees(batch, head, query, key) & ((key >= num_tokens) | (key >= first_A[query]))

        return within

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
        starts_A = self._first_seen(num_further)
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
            own_Q, own_end_Q = self._own_keys(begin_Q, (begin_Q + _BLOCK).clamp(max=num_anchors), step)
            seen_QB = seen_QB | ((end_B > own_Q[:, None]) & (begin_B < own_end_Q[:, None]))
        return BlockMask.from_kv_blocks(
            *_listed(seen_QB & ~full_QB),
            *_listed(full_QB),
            BLOCK_SIZE=_BLOCK,
            mask_mod=self.sees() if self.sliding_window is None else self._sees_within(starts_A),
            seq_lengths=(num_anchors, num_keys),
        )


def _attend(
    queries_CHD: Tensor,
    first_C: Tensor,
    last_C: Tensor,
    own_keys_CJGD: Tensor,
    own_values_CJGD: Tensor,
    own_hidden_CJ: Tensor,
    keys_SGD: Tensor,
    values_SGD: Tensor,
) -> Tensor:
    """[C, H, Dh] with every score in memory: [G, R, C, S] over the text and [G, R, C, J] over the own steps.

    A query sees the keys of the text from its first to its last (int64 [C], numbers among S), and its own that are not hidden.
    """
    num_keys, num_groups, head_size = keys_SGD.shape
    scaled = (queries_CHD / math.sqrt(head_size)).unflatten(1, (num_groups, -1)).permute(1, 2, 0, 3)
    rows = scaled.shape[1:3]
    over_text = (scaled.flatten(1, 2) @ keys_SGD.permute(1, 2, 0)).unflatten(1, rows)
    at_S = torch.arange(num_keys, device=last_C.device)
    hidden_CS = (at_S < first_C[:, None]) | (at_S > last_C[:, None])
    over_own = torch.einsum("grcd,cjgd->grcj", scaled, own_keys_CJGD).masked_fill(own_hidden_CJ, -torch.inf)
    scores = torch.cat([over_text.masked_fill(hidden_CS, -torch.inf), over_own], dim=-1)
    weights = scores.softmax(-1, dtype=torch.float32).to(queries_CHD.dtype)
    of_text = (weights[..., :num_keys].flatten(1, 2) @ values_SGD.transpose(0, 1)).unflatten(1, rows)
    of_own = torch.einsum("grcj,cjgd->grcd", weights[..., num_keys:], own_values_CJGD)
    return (of_text + of_own).permute(2, 0, 1, 3).flatten(1, 2)


def _attend_again_in_backward(*arguments: Tensor) -> Tensor:
    """As `_attend`, whose scores live no longer than the call, here and in the backward pass."""
    if not torch.is_grad_enabled():
        return _attend(*arguments)
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

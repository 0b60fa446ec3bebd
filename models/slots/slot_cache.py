"""The key/value cache of the engine: rows of one batch that advance by different lengths.

Owns where keys and values lie. Every row writes at its own slots into static buffers; a slot's index is its token's position, once the
accepted path has been compacted. Knows nothing of tokens, trees or attention masks.

Shape legend: B batch rows, H key/value heads, S slots, N new tokens, E path length, Dh head size.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import Cache

from draftsmith.models.slots.constants import counting


@dataclass(frozen=True)
class KeptRows:
    """Which rows of a batch continue, in an order that moves as few as possible.

    Attributes:
        order: old number of each row that is kept, in the new order.
        holes: new places, below ``len(order)``, whose old row ended.
        movers: old numbers of the rows that fill them.
        index: int64 [B'], ``order`` on the device.
    """

    order: list[int]
    holes: list[int]
    movers: list[int]
    index: Tensor

    @classmethod
    def of(cls, keep: list[int], device: torch.device) -> KeptRows:
        """Plan the moves. Example: keeping 1, 2, 4 of five rows gives the order 4, 1, 2: row 4 moves into place 0.

        Args:
            keep: numbers of the rows to keep, ascending.
            device: of ``index``.

        Returns:
            The plan.
        """
        kept = set(keep)
        holes = [row for row in range(len(keep)) if row not in kept]
        movers = [row for row in keep if row >= len(keep)]
        order = list(range(len(keep)))
        for hole, mover in zip(holes, movers, strict=True):
            order[hole] = mover
        return cls(order, holes, movers, torch.tensor(order, dtype=torch.int64, device=device))


class SlotCache(Cache):
    """Static buffers of S slots a layer, written at row-specific slots.

    Layers of one shape and device share one buffer, so that an accepted path is compacted in two operations. In most models these are all
    layers. Buffers are made at a layer's first write, on its device and in its dtype; a layer of another shape gets its own. Layers
    with a sliding window keep all slots too; the mask hides what is out of the window.

    Args:
        capacity: number of slots S of each row.
        num_layers: how many layers the model has.

    Attributes:
        capacity: S.
        window: how many slots the next forward sees, from slot 0 on.
    """

    def __init__(self, capacity: int, num_layers: int) -> None:
        super().__init__(layers=[])
        self.capacity = capacity
        self.window = 0
        self._num_layers = num_layers
        self._pools: list[Tensor] = []  # [P, B, H, S, Dh] each
        self._places: list[
            tuple[tuple[int, int], tuple[int, int]]
        ] = []  # of a layer's keys and values: pool, row of it
        self._slots_BN = torch.empty(0, 0, dtype=torch.int64)
        self._first: int | None = None
        self._parts: dict[tuple[int, int, int], Tensor] = {}  # of the forward in progress; see _part

    def aim(self, slots_BN: Tensor, window: int, first: int | None = None) -> None:
        """Say where the next forward writes, and how many slots it sees.

        Args:
            slots_BN: int64 [B, N]. A layer that writes fewer tokens takes the first of them.
            window: slots 0..window-1 are visible to attention (the mask decides among them).
            first: where all rows write the same consecutive slots, the first of them; a plain copy is then enough.

        Raises:
            ValueError: ``window`` is beyond the capacity.
        """
        if window > self.capacity:
            raise ValueError(f"{window} cache slots are needed, {self.capacity} were allocated")
        self._slots_BN, self.window, self._first = slots_BN, window, first
        self._parts = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write new keys and values. Transformers' models call it in each layer.

        Args:
            key_states: float [B, H, N, Dh].
            value_states: float [B, H, N, Dh].
            layer_idx: the layer; its first call makes its buffers.
            args: ignored, as in other caches of Transformers.
            kwargs: ignored, likewise.

        Returns:
            Keys and values of the visible slots, [B, H, window, Dh] each.
        """
        if layer_idx == len(self._places):
            self._places.append(self._allocate(key_states, value_states))
        key_place, value_place = self._places[layer_idx]
        if self._first is None:
            self._write(key_place, key_states)
            self._write(value_place, value_states)
            keys, values = self.layer(layer_idx)
            return keys[:, :, : self.window], values[:, :, : self.window]
        last = self._first + key_states.shape[2]
        self._part(key_place, self._first, last).copy_(key_states)
        self._part(value_place, self._first, last).copy_(value_states)
        return self._part(key_place, 0, self.window), self._part(value_place, 0, self.window)

    def _part(self, place: tuple[int, int], start: int, end: int) -> Tensor:
        """Some slots of a layer, [B, H, end - start, Dh]. A buffer is cut once for all its layers, since a cut costs as much as a write."""
        index, row = place
        key = index, start, end
        if key not in self._parts:
            self._parts[key] = self._pools[index][..., start:end, :]
        return self._parts[key][row]

    def _write(self, place: tuple[int, int], states: Tensor) -> None:
        """Write at the rows' own slots.

        The index reaches into the whole buffer. Through a view of one layer, a compiler copies the buffers of all layers for each write.
        """
        pool, (B, H, *_), device = self._pools[place[0]], states.shape, states.device
        row = counting(pool.shape[0], device)[place[1]]
        slots_BN = self._slots_BN[:, : states.shape[2]].to(device)
        pool.index_put_(
            (row, counting(B, device)[:, None, None], counting(H, device)[:, None], slots_BN[:, None]), states
        )

    def move(self, source_BE: Tensor, target_BE: Tensor) -> None:
        """Copy slots to other slots of the same row, in all layers: the compaction of an accepted path.

        Args:
            source_BE: int64, where each token lies.
            target_BE: int64, where it goes.
        """
        for pool in self._pools:
            shape = (pool.shape[0], -1, pool.shape[2], -1, pool.shape[4])
            moved = pool.gather(3, source_BE[None, :, None, :, None].to(pool.device).expand(shape))
            pool.scatter_(3, target_BE[None, :, None, :, None].to(pool.device).expand(shape), moved)

    def keep(self, path_BE: Tensor) -> None:
        """Compact an accepted path of the last forward: its tokens move to the first slots that this forward wrote.

        Args:
            path_BE: int64, which of the tokens that were written belong to the path, in order; behind its end any.
        """
        target_BE = self._slots_BN[:, : path_BE.shape[1]]
        self.move(self._slots_BN.gather(1, path_BE[:, : target_BE.shape[1]]), target_BE)

    def replace(self, rows: list[int], fresh: SlotCache) -> None:
        """Put another cache's rows, all of its slots, in the place of these rows' first slots.

        Args:
            rows: numbers of the rows to overwrite.
            fresh: filled by the same model, with as many rows, and no more slots.
        """
        for pool, new in zip(self._pools, fresh._pools, strict=True):
            index_R = torch.tensor(rows, dtype=torch.int64, device=pool.device)
            # A cache that is made for the layers that write has no room for others.
            pool[: len(new), :, :, : fresh.capacity].index_copy_(1, index_R, new)

    def append(self, fresh: SlotCache) -> None:
        """Put another cache's rows behind these.

        Args:
            fresh: filled by the same model; with no more slots.
        """
        self._parts = {}  # or the buffers of before would stay in memory
        more = self.capacity - fresh.capacity
        for index, (pool, new) in enumerate(zip(self._pools, fresh._pools, strict=True)):
            self._pools[index] = torch.cat([pool, F.pad(new, (0, 0, 0, more))], dim=1)

    def shrink(self, kept: KeptRows) -> None:
        """Keep some rows; only those that fill holes are copied.

        Args:
            kept: which rows, and where they go.
        """
        for index, pool in enumerate(self._pools):
            if kept.holes:
                pool[:, kept.holes] = pool[:, kept.movers]
            self._pools[index] = pool[:, : len(kept.order)]

    def rows(self, rows: slice) -> SlotCache:
        """Some of the rows, in the same memory.

        Args:
            rows: which ones.

        Returns:
            A cache of these rows.
        """
        taken = copy.copy(self)
        taken._pools = [pool[:, rows] for pool in self._pools]
        return taken

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Give the buffers of a layer.

        Args:
            index: of the layer.

        Returns:
            Keys and values, [B, H, S, Dh] each.
        """
        (key_pool, key_row), (value_pool, value_row) = self._places[index]
        return self._pools[key_pool][key_row], self._pools[value_pool][value_row]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Visible slots; asked by models that were given no positions, which ours always are."""
        return self.window

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Visible slots and the first of them; asked by models that were given no mask."""
        return self.window, 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Position of the first new token; asked by models that were given no mask, which is with one new token only."""
        return self.window - 1

    def __len__(self) -> int:
        return len(self._places)

    def _allocate(self, key_states: Tensor, value_states: Tensor) -> tuple[tuple[int, int], tuple[int, int]]:
        alike = key_states.shape == value_states.shape
        if not self._pools and alike:
            self._pools.append(self._buffer(key_states, 2 * self._num_layers))
        layer = len(self._places)
        if alike and layer < self._num_layers and self._fits(key_states):
            return (0, 2 * layer), (0, 2 * layer + 1)
        self._pools += [self._buffer(key_states, 1), self._buffer(value_states, 1)]
        return (len(self._pools) - 2, 0), (len(self._pools) - 1, 0)

    def _fits(self, states: Tensor) -> bool:
        """Whether a layer's states have the shape and device of the shared buffer."""
        pool, (B, H, _, Dh) = self._pools[0], states.shape
        return pool.device == states.device and pool.shape[0] > 1 and pool.shape[1:3] == (B, H) and pool.shape[4] == Dh

    def _buffer(self, states: Tensor, count: int) -> Tensor:
        B, H, _, Dh = states.shape
        with torch.inference_mode(False):  # models run in inference mode, what moves slots does not
            return states.new_zeros(count, B, H, self.capacity, Dh)

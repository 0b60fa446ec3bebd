"""The key/value cache of the engine: rows of one batch that advance by different lengths.

Owns where keys and values lie. Every row writes at its own slots into static buffers; a slot's index is its token's position, once the
accepted path has been compacted. Knows nothing of tokens, trees or attention masks.

Shape legend: B batch rows, H key/value heads, S slots, N new tokens, E path length, Dh head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache


class SlotCache(Cache):
    """Static buffers [B, H, S, Dh] a layer, written at row-specific slots.

    Buffers are made at a layer's first write, on that layer's device and in its dtype, so that sharded targets and unusual head
    shapes need no special case. Layers with a sliding window keep all slots too; the mask hides what is out of the window.

    Args:
        capacity: number of slots S of each row.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__(layers=[])
        self.capacity = capacity
        self.window = 0
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._slots_BN = torch.empty(0, 0, dtype=torch.int64)
        self._first: int | None = None

    def aim(self, slots_BN: Tensor, window: int, first: int | None = None) -> None:
        """Say where the next forward writes, and how many slots it sees.

        Args:
            slots_BN: int64 [B, N].
            window: slots 0..window-1 are visible to attention (the mask decides among them).
            first: where all rows write the same consecutive slots, the first of them; a plain copy is then enough.

        Raises:
            ValueError: ``window`` is beyond the capacity.
        """
        if window > self.capacity:
            raise ValueError(f"{window} cache slots are needed, {self.capacity} were allocated")
        self._slots_BN, self.window, self._first = slots_BN, window, first

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write new keys and values [B, H, N, Dh]; return those of the visible slots."""
        if layer_idx == len(self._keys):
            self._keys.append(self._buffer(key_states))
            self._values.append(self._buffer(value_states))
        keys, values = self._keys[layer_idx], self._values[layer_idx]
        if self._first is not None:
            last = self._first + key_states.shape[2]
            keys[:, :, self._first : last] = key_states
            values[:, :, self._first : last] = value_states
        else:
            slots = self._slots_BN[:, None, :, None].to(keys.device)
            keys.scatter_(2, slots.expand_as(key_states), key_states)
            values.scatter_(2, slots.expand_as(value_states), value_states)
        return keys[:, :, : self.window], values[:, :, : self.window]

    def move(self, source_BE: Tensor, target_BE: Tensor) -> None:
        """Copy slots to other slots of the same row, in all layers: the compaction of an accepted path. int64 [B, E] each."""
        for buffer in (*self._keys, *self._values):
            shape = (-1, buffer.shape[1], -1, buffer.shape[3])
            moved = buffer.gather(2, source_BE[:, None, :, None].to(buffer.device).expand(shape))
            buffer.scatter_(2, target_BE[:, None, :, None].to(buffer.device).expand(shape), moved)

    def select_rows(self, rows: Tensor) -> None:
        """Keep some batch rows only. ``rows``: int64 [B']."""
        self._keys = [buffer[rows.to(buffer.device)] for buffer in self._keys]
        self._values = [buffer[rows.to(buffer.device)] for buffer in self._values]

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, [B, H, S, Dh] each."""
        return self._keys[index], self._values[index]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Visible slots; asked by models that were given no positions, which ours always are."""
        return self.window

    def __len__(self) -> int:
        return len(self._keys)

    def _buffer(self, states: Tensor) -> Tensor:
        B, H, _, Dh = states.shape
        return states.new_zeros(B, H, self.capacity, Dh)

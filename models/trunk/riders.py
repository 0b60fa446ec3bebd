"""Riders: further rows of a target's forward, which enter at one of its blocks beside the tokens and leave nothing behind.

A rider stands for a token that is not known yet. Its token, the *carrier*, is one of the forward's own; the rider takes a position behind
it, sees what the carrier sees and the riders before it, and gives a state as a token does. No token sees a rider. A rider's keys and values
lie in slots behind the text, as those of drafted tokens do, and the next forward writes over them.

Owns what riders are, what they see, and the hooks by which they enter. Knows no drafter, no tree and no cache layout.

Shape legend: B batch rows, N tokens, M carriers, K riders of a carrier, R = K M rider rows, S cache slots, D hidden.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from draftsmith.models.slots.constants import counting

RIDERS = "riders"
"""The name under which a forward's output has the riders' states, [B, M, K D], after the final norm."""

_ROWS_AT = {"attention_mask": -2, "position_embeddings": -2, "position_ids": -1, "cache_position": -1}
"""Where a block's arguments have the rows; one that a family names otherwise fails in the proof."""


@dataclass(frozen=True)
class Riders:
    """What rides behind every carrier.

    Attributes:
        entries: of each rider, the block that it enters at (0: where embeddings do); they do not fall, so that those who see others enter
            no earlier.
        vectors: (number of a rider, states of the carriers at its entry [B, M, D]) -> what enters, [B, M, D].
    """

    entries: tuple[int, ...]
    vectors: Callable[[int, Tensor], Tensor]

    def first(self, count: int) -> Riders:
        """The first riders alone, which see none of the others."""
        return replace(self, entries=self.entries[:count])

    def fault(self, num_blocks: int) -> str:
        """What is wrong with the entries, in words for an error; empty where nothing is.

        Args:
            num_blocks: of the target.
        """
        if any(after < before for before, after in zip(self.entries, self.entries[1:], strict=False)):
            return f"entries {list(self.entries)} fall; a rider must enter no earlier than those before it"
        if self.entries and not 0 <= min(self.entries) <= max(self.entries) < num_blocks:
            return f"entries {list(self.entries)} are not all blocks of the target; they must be within 0 to {num_blocks - 1}"
        return ""


@dataclass(frozen=True)
class Carried:
    """The riders of one forward.

    Rider rows lie behind the tokens: the first rider of every carrier, then the second of every carrier, and so on. So the rows that a
    block has are always the first ones of all.

    Attributes:
        riders: what rides.
        carriers_BM: int64, which of the forward's tokens have riders.
        num_tokens: N.
    """

    riders: Riders
    carriers_BM: Tensor
    num_tokens: int

    @property
    def num_rows(self) -> int:
        """R."""
        return len(self.riders.entries) * self.carriers_BM.shape[1]

    def rows_at(self, block: int) -> int:
        """How many rows a block has, tokens and riders together."""
        return self.num_tokens + sum(entry <= block for entry in self.riders.entries) * self.carriers_BM.shape[1]

    def join(self, block: int, states_BND: Tensor) -> Tensor:
        """The rows of a block, from those of the block before it: the riders that enter here are added behind them."""
        entering = [rider for rider, entry in enumerate(self.riders.entries) if entry == block]
        if not entering:
            return states_BND
        index_BMD = self.carriers_BM[..., None].expand(-1, -1, states_BND.shape[-1])
        carriers_BMD = states_BND.gather(1, index_BMD)
        return torch.cat([states_BND, *(self.riders.vectors(rider, carriers_BMD) for rider in entering)], dim=1)

    def positions(self, positions_BN: Tensor) -> Tensor:
        """int64 [B, N + R]: rider k (from 0) is k + 1 behind its carrier.

        Example: tokens at 7 and 8, which carry two riders each: 7, 8, 8, 9, 9, 10.
        """
        carriers_BM = positions_BN.gather(1, self.carriers_BM)
        further = [carriers_BM + rider + 1 for rider in range(len(self.riders.entries))]
        return torch.cat([positions_BN, *further], dim=1)

    def mask(self, mask_B1NS: Tensor, first_B: Tensor) -> Tensor:
        """What tokens and riders see.

        Args:
            mask_B1NS: bool, what tokens see; no slot of a rider is among it.
            first_B: int64, the slot of each row's first rider.

        Returns:
            bool [B, 1, N + R, S].
        """
        num_slots, num_riders, M = mask_B1NS.shape[-1], len(self.riders.entries), self.carriers_BM.shape[1]
        index_B1MS = self.carriers_BM[:, None, :, None].expand(-1, 1, -1, num_slots)
        inherited_B1RS = (
            mask_B1NS.expand(len(self.carriers_BM), -1, -1, -1).gather(2, index_B1MS).repeat(1, 1, num_riders, 1)
        )
        place_BS = counting(num_slots, first_B.device) - first_B[:, None]  # of a slot among those of the riders
        row_R = counting(num_riders * M, first_B.device)
        own_BRS = (place_BS[:, None] >= 0) & (place_BS[:, None] <= row_R[:, None])
        own_BRS = own_BRS & (place_BS[:, None] % M == (row_R % M)[:, None])
        return torch.cat([mask_B1NS.expand(len(first_B), -1, -1, -1), inherited_B1RS | own_BRS[:, None]], dim=2)

    def key_positions(self, key_positions_BS: Tensor, positions_BP: Tensor, first_B: Tensor) -> Tensor:
        """The position of each slot's token or rider.

        Args:
            key_positions_BS: int64, of the tokens' slots.
            positions_BP: int64 [B, N + R], as :meth:`positions` gives them.
            first_B: int64, the slot of each row's first rider.

        Returns:
            int64 [B, S].
        """
        slots_BR = first_B[:, None] + counting(self.num_rows, first_B.device)
        return key_positions_BS.scatter(1, slots_BR, positions_BP[:, self.num_tokens :])

    def split(self, states_BPD: Tensor) -> Tensor:
        """The riders' states [B, M, K D], from those of all rows [B, N + R, D]."""
        B, M = self.carriers_BM.shape
        states_BKMD = states_BPD[:, self.num_tokens :].unflatten(1, (-1, M))
        return states_BKMD.transpose(1, 2).reshape(B, M, -1)


class Entrances:
    """Hooks on a decoder's blocks, at which the riders of the forward in progress enter. They are set once, as taps are.

    Args:
        blocks: of the decoder, in order.
    """

    def __init__(self, blocks: list[nn.Module]) -> None:
        self._now = _Now()
        self._handles = [
            block.register_forward_pre_hook(_entrance(number, self._now), with_kwargs=True)
            for number, block in enumerate(blocks)
        ]
        weakref.finalize(self, _remove, self._handles)

    @contextmanager
    def carrying(self, carried: Carried | None) -> Iterator[None]:
        """Let riders enter the forward that is run inside; None lets none."""
        self._now.carried = carried
        try:
            yield
        finally:
            self._now.carried = None


@dataclass
class _Now:
    """What hooks read: the riders of the forward in progress."""

    carried: Carried | None = None


def _entrance(block: int, now: _Now) -> Callable[..., tuple[tuple[Any, ...], dict[str, Any]] | None]:
    def enter(
        module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if now.carried is None:
            return None
        count = now.carried.rows_at(block)
        own = {
            name: _rows(value, _ROWS_AT[name], count) if name in _ROWS_AT else value for name, value in named.items()
        }
        return (now.carried.join(block, inputs[0]), *inputs[1:]), own

    return enter


def _rows(value: Any, dimension: int, count: int) -> Any:
    """The first rows of a tensor, or of each in a tuple; anything else as it is."""
    if isinstance(value, tuple):
        return tuple(_rows(part, dimension, count) for part in value)
    return value.narrow(dimension, 0, count) if isinstance(value, Tensor) else value


def _remove(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()

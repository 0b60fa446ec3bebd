"""Where a drafter with keys and values of its own writes one draft, and what each drafted node sees.

Owns the bookkeeping that a draft layer and an ordinary draft LM share. Their cache holds the accepted text only. The nodes of a draft
lie behind it, and the next draft overwrites them. Owns how the pairs of a prompt, a token and the target's state before it, are read.
Knows nothing of layers.

Shape legend: B batch rows, E fresh tokens, M nodes of a layer, S visible slots.
"""

from __future__ import annotations

from collections.abc import Callable, Generator

import torch
from torch import Tensor
from torch.nn import functional as F

from draftsmith.models.drafters.draft_records import CacheState, Cycle, Emitted, Opening
from draftsmith.models.slots.constants import counting
from draftsmith.models.slots.slot_cache import SlotCache


def read_prompt(
    opening: Opening, cache: SlotCache, write: Callable[[Emitted, Tensor], object]
) -> Generator[None, None, CacheState]:
    """Read the pairs of the prompts, in chunks, and give control back between two of them. The last pair stays pending.

    Behind the pairs of shorter prompts, padding is written, which the drafts write over.

    Args:
        opening: the prompts.
        cache: of the drafter, empty.
        write: writes keys and values of some pairs at their positions, int64 [B, E], where the cache is aimed at them.

    Returns:
        The state, from which the first draft begins.
    """
    prompt = opening.prompt
    B, T = prompt.tokens_BE.shape
    for begin in range(0, T, opening.chunk):
        if begin > 0:
            yield
        end = min(begin + opening.chunk, T)
        positions_BE = torch.arange(begin, end, device=prompt.tokens_BE.device).expand(B, -1)
        cache.aim(positions_BE, end, begin)
        write(prompt.slots(begin, end), positions_BE)
    return CacheState(cache, prompt.last_only(opening.num_pending))


class DraftSlots:
    """The slots of one draft.

    Args:
        cache: of the drafter; what it holds of the accepted text ends ``cycle.host_fresh`` tokens before ``cycle.host_lengths``.
        cycle: what the decoder knows of the rows.
        num_pending: the most tokens that a row has pending.
        ahead: tokens that the drafter's cache holds beyond the target's; 1 where it is fed the root itself.
        sliding_window: a token sees only so many of the last ones, itself among them; None for all. No draft may be deeper.
    """

    def __init__(
        self, cache: SlotCache, cycle: Cycle, num_pending: int, ahead: int = 0, sliding_window: int | None = None
    ) -> None:
        self.cache = cache
        self.lengths_B = cycle.lengths_B + ahead
        self.longest = max(cycle.host_lengths) + ahead
        self.num_fresh = min(max(_num_pending(cycle)), num_pending)
        self.fixed = cycle.fixed_shapes
        self.single = len(cycle.host_lengths) == 1 and not self.fixed
        self._sliding_window = sliding_window
        self._num_layers = self._num_nodes = 0
        self._is_chain = True
        self._mask_BMS: Tensor | None = None

    def aim_fresh(self, counts_B: Tensor) -> Tensor:
        """Aim the cache at the fresh tokens of every row.

        Rows with fewer than E write what is not theirs behind their text, where the draft's nodes overwrite it.

        Args:
            counts_B: int64, fresh tokens of each row.

        Returns:
            Their positions, int64 [B, E].
        """
        place_E = counting(self.num_fresh, counts_B.device)
        positions_BE = (self.lengths_B - counts_B)[:, None] + place_E
        first = self.longest - self.num_fresh if self.single else None
        self._aim(positions_BE, self.longest, first)
        return positions_BE

    def aim_block(self, counts_B: Tensor, num_slots: int) -> tuple[Tensor, Tensor]:
        """Aim the cache at the fresh tokens of every row, and at a block behind its text: the root and the slots that follow.

        Rows with fewer than E fresh tokens write what is not theirs into one slot behind the block, which nobody sees.

        Args:
            counts_B: int64, fresh tokens of each row.
            num_slots: of the block.

        Returns:
            Positions of the fresh tokens, int64 [B, E], and of the block, int64 [B, num_slots].
        """
        end_B1 = self.lengths_B[:, None]
        fresh_BE = end_B1 - counts_B[:, None] + counting(self.num_fresh, counts_B.device)
        block_BS = end_B1 + counting(num_slots, counts_B.device)
        own_BE = torch.where(fresh_BE < end_B1, fresh_BE, end_B1 + num_slots)
        first = self.longest - self.num_fresh if self.single else None
        self._aim(torch.cat([own_BE, block_BS], dim=1), self.longest + num_slots, first)
        return fresh_BE, block_BS

    def text_mask(self, positions_BE: Tensor) -> Tensor | None:
        """Let tokens of the text see the slots at or before their positions.

        Args:
            positions_BE: int64.

        Returns:
            bool [B, 1, E, S], or None where a token sees all slots.
        """
        if self.single and positions_BE.shape[1] == 1 and not self._passes_window():
            return None
        return seen_text(self.cache.window, positions_BE, self._sliding_window)

    def block_mask(self, block_BS: Tensor, window: int | None, causal: bool, from_root: bool = False) -> Tensor | None:
        """Let the slots of a block see the text and their block.

        Args:
            block_BS: int64, their positions.
            window: a slot sees only so many of the last positions, its own among them; None for all. No block is longer.
            causal: a slot sees no later slot of its block.
            from_root: the window is that many tokens before the root instead, and the block.

        Returns:
            bool [B, 1, num_slots, S], or None where a slot sees all.
        """
        mask = self.text_mask(block_BS if causal else block_BS[:, -1:])
        if window is not None and self.cache.window > window:
            slot_S = counting(self.cache.window, block_BS.device)
            last_BN = block_BS[:, :1] - 1 if from_root else block_BS
            near_B1NS = (slot_S > last_BN[..., None] - window)[:, None]
            mask = near_B1NS if mask is None else mask & near_B1NS
        return None if mask is None else mask.expand(-1, -1, block_BS.shape[1], -1)

    def aim_nodes(self, above_BM: Tensor) -> Tensor | None:
        """Aim the cache at M new nodes below those of the last call.

        Args:
            above_BM: int64, which node of the last call each one continues.

        Returns:
            The mask bool [B, 1, M, S], or None where all slots are seen.
        """
        M, before = above_BM.shape[1], self._num_nodes
        self._num_nodes += M
        self._is_chain = self._is_chain and M == 1
        slots_BM = self.lengths_B[:, None] + counting(self._num_nodes, above_BM.device)[before:]
        self._aim(slots_BM, self.longest + self._num_nodes, self.longest + before if self.single else None)
        depth = self._num_layers
        self._num_layers += 1
        if self.single and self._is_chain and not self._passes_window():
            return None
        self._mask_BMS = self._inherited(above_BM, before).scatter_(2, slots_BM[..., None], True)
        if self._sliding_window is None:
            return self._mask_BMS[:, None]
        return self._within_window(self._mask_BMS, self.lengths_B[:, None] + depth)[:, None]

    def _passes_window(self) -> bool:
        """Whether the cache's window may hold tokens that the layer does not see."""
        return self._sliding_window is not None and self.cache.window > self._sliding_window

    def _within_window(self, mask_BNS: Tensor, positions_BN: Tensor) -> Tensor:
        """Without the slots that are too far behind tokens at these positions, where the layer has a sliding window.

        A slot of the text equals its position. Nodes of the draft have slots behind it, at or after their positions.
        """
        if self._sliding_window is None:
            return mask_BNS
        return mask_BNS & _near(mask_BNS.shape[-1], positions_BN, self._sliding_window)

    def _inherited(self, above_BM: Tensor, before: int) -> Tensor:
        """bool [B, M, S]: what the nodes above see, of which there are ``before`` in all layers."""
        window, mask_BMS = self.cache.window, self._mask_BMS
        if mask_BMS is None:
            # Nothing branched so far, so all nodes before are seen.
            seen_BS = counting(window, above_BM.device) < (self.lengths_B + before)[:, None]
            return seen_BS[:, None].repeat(1, above_BM.shape[1], 1)
        inherited_BMS = mask_BMS.gather(1, above_BM[..., None].expand(-1, -1, mask_BMS.shape[2]))
        more = window - mask_BMS.shape[2]
        return F.pad(inherited_BMS, (0, more)) if more else inherited_BMS

    def _aim(self, slots_BN: Tensor, window: int, first: int | None) -> None:
        """Aim the cache at slots; where shapes are fixed, all of its slots are in the window."""
        self.cache.aim(slots_BN, self.cache.capacity if self.fixed else window, first)


def seen_text(num_slots: int, positions_BE: Tensor, sliding_window: int | None) -> Tensor:
    """Which slots of the text tokens of it see.

    Args:
        num_slots: S.
        positions_BE: int64.
        sliding_window: a token sees only so many of the last ones, itself among them; None for all.

    Returns:
        bool [B, 1, E, S].
    """
    seen_BES = counting(num_slots, positions_BE.device) <= positions_BE[..., None]
    if sliding_window is not None:
        seen_BES = seen_BES & _near(num_slots, positions_BE, sliding_window)
    return seen_BES[:, None]


def _near(num_slots: int, positions_BN: Tensor, sliding_window: int) -> Tensor:
    """bool [B, N, S]: slots that are not too far behind tokens at these positions."""
    return counting(num_slots, positions_BN.device) > positions_BN[..., None] - sliding_window


def _num_pending(cycle: Cycle) -> list[int]:
    """How many tokens of each row the drafter has not read. Of a prompt, which counts as fresh in its first cycle, that is the last alone,
    even in a batch whose other rows have had more of them pending.

    Example: three rows of 9 tokens each, of which 9, 4 and 1 are fresh, have 1, 4 and 1 pending.
    """
    return [1 if fresh == length else fresh for fresh, length in zip(cycle.host_fresh, cycle.host_lengths, strict=True)]

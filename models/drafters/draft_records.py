"""What passes between a drafter and the decoder: emitted tokens, what is known of the rows, and the drafter's own state.

Owns these records. Knows no drafter and no decoder.

Shape legend: B batch rows, E emitted tokens, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from draftsmith.models.slots.slot_cache import KeptRows, SlotCache
from draftsmith.models.tree.limits import DraftLimits
from draftsmith.models.tree.noise import SharedNoise
from draftsmith.models.tree.search import Draws


@dataclass(frozen=True)
class Emitted:
    """Tokens that became final, each with the target's features at the position that predicted it.

    Attributes:
        tokens_BE: int64 [B, E]; the last counted one of a row is the new root.
        features: layer name -> [B, E, D]; ``[b, i]`` is the target's state of the token before ``tokens_BE[b, i]``.
        counts_B: int64 [B], how many of the E are real in each row, at least 1.
    """

    tokens_BE: Tensor
    features: dict[str, Tensor]
    counts_B: Tensor

    @property
    def root_B(self) -> Tensor:
        """int64 [B]: the new root of each row."""
        return self.tokens_BE.gather(1, self.counts_B[:, None] - 1).squeeze(1)

    def last(self, layer: str) -> tuple[Tensor, Tensor]:
        """Give the new root, and the state of the token before it, which predicted it.

        Args:
            layer: name of the state's layer.

        Returns:
            The root int64 [B], and the target's state [B, D].
        """
        states_BED = self.features[layer]
        if self.tokens_BE.shape[1] == 1:
            return self.tokens_BE[:, 0], states_BED[:, 0]
        last_B1 = self.counts_B[:, None] - 1
        state_B1D = states_BED.gather(1, last_B1[..., None].expand(-1, -1, states_BED.shape[-1]))
        return self.root_B, state_B1D.squeeze(1)

    def tokens_only(self) -> Emitted:
        """The same tokens without the target's features."""
        return Emitted(self.tokens_BE, {}, self.counts_B)

    def slots(self, begin: int, end: int) -> Emitted:
        """The pairs in slots ``begin`` to ``end - 1``; the counts stay those of all."""
        features = {name: states_BED[:, begin:end] for name, states_BED in self.features.items()}
        return Emitted(self.tokens_BE[:, begin:end], features, self.counts_B)

    def last_only(self, num_slots: int = 1) -> Emitted:
        """The last counted pair of each row alone, as the first of some slots.

        Args:
            num_slots: E of what is given; the slots behind the pair are empty.
        """
        last_B1 = self.counts_B[:, None] - 1
        more = num_slots - 1
        features = {
            name: F.pad(states_BED.gather(1, last_B1[..., None].expand(-1, -1, states_BED.shape[-1])), (0, 0, 0, more))
            for name, states_BED in self.features.items()
        }
        return Emitted(F.pad(self.tokens_BE.gather(1, last_B1), (0, more)), features, torch.ones_like(self.counts_B))

    def select_rows(self, rows_B: Tensor) -> Emitted:
        """Keep some batch rows only.

        Args:
            rows_B: int64 [B'].

        Returns:
            The same of these rows.
        """
        features = {name: states[rows_B] for name, states in self.features.items()}
        return Emitted(self.tokens_BE[rows_B], features, self.counts_B[rows_B])


@dataclass(frozen=True)
class Opening:
    """What a drafter learns when a batch begins.

    Attributes:
        prompt: the pairs of the prompts: every token but the first, then the first emitted one, each with the state before it.
        first_B: int64 [B], the first token of each prompt, which no such pair holds.
        limits: how drafts will be made.
        room: tokens that a row can come to hold, prompt included; for buffers.
        fixed_shapes: see :class:`Cycle`; what :meth:`Drafter.advance` returns must then fit into what :meth:`Drafter.start` returned.
        chunk: tokens of the prompts to read at once, which bounds the memory of long ones.
        indices: which of the caller's prompts each row answers; empty where nobody has numbered them.
    """

    prompt: Emitted
    first_B: Tensor
    limits: DraftLimits
    room: int
    fixed_shapes: bool = False
    chunk: int = 1024
    indices: tuple[int, ...] = ()

    @property
    def num_pending(self) -> int:
        """Slots for the pairs of one cycle in a state that :meth:`Drafter.advance` must fit into; 1 where shapes follow the rows."""
        return self.limits.draft_length + 1 if self.fixed_shapes else 1


@dataclass(frozen=True)
class Cycle:
    """What the decoder knows of its rows when it asks for a draft.

    Attributes:
        lengths_B: int64 [B], tokens of each row in the target's cache; the root is not among them.
        host_lengths: the same numbers on the host, so that shapes can follow them without asking the device.
        host_fresh: how many of them are new since the last draft (all of them in the first).
        fixed_shapes: whether every cycle must have the shapes of the others, as a compiled or captured one has. ``host_lengths`` and
            ``host_fresh`` are then the same upper bounds in every cycle.
        stop_below_B: float32 [B], threshold of the early stop, or None.
        draws: for sampled trees, or None.
        temperature: of the requests; decides how sharply scores are read.
        keep_probs: whether verification compares distributions; chains then carry theirs.
        noise: by which the target will draw, for drafts that are not drawn themselves; None drafts the likeliest tokens.
    """

    lengths_B: Tensor
    host_lengths: list[int]
    host_fresh: list[int]
    stop_below_B: Tensor | None = None
    draws: Draws | None = None
    temperature: float = 0.0
    keep_probs: bool = False
    fixed_shapes: bool = False
    noise: SharedNoise | None = None

    def select_rows(self, rows: list[int], rows_B: Tensor) -> Cycle:
        """Keep some batch rows only.

        Args:
            rows: their numbers.
            rows_B: int64 [B'], the same on the device.

        Returns:
            The same of these rows.
        """
        return replace(
            self,
            lengths_B=self.lengths_B[rows_B],
            host_lengths=[self.host_lengths[row] for row in rows],
            host_fresh=[self.host_fresh[row] for row in rows],
            stop_below_B=None if self.stop_below_B is None else self.stop_below_B[rows_B],
            draws=None if self.draws is None else replace(self.draws, keys_BU=self.draws.keys_BU[rows_B]),
            noise=None if self.noise is None else self.noise.select_rows(rows_B),
        )


class DraftState(Protocol):
    """What a drafter carries from cycle to cycle; its content is the family's own."""

    def select_rows(self, kept: KeptRows) -> DraftState:
        """Keep some batch rows only.

        Args:
            kept: which rows, and where they go.

        Returns:
            The state of these rows.
        """
        ...


@dataclass(frozen=True)
class RootState:
    """What drafters without keys and values of their own carry between cycles.

    Attributes:
        context_BD: the target's normed state of the last cached token, constant over a draft.
        root_B: int64, the last emitted token.
    """

    context_BD: Tensor
    root_B: Tensor

    def select_rows(self, kept: KeptRows) -> RootState:
        """Keep some batch rows only.

        Args:
            kept: which rows, and where they go.

        Returns:
            The state of these rows.
        """
        return RootState(self.context_BD[kept.index], self.root_B[kept.index])


@dataclass(frozen=True)
class CacheState:
    """What drafters with keys and values of their own carry between cycles.

    Attributes:
        cache: keys and values at accepted positions, up to the tokens that are pending.
        pending: what was emitted since the last draft, with the target's states where the drafter reads them; its last token is the root.
    """

    cache: SlotCache
    pending: Emitted

    def select_rows(self, kept: KeptRows) -> CacheState:
        """Keep some batch rows only.

        Args:
            kept: which rows, and where they go.

        Returns:
            The state of these rows.
        """
        self.cache.shrink(kept)
        return CacheState(self.cache, self.pending.select_rows(kept.index))

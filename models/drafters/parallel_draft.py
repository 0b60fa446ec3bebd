"""A draft whose slots are all computed in one pass, whatever is drafted. What a node adds to the slot behind it is a sum at the most.

Owns how such a draft answers a search: node by node over the vocabulary, or with shortlists of its slots. Knows no family, no tree.

Shape legend: B batch rows, M nodes of a layer, K draft steps, C candidates, r rank of what nodes add, Vd draft vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from draftsmith.models.tree.noise import SharedNoise
from draftsmith.models.tree.shortlist import Shortlist, every_target_id, shortlist_of

if TYPE_CHECKING:
    from draftsmith.models.drafters.drafter import Drafter

NARROW = 8
"""So many continuations of a node are still taken from the whole vocabulary, where nodes add something."""
FEWEST = 64
"""Candidates of a slot in wider drafts, of which twice as many are scored as are asked for, and no fewer than this."""


class ParallelDraft(ABC):
    """One draft of K slots.

    Args:
        drafter: whose draft vocabulary and correction are used.
        root_B: int64, the token that the draft hangs on.
        num_drafted: only so many tokens of a slot, the likeliest before nodes add anything, are drafted; None for all.
        corrected: nodes add something.

    Attributes:
        root_B: see above.
        depth: of the slot behind the nodes of the last call.
    """

    def __init__(
        self,
        drafter: Drafter,
        root_B: Tensor,
        num_drafted: int | None = None,
        corrected: bool = False,
    ) -> None:
        self.root_B, self.target_ids = root_B, drafter.to_target_ids
        self.depth, self._corrected = 0, corrected
        self._drafter, self._num_drafted = drafter, num_drafted
        self._logits_BKV = self._draft_BKC = torch.empty(0)  # until the slots have been computed

    @abstractmethod
    def slot_logits(self) -> Tensor:
        """Compute all slots: logits [B, K, Vd]."""

    def correction(self, tokens_BM: Tensor, above_BM: Tensor | None) -> Tensor | None:
        """What nodes add to the slot behind them.

        Args:
            tokens_BM: int64, target ids.
            above_BM: int64, which node of the last call each one continues; None for the root.

        Returns:
            Z [B, M, r]; the logits grow by Z U^T, with the drafter's ``correction_weight`` U. None where nodes add nothing.
        """
        return None

    def begin(self) -> Tensor:
        """See :class:`Expander`: all slots."""
        self._logits_BKV = self._drafter.without_mask(self.slot_logits())
        if self._num_drafted is not None:
            count = min(self._num_drafted, self._logits_BKV.shape[-1])
            best_BKC, self._draft_BKC = self._logits_BKV.topk(count, dim=-1)
            self._logits_BKV = torch.full_like(self._logits_BKV, -torch.inf).scatter(-1, self._draft_BKC, best_BKC)
        return self._behind(self.root_B[:, None], None)

    def extend(self, tokens_BM: Tensor, above_BM: Tensor) -> Tensor:
        """See :class:`Expander`: the next slot."""
        self.depth += 1
        return self._behind(tokens_BM, above_BM)

    def shortlist(self, count: int, scale: float, noise: SharedNoise | None) -> Shortlist | None:
        """See :class:`ShortlistExpander`. Where nodes add something, narrow drafts score the whole vocabulary, which leaves nothing out."""
        if self._corrected and count <= NARROW and self._num_drafted is None:
            return None
        shortlist = shortlist_of(
            self._drafter.without_mask(self.slot_logits()),
            max(2 * count, FEWEST) if self._corrected else count,
            scale,
            self._num_drafted,
            None if noise is None else lambda logits: noise.onto(logits, 0, every_target_id(self, logits), each=True),
        )
        self._draft_BKC = shortlist.draft_BSC
        self.depth = -1
        return shortlist

    def rescore(self, tokens_BM: Tensor, above_BM: Tensor) -> Tensor | None:
        """See :class:`ShortlistExpander`."""
        self.depth += 1
        part_BMr = self.correction(tokens_BM, above_BM if self.depth else None)
        return None if part_BMr is None else self._added(part_BMr)

    def _behind(self, tokens_BM: Tensor, above_BM: Tensor | None) -> Tensor:
        """[B, M, Vd]: logits of the slot behind some nodes."""
        logits_BMV = self._logits_BKV[:, self.depth : self.depth + 1].expand(-1, tokens_BM.shape[1], -1)
        part_BMr = self.correction(tokens_BM, above_BM)
        if part_BMr is None:
            return logits_BMV
        if self._num_drafted is not None:
            ids_BMC = self._draft_BKC[:, self.depth, None].expand(-1, tokens_BM.shape[1], -1)
            return logits_BMV.scatter_add(-1, ids_BMC, self._added(part_BMr).to(logits_BMV.dtype))
        weight = self._drafter.correction_weight
        assert weight is not None
        return logits_BMV + F.linear(part_BMr.to(weight.dtype), weight)

    def _added(self, part_BMr: Tensor) -> Tensor:
        """[B, M, C]: what nodes add to the candidates of the slot behind them."""
        weight = self._drafter.correction_weight
        assert weight is not None
        rows_BCr = F.embedding(self._draft_BKC[:, self.depth], weight)
        return part_BMr.to(weight.dtype) @ rows_BCr.mT

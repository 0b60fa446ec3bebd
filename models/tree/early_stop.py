"""The threshold of AdaEDL's early stop, steered row by row (arXiv:2410.18351, section 3.2).

Owns the controller. Knows nothing of how a draft is stopped (:mod:`draftsmith.models.tree.search`) or verified.

Shape legend: B batch rows, N tree nodes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from draftsmith.models.tree.limits import EarlyStop
from draftsmith.models.tree.tree import DraftTree


@dataclass(frozen=True)
class StopState:
    """The state of each row's controller.

    Attributes:
        settings: shared by the rows.
        longest: how deep a draft can go where nothing stops it.
        threshold_B: float32, drafting stops where the bound on acceptance falls below it.
        rate_B: float32, running share of drafted depth that was accepted.
    """

    settings: EarlyStop
    longest: int
    threshold_B: Tensor
    rate_B: Tensor

    @classmethod
    def begin(cls, settings: EarlyStop, longest: int, num_rows: int, device: torch.device) -> StopState:
        """All rows at the settings' threshold and goal.

        Args:
            settings: shared by the rows.
            longest: tokens of a draft that nothing stops.
            num_rows: B.
            device: of the tensors.
        """
        ones_B = torch.ones(num_rows, device=device)
        return cls(settings, longest, settings.threshold * ones_B, settings.goal * ones_B)

    def after(self, tree: DraftTree, counts_B: Tensor) -> StopState:
        """The state after a cycle that emitted ``counts_B`` tokens (int64 [B]; accepted drafts + 1) from ``tree``.

        Too little accepted raises the threshold, so that drafts stop sooner; else it is lowered, unless the longest draft was accepted
        whole and nothing is left to gain.
        """
        s, accepted_B = self.settings, counts_B - 1
        drafted_B = (tree.depths_BN * tree.valid_BN).amax(1)
        rate_B = s.rate_memory * self.rate_B + (1.0 - s.rate_memory) * accepted_B / drafted_B.clamp(min=1)
        eased_B = torch.where(accepted_B < self.longest, -s.step, 0.0)
        moved_B = self.threshold_B + torch.where(rate_B < s.goal, s.step, eased_B)
        threshold_B = s.threshold_memory * self.threshold_B + (1.0 - s.threshold_memory) * moved_B
        return StopState(s, self.longest, threshold_B.clamp(0.0, 1.0), rate_B)

    def select_rows(self, rows: Tensor) -> StopState:
        """Some rows only. ``rows``: int64 [B']."""
        return StopState(self.settings, self.longest, self.threshold_B[rows], self.rate_B[rows])

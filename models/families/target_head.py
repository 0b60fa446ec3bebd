"""The target's own output head, frozen, as the head of a drafter.

Owns which rows of it are used. Knows no architecture.

Shape legend: D hidden, Vd draft vocabulary.
"""

from __future__ import annotations

from torch import Tensor

from draftsmith.models.drafters.drafter import Drafter
from draftsmith.models.drafters.drafter_config import DrafterConfig
from draftsmith.models.target.target import TargetEnds


class TargetHead(Drafter):
    """A drafter whose head inputs are scored by the target's head; the head is no weight of the drafter.

    Args:
        config: of the family's own class.
    """

    borrows_head = True

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__(config)
        self._rows: Tensor | None = None

    @property
    def head_weight(self) -> Tensor:
        """[Vd, D], frozen: the target's head, or its rows of the draft vocabulary."""
        return self.target_rows()

    def target_rows(self) -> Tensor:
        """As :attr:`head_weight`, for families that have heads of their own too."""
        weight, scale = self.ends.head_weight, self.ends.logit_scale
        if self.d2t is None and scale == 1.0:
            return weight
        if self._rows is None or self._rows.device != weight.device or self._rows.dtype != weight.dtype:
            self._rows = weight.detach()[self.draft_ids().to(weight.device)] * scale
        return self._rows

    def set_draft_ids(self, target_ids: Tensor) -> None:
        """See :meth:`Drafter.set_draft_ids`."""
        super().set_draft_ids(target_ids)
        self._rows = None

    def attach(self, ends: TargetEnds) -> Drafter:
        """See :meth:`Drafter.attach`."""
        self._rows = None
        return super().attach(ends)

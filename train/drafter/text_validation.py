"""Validation along the text: how well a drafter continues what was really said, and how sharply its scores should be read.

Owns: the sums of one validation. Does not know: what is learned, real decoding (a callback's business).
"""

from __future__ import annotations

import pytorch_lightning as pl
import torch
from torch import Tensor

from draftsmith.models.drafters.drafter import Drafter
from draftsmith.models.drafters.rollout import PackedBatch
from draftsmith.models.target.target import PRE_NORM, TargetEnds
from draftsmith.train.drafter.metrics import means, pool
from draftsmith.train.drafter.objective import Objective, prepare, run
from draftsmith.train.drafter.score_scale import SCALES, best_scale, surprise_by_scale
from draftsmith.train.run.collectives import sum_over_ranks


class TextValidation:
    """The sums of one validation.

    Args:
        objective: what is measured.
    """

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self.begin(torch.device("cpu"))

    def begin(self, device: torch.device) -> None:
        """Forgets the sums of the last validation.

        Args:
            device: of the batches to come.
        """
        self._sums: list[Tensor] = []
        self._surprise = torch.zeros(len(SCALES), device=device)

    def add(self, batch: PackedBatch, drafter: Drafter, ends: TargetEnds, to_draft: Tensor) -> None:
        """Teacher-forced cross-entropy, accuracies and acceptance of one batch; and the drafter's score scale so far.

        Args:
            batch: packed samples.
            drafter: to be validated.
            ends: the target's.
            to_draft: int64 [V], maps target ids to draft ids.
        """
        prepared = prepare(self.objective, batch, to_draft)
        weights = torch.zeros(self.objective.num_steps, device=self._surprise.device)
        self._sums.append(pool(run(self.objective, prepared, drafter, ends, weights, True, acceptance=True)))
        if PRE_NORM in batch.hidden:
            self._surprise += surprise_by_scale(batch, drafter, ends, to_draft, self.objective.max_anchors)
            # After every batch, not at the end, because callbacks that decode come before the module's own end of a validation.
            drafter.config.score_scale = best_scale(self._surprise)

    def pooled_means(self, module: pl.LightningModule) -> dict[str, float]:
        """The means over all ranks by name, none where there was no batch. Collective.

        Args:
            module: of the run.
        """
        if not self._sums:
            return {}
        return means(sum_over_ranks(module, torch.stack(self._sums).sum(0)), self.objective, "val")

    def score_scale(self, module: pl.LightningModule) -> float | None:
        """The score scale by the batches of all ranks; None where they tell nothing of it. Collective.

        Args:
            module: of the run.
        """
        surprise = sum_over_ranks(module, self._surprise)
        return best_scale(surprise) if bool(surprise.any()) else None

"""The held-out tokens of a judge in training, and those among them that a judge is asked about.

Owns that selection. A drafted token that the target would have chosen stands without a judge, so figures over all tokens flatter: most
are words that nobody gets wrong. Knows no model and no files.

Shape legend: N tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from draftsmith.models.judge import CurvePoint
from draftsmith.train.judge.metrics import Bootstrap, reliability, roc_auc

DIFFERING, ALL = "differing", "all"


class HeldOutTokens:
    """The held-out tokens as the best of the sweep sees them.

    Args:
        probabilities: float64 [N], of being correct.
        labels: bool [N].
        questions: int64 [N].
        differs: bool [N], True where the target would have chosen another token.
    """

    def __init__(
        self, probabilities: np.ndarray, labels: np.ndarray, questions: np.ndarray, differs: np.ndarray
    ) -> None:
        self.probabilities, self.labels, self.questions = probabilities, labels, questions
        self._differs = differs

    @property
    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Probabilities, labels and questions."""
        return self.probabilities, self.labels, self.questions

    def differing(self) -> HeldOutTokens | None:
        """The tokens that the target would not have chosen; None unless some are correct and some are wrong."""
        chosen = self._differs
        if len(np.unique(self.labels[chosen])) < 2:
            return None
        probabilities, labels, questions = self.arrays
        return HeldOutTokens(probabilities[chosen], labels[chosen], questions[chosen], chosen[chosen])

    def asked(self, over: str) -> tuple[HeldOutTokens, str]:
        """The tokens that a threshold is chosen over, and which they are: all of them where those that differ are of one class.

        Args:
            over: `differing` or `all`.
        """
        differing = self.differing() if over == DIFFERING else None
        return (self, ALL) if differing is None else (differing, DIFFERING)

    def points(self, thresholds: Sequence[float], num_replicates: int) -> list[CurvePoint]:
        """What thresholds accept.

        Args:
            thresholds: rising.
            num_replicates: of the bootstrap over questions.
        """
        return Bootstrap(*self.arrays, num_replicates, seed=0).points(np.asarray(thresholds, dtype=np.float64))

    def summary(self, threshold: float, num_replicates: int) -> dict[str, Any]:
        """Counts, area under the ROC curve, calibration error, and what a threshold accepts, for a judge's config.

        Args:
            threshold: the judge's.
            num_replicates: of the bootstrap over questions.
        """
        correct = int(self.labels.sum())
        return {
            "correct": correct,
            "wrong": len(self.labels) - correct,
            "auc": roc_auc(self.probabilities, self.labels),
            "calibration_error": reliability(self.probabilities, self.labels).error,
            "at_threshold": dict(self.points([threshold], num_replicates)[0]),
        }

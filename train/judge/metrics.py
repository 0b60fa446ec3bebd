"""How well a judge tells correct tokens from wrong ones, and where to draw its line.

Owns pure functions over probabilities, labels and questions: ROC, precision and recall, calibration, thresholds, intervals by
bootstrap over questions. Knows no model, no files and no figures.

scikit-learn computes curves and areas. The rest it does not have: thresholds under a limit, intervals by question, and bins that keep
their counts, the empty ones included.

Shape legend: N tokens, Q questions, R bootstrap replicates, C thresholds. Labels are 1 for correct, 0 for wrong.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn import metrics

from draftsmith.models.judge import CurvePoint

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
_INTERVAL = (2.5, 97.5)
_LEAST = 2.0**-50
_REPLICATE_NUMBERS = 2**23  # bootstrap weights in memory at a time


@dataclass(frozen=True)
class Reliability:
    """Calibration by bins of equal width.

    Attributes:
        probability: float64 [bins], the mean probability; NaN for a bin without a token.
        correct: float64 [bins], the share that is correct; NaN likewise.
        counts: int64 [bins], tokens.
        error: the expected calibration error: the distance of both, weighted by tokens.
    """

    probability: Floats
    correct: Floats
    counts: Ints
    error: float


def roc_auc(scores: ArrayLike, labels: ArrayLike) -> float:
    """The area under the ROC curve: the chance that a correct token scores above a wrong one, ties counting half.

    Args:
        scores: [N], higher for tokens that seem correct.
        labels: [N], 1 for correct, 0 for wrong.

    Raises:
        ValueError: only one class, scores that are not finite, or lists of different lengths.
    """
    scores, labels = _checked(scores, labels)
    return float(metrics.roc_auc_score(labels, scores))


def roc_curve(scores: ArrayLike, labels: ArrayLike) -> tuple[Floats, Floats]:
    """Shares of wrong and of correct tokens accepted, from the strictest threshold (0, 0) to the loosest (1, 1).

    Args:
        scores: [N], higher for tokens that seem correct.
        labels: [N], 1 for correct, 0 for wrong.

    Raises:
        ValueError: as :func:`roc_auc`.
    """
    scores, labels = _checked(scores, labels)
    wrong, correct, _ = metrics.roc_curve(labels, scores, drop_intermediate=False)
    return wrong, correct


def wrong_precision_recall(scores: ArrayLike, labels: ArrayLike) -> tuple[Floats, Floats]:
    """Precision and recall of rejecting wrong tokens, from the strictest rejection to rejecting all.

    Wrong tokens are the rare class, so this pair of curves is the informative one.

    Args:
        scores: [N], higher for tokens that seem correct.
        labels: [N], 1 for correct, 0 for wrong.

    Returns:
        recall (the share of wrong tokens that are rejected) and precision (the share of rejected tokens that are wrong).

    Raises:
        ValueError: as :func:`roc_auc`.
    """
    scores, labels = _checked(scores, labels)
    precision, recall, _ = metrics.precision_recall_curve(1 - labels, -scores)
    # The other way round, and without the last entry: nothing is rejected there, and precision means nothing.
    return recall[-2::-1], precision[-2::-1]


def average_precision(scores: ArrayLike, labels: ArrayLike) -> float:
    """Area under :func:`wrong_precision_recall` as a step function.

    Args:
        scores: [N], higher for tokens that seem correct.
        labels: [N], 1 for correct, 0 for wrong.

    Raises:
        ValueError: as :func:`roc_auc`.
    """
    scores, labels = _checked(scores, labels)
    return float(metrics.average_precision_score(1 - labels, -scores))


def reliability(probabilities: ArrayLike, labels: ArrayLike, num_bins: int = 10) -> Reliability:
    """Calibration by bins; see `Reliability`.

    Classes that were balanced in training move all probabilities away from the shares of the text.

    Args:
        probabilities: [N], of being correct.
        labels: [N], 1 for correct, 0 for wrong.
        num_bins: bins of equal width.

    Raises:
        ValueError: as :func:`roc_auc`, or a probability is not within 0 and 1.
    """
    probabilities, labels = _checked(probabilities, labels)
    _check_probabilities(probabilities)
    bins = np.minimum((probabilities * num_bins).astype(np.int64), num_bins - 1)
    counts = np.bincount(bins, minlength=num_bins)
    empty = counts == 0
    shares = [
        np.bincount(bins, weights, minlength=num_bins) / np.maximum(counts, 1) for weights in (probabilities, labels)
    ]
    error = float(np.sum(np.abs(shares[0] - shares[1]) * counts) / len(labels))
    probability, correct = (np.where(empty, np.nan, share) for share in shares)
    return Reliability(probability, correct, counts, error)


def choose_threshold(
    probabilities: ArrayLike,
    labels: ArrayLike,
    questions: Sequence[object] | NDArray,
    max_wrong: float = 0.05,
    hold_upper: bool = False,
    num_replicates: int = 1000,
    seed: int = 0,
) -> CurvePoint:
    """The threshold that accepts most correct tokens with at most the share `max_wrong` of wrong ones accepted.

    Accepted means strictly above the threshold. Of thresholds that accept the same correct tokens, the one with the fewest wrong tokens is
    taken, also where the limit allows more. It lies in the middle between two probabilities that occur, in log-odds: where nothing lies
    between the classes, both are equally far away. Where even the likeliest wrong token must be rejected and nothing lies above it, the
    threshold is 1.

    Args:
        probabilities: of being correct, of held-out tokens.
        labels: theirs.
        questions: the question of each; tokens of one question are not independent, so the bootstrap draws questions.
        max_wrong: the limit, from 0 to 1.
        hold_upper: the upper end of the 95 % interval must also be within the limit, not only the share. An interval of 0 to 0 says that
            none was seen, not that there are none: with few questions it says little.
        num_replicates: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        ValueError: only one class, numbers out of range, or lists of different lengths.
    """
    bootstrap = Bootstrap(probabilities, labels, questions, num_replicates, seed)
    if not 0.0 <= max_wrong <= 1.0:
        raise ValueError(f"max_wrong is {max_wrong}; it is the share of wrong tokens that may be accepted; give 0 to 1")
    candidates = _candidates(bootstrap.probabilities, bootstrap.labels)
    wrong = np.sort(bootstrap.probabilities[bootstrap.labels == 0])
    shares = 1.0 - np.searchsorted(wrong, candidates, side="right") / len(wrong)
    # A hair of tolerance: 0.05 of 100 tokens are 5, though 1 - 0.95 is more than 0.05 in floats.
    first = int(np.argmax(shares <= max_wrong + 1e-12))
    if hold_upper:
        first = _first_below(bootstrap, candidates, first, max_wrong)
    correct = np.sort(bootstrap.probabilities[bootstrap.labels == 1])
    rejected = np.searchsorted(correct, candidates, side="right")
    strictest = int(np.searchsorted(rejected, rejected[first], side="right")) - 1
    [point] = bootstrap.points(candidates[strictest : strictest + 1])
    return point


def curve(
    probabilities: ArrayLike,
    labels: ArrayLike,
    questions: Sequence[object] | NDArray,
    num_points: int = 41,
    num_replicates: int = 1000,
    seed: int = 0,
) -> list[CurvePoint]:
    """What thresholds from 0 to 1 do, spread evenly over the shares of wrong and of correct tokens; rising.

    Args:
        probabilities: [N], of being correct.
        labels: [N], 1 for correct, 0 for wrong.
        questions: [N], the question of each token.
        num_points: about how many thresholds.
        num_replicates: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        ValueError: as :func:`choose_threshold`.
    """
    bootstrap = Bootstrap(probabilities, labels, questions, num_replicates, seed)
    steps = np.linspace(0.0, 1.0, max(2, num_points // 2))
    spread = [np.quantile(bootstrap.probabilities[bootstrap.labels == kind], steps, method="lower") for kind in (0, 1)]
    return bootstrap.points(np.unique(np.concatenate([[0.0, 1.0], *spread])))


class Bootstrap:
    """Accepted shares at thresholds with 95 % percentile intervals over questions: Q of Q questions are drawn, with replacement.

    The same draws serve every threshold, so intervals fall with the threshold as the shares do. Replicates without a token of a class do
    not count for it. If none is left, nothing is known, and the interval is 0 to 1.

    Args:
        probabilities: [N], of being correct.
        labels: [N], 1 for correct, 0 for wrong.
        questions: [N], the question of each token.
        num_replicates: R.
        seed: of the draws.

    Raises:
        ValueError: only one class, probabilities out of range, lists of different lengths, or no replicate.
    """

    def __init__(
        self,
        probabilities: ArrayLike,
        labels: ArrayLike,
        questions: Sequence[object] | NDArray,
        num_replicates: int,
        seed: int,
    ) -> None:
        self.probabilities, self.labels = _checked(probabilities, labels)
        _check_probabilities(self.probabilities)
        if len(questions) != len(self.labels):
            raise ValueError(f"{len(questions)} questions for {len(self.labels)} tokens; give one for each token")
        if num_replicates < 1:
            raise ValueError(f"num_replicates is {num_replicates}; a bootstrap needs at least 1")
        names, self._question = np.unique(np.asarray(questions), return_inverse=True)
        self._num_questions, self._num_replicates, self._seed = len(names), num_replicates, seed

    def points(self, thresholds: Floats) -> list[CurvePoint]:
        """One point a threshold.

        Args:
            thresholds: float64 [C], rising.
        """
        correct, wrong = (self._shares(kind, thresholds) for kind in (1, 0))
        return [
            CurvePoint(
                threshold=float(threshold),
                correct=float(correct[0, index]),
                correct_low=float(correct[1, index]),
                correct_high=float(correct[2, index]),
                wrong=float(wrong[0, index]),
                wrong_low=float(wrong[1, index]),
                wrong_high=float(wrong[2, index]),
            )
            for index, threshold in enumerate(thresholds)
        ]

    def _shares(self, kind: int, thresholds: Floats) -> Floats:
        """[3, C]: the share of the class that is accepted, and the ends of its interval."""
        chosen = self.labels == kind
        # The number of thresholds that lie strictly below a probability: those accept it.
        below = np.searchsorted(thresholds, self.probabilities[chosen], side="left")
        num_thresholds = len(thresholds)
        cells = np.bincount(
            self._question[chosen] * (num_thresholds + 1) + below, minlength=self._num_questions * (num_thresholds + 1)
        )
        counts = cells.reshape(self._num_questions, num_thresholds + 1)[:, ::-1].cumsum(1)[:, ::-1].astype(np.float64)
        accepted, totals = counts[:, 1:], counts[:, 0]
        parts = []
        for draws in self._draws():
            drawn_totals = draws @ totals
            drawn_accepted = draws @ accepted
            parts.append(drawn_accepted[drawn_totals > 0] / drawn_totals[drawn_totals > 0, None])
        drawn = np.concatenate(parts)
        ends = (
            np.percentile(drawn, _INTERVAL, axis=0) if len(drawn) else np.repeat([[0.0], [1.0]], num_thresholds, axis=1)
        )
        return np.concatenate([accepted.sum(0, keepdims=True) / totals.sum(), ends])

    def _draws(self) -> Iterator[Floats]:
        """How often each question was drawn: [R, Q] in parts, the same ones every time."""
        generator = np.random.default_rng(self._seed)
        part = max(1, _REPLICATE_NUMBERS // self._num_questions)
        even = np.full(self._num_questions, 1.0 / self._num_questions)
        for start in range(0, self._num_replicates, part):
            number = min(part, self._num_replicates - start)
            yield generator.multinomial(self._num_questions, even, size=number).astype(np.float64)


def _candidates(probabilities: Floats, labels: Ints) -> Floats:
    """Thresholds worth a thought, rising: 0, just above each wrong token's probability, and 1 where nothing lies above."""
    values = np.unique(probabilities)
    wrong = np.unique(probabilities[labels == 0])
    after = np.searchsorted(values, wrong, side="right")
    higher = np.append(values, 1.0)[after]
    middle = 1.0 / (1.0 + np.exp(-(_log_odds(wrong) + _log_odds(higher)) / 2))
    middle = np.where((middle > wrong) & (middle < higher), middle, wrong)
    middle[after == len(values)] = 1.0
    return np.unique(np.concatenate([[0.0], middle]))


def _log_odds(probabilities: Floats) -> Floats:
    """Finite also for 0 and 1."""
    inside = np.clip(probabilities, _LEAST, 1.0 - _LEAST)
    return np.log(inside) - np.log1p(-inside)


def _first_below(bootstrap: Bootstrap, candidates: Floats, first: int, max_wrong: float) -> int:
    """The first candidate from `first` on whose upper end is within the limit; by bisection, since upper ends fall."""
    low, high = first, len(candidates) - 1
    while low < high:
        middle = (low + high) // 2
        [point] = bootstrap.points(candidates[middle : middle + 1])
        low, high = (low, middle) if point["wrong_high"] <= max_wrong + 1e-12 else (middle + 1, high)
    return low


def _checked(scores: ArrayLike, labels: ArrayLike) -> tuple[Floats, Ints]:
    scores, labels = np.asarray(scores, dtype=np.float64), np.asarray(labels, dtype=np.int64)
    if scores.ndim != 1 or scores.shape != labels.shape:
        raise ValueError(
            f"scores have shape {scores.shape} and labels {labels.shape}; both are one list of tokens; give one label each"
        )
    num_bad = int((~np.isfinite(scores)).sum())
    if num_bad:
        raise ValueError(
            f"{num_bad} scores are NaN or infinite; every score is a number; look at the states they come from"
        )
    classes = set(np.unique(labels).tolist())
    if classes != {0, 1}:
        raise ValueError(
            f"the labels are {sorted(classes)}; both 1 (correct) and 0 (wrong) are needed; label more answers"
        )
    return scores, labels


def _check_probabilities(probabilities: Floats) -> None:
    if probabilities.min() < 0.0 or probabilities.max() > 1.0:
        raise ValueError(
            f"probabilities go from {probabilities.min()} to {probabilities.max()}; they are from 0 to 1; take the sigmoid of log-odds"
        )

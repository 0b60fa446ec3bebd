"""ROC, precision and recall, and calibration of a judge as images.

Owns: how they are drawn. Does not know: where they are shown, models.

Shape legend: N tokens, H and W pixels.
"""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from draftsmith.train.judge.metrics import average_precision, reliability, roc_auc, roc_curve, wrong_precision_recall

Image = NDArray[np.uint8]
_MOST_POINTS = 2000


def draw_roc(probabilities: ArrayLike, labels: ArrayLike) -> Image:
    """Correct tokens accepted against wrong tokens accepted.

    Args:
        probabilities: [N], of being correct.
        labels: [N], 1 for correct, 0 for wrong.

    Returns:
        uint8 [H, W, 3].

    Raises:
        ValueError: as metrics.roc_auc.
    """
    wrong, correct = roc_curve(probabilities, labels)
    figure, axes = _square("wrong tokens accepted", "correct tokens accepted")
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    axes.plot(_thinned(wrong), _thinned(correct))
    axes.set_title(f"ROC, area {roc_auc(probabilities, labels):.3f}")
    return _image(figure)


def draw_precision_recall(probabilities: ArrayLike, labels: ArrayLike) -> Image:
    """The share of the rejected tokens that is wrong, against the share of the wrong tokens that is rejected.

    Args:
        probabilities: [N], of being correct.
        labels: [N], 1 for correct, 0 for wrong.

    Returns:
        uint8 [H, W, 3].

    Raises:
        ValueError: as metrics.roc_auc.
    """
    recall, precision = wrong_precision_recall(probabilities, labels)
    figure, axes = _square("wrong tokens rejected", "wrong among the rejected")
    axes.axhline(1.0 - float(np.mean(np.asarray(labels))), color="0.7", linewidth=1)
    axes.plot(_thinned(recall), _thinned(precision))
    axes.set_title(f"wrong tokens, average precision {average_precision(probabilities, labels):.3f}")
    return _image(figure)


def draw_reliability(probabilities: ArrayLike, labels: ArrayLike) -> Image:
    """The share of correct tokens in bins of their probability, with the number of tokens in each bin.

    Args:
        probabilities: [N], of being correct.
        labels: [N], 1 for correct, 0 for wrong.

    Returns:
        uint8 [H, W, 3].

    Raises:
        ValueError: as metrics.reliability.
    """
    bins = reliability(probabilities, labels)
    figure, axes = _square("probability of being correct", "share that is correct")
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    axes.plot(bins.probability, bins.correct, marker="o")
    for probability, correct, count in zip(bins.probability, bins.correct, bins.counts, strict=True):
        if count:
            axes.annotate(f"{count}", (probability, correct), (3, -9), textcoords="offset points", fontsize=7)
    axes.set_title(f"calibration, error {bins.error:.3f}")
    return _image(figure)


def _square(x: str, y: str) -> tuple[Figure, Axes]:
    """Axes from 0 to 1. Without pyplot, whose list of open figures would grow with every validation."""
    figure = Figure(figsize=(4.2, 4.2), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xlabel=x, ylabel=y)
    axes.grid(color="0.92")
    return figure, axes


def _thinned(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """No more points than can be seen, both ends among them."""
    if len(values) <= _MOST_POINTS:
        return values
    return values[np.linspace(0, len(values) - 1, _MOST_POINTS).astype(np.int64)]


def _image(figure: Figure) -> Image:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()

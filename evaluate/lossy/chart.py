"""The picture of a comparison of lossy rules: right answers against accepted tokens, and against speed.

Owns the look of the chart. Does not know how a row was measured. Draws without a display.
"""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from draftsmith.escapes import chart_text
from draftsmith.evaluate.chart import GRID, LOOKS, SOFT, titled_png
from draftsmith.evaluate.lossy.lossy import PLAIN, RuleRow


def draw_trade(rows: Sequence[RuleRow]) -> bytes:
    """PNG bytes: one line a rule over its thresholds, each point with its 95 % interval of accuracy; the target's accuracy dashed.

    Against accepted tokens, and beside it against speed where speed was measured.
    """
    measures = {"accepted_per_cycle": "draft tokens accepted a cycle"}
    if all(row.speedup is not None for row in rows):
        measures["speedup"] = "speed-up over plain decoding"
    figure = Figure(figsize=(3.5 + 4.0 * len(measures), 4.8), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(measures), sharey=True, squeeze=False)[0]
    for axes, (measure, title) in zip(panels, measures.items(), strict=True):
        _draw(axes, rows, measure, title)
    panels[0].set_ylabel("right answers, %", color=SOFT)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    return titled_png(figure, f"What lossy rules gain and cost: {rows[0].problems} problems")


def _draw(axes: Axes, rows: Sequence[RuleRow], measure: str, title: str) -> None:
    names = list(dict.fromkeys(row.rule for row in rows if row.rule != PLAIN))
    plain = next((row for row in rows if row.rule == PLAIN), None)
    if plain is not None:
        axes.axhline(100 * plain.accuracy, color=SOFT, linestyle="--", linewidth=1, label="the target alone")
    for number, name in enumerate(names):
        colour, marker = LOOKS[number % len(LOOKS)]
        own = sorted((row for row in rows if row.rule == name), key=lambda row: float(getattr(row, measure)))
        across = [float(getattr(row, measure)) for row in own]
        up = [100 * row.accuracy for row in own]
        low = [100 * (row.accuracy - row.accuracy_interval[0]) for row in own]
        high = [100 * (row.accuracy_interval[1] - row.accuracy) for row in own]
        axes.errorbar(
            across,
            up,
            yerr=[low, high],
            color=colour,
            marker=marker,
            markersize=5,
            linewidth=1.4,
            elinewidth=0.7,
            capsize=2,
            label=chart_text(name),
        )
    axes.set_xlabel(title, color=SOFT)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)

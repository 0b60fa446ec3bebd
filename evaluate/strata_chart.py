"""The pictures of parts: tokens per step and speed-up by category, and tokens per step by length of the context.

Owns their look. Does not know how a figure was measured. Draws without a display.
"""

from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from draftsmith.escapes import chart_text
from draftsmith.evaluate.chart import DASHES, INK, LOOKS, SOFT, plain_axes, titled_png
from draftsmith.evaluate.strata.categories import Category
from draftsmith.evaluate.strata.words import NamedBins, NamedCategories, prompts_of_categories

Figures = Callable[[Category], tuple[float | None, tuple[float, float] | None]]
"""A figure of a category with its interval."""
MOST_CATEGORIES = 40
"""In the picture: with more of them it would be too tall to read. The tables have all."""


def _steps(part: Category) -> tuple[float | None, tuple[float, float] | None]:
    return part.tokens_per_step, part.tokens_per_step_interval


def _speed(part: Category) -> tuple[float | None, tuple[float, float] | None]:
    return part.speedup, part.speedup_interval


def draw_categories(rows: Sequence[NamedCategories]) -> bytes | None:
    """PNG bytes of tokens per step and, where it is known, speed-up of each category, with intervals; None without categories.

    Args:
        rows: the named categories of each row.

    Returns:
        The picture. It has the first 40 categories, and says so where there are more.
    """
    counts = prompts_of_categories(rows)
    if not counts:
        return None
    shown = list(counts)[:MOST_CATEGORIES]
    timed = any(part.speedup is not None for _, categories in rows for part in categories)
    height = max(3.2, 1.9 + len(shown) * (0.2 + 0.13 * len(rows)))
    figure = Figure(figsize=(11.5, height), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2 if timed else 1, sharey=True, squeeze=False)[0]
    _draw_dots(axes[0], rows, shown, _steps, "Tokens per step")
    if timed:
        _draw_dots(axes[1], rows, shown, _speed, "Speed-up over plain decoding")
    axes[0].set_yticks(range(len(shown)), [chart_text(f"{name} ({counts[name]})") for name in shown])
    axes[0].set_ylim(len(shown) - 0.5, -0.5)
    axes[0].tick_params(axis="y", labelcolor=INK)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8.5, frameon=False, labelcolor=INK, loc="outside lower center", ncols=4)
    left_out = len(counts) - len(shown)
    return titled_png(figure, "By category" + (f": {left_out} more are in the tables" if left_out else ""))


def _draw_dots(
    axes: Axes, rows: Sequence[NamedCategories], categories: Sequence[str], figures: Figures, title: str
) -> None:
    """A dot with its interval for each row, below one another in the band of each category."""
    for index, (name, parts) in enumerate(rows):
        colour, marker = LOOKS[index % len(LOOKS)]
        offset = 0.7 * ((index + 0.5) / len(rows) - 0.5)
        known = {part.category: figures(part) for part in parts}
        points = [(place + offset, *known[category]) for place, category in enumerate(categories) if category in known]
        dots = [(place, value, interval or (value, value)) for place, value, interval in points if value is not None]
        values = [value for _, value, _ in dots]
        errors = [
            [max(value - low, 0.0) for _, value, (low, _) in dots],
            [max(high - value, 0.0) for _, value, (_, high) in dots],
        ]
        look: dict[str, Any] = {"fmt": marker, "color": colour, "markersize": 5, "elinewidth": 1.2, "capsize": 2}
        axes.errorbar(values, [place for place, _, _ in dots], xerr=errors, label=chart_text(name), **look)
    for place in range(1, len(categories)):
        axes.axhline(place - 0.5, color="#f1f3f5", linewidth=0.8, zorder=0)
    axes.axvline(1.0, color=SOFT, linewidth=1, linestyle=(0, (4, 3)))
    axes.set_xlim(left=0)
    plain_axes(axes, title, "x")


def draw_contexts(rows: Sequence[NamedBins]) -> bytes | None:
    """PNG bytes of tokens per step over the length of the context, with intervals; None where there is no second bin.

    Args:
        rows: the named bins of each row.

    Returns:
        The picture.
    """
    names = {part.low: part.name for _, bins in rows for part in bins}
    if len(names) < 2:
        return None
    places = {low: place for place, low in enumerate(sorted(names))}
    figure = Figure(figsize=(8.5, 4.4), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for index, (name, bins) in enumerate(rows):
        colour, marker = LOOKS[index % len(LOOKS)]
        values = [part.tokens_per_step for part in bins]
        errors = [
            [max(part.tokens_per_step - part.tokens_per_step_interval[0], 0.0) for part in bins],
            [max(part.tokens_per_step_interval[1] - part.tokens_per_step, 0.0) for part in bins],
        ]
        beside = 0.12 * ((index + 0.5) / len(rows) - 0.5)
        across = [places[part.low] + beside for part in bins]
        look: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 5.5, "elinewidth": 1.2, "capsize": 2.5}
        look["linestyle"] = DASHES[index // len(LOOKS) % len(DASHES)]
        axes.errorbar(across, values, yerr=errors, label=chart_text(name), **look)
    axes.set_xticks(range(len(places)), [names[low] for low in places])
    axes.set_xlim(-0.5, len(places) - 0.5)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("prompt and reply before the cycle, tokens", fontsize=9, color=SOFT)
    plain_axes(axes, "Tokens per step", "y")
    figure.legend(fontsize=8.5, frameon=False, labelcolor=INK, loc="outside lower center", ncols=4)
    return titled_png(figure, "By length of the context")

"""The report's picture: what each drafter gains beside what it could gain, and how acceptance falls with depth.

Owns the look of the chart. Does not know how a row was measured. Draws without a display.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from draftsmith.escapes import chart_text
from draftsmith.evaluate.records import Row
from draftsmith.evaluate.roofline.roofline import Roofline
from draftsmith.evaluate.roofline.words import share

INK, SOFT, GRID = "#22262e", "#6b7280", "#e5e7eb"
LOOKS = (
    ("#2563eb", "o"),
    ("#d97706", "s"),
    ("#059669", "D"),
    ("#7c3aed", "^"),
    ("#dc2626", "v"),
    ("#0891b2", "P"),
    ("#be185d", "X"),
    ("#4d7c0f", "<"),
    ("#1e3a8a", ">"),
    ("#78350f", "h"),
    ("#475569", "p"),
    ("#a21caf", "*"),
)
DASHES = ("-", "--", ":", "-.")
MOST_LINES = 10
"""Of more drafting rows than these, the right side shows each drafter's fastest alone: nobody could tell their lines apart."""
FEWEST_REACHED = 20
"""A share of fewer drafts than these is noise, and is not drawn behind the first depth."""


@dataclass(frozen=True)
class Look:
    """How a row is drawn: colour and marker say who and which shape, the dash which temperature."""

    colour: str
    marker: str = "o"
    dash: str = "-"


def draw(rows: Sequence[Row]) -> bytes:
    """PNG bytes. Left: speed-up (bar, with its interval) and tokens per step (diamond); right: acceptance by depth."""
    figure = Figure(figsize=(11.5, max(3.8, 1.9 + 0.42 * len(rows))), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    deep = any(row.acceptance_by_depth for row in rows)
    axes = figure.subplots(1, 2, width_ratios=(1.45, 1)) if deep else [figure.subplots()]
    several = len({row.temperature for row in rows}) > 1
    names = [chart_text(f"{row.label}  T={row.temperature:g}" if several else row.label) for row in rows]
    looks = _looks(rows)
    _draw_gains(axes[0], rows, names, [look.colour for look in looks])
    if deep:
        draw_depths(axes[1], rows, names)
    first = rows[0]
    return titled_png(
        figure, f"{first.target}: {first.prompts} prompts, batch {first.batch_size}, {first.dtype} on {first.device}"
    )


def draw_rooflines(rows: Sequence[Row]) -> bytes | None:
    """PNG bytes of rows that were clocked: how long a cycle takes at least, and how long it took. None without such rows."""
    clocked = [row for row in rows if row.roofline is not None and row.roofline.stage_seconds]
    if not clocked:
        return None
    figure = Figure(
        figsize=(11.5, max(3.2, 1.9 + 0.7 * len(clocked))), dpi=150, facecolor="white", layout="constrained"
    )
    FigureCanvasAgg(figure)
    several = len({row.temperature for row in clocked}) > 1
    names = [chart_text(f"{row.label}  T={row.temperature:g}" if several else row.label) for row in clocked]
    _draw_cycles(figure.subplots(), [row.roofline for row in clocked if row.roofline is not None], names)
    figure.legend(fontsize=8.5, frameon=False, labelcolor=INK, loc="outside lower center", ncols=6)
    first = clocked[0]
    return titled_png(figure, f"{first.target}: a cycle against the memory of {first.device}, {first.dtype}")


def _draw_cycles(axes: Axes, rooflines: Sequence[Roofline], names: list[str]) -> None:
    """For each row two bars: above the bound, below the time that each stage took."""
    places = range(len(rooflines))
    target = [1e3 * (each.weight_bytes + each.cached_bytes) / each.bandwidth for each in rooflines]
    draft = [1e3 * each.draft_bytes / each.bandwidth for each in rooflines]
    above, below = [place - 0.17 for place in places], [place + 0.17 for place in places]
    axes.barh(above, target, height=0.3, color="#9ca3af", label="roofline: read the target")
    if any(draft):
        axes.barh(above, draft, left=target, height=0.3, color="#d1d5db", label="roofline: read the drafter")
    ends = [0.0] * len(rooflines)
    for name, (colour, _) in zip(
        dict.fromkeys(n for each in rooflines for n in each.stage_seconds), LOOKS, strict=False
    ):
        taken = [1e3 * each.stage_seconds.get(name, 0.0) for each in rooflines]
        axes.barh(below, taken, left=ends, height=0.3, color=colour, alpha=0.85, label=f"took: {name}")
        ends = [end + more for end, more in zip(ends, taken, strict=True)]
    widest = max(*ends, *(sum(both) for both in zip(target, draft, strict=True)))
    for place, end, each in zip(below, ends, rooflines, strict=True):
        note = share(each) if each.beats_memory else f"{share(each)} of the roofline"
        axes.annotate(note, (end, place), (6, 0), textcoords="offset points", va="center", fontsize=9.5, color=SOFT)
    axes.set_xlim(0, 1.25 * widest)
    axes.set_yticks(list(places), names)
    axes.invert_yaxis()
    axes.set_xlabel("ms a cycle", fontsize=9, color=SOFT)
    plain_axes(axes, "How long a cycle takes at least (above) and how long it took (below)", "x")
    axes.tick_params(axis="y", labelcolor=INK)


def titled_png(figure: Figure, title: str) -> bytes:
    """PNG bytes of a figure under its title."""
    figure.suptitle(chart_text(title), fontsize=12, color=INK, x=0.01, ha="left", fontweight="bold")
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": ""})
    return out.getvalue()


def _looks(rows: Sequence[Row]) -> list[Look]:
    """A colour for each drafter, a marker for each of its shapes, a dash for each temperature; grey for rows that do not draft.

    One drafter alone has a colour for each of its shapes too.
    """
    drafting = [row for row in rows if row.acceptance_by_depth]
    drafters = list(dict.fromkeys(row.drafter for row in drafting))
    warmths = list(dict.fromkeys(row.temperature for row in rows))

    def look(row: Row) -> Look:
        own = list(dict.fromkeys(other.label for other in drafting if other.drafter == row.drafter)).index(row.label)
        colour = LOOKS[(drafters.index(row.drafter) if len(drafters) > 1 else own) % len(LOOKS)][0]
        return Look(colour, LOOKS[own % len(LOOKS)][1], DASHES[warmths.index(row.temperature) % len(DASHES)])

    return [look(row) if row.acceptance_by_depth else Look("#9ca3af") for row in rows]


def plain_axes(axes: Axes, title: str, grid: Literal["x", "y"]) -> None:
    """A title, a grid along one axis, and no frame.

    Args:
        axes: to be changed.
        title: above them.
        grid: the axis whose values the lines mark.
    """
    axes.set_title(title, loc="left", fontsize=10.5, color=INK)
    axes.grid(axis=grid, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#d1d5db")
    axes.tick_params(colors=SOFT, labelsize=9, length=0)


def _draw_gains(axes: Axes, rows: Sequence[Row], names: list[str], colours: list[str]) -> None:
    places = range(len(rows))
    speedups = [row.speedup for row in rows]
    errors = [
        [max(row.speedup - row.speedup_interval[0], 0.0) for row in rows],
        [max(row.speedup_interval[1] - row.speedup, 0.0) for row in rows],
    ]
    axes.barh(places, speedups, height=0.58, color=colours, alpha=0.85)
    axes.errorbar(speedups, places, xerr=errors, fmt="none", ecolor=INK, elinewidth=1, capsize=2.5)
    stepped = [(row.tokens_per_step, place) for place, row in zip(places, rows, strict=True) if row.tokens_per_step]
    axes.plot(
        *zip(*stepped, strict=True), "D", color=INK, markersize=6, markerfacecolor="white", label="tokens per step"
    )
    widest = 1.2 * max(max(row.speedup_interval[1], row.tokens_per_step or 0.0) for row in rows)
    axes.set_xlim(0, widest)
    for place, row in zip(places, rows, strict=True):
        _label_row(axes, place, row, fits=row.speedup > 0.1 * widest)
    axes.axvline(1.0, color=SOFT, linewidth=1, linestyle=(0, (4, 3)))
    axes.set_yticks(list(places), names)
    axes.invert_yaxis()
    plain_axes(axes, "Speed-up over plain decoding (bar) and tokens per step (diamond)", "x")
    axes.tick_params(axis="y", labelcolor=INK)


def _label_row(axes: Axes, place: int, row: Row, fits: bool) -> None:
    """The speed-up inside its bar, or after it where the bar is too short; tokens per step beside its diamond."""
    speedup, far = f"{row.speedup:.2f}x", max(row.speedup_interval[1], row.tokens_per_step or 0.0)
    if fits:
        axes.annotate(
            speedup, (0, place), (6, 0), textcoords="offset points", va="center", color="white", weight="bold"
        )
    else:
        axes.annotate(speedup, (row.speedup_interval[1], place), (6, 0), textcoords="offset points", va="center")
    steps = "" if row.tokens_per_step is None else f"{row.tokens_per_step:.2f}"
    note, colour = (f"{steps}  suspicious", "#b91c1c") if row.suspicious else (steps, SOFT)
    axes.annotate(note, (far, place), (9, 0), textcoords="offset points", va="center", fontsize=9.5, color=colour)


def _fastest(rows: Sequence[Row]) -> list[Row]:
    """Of each drafter and temperature the row with the largest speed-up."""
    best: dict[tuple[str, float], Row] = {}
    for row in rows:
        who = (row.drafter, row.temperature)
        if who not in best or row.speedup > best[who].speedup:
            best[who] = row
    return list(best.values())


def draw_depths(axes: Axes, rows: Sequence[Row], names: Sequence[str]) -> None:
    """A line for each row that drafts: how much of each depth is accepted. Of many rows, each drafter's fastest alone.

    Args:
        axes: to be drawn into.
        rows: of the report.
        names: of each row.
    """
    drafting = [row for row in rows if row.acceptance_by_depth]
    crowded = len(drafting) > MOST_LINES
    shown = _fastest(drafting) if crowded else drafting
    deepest = 1
    for row, name, look in zip(rows, names, _looks(rows), strict=True):
        if any(row is each for each in shown):
            levels = [level for level in row.acceptance_by_depth if level.depth == 1 or level.reached >= FEWEST_REACHED]
            depths = [level.depth for level in levels]
            deepest = max(deepest, *depths)
            shares = [100 * level.conditional for level in levels]
            axes.plot(depths, shares, look.dash, color=look.colour, marker=look.marker, markersize=5.5, label=name)
    axes.set_xticks(range(1, deepest + 1))
    axes.set_xlim(0.8, deepest + 0.2)
    axes.set_ylim(0, 102)
    note = f"draft depth, while {FEWEST_REACHED} drafts or more come so far"
    axes.set_xlabel(f"{note};\neach drafter's fastest shape" if crowded else note, fontsize=9, color=SOFT)
    plain_axes(axes, "Accepted, % of drafts whose parent was", "y")
    if len(shown) > MOST_LINES // 2:  # below the lines, where it hides none
        beside: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.07), "ncols": 2}
    else:
        beside = {"loc": "best"}
    axes.legend(fontsize=8.5, frameon=False, labelcolor=INK, **beside)

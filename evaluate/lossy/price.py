"""Rules at equal quality: what each gains where it loses at most so many points of right answers.

Owns the choice of each rule's setting, its table and its chart. Does not know how a row was measured. Draws without a display.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from draftsmith.escapes import chart_text, plain
from draftsmith.evaluate.chart import GRID, LOOKS, SOFT, titled_png
from draftsmith.evaluate.lossy.lossy import LOSSLESS, PLAIN, RuleRow

PRICE_CHART = "price.png"
HEADER = "| rule | settings tried | at | change, points (95 % bounds) | accepted a cycle | times lossless | speed-up over plain |"
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Price:
    """What a rule gains at a price.

    Attributes:
        rule: its name.
        tried: how many of its settings were measured.
        row: the setting with the most accepted tokens among those that lose no more than allowed; None where there is none.
        times_lossless: its accepted tokens per cycle over those of lossless decoding; None without a row of either.
    """

    rule: str
    tried: int
    row: RuleRow | None
    times_lossless: float | None


def prices(rows: Sequence[RuleRow], most_lost: float) -> list[Price]:
    """Every lossy rule's gain at the same price, the largest first.

    Args:
        rows: of one comparison; several with one name are settings of one rule.
        most_lost: the share of right answers that may be lost, against plain decoding over the same problems.
    """
    base = next((row.accepted_per_cycle for row in rows if row.rule == LOSSLESS and not row.lossy), None)
    priced = []
    for name in dict.fromkeys(row.rule for row in rows if row.lossy):
        own = [row for row in rows if row.rule == name and row.lossy]
        good = [row for row in own if row.accuracy_change >= -most_lost - _ROUNDING]
        best = max(good, key=lambda row: row.accepted_per_cycle, default=None)
        times = best.accepted_per_cycle / base if best is not None and base else None
        priced.append(Price(name, len(own), best, times))
    return sorted(priced, key=lambda price: -(price.row.accepted_per_cycle if price.row else 0.0))


def price_table(priced: Sequence[Price], most_lost: float) -> str:
    """The rules in Markdown; empty where there is no lossy rule.

    Args:
        priced: in order.
        most_lost: see `prices`.
    """
    if not priced:
        return ""
    lines = [
        f"The largest gain of each rule among its settings that lose at most {100 * most_lost:g} points of right answers:",
        "",
        HEADER,
        "|---|---|---|---|---|---|---|",
    ]
    for price in priced:
        lines.append("| " + " | ".join([plain(price.rule), str(price.tried), *_cells(price)]) + " |")
    return "\n".join(lines)


def _cells(price: Price) -> list[str]:
    row = price.row
    if row is None:
        return ["-", "every setting loses more", "none", "none", "none"]
    low, high = row.accuracy_change_bounds
    return [
        "-" if row.threshold is None else f"{row.threshold:g}",
        f"{100 * row.accuracy_change:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})",
        f"{row.accepted_per_cycle:.2f}",
        "-" if price.times_lossless is None else f"{price.times_lossless:.2f}",
        "-" if row.speedup is None else f"{row.speedup:.2f}",
    ]


def draw_prices(priced: Sequence[Price], rows: Sequence[RuleRow], most_lost: float) -> bytes:
    """PNG bytes: a bar for each rule, as long as what it accepts at the price; lossless decoding dashed.

    Args:
        priced: in order, at least one.
        rows: of the comparison.
        most_lost: see `prices`.
    """
    figure = Figure(figsize=(9.0, 1.6 + 0.36 * len(priced)), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for number, price in enumerate(priced):
        length = price.row.accepted_per_cycle if price.row else 0.0
        axes.barh(number, length, color=LOOKS[number % len(LOOKS)][0], height=0.62)
        times = "" if price.times_lossless is None else f" ({price.times_lossless:.2f} times lossless)"
        text = f" {length:.2f}{times}" if price.row else " none: every setting loses more"
        axes.text(length, number, text, va="center", fontsize=8, color=SOFT)
    base = next((row.accepted_per_cycle for row in rows if row.rule == LOSSLESS and not row.lossy), None)
    if base is not None:
        axes.axvline(base, color=SOFT, linestyle="--", linewidth=1)
    axes.set_yticks(range(len(priced)), [chart_text(price.rule) for price in priced])
    axes.invert_yaxis()
    axes.margins(x=0.35)
    axes.set_xlim(left=0)
    axes.set_xlabel("draft tokens accepted a cycle; dashed: lossless", color=SOFT)
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    problems = next((row.problems for row in rows if row.rule == PLAIN), rows[0].problems)
    return titled_png(
        figure, f"Gain where at most {100 * most_lost:g} points of right answers are lost: {problems} problems"
    )

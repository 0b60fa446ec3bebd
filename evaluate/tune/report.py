"""What `draftsmith tune` leaves behind: a page to read, JSON to compute with, a heat map.

Owns formats and words. Does not know how anything was recorded, timed or weighed.
"""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from draftsmith.escapes import block, code, plain
from draftsmith.evaluate.chart import INK, SOFT
from draftsmith.evaluate.slow_drafters import slow_shapes
from draftsmith.evaluate.tune.alphas import AlphaOutcome, alpha_table, best_alpha
from draftsmith.evaluate.tune.by_rows import RowsOutcome
from draftsmith.evaluate.tune.costs import Costs
from draftsmith.evaluate.tune.tune import Outcome
from draftsmith.evaluate.tune.vocabularies import VocabularyOutcome, best_vocabulary, vocabulary_table
from draftsmith.models.tree.shapes import short_shape

SHOWN = 12
WOBBLY = 0.25
MEANING = """\
- *Tokens per step*: what the engine would have emitted per target forward with this shape on these replies, replayed from one
  recorded pass; the bonus token counted, prefill left out. In brackets the 95 % percentile bootstrap over prompts.
- *Draft*, *check*: median milliseconds of a cycle on this machine, made to rise with depth and nodes; checking is the target's
  forward and all bookkeeping.
- *Speed-up*: predicted, tokens per step x a step of plain decoding / (draft + check). It leaves the prefill out. To see it
  measured, race the shape against plain decoding with `draftsmith evaluate`.
- A static tree's tokens per step are those of trees chosen on the other half of the prompts; paths that the widest recorded tree
  does not continue are missing from it."""

ROWS_MEANING = """\
How many rows decode together decides which draft pays: more rows make each node dearer. *Speed-up*: predicted, of the shape named, over
plain decoding of as many rows. *Without a draft*: the same of cycles in which the drafter only keeps up with the text."""
VOCABULARIES_MEAN = """\
With the fastest shape. A smaller vocabulary keeps the most frequent tokens. *Tokens per step* come from the same record, with drafts
that end at tokens outside of it: a lower bound. *Draft* is an estimate, by the bytes of the output head; on a GPU, reading them takes
the time."""

ALPHAS_MEAN = """\
On the same replies, with the fastest shape. Alpha 0 is the control: the same candidates without the second opinion. The weight changes no
time of a cycle."""


@dataclass(frozen=True)
class TuneReport:
    """All that is reported.

    Attributes:
        target, drafter: their names.
        setting: what was run: prompts, tokens, batch size, dtype, device, temperature.
        outcomes: the fastest first.
        costs: of the cycles.
        lookup: measured speed-up of prompt lookup over plain decoding; None where it was not timed.
        by_rows: what is fastest for each number of rows; empty where no other number was asked for.
        kept: what became of the file of shapes in the drafter's folder, in words; empty where none was to be kept.
        vocabularies: what draft vocabularies would give with the fastest shape, the fastest first; empty where none was weighed.
        alphas: what weights of a refined drafter's second opinion give with the fastest shape, the best first; empty for other drafters.
        left_out: why prompt lookup was not timed though it was wanted; empty otherwise.
        files: shape text -> the file that a static tree was written to.
    """

    target: str
    drafter: str
    setting: Mapping[str, object]
    outcomes: Sequence[Outcome]
    costs: Costs
    files: Mapping[str, str]
    lookup: float | None = None
    by_rows: Sequence[RowsOutcome] = ()
    kept: str = ""
    vocabularies: Sequence[VocabularyOutcome] = ()
    alphas: Sequence[AlphaOutcome] = ()
    left_out: str = ""

    @property
    def best(self) -> Outcome:
        """The fastest."""
        return self.outcomes[0]

    def word(self, outcome: Outcome) -> str:
        """What to type for a shape: static trees by their file."""
        file = self.files.get(outcome.shape)
        return outcome.shape if file is None else f"tree:{file}"

    def name(self, outcome: Outcome) -> str:
        """What a table calls it."""
        return self.word(outcome) if outcome.shape in self.files else short_shape(outcome.shape)


def tune_json(report: TuneReport, made_by: Mapping[str, object]) -> str:
    """The text of tune.json: everything, the fastest shape first."""
    costs = report.costs
    return json.dumps(
        {
            "command": made_by["command"],
            "machine": made_by["machine"],
            "versions": made_by["versions"],
            "target": report.target,
            "drafter": report.drafter,
            "setting": dict(report.setting),
            "best": report.word(report.best),
            "plain_seconds": costs.plain,
            "prompt_lookup_speedup": report.lookup,
            "left_out": report.left_out,
            "wobble": costs.wobble,
            "draft_seconds": {f"{width}x{depth}": seconds for (width, depth), seconds in costs.draft.items()},
            "check_seconds": {str(nodes): seconds for nodes, seconds in costs.check.items()},
            "by_rows": [
                {
                    "rows": each.rows,
                    "shape": each.best.shape if each.drafts else None,
                    "tokens_per_step": each.best.tokens_per_step if each.drafts else 1.0,
                    "speedup": max(each.best.speedup, each.no_draft),
                    "best_draft": asdict(each.best),
                    "no_draft_speedup": each.no_draft,
                }
                for each in report.by_rows
            ],
            "kept": report.kept,
            "draft_vocabularies": [asdict(outcome) for outcome in report.vocabularies],
            "alphas": [asdict(outcome) for outcome in report.alphas],
            "shapes": [asdict(outcome) | {"word": report.word(outcome)} for outcome in report.outcomes],
        },
        indent=2,
        allow_nan=False,
    )


def tune_markdown(report: TuneReport, made_by: Mapping[str, object]) -> str:
    """The text of tune.md."""
    best = report.best
    facts = plain(", ".join(f"{name} {value}" for name, value in report.setting.items()))
    parts = [
        "# Draft shapes",
        f"Target {code(report.target)}, drafter {code(report.drafter)}: {facts}.",
        f"**Fastest: {code(report.word(best))}**, predicted {best.speedup:.2f} times as fast as plain decoding, with "
        f"{best.tokens_per_step:.2f} tokens per step.",
        *map(plain, slow_shapes(best.speedup, report.lookup)),
        *_lookup(report),
        *_warnings(report.costs),
        *_by_rows(report),
        f"## The fastest {min(SHOWN, len(report.outcomes))} of {len(report.outcomes)}",
        outcome_table(report, report.outcomes[:SHOWN]),
        "## The best of each manner and width",
        outcome_table(report, best_of_each(report.outcomes)),
        "![Predicted speed-up by width, depth and nodes](tune.png)",
        MEANING,
        *_vocabularies(report.vocabularies),
        *_alphas(report.alphas),
        "## What a cycle costs",
        _cost_tables(report.costs),
        f"## How it was made\n\n{block(made_by['command'], 'sh')}",
    ]
    return "\n\n".join(parts) + "\n"


def _vocabularies(outcomes: Sequence[VocabularyOutcome]) -> list[str]:
    if len(outcomes) < 2:
        return []
    return ["## Draft vocabularies", vocabulary_table(outcomes), f"{best_vocabulary(outcomes)}.", VOCABULARIES_MEAN]


def _alphas(outcomes: Sequence[AlphaOutcome]) -> list[str]:
    if not outcomes:
        return []
    return [
        "## The weight of the second opinion",
        alpha_table(outcomes),
        f"{sentence(best_alpha(outcomes))}",
        ALPHAS_MEAN,
    ]


def _lookup(report: TuneReport) -> list[str]:
    if report.lookup is None:
        return [plain(report.left_out)] if report.left_out else []
    return [
        f"Prompt lookup of Transformers, which needs no training, was measured at {report.lookup:.2f} times the speed of plain decoding, "
        "prefill included."
    ]


def _warnings(costs: Costs) -> list[str]:
    if costs.wobble < WOBBLY:
        return []
    return [
        f"**Wobbly clock:** the quartiles of one shape's cycles lie {100 * costs.wobble:.0f} % of their median apart, so the machine was "
        "doing other things. Run again on an idle one, or with more rounds, before believing in small differences of speed. Tokens per "
        "step do not suffer."
    ]


def _by_rows(report: TuneReport) -> list[str]:
    if not report.by_rows:
        return []
    return [
        "## The fastest by rows",
        ROWS_MEANING,
        rows_table(report),
        *([plain(sentence(report.kept))] if report.kept else []),
    ]


def sentence(text: str) -> str:
    """The text with a capital at its beginning and a full stop at its end."""
    return f"{text[:1].upper()}{text[1:].rstrip('.')}."


def rows_table(report: TuneReport) -> str:
    """A Markdown table of what is fastest for each number of rows."""
    lines = [
        "| rows | shape | nodes | tokens per step | speed-up | without a draft |",
        "|---|---|---|---|---|---|",
    ]
    for each in report.by_rows:
        best = each.best
        shape = plain(report.name(best)) if each.drafts else f"no draft (best: {plain(report.name(best))})"
        lines.append(
            f"| {each.rows} | {shape} | {best.nodes} | {best.tokens_per_step:.2f} | {best.speedup:.2f} | {each.no_draft:.2f} |"
        )
    return "\n".join(lines)


def outcome_table(report: TuneReport, outcomes: Sequence[Outcome]) -> str:
    """A Markdown table."""
    lines = [
        "| shape | nodes | depth | tokens per step (95 %) | draft, ms | check, ms | speed-up |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {plain(report.name(outcome))} | {outcome.nodes} | {outcome.depth} "
        f"| {outcome.tokens_per_step:.2f} ({outcome.interval[0]:.2f} to {outcome.interval[1]:.2f}) "
        f"| {1000 * outcome.draft_seconds:.2f} | {1000 * outcome.check_seconds:.2f} | {outcome.speedup:.2f} |"
        for outcome in outcomes
    ]
    return "\n".join(lines)


def best_of_each(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """The fastest chain, the fastest dynamic tree of each width, the fastest static tree; the fastest first as given."""
    best: dict[tuple[str, int], Outcome] = {}
    for outcome in outcomes:
        best.setdefault((outcome.manner, outcome.width), outcome)
    return list(best.values())


def _cost_tables(costs: Costs) -> str:
    lines = [f"A step of plain decoding: {1000 * costs.plain:.2f} ms."]
    if costs.check:
        nodes = sorted(costs.check)
        lines += [
            "",
            "| nodes checked | " + " | ".join(map(str, nodes)) + " |",
            "|---" * (len(nodes) + 1) + "|",
            "| ms | " + " | ".join(f"{1000 * costs.check[count]:.2f}" for count in nodes) + " |",
            "",
            "| drafted, ms | " + " | ".join(f"depth {depth}" for depth in _depths(costs)) + " |",
            "|---" * (len(_depths(costs)) + 1) + "|",
        ]
        for width in sorted({width for width, _ in costs.draft}):
            cells = [f"{1000 * costs.draft[width, depth]:.2f}" for depth in _depths(costs)]
            lines.append(f"| width {width} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _depths(costs: Costs) -> list[int]:
    return sorted({depth for _, depth in costs.draft})


def heat_map(outcomes: Sequence[Outcome]) -> bytes:
    """PNG bytes: predicted speed-up in colour and words. A panel of depths and nodes for each width of dynamic trees, two side by side;
    below them a strip of the chains by depth and one of the static trees by nodes."""
    widths = sorted({outcome.width for outcome in outcomes if outcome.manner == "dynamic"})
    panels = [
        [outcome for outcome in outcomes if outcome.manner == "dynamic" and outcome.width == width] for width in widths
    ]
    strips = [[outcome for outcome in outcomes if outcome.manner == manner] for manner in ("chain", "static")]
    most_columns = max(len({outcome.nodes for outcome in part}) for part in [*panels, *strips] if part)
    heights = [_num_depths(panels[place : place + 2]) for place in range(0, len(panels), 2)] + [1]
    size = (2 * (0.9 + 0.5 * most_columns), 1.2 + sum(0.8 + 0.36 * height for height in heights))
    figure = Figure(figsize=size, dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    places = figure.subplots(len(heights), 2, squeeze=False, height_ratios=[height + 1 for height in heights])
    low, high = min(outcome.speedup for outcome in outcomes), max(outcome.speedup for outcome in outcomes)
    titled = [(f"width {width}", panel) for width, panel in zip(widths, panels, strict=True)]
    titled += [("", [])] * (len(titled) % 2) + list(zip(("chains", "static trees"), strips, strict=True))
    for axes, (title, panel) in zip(places.flat, titled, strict=True):
        axes.set_axis_off()
        if panel:
            axes.set_axis_on()
            axes.set_title(title, loc="left", fontsize=10, color=INK)
            _draw_panel(axes, panel, low, high)
    figure.suptitle("Predicted speed-up over plain decoding", fontsize=11, color=INK, x=0.01, ha="left", weight="bold")
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": ""})
    return out.getvalue()


def _num_depths(panels: Sequence[Sequence[Outcome]]) -> int:
    return max(len({outcome.depth for outcome in panel}) for panel in panels)


def _draw_panel(axes: Axes, panel: Sequence[Outcome], low: float, high: float) -> None:
    flat = panel[0].manner != "dynamic"
    rows = [0] if flat else sorted({outcome.depth for outcome in panel})
    columns = sorted({outcome.nodes for outcome in panel})
    grid = np.full((len(rows), len(columns)), np.nan)
    for outcome in panel:
        grid[0 if flat else rows.index(outcome.depth), columns.index(outcome.nodes)] = outcome.speedup
    axes.imshow(grid, aspect="auto", cmap="viridis", vmin=low, vmax=max(high, low + 1e-9))
    for (row, column), speed in np.ndenumerate(grid):
        if not np.isnan(speed):
            colour = "white" if speed < low + 0.6 * (high - low) else INK
            axes.text(column, row, f"{speed:.2f}", ha="center", va="center", fontsize=7.5, color=colour)
    axes.set_xticks(range(len(columns)), list(map(str, columns)))
    axes.set_yticks([] if flat else range(len(rows)), [] if flat else list(map(str, rows)))
    axes.set_xlabel("drafted depth" if panel[0].manner == "chain" else "nodes checked", fontsize=8.5, color=SOFT)
    axes.set_ylabel("" if flat else "drafted depth", fontsize=8.5, color=SOFT)
    axes.spines[:].set_visible(False)
    axes.tick_params(colors=SOFT, labelsize=8, length=0)

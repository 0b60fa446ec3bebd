"""The report's files: report.json, report.md and TensorBoard scalars, each written whole or not at all.

Owns the format of the report and the words of its tables. Does not know how a row was measured.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from draftsmith.escapes import block, code, plain
from draftsmith.evaluate.records import Row, Slice
from draftsmith.evaluate.roofline.words import MEANING as ROOFLINE_MEANING
from draftsmith.evaluate.roofline.words import NamedRoofline, roofline_text
from draftsmith.evaluate.slow_drafters import slow_drafters
from draftsmith.evaluate.strata.words import (
    NamedBins,
    NamedCategories,
    category_text,
    context_text,
    depth_cells,
    ranged,
)
from draftsmith.files import atomic_write
from draftsmith.json_text import parse_json

REPORTS = ("report.md", "report.json", "report.png")
ROOFLINE_CHART = "roofline.png"
CATEGORY_CHART = "categories.png"
CONTEXT_CHART = "contexts.png"

CHARTS = (REPORTS[2], ROOFLINE_CHART, CATEGORY_CHART, CONTEXT_CHART)
"""Every picture that a report may have."""
HEADER = "| drafter | T | tokens per step (95 %) | speed-up (95 %) | tokens/s | identical | looping |"
MEANING = """\
- *Tokens per step*: emitted tokens per target forward after the prefill, pooled over prompts, the bonus token counted.
  Plain decoding is 1.
- *Speed-up*: tokens/s over plain decoding in the same engine, interleaved prompt by prompt or, with several prompts
  at once, round by round; wall-clock, prefill included, warm-up excluded.
- *Identical*: share of prompts whose token ids equal plain decoding's, all of them, EOS included. Sampled trees have
  the target's distribution, but draw other tokens than plain decoding does from the same seed.
- *Looping*: share of replies that end by repeating one phrase, which any drafter guesses: see the parts below.
- Intervals are percentile bootstraps over prompts: they say how much the prompts matter, not how much the speed of the
  machine wanders.
"""


def to_json(command: str, machine: dict, versions: dict, rows: Sequence[Row], left_out: Sequence[str] = ()) -> str:
    """The text of report.json: command, machine, versions, rows, and who was left out, if anybody. NaN and infinity become null."""
    facts = {"command": command, "machine": machine, "versions": versions}
    return json.dumps(
        facts | {"rows": [_finite(asdict(row)) for row in rows]} | ({"left_out": list(left_out)} if left_out else {}),
        indent=2,
        allow_nan=False,
    )


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_rows(path: Path) -> list[dict]:
    """Rows of a report.json.

    Raises:
        ValueError: the file is missing, is not JSON, or is no report.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such report; make one with `draftsmith evaluate --out {path.parent}`")
    report = parse_json(path.read_bytes(), str(path), "make the report again with `draftsmith evaluate`")
    if not isinstance(report, dict) or not isinstance(report.get("rows"), list):
        raise ValueError(f"{path}: not a report: it has no list of rows; give the report.json of `draftsmith evaluate`")
    return report["rows"]


def to_markdown(
    command: str,
    machine: dict,
    versions: dict,
    rows: Sequence[Row],
    chart: str | None = None,
    roofline_chart: str | None = None,
    category_chart: str | None = None,
    context_chart: str | None = None,
    left_out: Sequence[str] = (),
) -> str:
    """The text of report.md: table, who was left out and why, what words mean, categories, parts, acceptance, where time went."""
    first = rows[0]
    runs = f"{first.repeats} timed run{'s' if first.repeats > 1 else ''} a prompt"
    setting = (
        f"Target {code(first.target)}, {first.dtype} on {plain(first.device)}, batch {first.batch_size}, {first.prompts} prompts, "
        f"at most {first.max_new_tokens} new tokens, {runs}."
    )
    parts = [
        "# Evaluation",
        setting,
        main_table(rows),
        *map(plain, left_out),
        *slow_drafters(rows, plain),
        *_warnings(rows),
        *_baseline(rows),
        _busy_rows(rows),
    ]
    if chart:
        parts.append(f"![Speed-up, tokens per step and acceptance by depth]({chart})")
    parts += [MEANING.rstrip(), _category_part(rows, category_chart), _slice_table(rows), _depth_table(rows)]
    parts += [_context_part(rows, context_chart), _stage_table(rows)]
    parts += [_roofline_part(rows, roofline_chart), _divergence_list(rows)]
    parts.append(_made_by(command, machine, versions))
    return "\n\n".join(part for part in parts if part) + "\n"


def main_table(rows: Sequence[Row]) -> str:
    """The table of all rows, in Markdown."""
    lines = [HEADER, "|---|---|---|---|---|---|---|"]
    for row in rows:
        steps = ranged(row.tokens_per_step, row.tokens_per_step_interval)
        speedup = ranged(row.speedup, row.speedup_interval) + (" (suspicious)" if row.suspicious else "")
        lines.append(
            f"| {plain(row.label)} | {row.temperature:g} | {steps} | {speedup} | {row.tokens_per_second:.0f} "
            f"| {'in distribution' if row.is_sampled else _percent(row.exact_share)} | {_percent(row.looping_share)} |"
        )
    return "\n".join(lines)


def _warnings(rows: Sequence[Row]) -> list[str]:
    return [
        f"**Suspicious:** {code(row.label)} at T = {row.temperature:g} is {row.speedup:.2f} times faster with only "
        f"{row.tokens_per_step or 0:.2f} tokens per step. A drafter cannot save more forwards than that: look for a "
        "slow baseline or a busy machine before believing this row."
        for row in rows
        if row.suspicious
    ]


def _baseline(rows: Sequence[Row]) -> list[str]:
    lines = []
    for row in rows:
        if row.drafter == "plain" and row.engine_vs_transformers is not None:
            share = row.transformers_exact_share
            same = "" if share is None else f", the same tokens on {_percent(share)}"
            lines.append(
                f"The baseline at T = {row.temperature:g}: the engine decodes plainly at "
                f"{row.engine_vs_transformers:.2f} times the speed of `transformers.generate` "
                f"({row.transformers_tokens_per_second:.0f} tokens/s on the same prompts{same})."
            )
    return lines


def _busy_rows(rows: Sequence[Row]) -> str:
    """How several prompts at once were decoded; empty where they were decoded one at a time."""
    shares = [(row, row.busy_rows) for row in rows if row.busy_rows is not None]
    if not shares:
        return ""
    listed = ", ".join(f"{code(row.label)} at T = {row.temperature:g} {_percent(share)}" for row, share in shares)
    return (
        f"The engine decoded {rows[0].batch_size} prompts at once, plainly and with every drafter. A prompt that waited took the row "
        "of one that had ended. The contenders took turns round by round, and the intervals of speed-ups are over rounds. "
        f"Transformers decodes fixed batches. Busy rows, over all cycles: {listed}."
    )


def _slice_table(rows: Sequence[Row]) -> str:
    parts = [(row, part) for row in rows for part in row.slices if row.shape]
    if not parts:
        return ""
    head = (
        "| drafter | T | part | prompts | tokens | tokens per step (95 %) | speed-up |\n|---|---|---|---|---|---|---|"
    )
    return "## By part of the prompts\n\n" + "\n".join([head, *(_slice_line(row, part) for row, part in parts)])


def _slice_line(row: Row, part: Slice) -> str:
    steps = ranged(part.tokens_per_step, part.tokens_per_step_interval)
    speedup = "-" if part.speedup is None else f"{part.speedup:.2f}"
    name = plain(f"{part.by}: {part.value}")
    return (
        f"| {plain(row.label)} | {row.temperature:g} | {name} | {part.prompts} | {part.tokens} | {steps} | {speedup} |"
    )


def _depth_table(rows: Sequence[Row]) -> str:
    with_depths = [row for row in rows if row.acceptance_by_depth]
    if not with_depths:
        return ""
    deepest = max(len(row.acceptance_by_depth) for row in with_depths)
    lines = [
        "| drafter | T | " + " | ".join(f"depth {depth + 1}" for depth in range(deepest)) + " |",
        "|---" * (deepest + 2) + "|",
    ]
    for row in with_depths:
        cells = depth_cells(row.acceptance_by_depth, deepest)
        lines.append(f"| {plain(row.label)} | {row.temperature:g} | " + " | ".join(cells) + " |")
    return "## Acceptance by depth\n\nConditional (given the depth before was accepted) / marginal.\n\n" + "\n".join(
        lines
    )


def _stage_table(rows: Sequence[Row]) -> str:
    stages = list(dict.fromkeys(stage for row in rows for stage in row.stage_seconds))
    if not stages:
        return ""
    lines = ["| drafter | T | " + " | ".join(stages) + " |", "|---" * (len(stages) + 2) + "|"]
    for row in (row for row in rows if row.stage_seconds):
        total = sum(row.stage_seconds.values())
        cells = [_percent(row.stage_seconds.get(stage, 0.0) / total) if total else "-" for stage in stages]
        lines.append(f"| {plain(row.label)} | {row.temperature:g} | " + " | ".join(cells) + " |")
    note = "Share of the wall-clock, from a separate run with the ledger on: its clock does not slow the figures above."
    return f"## Where the time goes\n\n{note}\n\n" + "\n".join(lines)


def labelled_rooflines(rows: Sequence[Row]) -> list[NamedRoofline]:
    """The rooflines of the rows that have one."""
    return [NamedRoofline(row.label, row.temperature, row.roofline) for row in rows if row.roofline is not None]


def row_names(rows: Sequence[Row]) -> list[str]:
    """The label of each row, with its temperature where the rows have several."""
    several = len({row.temperature for row in rows}) > 1
    return [f"{row.label} T={row.temperature:g}" if several else row.label for row in rows]


def named_categories(rows: Sequence[Row]) -> list[NamedCategories]:
    """The categories of each row but plain decoding's, which is the baseline."""
    named = zip(row_names(rows), rows, strict=True)
    return [(name, row.by_category) for name, row in named if row.by_category and row.drafter != "plain"]


def named_bins(rows: Sequence[Row]) -> list[NamedBins]:
    """The bins of the context of each row but plain decoding's, which has one token per step in all of them."""
    named = zip(row_names(rows), rows, strict=True)
    return [(name, row.by_context) for name, row in named if row.by_context and row.drafter != "plain"]


def _category_part(rows: Sequence[Row], chart: str | None) -> str:
    text = category_text(named_categories(rows))
    picture = f"\n\n![Tokens per step and speed-up by category]({chart})" if chart else ""
    return f"## By category\n\n{text}{picture}" if text else ""


def _context_part(rows: Sequence[Row], chart: str | None) -> str:
    text = context_text(named_bins(rows))
    picture = f"\n\n![Tokens per step by length of the context]({chart})" if chart else ""
    return f"## By length of the context\n\n{text}{picture}" if text else ""


def _roofline_part(rows: Sequence[Row], chart: str | None) -> str:
    text = roofline_text(labelled_rooflines(rows))
    picture = f"\n\n![The memory roofline of each cycle, and the time it took]({chart})" if chart else ""
    return f"## Against the memory roofline\n\n{text}{picture}\n\n{ROOFLINE_MEANING.rstrip()}" if text else ""


def _divergence_list(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        for divergence in row.divergences:
            gap = "" if divergence.gap is None else f"; the target's logits are {divergence.gap:.2g} apart"
            lines.append(
                f"- {plain(row.label)}, T = {row.temperature:g}, prompt {code(divergence.prompt_id)}, token {divergence.position}: plain "
                f"{divergence.plain_token}, got {divergence.contender_token}{gap}"
            )
    return "## Replies that differ from plain decoding\n\n" + "\n".join(lines) if lines else ""


def _made_by(command: str, machine: dict, versions: dict) -> str:
    facts = [f"- {plain(key)}: {plain(value)}" for key, value in machine.items() if value not in (None, "", [])]
    facts += [f"- {plain(key)} {plain(value)}" for key, value in versions.items() if value]
    return f"## How it was made\n\n{block(command, 'sh')}\n\n" + "\n".join(facts)


def _percent(share: float) -> str:
    """A share in percent that says 100 only when it is all, and 0 only when it is none."""
    rounded = f"{100 * share:.1f}"
    if rounded == "100.0":
        return "100 %" if share >= 1 else "99.9 %"
    if rounded == "0.0":
        return "0 %" if share <= 0 else "< 0.1 %"
    return f"{rounded} %"


def write_scalars(directory: Path, rows: Sequence[Row]) -> None:
    """TensorBoard scalars of every row under `directory`; the step is 1000 x temperature."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(log_dir=str(directory)) as writer:
        for row in rows:
            step, name = round(1000 * row.temperature), row.label.replace(" ", "_")
            scalars = {
                "tokens_per_step": row.tokens_per_step,
                "speedup": row.speedup,
                "tokens_per_second": row.tokens_per_second,
                "exact_share": row.exact_share,
                "looping_share": row.looping_share,
            }
            scalars |= {f"acceptance/depth{level.depth}": level.conditional for level in row.acceptance_by_depth}
            for key, value in scalars.items():
                if value is not None:
                    writer.add_scalar(f"evaluate/{name}/{key}", value, step)


def write_report(
    out: Path,
    command: str,
    machine: dict,
    versions: dict,
    rows: Sequence[Row],
    chart: bytes | None = None,
    roofline_chart: bytes | None = None,
    category_chart: bytes | None = None,
    context_chart: bytes | None = None,
    left_out: Sequence[str] = (),
) -> None:
    """Write report.json, report.md and, where given, the charts into `out`; the JSON last, so it means all is there.

    A chart that an earlier report had and this one lacks is deleted.
    """
    out.mkdir(parents=True, exist_ok=True)
    pictures = dict(zip(CHARTS, (chart, roofline_chart, category_chart, context_chart), strict=True))
    for name, picture in pictures.items():
        if picture is None:
            (out / name).unlink(missing_ok=True)
        else:
            atomic_write(out / name, picture)
    best, roofline, category, context = (name if picture else None for name, picture in pictures.items())
    page = to_markdown(command, machine, versions, rows, best, roofline, category, context, left_out)
    atomic_write(out / "report.md", page)
    atomic_write(out / "report.json", to_json(command, machine, versions, rows, left_out) + "\n")

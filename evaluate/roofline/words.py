"""The words and the table of rooflines, for the terminal and for reports.

Owns the format. Does not know how anything was counted or measured.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from draftsmith.escapes import plain
from draftsmith.evaluate.roofline.roofline import Roofline

HEADER = "| drafter | T | reads a cycle | takes at least | took | of the roofline | left over |"
MEANING = """\
- *Reads a cycle*: the target's weights once, its keys and values, and the drafter's weights once for each draft step. In plain
  decoding a cycle is one step.
- *Takes at least*: these bytes at the speed of a plain copy on this machine, measured in the same run. It is the memory roofline.
- *Took*: the mean cycle of the run with the ledger on. *Of the roofline*: takes at least / took.
- *Left over*: what draft, verify, accept and the rest took above the time that reading their bytes takes at least.
"""


@dataclass(frozen=True)
class NamedRoofline:
    """The roofline of one row of a report.

    Attributes:
        label: of the row: drafter and shape.
        temperature: of the row.
        roofline: its figures.
    """

    label: str
    temperature: float
    roofline: Roofline


def roofline_text(rows: Sequence[NamedRoofline]) -> str:
    """The machine in a sentence, the table in Markdown, and remarks; empty without rows.

    Args:
        rows: of one evaluation, in the order of its table.
    """
    if not rows:
        return ""
    return "\n\n".join([_machine(rows), _table(rows), *_remarks(rows)])


def _machine(rows: Sequence[NamedRoofline]) -> str:
    first = rows[0].roofline
    threads = f" with {first.threads} thread{'s' if first.threads > 1 else ''}" if first.threads else ""
    lines = [f"Memory: this machine copies {first.bandwidth / 1e9:.1f} GB/s{threads}, measured in this run."]
    base = next((row.roofline for row in rows if not row.roofline.draft_steps), None)
    if base is not None:
        together = f", {base.num_rows:.1f} rows at a time" if base.num_rows > 1 else ""
        lines.append(
            f"A step of plain decoding reads {size(base.total_bytes)}: {size(base.weight_bytes)} of weights and "
            f"{size(base.cached_bytes)} of keys and values (mean text {base.context:.0f} tokens{together})."
        )
    return " ".join(lines)


def _table(rows: Sequence[NamedRoofline]) -> str:
    lines = [HEADER, "|---|---|---|---|---|---|---|"]
    for row in rows:
        figures = row.roofline
        read = ("up to " if figures.upper_bound else "") + size(figures.total_bytes)
        if figures.draft_steps:
            read += f" ({size(figures.draft_bytes)} in {figures.draft_steps} draft steps)"
        stages = [f"{name} {milliseconds(seconds)}" for name, seconds in figures.left_over_seconds.items()]
        cells = [
            plain(row.label),
            f"{row.temperature:g}",
            read,
            milliseconds(figures.bound_seconds),
            milliseconds(figures.cycle_seconds) if figures.stage_seconds else "-",
            share(figures),
            ", ".join(stages) or "-",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def share(figures: Roofline) -> str:
    """The share of the roofline in words. A row that the caches made faster than memory gets no percentage: it would mean nothing."""
    if figures.share is None:
        return "-"
    if figures.beats_memory:
        return "faster than memory"
    return f"{100 * figures.share:.0f} %" if figures.share >= 0.01 else "below 1 %"


def _remarks(rows: Sequence[NamedRoofline]) -> list[str]:
    """What a reader must know before believing the table."""
    figures = [row.roofline for row in rows]
    remarks = []
    faster = list(dict.fromkeys(plain(row.label) for row in rows if row.roofline.beats_memory))
    if faster:
        remarks.append(
            f"Faster than memory: {', '.join(faster)}. A processor's caches are faster than main memory, and small weights stay in them "
            "from step to step. So main memory is not the limit here, and the roofline says nothing about these rows."
        )
    elif any(each.fits_in_caches for each in figures):
        remarks.append(
            f"What a step reads fits into the processor's caches ({size(figures[0].caches or 0)}), which are faster than main memory. So "
            "main memory is not the limit here: what is left over is mostly the cost of many small operations."
        )
    if any((each.share or 0.0) > 1 and not each.beats_memory for each in figures):
        remarks.append(
            "Above 100 %: the roofline is measured with a copy, and reading alone can be faster. Such a row is at the limit of the memory."
        )
    if any(each.upper_bound for each in figures):
        remarks.append(
            "Mixture of experts: *up to* counts as if no two tokens of a forward shared an expert. Fewer bytes may be read."
        )
    if not any(each.stage_seconds for each in figures):
        remarks.append("Nothing was clocked: give --ledger-prompts 8 to see how close decoding comes to the roofline.")
    return remarks


def size(num_bytes: float) -> str:
    """Bytes in the unit that fits, with three digits or so. Example: 12.6 MB."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.3g} {unit}" if num_bytes < 1000 * scale else f"{num_bytes / scale:.0f} {unit}"
    return f"{num_bytes:.0f} B"


def milliseconds(seconds: float) -> str:
    """Seconds as milliseconds. Example: 1.62 ms."""
    return f"{1e3 * seconds:.2f} ms"

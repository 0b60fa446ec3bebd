"""What `draftsmith doctor` found: one finding a check, as a table on the terminal and as JSON.

Owns a finding's fields and how they are shown. Does not know what is checked.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from rich.console import Console, Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from draftsmith.escapes import visible
from draftsmith.json_text import json_text

Verdict = Literal["ok", "warning", "fault", "not checked"]
_STYLES: dict[Verdict, str] = {"ok": "green", "warning": "yellow", "fault": "bold red", "not checked": "dim"}
_WIDTH = 118  # where the output is no terminal


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        name: of the check, as `--skip` takes it.
        verdict: `ok`; `warning`: acceptance may suffer; `fault`: something is broken; `not checked`.
        measured: the figure in words, or why nothing was measured.
        expected: what it should be.
        remedy: what to do; empty where nothing is wrong.
        figures: the same as numbers, by name.
        details: further lines: examples, parts of the figure.

    Raises:
        ValueError: a warning or a fault has no remedy.
    """

    name: str
    verdict: Verdict
    measured: str
    expected: str = ""
    remedy: str = ""
    figures: Mapping[str, float] = field(default_factory=dict)
    details: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.verdict in ("warning", "fault") and not self.remedy:
            raise ValueError(f"the finding {self.name!r} is a {self.verdict} without a remedy; say what to do")


def console() -> Console:
    """Standard output; wide enough for the table where it is no terminal."""
    plain = Console()
    return plain if plain.is_terminal else Console(width=_WIDTH)


def findings_table(findings: Sequence[Finding]) -> Group:
    """A table of all findings, and below it what to do about each that is no `ok`."""
    table = Table(show_lines=False, header_style="bold", box=None, pad_edge=False)
    for title in ("check", "verdict", "measured", "should be"):
        table.add_column(title, overflow="fold", no_wrap=title in ("check", "verdict"))
    for finding in findings:
        # Text, since a plain str is read as markup: ids, phrases and paths may hold brackets.
        table.add_row(
            finding.name,
            Text(finding.verdict, _STYLES[finding.verdict]),
            Text(visible(finding.measured)),
            Text(visible(finding.expected)),
        )
    notes: list[Text | Padding] = []
    for finding in findings:
        if finding.remedy:
            notes.append(Text(f"\n{finding.name}", _STYLES[finding.verdict]))
            notes += [Padding(Text(visible(line)), (0, 0, 0, 2)) for line in finding.details]
            notes.append(Padding(Text(visible(f"-> {finding.remedy}"), "bold"), (0, 0, 0, 2)))
    return Group(table, *notes)


def summary(findings: Sequence[Finding]) -> str:
    """Counts of the verdicts, and the names of what is wrong. Example: `11 ok, 1 warning (overlap), 2 not checked`."""
    parts = []
    for verdict in ("fault", "warning", "ok", "not checked"):
        names = [finding.name for finding in findings if finding.verdict == verdict]
        if names:
            named = f" ({', '.join(names)})" if verdict in ("fault", "warning") else ""
            plural = "s" if verdict in ("fault", "warning") and len(names) > 1 else ""
            parts.append(f"{len(names)} {verdict}{plural}{named}")
    return ", ".join(parts)


def _number(value: float) -> float | None:
    """JSON has no NaN and no infinity."""
    return value if math.isfinite(value) else None


def findings_json(findings: Sequence[Finding], subject: Mapping[str, Any], made_by: Mapping[str, Any]) -> str:
    """The report as JSON: what was looked at, every finding, and what made the report."""
    listed = [
        {**asdict(finding), "figures": {name: _number(value) for name, value in finding.figures.items()}}
        for finding in findings
    ]
    content = {"subject": dict(subject), "findings": listed, "provenance": dict(made_by)}
    return json_text(content, indent=2) + "\n"

"""The goals of the GPU benchmark, and its page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Figures = Mapping[str, Any]


@dataclass(frozen=True)
class Goal:
    """One goal beside what was measured.

    Attributes:
        what: in words, with the limit.
        measured: the figure.
        met: whether the goal is met.
    """

    what: str
    measured: str
    met: bool


def goals(sections: Mapping[str, Figures]) -> list[Goal]:
    """Every goal whose section has its figures."""
    done = {name: figures for name, figures in sections.items() if "error" not in figures and "skipped" not in figures}
    return [goal for name, figures in done.items() if name in JUDGES for goal in JUDGES[name](figures)]


def _plain(figures: Figures) -> Iterator[Goal]:
    for name, part in _parts(figures):
        share = part["share_of_roofline"]
        yield Goal(f"plain decoding, {name}: at least 0.85 of the roofline", f"{share:.2f}", share >= 0.85)
        yield _first_use(f"plain decoding, {name}", part)


def _verify(figures: Figures) -> Iterator[Goal]:
    ratio = figures["over_plain_step"]
    yield Goal(
        f"a verify of {figures['nodes']} nodes, the walk included: at most 1.15 plain steps",
        f"{ratio:.2f}",
        ratio <= 1.15,
    )


def _cycles(figures: Figures) -> Iterator[Goal]:
    for name, part in _parts(figures):
        ratio = part["over_bound"]
        yield Goal(f"a cycle of {name}: at most 1.10 of its bound", f"{ratio:.2f}", ratio <= 1.1)
        yield _first_use(f"a cycle of {name}", part)


def _first_use(what: str, part: Figures) -> Goal:
    seconds = part["first_use_s"]
    return Goal(f"{what}: first use under 30 s", f"{seconds:.1f} s", seconds < 30)


def _exact(figures: Figures) -> Iterator[Goal]:
    for name, part in _parts(figures):
        counted = f"{part['equal']} of {part['replies']} equal"
        if name == "float32":
            yield Goal("float32: every reply equals plain decoding's", counted, part["equal"] == part["replies"])
        else:
            yield Goal(f"{name}: replies differ from plain decoding's at ties only", counted, part["ties_only"])


JUDGES = {"plain": _plain, "verify": _verify, "cycles": _cycles, "exact": _exact}


def _parts(figures: Figures) -> list[tuple[str, Figures]]:
    return [(name, part) for name, part in figures.items() if isinstance(part, Mapping)]


def page(report: Mapping[str, Any]) -> str:
    """The page in Markdown: goals, figures of each section, the machine and the versions."""
    judged = report["scale"] == "full"
    lines = [
        "# Decoding and training on a GPU",
        "",
        f"Scale `{report['scale']}`, {report['dtype']} on {report['device']}.",
    ]
    if not judged:
        lines += [
            "",
            "This scale tries the benchmark out. Its speeds say nothing about a GPU, so only exactness is judged.",
        ]
    lines += ["", "| goal | measured | met |", "|---|---|---|"]
    for goal in report["goals"]:
        met = ("yes" if goal["met"] else "**no**") if judged or "repl" in goal["what"] else "not judged"
        lines.append(f"| {goal['what']} | {goal['measured']} | {met} |")
    for name, figures in report["sections"].items():
        lines += ["", f"## {name}", "", *_figure_lines(figures)]
    lines += ["", "## How it was made", "", "```sh", report["command"], "```", ""]
    facts = {**report["machine"], **report["versions"]}
    lines += [f"- {key}: {value}" for key, value in facts.items() if value not in (None, "", [])]
    return "\n".join(lines) + "\n"


def _figure_lines(figures: Figures, depth: int = 0) -> list[str]:
    lines = []
    for name, value in figures.items():
        if isinstance(value, Mapping):
            lines += [f"{'  ' * depth}- {name}:", *_figure_lines(value, depth + 1)]
        else:
            shown = f"{value:.4g}" if isinstance(value, float) else value
            lines.append(f"{'  ' * depth}- {name}: {shown}")
    return lines

"""The page of the judge's benchmark, its rows and its charts.

Owns what the page says. Measures nothing.
"""

import argparse
import json
import shutil
from collections.abc import Iterable
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.judge.ablations import REPORT, compared, tuned_folder
from benchmarks.judge.lanes import Stages
from benchmarks.judge.stages import DRAFT, TARGET, Judged, judged
from benchmarks.judge.tuned import HEAD_SHAPES, SHAPE
from benchmarks.machine import machine_section
from draftsmith import provenance
from draftsmith.files import atomic_write

FIRST_ERRORS, OUT_OF_DOMAIN = "first-errors", "out-of-domain"
"""Parts of the benchmark that a run can leave out."""
BESIDE, ALONE = "beside", "alone"
"""How the ablations are made: with the rest of the benchmark, or without."""
PEOPLE = "people's labels, chat-6m's states"
"""The judge of another target, which learns from people."""
LEAST_TIMES, MOST_LOST, LEAST_SPEEDUP = 2.5, 1.0, 2.0
"""The goals: times lossless decoding's accepted tokens, points of right answers, speed-up over plain decoding."""


ERRORS_SAID = "In plain and in lossless decoding, every token is the target's own choice."


def publish(stages: Stages, judges: dict[str, Judged], options: argparse.Namespace) -> None:
    """Writes the page, the rows and the charts."""
    work, name = stages.work, f"{date.today().isoformat()}-judge"
    record = provenance.record(provenance.command_line(), {}, {})
    facts = {key: record[key] for key in ("command", "machine", "versions")}
    rows = rows_of(work / "report")
    options.out.mkdir(parents=True, exist_ok=True)
    atomic_write(work / "report.json", json.dumps(facts | {"rows": rows}, indent=1) + "\n")
    shutil.copyfile(work / "report" / "report.png", options.out / f"{name}.png")
    shutil.copyfile(work / "report" / "price.png", options.out / f"{name}-price.png")
    shutil.copyfile(work / "report.json", options.out / f"{name}.json")
    page = [
        f"# The judge on the embedded pair, {date.today().isoformat()}",
        f"`{record['command']}`; {spent_text(stages)}.",
        f"Target `{TARGET}`, draft LM `{DRAFT}`, chains of {SHAPE.removeprefix('1x')} drafted tokens unless a table says otherwise, "
        f"temperature 0, {rows[0]['problems']} problems of the test split that nothing was trained or tuned on. Every rule but plain and "
        "lossless is LOSSY.",
        "## The goals",
        goals(work),
        "## At equal quality",
        price_section(work / "report"),
        "Settings of rules without training were chosen on these problems, which favours them. The setting of *judge, tuned* was chosen "
        "before, on problems of the training split.",
        f"![Gain at equal quality]({name}-price.png)",
        "## All settings",
        section(work / "report"),
        f"![Right answers against accepted tokens]({name}.png)",
        "## The judge under each drafter, tuned for each",
        drafters_table(work),
        f"Speeds are those of {rows_of(work / 'race-draft_lm')[0]['problems']} of the problems, one at a time, each rule in turn. "
        "Where cycles are compiled, so is plain decoding.",
        *(part for name in ("draft_lm", *HEAD_SHAPES) for part in tuning_section(work / f"tuned-{name}", name)),
        "Tuning ran on one thread, beside another stage. Its times only choose between shapes.",
        "## What a judge reads and learns from",
        judges_table(judges),
        "Each at the threshold that its training chose, over the test problems:",
        section(work / "report-judges"),
        "The rounds:",
        section(work / "rounds", "rounds.md"),
        *(ablation_sections(work) if options.ablations else []),
        *(["## Whose errors they are", ERRORS_SAID, errors_table(work)] if FIRST_ERRORS not in options.without else []),
        *(out_of_domain(work) if OUT_OF_DOMAIN not in options.without else []),
        "## Mining",
        mining(work),
        "## Time",
        "Stages ran side by side, each on one thread, as many at once as there are cores. So their seconds add up to more than the "
        "clock's. Races ran last, one at a time, on all cores.",
        time_table(stages),
        machine_section(),
    ]
    _write(options.out / f"{name}.md", page)


def publish_ablations(stages: Stages, people: Judged | None, options: argparse.Namespace) -> None:
    """Writes a page of the ablations alone, and their rows beside it."""
    work, name = stages.work, f"{date.today().isoformat()}-judge-ablations"
    record = provenance.record(provenance.command_line(), {}, {})
    rows = rows_of(work / REPORT)
    options.out.mkdir(parents=True, exist_ok=True)
    facts = {key: record[key] for key in ("command", "machine", "versions")}
    atomic_write(options.out / f"{name}.json", json.dumps(facts | {"rows": rows}, indent=1) + "\n")
    page = [
        f"# Judges by their labels on the embedded pair, {date.today().isoformat()}",
        f"`{record['command']}`; {spent_text(stages)}.",
        f"Target `{TARGET}`, draft LM `{DRAFT}`, temperature 0, {rows[0]['problems']} problems of the test split that nothing was trained "
        "or tuned on. Every rule but plain and lossless is LOSSY.",
        *ablation_sections(work),
        *([] if people is None else ["## People's labels", judges_table({PEOPLE: people})]),
        "## Mining",
        mining(work),
        "## Time",
        time_table(stages),
        machine_section(),
    ]
    _write(options.out / f"{name}.md", page)


def _write(page: Path, parts: list[str]) -> None:
    atomic_write(page, "\n\n".join(parts) + "\n")
    print(page)


def ablation_sections(work: Path) -> list[str]:
    """Judges by how many questions they learn from, and of mined labels: as trained, as tuned, and what tuning tried."""
    judges = compared(work)
    return [
        "## Sizes and mined labels, tuned by answers",
        judges_table({name: judged(folder) for name, folder in judges.items()}),
        f"Each over the test problems with chains of {SHAPE.removeprefix('1x')}, at the threshold that `draftsmith judge tune` chose on "
        "problems of the training split; the largest also at the one that its training chose. At threshold 1 a judge is shut, because no "
        "setting held:",
        section(work / REPORT),
        *(part for name, folder in judges.items() for part in tuning_section(tuned_folder(work, folder), name)),
        "The times of tuning choose nothing here: there is one shape.",
    ]


def out_of_domain(work: Path) -> list[str]:
    """Judges with and without division, on problems with and without it."""
    return [
        "## Out of domain: problems with division",
        section(work / "report-division"),
        "The same judges on the problems without division:",
        section(work / "report-other"),
    ]


def rows_of(report: Path) -> list[dict[str, Any]]:
    """The rows of a report: plain decoding first."""
    return list(json.loads((report / "report.json").read_text())["rows"])


def goals(work: Path) -> str:
    """Each goal, what was measured, and whether it is reached."""
    rows = rows_of(work / "report")
    lossless = next(row for row in rows if row["rule"] == "lossless")
    own = next(row for row in rows if row["rule"] == "judge, tuned")
    times = own["accepted_per_cycle"] / lossless["accepted_per_cycle"]
    rivals = [row for row in rows if row["lossy"] and not row["rule"].startswith("judge") and _keeps(row)]
    best = max(rivals, key=lambda row: row["accepted_per_cycle"], default=None)
    rival = "none keeps its answers" if best is None else f"{best['rule']} accepts {best['accepted_per_cycle']:.2f}"
    heads = {name: rows_of(work / f"report-{name}")[-1] for name in ("draft_lm", *HEAD_SHAPES)}
    # A judge that is shut is lossless decoding: its speed is not the judge's.
    open_ones = [name for name, row in heads.items() if _keeps(row) and row["threshold"] < 1.0]
    speeds = {name: rows_of(work / f"race-{name}")[-1]["speedup"] for name in open_ones}
    if "draft_lm" in open_ones:
        speeds["draft_lm, compiled"] = rows_of(work / "race-compiled")[-1]["speedup"]
    fastest = ", ".join(f"{name} {speed:.2f}" for name, speed in speeds.items()) or "no judge is open"
    is_fast = max(speeds.values(), default=0.0) >= LEAST_SPEEDUP
    changes = ", ".join(f"{name} {100 * row['accuracy_change']:+.1f}" for name, row in heads.items())
    ahead = best is None or own["accepted_per_cycle"] > best["accepted_per_cycle"]
    lines = [
        "| goal | measured | reached |",
        "|---|---|---|",
        f"| at least {LEAST_TIMES:g} times the tokens that lossless decoding accepts | {times:.2f} times | {_yes(times >= LEAST_TIMES)} |",
        f"| at most {MOST_LOST:g} point of right answers lost | {_change(own)} | {_yes(_keeps(own))} |",
        f"| more than every rule without training at that quality | judge {own['accepted_per_cycle']:.2f}; {rival} "
        f"| {_yes(ahead and _keeps(own))} |",
        f"| at least {LEAST_SPEEDUP:g} times as fast as plain decoding | {fastest} | {_yes(is_fast)} |",
        f"| under no drafter more than {MOST_LOST:g} point lost | {changes} | {_yes(all(map(_keeps, heads.values())))} |",
    ]
    return "\n".join(lines)


def _keeps(row: dict[str, Any]) -> bool:
    return 100 * row["accuracy_change"] >= -MOST_LOST - 1e-7


def _yes(reached: bool) -> str:
    return "yes" if reached else "**no**"


def _change(row: dict[str, Any]) -> str:
    low, high = row["accuracy_change_bounds"]
    return f"{100 * row['accuracy_change']:+.1f} points (95 % bounds {100 * low:+.1f} to {100 * high:+.1f})"


def drafters_table(work: Path) -> str:
    """Two rows a drafter: lossless, and with the judge that was tuned for it; and the race of compiled cycles for the draft LM."""
    lines = [
        "| drafter | shape | rule | right answers | change, points (95 % bounds) | accepted a cycle | speed-up over plain (95 %) "
        "| the same, cycles compiled |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in ("draft_lm", *HEAD_SHAPES):
        raced = rows_of(work / f"race-{name}")
        compiled = {row["rule"]: row for row in rows_of(work / "race-compiled")} if name == "draft_lm" else {}
        for row, timed in zip(rows_of(work / f"report-{name}"), raced, strict=True):
            if row["rule"] == "plain":
                continue
            rule = row["rule"]
            if row["lossy"]:
                setting = f"threshold {row['threshold']:g}" if row["threshold"] < 1.0 else "shut: no setting held"
                rule = f"{rule}, {setting} (lossy)"
            change = _change(row).replace(" points (95 % bounds ", " (") if row["lossy"] else "-"
            cells = [name, row["shape"], rule, f"{100 * row['accuracy']:.1f} %", change]
            cells += [f"{row['accepted_per_cycle']:.2f}", _speed(timed), _speed(compiled.get(row["rule"]))]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _speed(row: dict[str, Any] | None) -> str:
    if row is None:
        return "-"
    low, high = row["speedup_interval"]
    return f"{row['speedup']:.2f} ({low:.2f} to {high:.2f})"


def tuning_section(folder: Path, name: str) -> list[str]:
    """What `judge tune` tried for a drafter or a judge, and what it kept."""
    kept = json.loads((folder / "tuning.json").read_text())["kept"]
    return [
        f"Tuning for {name}, on {kept['problems']} problems of the training split:",
        section(folder, "tuning.md"),
        f"{kept['said']}.",
    ]


def judges_table(judges: dict[str, Judged]) -> str:
    """How well each tells held-out tokens apart."""
    lines = [
        "| judge | questions | AUC on held-out questions | AUC where the target differs | threshold |",
        "|---|---|---|---|---|",
    ]
    for name, judge in judges.items():
        differing = "-" if judge.differing is None else f"{judge.differing:.3f}"
        lines.append(
            f"| {name} | {judge.questions} | {judge.auc:.3f} | {differing} | {judge.threshold:.3g} |",
        )
    return "\n".join(lines)


def errors_table(work: Path) -> str:
    """Answers by who said their first wrong token."""
    lines = [
        "| decoded | no wrong line | first wrong token by the rule | first wrong token by the target itself |",
        "|---|---|---|---|",
    ]
    for name, counts in json.loads((work / "first-errors.json").read_text()).items():
        lines.append(f"| {name} | {counts.get('nobody', 0)} | {counts.get('rule', 0)} | {counts.get('target', 0)} |")
    return "\n".join(lines)


def mining(work: Path) -> str:
    """The counts of a mining run."""
    mined = json.loads((work / "mined" / "report.json").read_text())
    return "\n".join(f"- {key}: {value}" for key, value in mined.items() if isinstance(value, int | float))


def section(report: Path, file: str = "report.md") -> str:
    """The first table of a report."""
    lines: list[str] = []
    for line in (report / file).read_text().splitlines():
        if line.startswith("|"):
            lines.append(line)
        elif lines:
            break
    return "\n".join(lines)


def price_section(report: Path) -> str:
    """The table of a report that compares rules at equal quality."""
    text = (report / "report.md").read_text().split("## At equal quality", 1)[1]
    lines: Iterable[str] = text.splitlines()
    return "\n".join(line for line in lines if line.startswith(("|", "The largest gain")) or not line).strip()


def spent_text(stages: Stages) -> str:
    """How long all stages took."""
    busy = sum(each["processor_seconds"] for each in stages.spent().values()) / 60
    return f"{stages.clock_seconds() / 60:.1f} minutes by the clock, {busy:.1f} minutes of a processor in all"


def time_table(stages: Stages) -> str:
    """Each stage of a second or more."""
    lines = ["| stage | seconds | seconds of a processor |", "|---|---|---|"]
    for stage, each in stages.spent().items():
        if each["seconds"] >= 1:
            lines.append(f"| {stage} | {each['seconds']:.0f} | {each['processor_seconds']:.0f} |")
    return "\n".join(lines)

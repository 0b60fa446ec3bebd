"""The words and tables of a comparison of lossy rules.

Owns the format of its page. Does not know how a row was measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from draftsmith.decode.runners import compiles
from draftsmith.escapes import code, plain
from draftsmith.evaluate.lossy.lossy import PLAIN, RuleRow
from draftsmith.evaluate.lossy.price import PRICE_CHART, price_table, prices

HEADER = (
    "| rule | threshold | right answers (95 %) | change, points (95 %) | accepted a cycle (95 %) | target forwards an answer (95 %) "
    "| speed-up (95 %) | wrong tokens accepted (95 %) |"
)
MEANING = """\
- Every rule but *plain* and *lossless* is LOSSY: its text may differ from the target's own.
- *Right answers*: share of problems whose answer the checker finds right; *change*: minus plain decoding's, paired by problem.
- *Accepted a cycle*: draft tokens that stand, without the target's own token that ends a cycle.
- *Target forwards an answer*: the prompt's included.
- *Speed-up*: tokens/s over plain decoding in the same engine, one answer at a time, interleaved problem by problem. Answers need not be as
  long as plain decoding's.
- *Wrong tokens accepted*: of labelled tokens in held-out answers that are the first error; interval over questions.
- Other intervals are percentile bootstraps over problems.
- *At equal quality*: bounds of the change are Tango's, each with 95 % confidence. A rule's setting was chosen on these very problems, which
  favours rules of which several settings were measured.
"""


def trade_table(rows: Sequence[RuleRow]) -> str:
    """All rows, in Markdown."""
    lines = [HEADER, "|---|---|---|---|---|---|---|---|"]
    for row in rows:
        change = "-" if not row.lossy else _points(row.accuracy_change, row.accuracy_change_interval)
        cells = [
            plain(f"{row.rule} (lossy)" if row.lossy else row.rule),
            "-" if row.threshold is None else f"{row.threshold:g}",
            _share(row.accuracy, row.accuracy_interval),
            change,
            "-" if row.rule == PLAIN else _number(row.accepted_per_cycle, row.accepted_per_cycle_interval, 2),
            _number(row.target_forwards_per_answer, row.target_forwards_per_answer_interval, 1),
            "-"
            if row.speedup is None or row.speedup_interval is None
            else _number(row.speedup, row.speedup_interval, 2),
            "-"
            if row.wrong_accepted_share is None or row.wrong_accepted_share_interval is None
            else _share(row.wrong_accepted_share, row.wrong_accepted_share_interval),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def to_markdown(facts: Mapping[str, Any], target: str, drafter: str, rows: Sequence[RuleRow], most_lost: float) -> str:
    """The page; `most_lost` is the share of right answers that may be lost where rules are compared at equal quality."""
    setting = (
        f"Target {code(target)}, drafter {code(drafter)}, shape {plain(next((row.shape for row in rows if row.shape), '-'))}, "
        f"{rows[0].problems} problems{_timed_how(facts)}."
    )
    machine = "\n".join(
        f"- {plain(key)}: {plain(value)}"
        for part in (facts["machine"], facts["versions"])
        for key, value in part.items()
    )
    parts = [
        "# Lossy rules",
        setting,
        trade_table(rows),
        "![Right answers against what a rule gains](report.png)",
    ]
    priced = prices(rows, most_lost)
    if priced:
        parts += ["## At equal quality", price_table(priced, most_lost), f"![Gain at equal quality]({PRICE_CHART})"]
    return "\n\n".join([*parts, MEANING.rstrip(), code(facts["command"]), machine]) + "\n"


def _timed_how(facts: Mapping[str, Any]) -> str:
    """Whether speed was measured, and whether its cycles ran compiled: the end of a sentence."""
    if not facts["timed_problems"]:
        return "; no speed was measured"
    return "; what was timed ran compiled, plain decoding too" if compiles(facts["compile"]) else ""


def _share(value: float, interval: tuple[float, float]) -> str:
    return f"{100 * value:.1f} % ({100 * interval[0]:.1f} to {100 * interval[1]:.1f})"


def _points(value: float, interval: tuple[float, float]) -> str:
    return f"{100 * value:+.1f} ({100 * interval[0]:+.1f} to {100 * interval[1]:+.1f})"


def _number(value: float, interval: tuple[float, float], digits: int) -> str:
    return f"{value:.{digits}f} ({interval[0]:.{digits}f} to {interval[1]:.{digits}f})"

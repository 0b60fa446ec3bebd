"""The words and the table of a tuned judge.

Owns the format of its page. Does not know how a setting was tried.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from draftsmith.escapes import code, plain
from draftsmith.evaluate.lossy.sweep import Trial

HEADER = (
    "| setting | problems | right answers | change, points (95 % bounds) | accepted a cycle | times lossless | ms a token | times plain "
    "| verdict |"
)
MEANING = """\
- *Change*: right answers minus lossless decoding's, paired by problem. Each bound holds by itself with 95 % confidence (Tango's score
  interval).
- *Accepted a cycle*: draft tokens that stand; *times lossless*: over those of lossless verification with the same shape.
- *Ms a token*, *times plain*: one answer at a time, interleaved problem by problem; timed were the best setting of each shape and plain
  decoding. The fastest is kept. Cycles of one shape cost the same, so the most accepted tokens are fastest there.
- *Holds*: the lower bound is above the loss that is allowed. *Stopped*, before all problems were answered: the upper bound fell below that
  loss (*loses more*), lossless decoding accepted as much (*gains nothing*), or another setting of the same shape holds and gains more.
- The best of several settings looks a little better than it is. Measure the kept one on unseen problems with `draftsmith judge evaluate`.
"""


def sweep_table(trials: Sequence[Trial], most_lost: float) -> str:
    """All settings, in Markdown.

    Args:
        trials: in order.
        most_lost: the share of right answers that may be lost.
    """
    lines = [HEADER, "|---|---|---|---|---|---|---|---|---|"]
    for trial in trials:
        low, high = trial.bounds
        verdict = (
            f"stopped: {trial.why_stopped}" if trial.stopped else "holds" if trial.holds(most_lost) else "does not hold"
        )
        times = trial.accepted_per_cycle / trial.lossless_per_cycle if trial.lossless_per_cycle else 0.0
        cells = [
            str(trial.setting),
            str(trial.problems),
            f"{100 * trial.right / trial.problems:.1f} %",
            f"{100 * trial.change:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})",
            f"{trial.accepted_per_cycle:.2f}",
            f"{times:.2f}",
            "-" if trial.seconds_per_token is None else f"{1000 * trial.seconds_per_token:.2f}",
            "-" if trial.times_plain is None else f"{trial.times_plain:.2f}",
            verdict,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def to_markdown(trials: Sequence[Trial], facts: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    """The page.

    Args:
        trials: in order.
        facts: of the kept setting.
        record: of provenance.
    """
    judged = code(facts["checker"]) if facts["checker"] else "nobody: they were compared with the target's own"
    share = f"{100 * facts['lossless_right']:.1f} %"
    setting = f"{facts['problems']} problems; answers judged by {judged}. Lossless decoding has {share} right."
    machine = "\n".join(
        f"- {plain(key)}: {plain(value)}"
        for part in (record["machine"], record["versions"])
        for key, value in part.items()
    )
    parts = [
        "# A tuned judge",
        setting,
        sweep_table(trials, facts["most_lost"]),
        f"{plain(facts['said'])}.",
        MEANING.rstrip(),
    ]
    return "\n\n".join([*parts, code(record["command"]), machine]) + "\n"

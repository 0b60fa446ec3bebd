"""Lossy rules as the command line names them.

Owns the words. Knows nothing of what a rule does.
"""

from __future__ import annotations

from pathlib import Path

from draftsmith.decode.rules import TRAINING_FREE, Everything, JudgeRule, LossyRule
from draftsmith.models.judge import load_judge


def parse_rule(text: str) -> tuple[str, LossyRule | None]:
    """A rule and its name from ``[NAME=]KIND[:FOLDER][@THRESHOLD]``; without a name it has its kind's.

    Kinds: ``lossless`` (no rule), ``judge:FOLDER`` with the head's own threshold unless one is given, ``top-k@3``, ``typical@0.09``,
    ``kl@0.5``, ``everything``.

    Raises:
        ValueError: an unknown kind, a threshold that is missing, not wanted or out of range, or a folder that holds no whole judge.
    """
    name, equals, rest = text.rpartition("=")
    kind, colon, folder = rest.partition(":")
    where, at, number = (folder if colon else kind).rpartition("@")
    if not at:
        where, number = number, ""
    if colon:
        folder = where
    else:
        kind = where
    threshold = _number(text, number) if at else None
    if kind == "judge" and folder:
        judge = load_judge(Path(folder))
        return name if equals else kind, JudgeRule(judge if threshold is None else judge.with_threshold(threshold))
    if folder:
        raise ValueError(f"rule {text!r}: only a judge has a folder; write {kind}@THRESHOLD")
    if kind in ("lossless", "everything") and threshold is None:
        return name if equals else kind, None if kind == "lossless" else Everything()
    if kind in TRAINING_FREE and threshold is not None:
        return name if equals else kind, TRAINING_FREE[kind](threshold)
    raise ValueError(
        f"rule {text!r} is not known; write lossless, judge:FOLDER, judge:FOLDER@0.9, top-k@3, typical@0.09, kl@0.5 or everything"
    )


def _number(text: str, number: str) -> float:
    try:
        return float(number)
    except ValueError:
        raise ValueError(
            f"rule {text!r}: {number!r} is no number; write a threshold behind the @, such as 0.9"
        ) from None

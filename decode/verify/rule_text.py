"""Lossy rules as the command line names them.

Owns the words. Knows nothing of what a rule does.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from draftsmith.decode.verify.lossy_rule import LossyRule
from draftsmith.decode.verify.lossy_rules import (
    Divergence,
    Ensemble,
    Everything,
    JudgeRule,
    TopK,
    Typical,
    UnsureDivergence,
)
from draftsmith.decode.verify.thoughts import ThoughtMarks
from draftsmith.decode.verify.uncertain_rules import Fly, Margin, Relaxed
from draftsmith.models.judge import load_judge

TRAINING_FREE: dict[str, Callable[[float], LossyRule]] = {
    rule.name: rule for rule in (TopK, Typical, Divergence, UnsureDivergence, Ensemble, Fly, Margin)
}
"""Rules that need no training, by name: each made from its threshold."""


def parse_rule(text: str) -> tuple[str, LossyRule | None]:
    """A rule and its name from ``[NAME=]KIND[:FOLDER][@THRESHOLD]``; without a name it has its kind's.

    Kinds: ``lossless`` (no rule), ``judge:FOLDER`` with the head's own threshold unless one is given, ``top-k@3``, ``typical@0.09``,
    ``kl@0.5``, ``kl-unsure@0.5``, ``ensemble@0.7``, ``fly@0.3``, ``margin@0.3``, ``relaxed:BEGIN,END[,K]@0.5`` with the ids of the tokens
    around thoughts, ``everything``.

    Raises:
        ValueError: an unknown kind, a threshold that is missing, not wanted or out of range, or a folder that holds no whole judge.
    """
    given, rest = _name(text)
    kind, colon, behind = rest.partition(":")
    where, at, number = (behind if colon else kind).rpartition("@")
    if not at:
        where = number
    kind, folder = (kind, where) if colon else (where, "")
    name, threshold = given or kind, _number(text, number) if at else None
    if kind == "judge" and folder:
        judge = load_judge(Path(folder))
        return name, JudgeRule(judge if threshold is None else judge.with_threshold(threshold))
    if kind == Relaxed.name and folder:
        return name, _relaxed(text, folder, threshold)
    if folder:
        raise ValueError(f"rule {text!r}: only a judge has a folder; write {kind}@THRESHOLD")
    if kind in ("lossless", "everything") and threshold is None:
        return name, None if kind == "lossless" else Everything()
    if kind in TRAINING_FREE and threshold is not None:
        return name, TRAINING_FREE[kind](threshold)
    raise ValueError(
        f"rule {text!r} is not known; write lossless, judge:FOLDER, judge:FOLDER@0.9, top-k@3, typical@0.09, kl@0.5, "
        "kl-unsure@0.5, ensemble@0.7, fly@0.3, margin@0.3, relaxed:BEGIN,END@0.5 or everything"
    )


def _relaxed(text: str, numbers: str, threshold: float | None) -> Relaxed:
    """From the ids of the tokens around thoughts and, behind them, how many of the likeliest tokens are allowed."""
    words = numbers.split(",")
    if threshold is None or len(words) not in (2, 3) or not all(word.strip().isdecimal() for word in words):
        raise ValueError(
            f"rule {text!r} is not relaxed with the ids of two tokens and a delta; write relaxed:BEGIN,END@0.5, or "
            "relaxed:BEGIN,END,K@0.5 for the likeliest K; tokenizer.convert_tokens_to_ids('<think>') tells an id"
        )
    begin, end, *most = map(int, words)
    return Relaxed(threshold, ThoughtMarks(begin, end), *most)


def _name(text: str) -> tuple[str, str]:
    """The name, empty where none is given, and what is behind it. A folder may have an = in its own name."""
    name, equals, rest = text.partition("=")
    if not equals or ":" in name:
        return "", text
    if not name:
        raise ValueError(f"rule {text!r} has an empty name; write one before the =, or leave the = out")
    return name, rest


def _number(text: str, number: str) -> float:
    try:
        return float(number)
    except ValueError:
        raise ValueError(
            f"rule {text!r}: {number!r} is no number; write a threshold behind the @, such as 0.9"
        ) from None

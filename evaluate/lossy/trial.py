"""Settings of a judge that are tried by answers: what each has done so far, and which is kept.

Owns the counts of a trial, when it holds, and the choice. Knows no engine, no files and not who judges answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from draftsmith.evaluate.lossy.lossy import Answered
from draftsmith.evaluate.lossy.paired import change_bounds
from draftsmith.models.judge import NO_GATE

GAINS_NOTHING = "gains nothing"


@dataclass(frozen=True)
class Setting:
    """How a judge decides, and how much is drafted.

    Attributes:
        shape: of the draft.
        threshold: of the judge.
        gate: of the judge.
        veto: of the judge.
    """

    shape: str
    threshold: float
    gate: str = NO_GATE
    veto: bool = False

    def __str__(self) -> str:
        gate = "" if self.gate == NO_GATE else f", {self.gate} gate{' with a veto' if self.veto else ''}"
        return f"{self.shape} at {self.threshold:g}{gate}"


@dataclass
class Trial:
    """What a setting has done so far, against lossless decoding.

    Attributes:
        setting: what was tried.
        problems: how many were answered.
        right: how many rightly.
        gained: problems that only this setting answers rightly.
        lost: problems that only lossless decoding answers rightly.
        accepted: draft tokens that stood.
        cycles: of drafting and verifying.
        lossless_per_cycle: draft tokens that a cycle of lossless decoding accepts with this shape.
        stopped: whether it was stopped before all problems were answered.
        why_stopped: in a few words.
        seconds_per_token: of the race, one answer at a time; None where it was not timed.
        times_plain: its tokens/s over those of plain decoding in the race.
    """

    setting: Setting
    problems: int = 0
    right: int = 0
    gained: int = 0
    lost: int = 0
    accepted: int = 0
    cycles: int = 0
    lossless_per_cycle: float = 0.0
    stopped: bool = False
    why_stopped: str = ""
    seconds_per_token: float | None = None
    times_plain: float | None = None

    @property
    def accepted_per_cycle(self) -> float:
        """The gain."""
        return self.accepted / max(1, self.cycles)

    @property
    def right_before(self) -> int:
        """How many of the problems lossless decoding answers rightly."""
        return self.right - self.gained + self.lost

    @property
    def change(self) -> float:
        """Of the share of right answers."""
        return (self.gained - self.lost) / self.problems

    @property
    def bounds(self) -> tuple[float, float]:
        """Of the change, each with 95 % confidence."""
        return change_bounds(self.gained, self.lost, self.problems)

    def holds(self, most_lost: float) -> bool:
        """Whether all problems were answered and the change is surely above minus this share.

        Args:
            most_lost: the share.
        """
        return not self.stopped and self.bounds[0] > -most_lost

    def is_worth_keeping(self, most_lost: float) -> bool:
        """Whether it holds, and gains over lossless decoding, which answers some problems rightly.

        Args:
            most_lost: see `holds`.
        """
        gains = self.accepted_per_cycle > self.lossless_per_cycle
        return self.holds(most_lost) and bool(self.right_before) and gains

    def stop(self, why: str) -> None:
        """Answer no more problems.

        Args:
            why: in a few words, for the report.
        """
        self.stopped, self.why_stopped = True, why

    def add(self, answered: Answered, was_right: Sequence[bool]) -> None:
        """Count answers.

        Args:
            answered: by this setting.
            was_right: whether lossless decoding answers the same problems rightly.
        """
        self.problems += len(answered.right)
        self.right += sum(answered.right)
        self.gained += sum(now and not before for now, before in zip(answered.right, was_right, strict=True))
        self.lost += sum(before and not now for now, before in zip(answered.right, was_right, strict=True))
        self.accepted += sum(sum(reply.accepted) for reply in answered.replies)
        self.cycles += sum(len(reply.accepted) for reply in answered.replies)


def best_trial(trials: Sequence[Trial], most_lost: float) -> Trial | None:
    """The trial that saves a user most among those that hold; None where none does, or none gains over lossless decoding.

    That is the fewest seconds a token among the trials that were timed. Where none was, it is the most accepted tokens a cycle: with one
    shape, cycles cost the same.

    Where lossless decoding answers nothing rightly, every setting holds, and none is shown to keep answers: then there is none, too.

    Args:
        trials: of all settings.
        most_lost: the share of right answers that may be lost.
    """
    good = [trial for trial in trials if trial.is_worth_keeping(most_lost)]
    timed = [trial for trial in good if trial.seconds_per_token is not None]
    if timed:
        return min(timed, key=lambda trial: trial.seconds_per_token or 0.0)
    return max(good, key=lambda trial: trial.accepted_per_cycle, default=None)


def why_none(trials: Sequence[Trial], most_lost: float, needed: int) -> str:
    """A sentence on why no setting is kept.

    Args:
        trials: of all settings.
        most_lost: the share of right answers that may be lost.
        needed: problems that would show that less is lost if none is.
    """
    # A setting that was stopped has answered a part of the problems only: their number says nothing.
    problems = max((trial.problems for trial in trials if not trial.stopped), default=needed)
    if not any(trial.right_before for trial in trials):
        return (
            "lossless decoding answers none of the problems rightly, so no answer can be lost and nothing is shown; look at the checker "
            "and at --max_new_tokens"
        )
    if problems < needed:
        return f"{problems} problems cannot show a loss below {100 * most_lost:g} points; even if no answer changes, {needed} are needed"
    losing = [trial for trial in trials if trial.why_stopped != GAINS_NOTHING]
    if not losing or any(trial.holds(most_lost) for trial in trials):
        return "no setting that keeps the answers accepts more than lossless verification"
    near = max(losing, key=lambda trial: trial.bounds[0])
    others = "" if len(losing) == len(trials) else "; the others accept no more than lossless verification"
    return (
        f"{len(losing)} of {len(trials)} settings may lose {100 * most_lost:g} points of right answers or more; the nearest, "
        f"{near.setting}, changes them by {100 * near.change:+.1f} points (lower 95 % bound {100 * near.bounds[0]:+.1f}){others}"
    )


def settings_of_sweep(
    shapes: Sequence[str], thresholds: Sequence[float], gates: Mapping[str, Sequence[bool]]
) -> list[Setting]:
    """Every combination.

    Args:
        shapes: of drafts.
        thresholds: of the judge.
        gates: by name, with which values of the veto each is tried.
    """
    return [
        Setting(shape, threshold, gate, veto)
        for shape in shapes
        for gate, vetoes in gates.items()
        for veto in vetoes
        for threshold in thresholds
    ]

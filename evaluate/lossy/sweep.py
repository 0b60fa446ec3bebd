"""Settings of a judge tried end to end: which gives most among those that lose less than a share of right answers.

Owns the trials, when a bad one stops, and the choice. Knows no files and not who judges answers.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from draftsmith.data.progress import progress
from draftsmith.decode import Engine
from draftsmith.decode.verify.lossy_rules import JudgeRule
from draftsmith.decode.verify.lossy_walk import LossyVerifier
from draftsmith.evaluate.lossy.contest import Contest
from draftsmith.evaluate.lossy.lossy import Answered, IsRight, answer_all
from draftsmith.evaluate.lossy.paired import change_bounds
from draftsmith.models.files.fingerprint import tokenizer_fingerprint
from draftsmith.models.judge import NO_GATE, Judge
from draftsmith.models.tree.shapes import parse_shape


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
        stopped: whether it was clearly bad before all problems were answered.
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


@dataclass
class Sweep:
    """Trials of settings over the problems of a contest, a part of the problems at a time.

    Attributes:
        contest: what the settings answer.
        judge: whose settings they are.
        line_end_ids: tokens that end a line, for gates of lines.
        most_lost: the share of right answers that a setting may lose.
        looks: after how many parts the trials are looked at; a setting that surely loses more stops there.
        batch_rows: problems answered together.
        right_by: makes what judges answers from lossless decoding's texts, where the contest has nothing.
    """

    contest: Contest
    judge: Judge
    line_end_ids: Sequence[int]
    most_lost: float
    looks: int
    batch_rows: int
    right_by: Callable[[Sequence[str]], IsRight]
    _lossless: dict[str, Answered] = field(default_factory=dict)

    def run(self, settings: Sequence[Setting]) -> list[Trial]:
        """Try settings.

        Args:
            settings: distinct ones.

        Returns:
            A trial for each, in their order.

        Raises:
            ValueError: before anything is decoded: the judge belongs to another target or tokenizer, or cannot verify a shape.
        """
        self._check(settings)
        samples = self.contest.samples
        shapes = list(dict.fromkeys(setting.shape for setting in settings))
        with progress("answers", (len(shapes) + len(settings)) * len(samples), "answers", 0) as advance:
            is_right = self._answer_losslessly(shapes, advance)
            right = self._lossless[shapes[0]].right
            trials = [Trial(setting, lossless_per_cycle=self._lossless_gain(setting.shape)) for setting in settings]
            for part in parts(len(samples), self.looks):
                for trial in trials:
                    if trial.stopped:
                        advance(len(part))
                        continue
                    trial.add(self._answer(trial.setting, part, is_right, advance), [right[place] for place in part])
                for trial in trials:
                    trial.stopped |= trial.problems < len(samples) and trial.bounds[1] < -self.most_lost
        return trials

    def _check(self, settings: Sequence[Setting]) -> None:
        self.judge.check_tokenizer(tokenizer_fingerprint(self.contest.tokenizer))
        for setting in settings:
            LossyVerifier(JudgeRule(self.judge_with(setting)).bound(self.contest.target), parse_shape(setting.shape))

    def _answer_losslessly(self, shapes: Sequence[str], advance: Callable[[int], None]) -> IsRight:
        contest, judged = self.contest, self.contest.is_right
        for shape in shapes:
            engine = Engine(contest.target, contest.drafter, parse_shape(shape))
            answered = answer_all(
                engine,
                contest.samples,
                contest.settings,
                judged or (lambda number, text: True),
                contest.text_of,
                self.batch_rows,
                advance,
            )
            self._lossless[shape] = answered
        return judged or self.right_by([contest.text_of(reply.token_ids) for reply in answered.replies])

    def _answer(self, setting: Setting, part: range, is_right: IsRight, advance: Callable[[int], None]) -> Answered:
        contest = self.contest
        rule = JudgeRule(self.judge_with(setting))
        return answer_all(
            Engine(contest.target, contest.drafter, parse_shape(setting.shape), rule=rule),
            contest.samples[part.start : part.stop],
            contest.settings,
            lambda number, text: is_right(part.start + number, text),
            contest.text_of,
            self.batch_rows,
            advance,
            first=part.start,  # above temperature 0, the noise of lossless decoding
        )

    def judge_with(self, setting: Setting) -> Judge:
        """The judge with a setting's threshold and gate.

        Args:
            setting: one of those tried.
        """
        ends = self.line_end_ids if setting.gate == "line" else ()
        return self.judge.with_threshold(setting.threshold).with_gate(setting.gate, setting.veto, ends)

    def _lossless_gain(self, shape: str) -> float:
        replies = self._lossless[shape].replies
        cycles = sum(len(reply.accepted) for reply in replies)
        return sum(sum(reply.accepted) for reply in replies) / max(1, cycles)

    @property
    def lossless_right(self) -> float:
        """The share of problems that lossless decoding answers rightly."""
        right = next(iter(self._lossless.values())).right
        return sum(right) / len(right)


def parts(count: int, number: int) -> list[range]:
    """Ranges of nearly equal length that cover 0 to count - 1; none is empty.

    Args:
        count: how many numbers.
        number: of ranges, at most.
    """
    number = min(number, count)
    cuts = [count * place // number for place in range(number + 1)]
    return [range(start, end) for start, end in itertools.pairwise(cuts)]


def best_trial(trials: Sequence[Trial], most_lost: float) -> Trial | None:
    """The trial with the largest gain among those that hold; None where none does, or none gains over lossless decoding.

    Where lossless decoding answers nothing rightly, every setting holds, and none is shown to keep answers: then there is none, too.

    Args:
        trials: of all settings.
        most_lost: the share of right answers that may be lost.
    """
    good = [
        trial
        for trial in trials
        if trial.holds(most_lost) and trial.right_before and trial.accepted_per_cycle > trial.lossless_per_cycle
    ]
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
    if any(trial.holds(most_lost) for trial in trials):
        return "no setting that keeps the answers accepts more than lossless verification"
    near = max(trials, key=lambda trial: trial.bounds[0])
    return (
        f"none of {len(trials)} settings surely loses less than {100 * most_lost:g} points of right answers; the nearest, {near.setting}, "
        f"changes them by {100 * near.change:+.1f} points (lower 95 % bound {100 * near.bounds[0]:+.1f})"
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

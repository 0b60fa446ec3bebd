"""Settings of a judge tried end to end: which give most among those that lose less than a share of right answers, and how fast these are.

Owns the order of the trials, when one stops, and the race of the best. Knows no files and not who judges answers.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from draftsmith.data.progress import ProgressMeter, metered
from draftsmith.decode import Engine
from draftsmith.decode.verify.lossy_rules import JudgeRule
from draftsmith.decode.verify.lossy_walk import LossyVerifier
from draftsmith.evaluate.contenders import Contender, EngineContender
from draftsmith.evaluate.lossy.contest import Contest
from draftsmith.evaluate.lossy.kept_answers import KeptAnswers, way_of
from draftsmith.evaluate.lossy.lossy import PLAIN, Answered, IsRight, answer_all
from draftsmith.evaluate.lossy.trial import GAINS_NOTHING, Setting, Trial, best_trial
from draftsmith.evaluate.speed import race, speedup, track
from draftsmith.models.files.fingerprint import tokenizer_fingerprint
from draftsmith.models.judge import Judge
from draftsmith.models.tree.shapes import parse_shape


@dataclass
class Sweep:
    """Trials of settings over the problems of a contest, a part of the problems at a time.

    Attributes:
        contest: what the settings answer.
        judge: whose settings they are.
        line_end_ids: tokens that end a line, for gates of lines.
        most_lost: the share of right answers that a setting may lose.
        looks: after how many parts the trials are looked at; a setting that surely loses more, or gains nothing, stops there.
        batch_rows: problems answered together.
        right_by: makes what judges answers from lossless decoding's texts, where the contest has nothing.
        timed_problems: answered once more, one at a time, for the seconds of the best setting of each shape; 0 times nothing.
        kept: the answers of earlier starts; takes the new ones.
    """

    contest: Contest
    judge: Judge
    line_end_ids: Sequence[int]
    most_lost: float
    looks: int
    batch_rows: int
    right_by: Callable[[Sequence[str]], IsRight]
    timed_problems: int = 0
    kept: KeptAnswers = field(default_factory=KeptAnswers)
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
        first, *rest = parts(len(samples), self.looks)
        ways = [way_of(parse_shape(shape), None) for shape in shapes] + [self._way(setting) for setting in settings]
        done = self.kept.begin(ways, len(samples))
        with metered("answers", len(ways) * len(samples), "answers", done) as meter:
            is_right = self._answer_losslessly(shapes, meter)
            trials = [Trial(setting, lossless_per_cycle=self._lossless_gain(setting.shape)) for setting in settings]
            for trial in trials:
                self._go_on(trial, first, is_right, meter)
            for shape in shapes:
                own = [trial for trial in trials if trial.setting.shape == shape]
                self._finish(own, rest, is_right, meter)
        best = (self._best_of(trials, shape) for shape in shapes)
        self._race([trial for trial in best if trial is not None])
        return trials

    def _go_on(self, trial: Trial, part: range, is_right: IsRight, meter: ProgressMeter) -> None:
        """Answer a part of the problems, and look whether more would be in vain."""
        samples = self.contest.samples
        right = next(iter(self._lossless.values())).right
        trial.add(self._answer(trial.setting, part, is_right, meter), [right[place] for place in part])
        if trial.problems == len(samples):
            return
        if trial.bounds[1] < -self.most_lost:
            self._stop(trial, "loses more", meter)
        elif trial.accepted_per_cycle <= self._lossless_gain(trial.setting.shape, trial.problems):
            self._stop(trial, GAINS_NOTHING, meter)

    def _stop(self, trial: Trial, why: str, meter: ProgressMeter) -> None:
        """Answers that are kept already count as done, so they stay in the total."""
        trial.stop(why)
        rest = range(trial.problems, len(self.contest.samples))
        meter.forgo(len(rest) - self.kept.num_of(self._way(trial.setting), rest))

    def _finish(self, trials: Sequence[Trial], rest: Sequence[range], is_right: IsRight, meter: ProgressMeter) -> None:
        """The other parts, for trials of one shape: the largest gain first. Smaller gains stop once a larger one holds."""
        best: Trial | None = None
        for trial in sorted(trials, key=lambda trial: -trial.accepted_per_cycle):
            for part in rest:
                if best is not None and not trial.stopped and trial.accepted_per_cycle < best.accepted_per_cycle:
                    self._stop(trial, f"{best.setting} holds and gains more", meter)
                if not trial.stopped:
                    self._go_on(trial, part, is_right, meter)
            if best is None and trial.is_worth_keeping(self.most_lost):
                best = trial

    def _best_of(self, trials: Sequence[Trial], shape: str) -> Trial | None:
        return best_trial([trial for trial in trials if trial.setting.shape == shape], self.most_lost)

    def _race(self, trials: Sequence[Trial]) -> None:
        """Time the best of each shape and plain decoding, one answer at a time, interleaved."""
        samples = self.contest.samples[: self.timed_problems]
        if not trials or not samples:
            return
        target, drafter, settings = self.contest.target, self.contest.drafter, self.contest.settings
        engines = {PLAIN: Engine(target)}
        for trial in trials:
            rule = JudgeRule(self.judge_with(trial.setting))
            engines[str(trial.setting)] = Engine(target, drafter, parse_shape(trial.setting.shape), rule=rule)
        contenders: list[Contender] = [EngineContender(name, engine, settings) for name, engine in engines.items()]
        with metered("race", len(engines) * len(samples), "answers", 0) as meter:
            tracks = {
                name: track(runs)
                for name, runs in race(contenders, samples, advance=meter.advance, say=meter.say).items()
            }
        for trial in trials:
            own = tracks[str(trial.setting)]
            trial.seconds_per_token = 1.0 / own.rate(list(own.tokens))
            trial.times_plain = speedup(own, tracks[PLAIN])

    def _check(self, settings: Sequence[Setting]) -> None:
        self.judge.check_tokenizer(tokenizer_fingerprint(self.contest.tokenizer))
        for setting in settings:
            LossyVerifier(JudgeRule(self.judge_with(setting)).bound(self.contest.target), parse_shape(setting.shape))

    def _answer_losslessly(self, shapes: Sequence[str], meter: ProgressMeter) -> IsRight:
        contest, judged = self.contest, self.contest.is_right
        for shape in shapes:
            limits = parse_shape(shape)
            answered = answer_all(
                Engine(contest.target, contest.drafter, limits),
                contest.samples,
                contest.settings,
                judged or (lambda number, text: True),
                contest.text_of,
                self.batch_rows,
                meter.advance,
                self.kept,
                way_of(limits, None),
            )
            self._lossless[shape] = answered
        return judged or self.right_by([contest.text_of(reply.token_ids) for reply in answered.replies])

    def _answer(self, setting: Setting, part: range, is_right: IsRight, meter: ProgressMeter) -> Answered:
        contest = self.contest
        rule = JudgeRule(self.judge_with(setting))
        return answer_all(
            Engine(contest.target, contest.drafter, parse_shape(setting.shape), rule=rule),
            contest.samples[part.start : part.stop],
            contest.settings,
            lambda number, text: is_right(part.start + number, text),
            contest.text_of,
            self.batch_rows,
            meter.advance,
            self.kept,
            self._way(setting),
            first=part.start,  # above temperature 0, the noise of lossless decoding
        )

    def _way(self, setting: Setting) -> str:
        return way_of(parse_shape(setting.shape), JudgeRule(self.judge_with(setting)))

    def judge_with(self, setting: Setting) -> Judge:
        """The judge with a setting's threshold and gate.

        Args:
            setting: one of those tried.
        """
        ends = self.line_end_ids if setting.gate == "line" else ()
        return self.judge.with_threshold(setting.threshold).with_gate(setting.gate, setting.veto, ends)

    def _lossless_gain(self, shape: str, problems: int | None = None) -> float:
        """Of all problems, or of the first so many."""
        replies = self._lossless[shape].replies[:problems]
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

"""A killed comparison of settings or rules resumes behind its last answer, and only where it is the same comparison."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from draftsmith.cli import main
from draftsmith.data.progress import ProgressMeter
from draftsmith.decode import Engine, Generation, GenerationSettings
from draftsmith.decode.verify.lossy_rule import LossyRule
from draftsmith.decode.verify.lossy_rules import JudgeRule, TopK
from draftsmith.embedded import write_prompts
from draftsmith.evaluate.lossy.contest import Contest
from draftsmith.evaluate.lossy.kept_answers import KeptAnswers, kept_answers, way_of
from draftsmith.evaluate.lossy.lossy import Ruled, compare
from draftsmith.evaluate.lossy.sweep import Sweep
from draftsmith.evaluate.lossy.trial import Setting
from draftsmith.evaluate.lossy.tune_command import agreement
from draftsmith.evaluate.records import Sample
from draftsmith.evaluate.resume import WORK_FILE
from draftsmith.label.checkers import checkers
from draftsmith.label.checkers.checkers import Checked, Row
from draftsmith.models import DraftLimits, Target
from draftsmith.models.judge import WITH_OPINION, Judge, JudgeConfig, load_judge
from draftsmith.models.tree.shapes import parse_shape

PROMPTS = [[1, 5, 9, 11, 4], [1, 7], [1, 8, 8, 8, 30, 31, 32], [1, 3, 4], [1, 40], [1, 41, 42, 43]]
SAMPLES = [Sample(f"p{number}", "", tuple(prompt)) for number, prompt in enumerate(PROMPTS)]
SETTINGS = [Setting(shape, threshold) for shape in ("1x3", "1x5") for threshold in (0.3, 0.5, 0.9)]
CLOCK = ("seconds_per_token", "times_plain", "said")


@dataclass
class Watch:
    """Notes what is decoded and checked, and ends the process' life at a check.

    Attributes:
        last: the check, counted from 1, at which life ends; None for none.
        decoded: request ids, for each answer of an engine that is given a list of prompts.
        checked: how many answers were checked.
    """

    last: int | None = None
    decoded: list[int] = field(default_factory=list)
    checked: int = 0

    def begin(self, last: int | None = None) -> None:
        self.last, self.decoded, self.checked = last, [], 0

    def check(self) -> None:
        self.checked += 1
        if self.checked == self.last:
            raise KeyboardInterrupt

    def is_right(self, number: int, text: str) -> bool:
        """As good as any other opinion: another text is right in another case."""
        self.check()
        return (number + sum(map(int, text.split()))) % 3 > 0


class ScriptedEngine:
    """Answers in no time: each problem by what number, shape and rule come to. Answers end in another order than they begin."""

    watch: ClassVar[Watch]

    def __init__(
        self,
        target: object,
        drafter: object = None,
        limits: DraftLimits | None = None,
        *,
        rule: LossyRule | None = None,
        compile: str = "auto",
    ) -> None:
        self.way = way_of(limits, rule)
        self.accepts = 0 if limits is None else 1 if rule is None else 1 + round(10 * rule.threshold)

    def stream(
        self, prompts: list[tuple[int, list[int]]], settings: GenerationSettings, num_rows: int, room: int
    ) -> Iterator[tuple[int, Generation]]:
        for index in [*range(1, len(prompts)), 0]:
            number = prompts[index][0]
            self.watch.decoded.append(number)
            yield index, self.answer(number)

    def generate(self, prompts: list[list[int]], settings: object, request_ids: list[int], **more: object) -> Any:
        return [self.answer(number) for number in request_ids]

    def answer(self, number: int) -> Generation:
        tokens = [zlib.crc32(f"{number} {self.way} {place}".encode()) % 100 for place in range(4)]
        return Generation(tokens, "eos", [self.accepts, number % 2], [3, 3], [1])


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    """Of scripted engines."""
    noted = Watch()
    monkeypatch.setattr(ScriptedEngine, "watch", noted, raising=False)
    for module in ("sweep", "lossy"):
        monkeypatch.setattr(f"draftsmith.evaluate.lossy.{module}.Engine", ScriptedEngine)
    return noted


@pytest.fixture
def engine_watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    """Of the engines that decode."""
    noted, stream = Watch(), Engine.stream

    def watched(engine: Engine, prompts: Any, *rest: Any, **more: Any) -> Iterator[Any]:
        ids = [request for request, _ in prompts] if isinstance(prompts, list) else None
        for index, reply in stream(engine, prompts, *rest, **more):
            if ids is not None:
                noted.decoded.append(ids[index])
            yield index, reply

    monkeypatch.setattr(Engine, "stream", watched)
    return noted


def judge_of(seed: int = 4) -> Judge:
    """Of a target with 8 numbers in a state."""
    head = Judge(JudgeConfig(8))
    with torch.no_grad():
        head.weight.copy_(torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(seed)))
    return head.eval()


class UncheckedSweep(Sweep):
    """There is no target to compare with."""

    def _check(self, settings: Sequence[Setting]) -> None:
        pass


@dataclass(frozen=True)
class Tuning:
    """A sweep with its work file."""

    watch: Watch
    judged: bool = True

    def run(
        self, work: Path, settings: Sequence[Setting] = tuple(SETTINGS), judge: Judge | None = None, looks: int = 3
    ) -> list[dict[str, Any]]:
        """The trials, without what a clock says."""
        is_right = self.watch.is_right if self.judged else None
        fakes: Any = (None, None, Words())
        contest = Contest(*fakes, SAMPLES, GenerationSettings(max_new_tokens=12), is_right, {}, {"seed": 2})
        with kept_answers(work, contest.facts, self.judged) as kept:
            sweep = UncheckedSweep(contest, judge or judge_of(), (), 0.9, looks, 2, agreement, 1, kept)
            trials = [asdict(trial) for trial in sweep.run(settings)]
        return [{name: value for name, value in trial.items() if name not in CLOCK} for trial in trials]

    def kill(self, work: Path, at: int, **more: Any) -> None:
        self.watch.begin(at)
        with pytest.raises(KeyboardInterrupt):
            self.run(work, **more)
        self.watch.begin()


class Words:
    """Writes token ids as they are."""

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return " ".join(map(str, ids))


@pytest.fixture
def tuning(watch: Watch) -> Tuning:
    return Tuning(watch)


def answers_in(work: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in work.read_text().splitlines()][1:]


def test_a_sweep_killed_at_any_check_ends_as_an_undisturbed_one_and_decodes_and_checks_nothing_twice(
    tuning: Tuning, watch: Watch, tmp_path: Path
) -> None:
    work = tmp_path / "work.jsonl"
    whole = tuning.run(work)
    total = len(watch.decoded)
    assert total == watch.checked > 2 * len(PROMPTS)
    assert len({(trial["right"], trial["accepted"]) for trial in whole}) > 2
    for killed_at in range(1, total + 1, 4):
        tuning.kill(work, killed_at)
        assert work.exists() == (killed_at > 1)
        assert killed_at == 1 or len(answers_in(work)) == killed_at - 1
        assert tuning.run(work) == whole
        assert len(watch.decoded) == watch.checked == total - (killed_at - 1)
        assert not work.exists()


def test_a_sweep_killed_again_and_again_ends_as_an_undisturbed_one(tuning: Tuning, tmp_path: Path) -> None:
    work = tmp_path / "work.jsonl"
    whole = tuning.run(work)
    total = len(tuning.watch.decoded)
    for start in range(total // 7):
        tuning.kill(work, 8)
        assert len(answers_in(work)) == 7 * (start + 1)
    assert tuning.run(work) == whole
    assert len(tuning.watch.decoded) == total % 7


def test_a_sweep_killed_in_its_race_decodes_the_race_alone(
    tuning: Tuning, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "work.jsonl"
    whole = tuning.run(work)

    def die(*args: object, **more: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("draftsmith.evaluate.lossy.sweep.race", die)
        tuning.kill(work, 0)
    assert tuning.run(work) == whole
    assert tuning.watch.decoded == []


def test_without_a_checker_no_verdict_is_kept_and_the_agreement_is_the_same(
    watch: Watch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuning, work = Tuning(watch, judged=False), tmp_path / "work.jsonl"
    whole = tuning.run(work)
    keep, num_kept = KeptAnswers.keep, 0

    def die(kept: KeptAnswers, *answer: Any) -> None:
        nonlocal num_kept
        keep(kept, *answer)
        num_kept += 1
        if num_kept == 19:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(KeptAnswers, "keep", die)
        tuning.kill(work, 0)
    assert {row["right"] for row in answers_in(work)} == {None}
    assert tuning.run(work) == whole


def test_an_answer_torn_by_the_kill_is_given_again_and_what_is_used_again_is_said_once(
    tuning: Tuning, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work = tmp_path / "work.jsonl"
    whole = tuning.run(work)
    total = len(tuning.watch.decoded)
    assert "earlier start" not in capsys.readouterr().out
    tuning.kill(work, 9)
    work.write_bytes(work.read_bytes()[:-7])
    assert tuning.run(work) == whole
    assert len(tuning.watch.decoded) == total - 7
    assert capsys.readouterr().out.count(f"{work}: 7 answers of an earlier start are used again\n") == 1


def test_other_settings_and_another_judge_use_the_lossless_answers_again(
    tuning: Tuning, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work, own, other = tmp_path / "work.jsonl", [Setting("1x3", 0.5)], judge_of(seed=5)
    changes: list[dict[str, Any]] = [{"settings": [Setting("1x3", 0.6)]}, {"settings": own, "judge": other}]
    for change in changes:
        whole = tuning.run(work, **change)
        total = len(tuning.watch.decoded)
        tuning.kill(work, 9, settings=own)  # 6 lossless answers, and 2 of the setting
        capsys.readouterr()
        assert tuning.run(work, **change) == whole
        assert len(tuning.watch.decoded) == total - 6
        said = "6 answers of an earlier start are used again, 2 of other settings are not\n"
        assert f"{work}: {said}" in capsys.readouterr().out
        tuning.watch.begin()


def test_answers_that_depend_on_something_else_are_an_error_and_stay(tuning: Tuning, tmp_path: Path) -> None:
    work = tmp_path / "work.jsonl"
    tuning.kill(work, 5)
    before = work.read_bytes()
    told = r"work\.jsonl holds answers of another run \(seed: there 2, now 3\).*delete the file, or name another folder"
    with pytest.raises(ValueError, match=told), kept_answers(work, {"seed": 3}, judged=True):
        pass
    assert work.read_bytes() == before


def test_a_run_that_ends_before_its_first_answer_keeps_no_other_run_out(tmp_path: Path) -> None:
    path = tmp_path / "work.jsonl"
    for seed in (0, 1):
        with pytest.raises(ValueError, match="bad shape"), kept_answers(path, {"seed": seed}, judged=True):
            raise ValueError("bad shape")
        assert not path.exists()
    for left in ('{"answers_of": {"seed": 0}}\n', '{"answers_of": {"se', ""):
        path.write_text(left)
        with kept_answers(path, {"seed": 1}, judged=True):
            pass
        assert not path.exists()


def test_a_file_of_the_users_under_the_name_of_the_work_file_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "work.jsonl"
    text = '{"to do": "water the plants"}\n{"torn'
    path.write_text(text)
    with pytest.raises(ValueError, match="was not written by this command"), kept_answers(path, {}, judged=True):
        pass
    assert path.read_text() == text


def test_a_line_of_other_fields_is_an_error_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "work.jsonl"
    path.write_text('{"answers_of": {}}\n{"way": "plain", "problem": 0}\n')
    with pytest.raises(ValueError, match=r"work\.jsonl:2: .*delete the line"), kept_answers(path, {}, judged=True):
        pass


def test_ways_of_decoding_differ_in_whatever_decides() -> None:
    head, other = judge_of(), judge_of(seed=5)
    shut = head.with_threshold(0.6)
    rules: list[LossyRule | None] = [None, TopK(2), TopK(3), *map(JudgeRule, (head, shut, other))]
    rules += [JudgeRule(shut.with_gate("reply", veto)) for veto in (False, True)]
    rules += [JudgeRule(shut.with_gate("line", False, ends)) for ends in ([7], [7, 8])]
    limits = [parse_shape("1x3"), parse_shape("1x4")]
    ways = [way_of(None, None), *(way_of(limit, rule) for limit in limits for rule in rules)]
    assert len(set(ways)) == len(ways)
    assert way_of(limits[0], JudgeRule(judge_of())) == way_of(limits[0], JudgeRule(head))


class Tally(ProgressMeter):
    """Notes what was done and the total, as the meter shows them."""

    def start(self) -> None:
        self.seen = [(self._before, self._total)]

    def advance(self, count: int, note: str | None = None) -> None:
        self._now += count
        self.seen.append((self._before + self._now, self._total))

    def forgo(self, count: int) -> None:
        super().forgo(count)
        self.seen.append((self._before + self._now, self._total))


@pytest.mark.parametrize(("killed_at", "looks"), [(None, 3), (30, 3), (30, 2)])
def test_the_progress_counts_answers_alone_and_its_total_falls_when_a_setting_stops(
    tuning: Tuning, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: int | None, looks: int
) -> None:
    """With other looks than before, kept answers of settings that stop earlier now are not used; they count as done all the same."""
    meters: list[Tally] = []

    @contextmanager
    def metered(title: str, total: int, unit: str, done: int) -> Iterator[ProgressMeter]:
        meters.append(Tally(title, total, unit, done))
        meters[-1].start()
        yield meters[-1]

    before, work = 0, tmp_path / "work.jsonl"
    if killed_at is not None:
        tuning.kill(work, killed_at)
        before = killed_at - 1
    monkeypatch.setattr("draftsmith.evaluate.lossy.sweep.metered", metered)
    trials = tuning.run(work, looks=looks)
    assert any(trial["stopped"] for trial in trials)
    meter = meters[0]  # the race has one of its own
    assert meter.seen[0] == (before, (2 + len(SETTINGS)) * len(PROMPTS))
    assert all(done <= total for done, total in meter.seen if total is not None)
    assert meter.seen[-1] == (before + len(tuning.watch.decoded),) * 2


def test_a_comparison_of_rules_killed_at_any_check_ends_as_an_undisturbed_one(watch: Watch, tmp_path: Path) -> None:
    work = tmp_path / "work.jsonl"
    rules = [Ruled("lossless", None), Ruled("top-k", TopK(3)), Ruled("judge", JudgeRule(judge_of()))]
    fakes: Any = (None, None)

    def rows() -> list[dict[str, Any]]:
        with kept_answers(work, {}, judged=True) as kept:
            compared = compare(
                *fakes,
                parse_shape("1x3"),
                rules,
                SAMPLES,
                watch.is_right,
                Words().decode,
                GenerationSettings(max_new_tokens=12),
                timed_problems=1,
                batch_rows=2,
                kept=kept,
            )
        return [{name: value for name, value in row.to_json().items() if "speedup" not in name} for row in compared]

    whole, total = rows(), 4 * len(PROMPTS)
    assert len(watch.decoded) == watch.checked == total
    for killed_at in range(2, total + 1):
        watch.begin(killed_at)
        with pytest.raises(KeyboardInterrupt):
            rows()
        watch.begin()
        assert rows() == whole
        assert len(watch.decoded) == watch.checked == total - (killed_at - 1)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Four problems for the embedded pair, and a judge that finds nothing wrong with any token."""
    folder = tmp_path_factory.mktemp("files")
    write_prompts(folder / "train.jsonl", "train", 4)
    head = Judge(JudgeConfig(Target.load("embedded:target").ends.hidden_size, WITH_OPINION))
    with torch.no_grad():
        head.bias.fill_(20.0)
    head.save_pretrained(folder / "judge")
    return folder / "train.jsonl", folder / "judge"


def test_the_commands_resume_and_tell_another_run_apart(
    files: tuple[Path, Path],
    engine_watch: Watch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    watch, (prompts, judge) = engine_watch, files
    check = checkers._check_number

    def counted(row: Row, response: str) -> Checked:
        if response:  # an empty one probes the row
            watch.check()
        return check(row, response)

    monkeypatch.setattr(checkers, "_check_number", counted)
    fixed = {"target": "embedded:target", "drafter": "embedded:draft_lm", "prompts": prompts, "checker": "final-number"}
    fixed |= {"max_new_tokens": 24, "batch_rows": 2}
    commands: dict[str, dict[str, Any]] = {
        "tune": {"judge": judge, "thresholds": "[0.5]", "shapes": '["1x8"]', "looks": 2},
        "evaluate": {"rules": f'["lossless", "judge:{judge}@0.5"]', "shape": "1x8", "timed_problems": 1},
    }
    changes: list[tuple[dict[str, Any], str]] = [
        ({"seed": 1}, "settings.seed: there 0, now 1"),
        ({"limit": 3}, "problems_sha256"),
        ({"checker": "embedded", "drafter": "embedded:target"}, "checker: there "),
        ({"dtype": "bfloat16"}, "dtype: there 'float32', now 'bfloat16'"),
    ]
    for command, own in commands.items():

        def start(out: Path, command: str = command, own: dict[str, Any] = own, **change: Any) -> int:
            words = [(f"--{name}", str(value)) for name, value in (fixed | own | {"out": out} | change).items()]
            return main(["judge", command, *(word for pair in words for word in pair)])

        cut = tmp_path / command
        work = cut.with_name(f"tune.{WORK_FILE}") if command == "tune" else cut / WORK_FILE
        watch.begin(7)
        assert start(cut) == 130
        assert len(answers_in(work)) == 6
        watch.begin()
        for change, named in changes if command == "tune" else changes[:1]:
            assert start(cut, **change) == 1
            assert named in capsys.readouterr().err
        assert watch.decoded == []
        assert start(cut) == 0
        assert f"{work}: 6 answers of an earlier start are used again\n" in capsys.readouterr().out
        assert len(watch.decoded) == watch.checked
        assert not work.exists()
        resumed = watch.checked
        watch.begin()
        assert start(tmp_path / f"{command}-whole") == 0
        assert watch.checked == resumed + 6
        if command == "tune":
            both = [json.loads((folder / "tuning.json").read_text()) for folder in (cut, tmp_path / "tune-whole")]
            assert both[0] == both[1]
            heads = [load_judge(folder / "judge") for folder in (cut, tmp_path / "tune-whole")]
            assert heads[0].config.to_dict() == heads[1].config.to_dict()

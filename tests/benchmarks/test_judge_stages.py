"""The stages of the judge's benchmark: each runs once, side by side with others, after those that it needs."""

import json
import os
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks.judge import ablations, reports, tuned
from benchmarks.judge.end_to_end import FULL, LONGEST_PATH, planned
from benchmarks.judge.lanes import Stage, Stages, needed
from benchmarks.judge.reports import races
from benchmarks.judge.stages import write_problems
from draftsmith.files import read_jsonl


def noting(folder: Path, name: str, *after: str, seconds: float = 0.0) -> Stage:
    """A stage that writes down when it begins and ends."""

    def make() -> None:
        begun = time.monotonic()
        time.sleep(seconds)
        with (folder / name).open("a") as file:
            file.write(json.dumps([begun, time.monotonic()]) + "\n")

    return Stage(name, make, after)


def runs(folder: Path, name: str) -> list[tuple[float, float]]:
    return [tuple(json.loads(line)) for line in (folder / name).read_text().splitlines()]


def test_stages_run_once_and_after_those_that_they_need(tmp_path: Path) -> None:
    stages = Stages(tmp_path)
    plan = [noting(tmp_path, "c", "a", "b"), noting(tmp_path, "a", seconds=0.2), noting(tmp_path, "b")]
    stages.run(plan, at_once=3)
    stages.run(plan, at_once=3)
    (own,) = runs(tmp_path, "c")
    assert all(end <= own[0] for name in "ab" for _, end in runs(tmp_path, name))
    assert len(runs(tmp_path, "a")) == 1
    stages.run([*plan, noting(tmp_path, "d", "c")], at_once=3)
    assert [len(runs(tmp_path, name)) for name in "abcd"] == [1, 1, 1, 1]
    assert set(stages.spent()) == set("abcd")


def test_as_many_run_at_once_as_asked_for_and_the_clock_counts_them_together(tmp_path: Path) -> None:
    stages, names = Stages(tmp_path), ("a", "b", "c", "d")
    stages.run([noting(tmp_path, name, seconds=0.3) for name in names], at_once=2)
    spans = [span for name in names for span in runs(tmp_path, name)]
    at_once = [sum(begun <= start < end for begun, end in spans) for start, _ in spans]
    assert max(at_once) == 2
    spent = sum(each["seconds"] for each in stages.spent().values())
    assert spent > 1.2
    assert stages.clock_seconds() >= 0.6
    before = stages.clock_seconds()
    stages.run([noting(tmp_path, "e", seconds=0.1)])
    assert stages.clock_seconds() >= before + 0.1


def test_a_stage_computes_on_one_thread_and_its_processor_time_counts_its_children(tmp_path: Path) -> None:
    code = "import time\nwhile time.process_time() < 0.5: pass"

    def make() -> None:
        (tmp_path / "threads").write_text(str(torch.get_num_threads()))
        subprocess.run([sys.executable, "-c", code], check=True)

    Stages(tmp_path).run([Stage("busy", make)])
    assert (tmp_path / "threads").read_text() == "1"
    assert Stages(tmp_path).spent()["busy"]["processor_seconds"] >= 0.4, "the clock of processes ticks in hundredths"


@pytest.mark.parametrize(
    "fail",
    [
        pytest.param(lambda: sys.exit("no such problem"), id="exit"),
        pytest.param(lambda: int("no such problem"), id="error"),
        pytest.param(lambda: os._exit(os.system("echo no such problem") + 3), id="child's words"),
    ],
)
def test_a_stage_that_fails_is_quoted_and_runs_again(tmp_path: Path, fail: Callable[[], object]) -> None:
    stages = Stages(tmp_path)
    plan = [noting(tmp_path, "good"), Stage("bad", fail, ("good",)), noting(tmp_path, "next", "bad")]
    with pytest.raises(SystemExit, match=r"(?s)stage bad ended with [13]:.*no such problem"):
        stages.run(plan)
    assert set(stages.spent()) == {"good"}
    stages.run([noting(tmp_path, name) for name in ("good", "bad", "next")])
    assert len(runs(tmp_path, "good")) == 1
    assert set(stages.spent()) == {"good", "bad", "next"}


class Swallows:
    """Waits in its finaliser, where Python drops what a handler of signals raises."""

    def __init__(self, waits: Path) -> None:
        self.waits = waits

    def __del__(self) -> None:
        self.waits.touch()
        time.sleep(60)


@pytest.mark.parametrize("swallows", [pytest.param(False, id="heard"), pytest.param(True, id="first request lost")])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_failure_ends_the_stages_beside_it(tmp_path: Path, swallows: bool) -> None:
    def wait() -> None:
        if swallows:
            Swallows(tmp_path / "waits")
        (tmp_path / "waits").touch()
        time.sleep(60)

    def fail() -> None:
        while not (tmp_path / "waits").exists():
            time.sleep(0.01)
        sys.exit("over")

    started = time.monotonic()
    with pytest.raises(SystemExit, match="over"):
        Stages(tmp_path).run([Stage("waiting", wait), Stage("failing", fail)], at_once=2)
    assert time.monotonic() - started < 30


def test_a_stage_that_nothing_brings_about_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="b waits for a, which nothing brings about"):
        Stages(tmp_path).run([noting(tmp_path, "b", "a")])


def test_what_some_stages_need_is_picked_in_the_order_of_the_plan(tmp_path: Path) -> None:
    plan = [noting(tmp_path, *names) for names in (("d", "c"), ("c", "a"), ("b", "a"), ("a",), ("e", "b", "d"))]
    assert [stage.name for stage in needed(plan, ["d"])] == ["d", "c", "a"]
    assert [stage.name for stage in needed(plan, ["b", "c"])] == ["c", "b", "a"]
    assert needed(plan, ["e"]) == plan


def options(**values: object) -> Namespace:
    """What a command without options gives, but for these."""
    return Namespace(**{"scale": 1.0, "people": False, "without": [], "ablations": None, "data": Path()} | values)


@pytest.mark.parametrize("without", [[], ["first-errors", "out-of-domain"]])
@pytest.mark.parametrize("people", [False, True])
@pytest.mark.parametrize("ablated", [None, "beside"])
def test_the_plan_makes_all_that_its_stages_need_without_circles(
    tmp_path: Path, without: list[str], people: bool, ablated: str | None
) -> None:
    judges, plan = planned(tmp_path, FULL, options(people=people, without=without, ablations=ablated))
    names = [stage.name for stage in plan] + [stage.name for stage in races(tmp_path)]
    assert len(set(names)) == len(names)
    assert set(LONGEST_PATH) <= set(names)
    done: set[str] = set()
    while left := [stage for stage in plan if stage.name not in done]:
        ready = [stage.name for stage in left if done.issuperset(stage.after)]
        assert ready, [stage.name for stage in left]
        done.update(ready)
    assert ("no division" in judges) == (not without)
    assert ("report-division" in names) == (not without)
    assert (ablations.REPORT in names) == ("answers-more" in names) == (ablated is not None)


def test_ablations_alone_leave_out_rounds_heads_and_the_price(tmp_path: Path) -> None:
    _, plan = planned(tmp_path, FULL, options(ablations="alone"))
    names = {stage.name for stage in needed(plan, [ablations.REPORT])}
    assert {"train-corrupted-50", "train-corrupted-1500", "train-mined", "cache-checker-more"} <= names
    assert not names & {"rounds", "report", "report-judges", "replies", "train-eagle", "tune-draft_lm", "train-people"}


def test_reports_of_the_embedded_pair_do_not_ask_the_judge_of_another_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(reports, "count_answers", lambda work, name, drafter, shape, rules, **rest: asked.extend(rules))
    judges, plan = planned(tmp_path, FULL, options(people=True))
    next(stage for stage in plan if stage.name == "report-judges").make()
    assert any("mined" in rule for rule in asked)
    assert not [rule for rule in asked if "people" in rule]
    assert any("people" in name for name in judges)


def test_each_judge_of_the_ablations_is_measured_where_tuning_leaves_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: dict[Path, tuple[Path, tuple[float, ...]]] = {}
    asked: list[str] = []

    def tune(target: str, drafter: str, judge: Path, prompts: Path, out: Path, **rest: object) -> None:
        assert prompts.name == "tuning.jsonl"
        written[out / "judge"] = judge, rest["sweep"].thresholds  # type: ignore[attr-defined]

    monkeypatch.setattr(tuned, "tune_judge", tune)
    monkeypatch.setattr(
        ablations, "count_answers", lambda work, name, drafter, shape, rules, **rest: asked.extend(rules)
    )
    plan = ablations.ablations(tmp_path, 1.0)
    for stage in plan:
        if stage.name.startswith("tune-") or stage.name == ablations.REPORT:
            stage.make()
    folders = ablations.compared(tmp_path)
    expected = ["lossless", f"1500 questions=judge:{folders['1500 questions']}"]
    for name, folder in folders.items():
        (own,) = [out for out, (judge, _) in written.items() if judge == folder]
        expected.append(f"{name}, tuned=judge:{own}")
        wanted = ablations.MINED_THRESHOLDS if name == "mined" else ablations.THRESHOLDS
        assert written[own][1] == wanted
    assert asked == expected
    assert set(written) == {ablations.tuned_folder(tmp_path, folder) / "judge" for folder in folders.values()}


def test_more_training_problems_are_none_that_anything_is_tuned_or_trained_on(tmp_path: Path) -> None:
    write_problems(tmp_path, {"test": 8, "held": 8, "train": 300, "mine": 20, "rounds": 20, "tuning": 40})
    plan = ablations.ablations(tmp_path, 0.1)
    next(stage for stage in plan if stage.name == "problems-more").make()
    ids = {
        name: [row["id"] for _, row in read_jsonl(tmp_path / f"{name}.jsonl")]
        for name in ("train", "mine", "rounds", "tuning", "more")
    }
    assert len(ids["more"]) > 300
    together = [each for part in ids.values() for each in part]
    assert len(set(together)) == len(together)

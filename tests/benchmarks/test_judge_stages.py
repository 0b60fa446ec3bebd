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

from benchmarks.judge.end_to_end import FULL, LONGEST_PATH, planned
from benchmarks.judge.lanes import Stage, Stages
from benchmarks.judge.reports import races


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


def test_a_failure_ends_the_stages_beside_it(tmp_path: Path) -> None:
    def wait() -> None:
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


@pytest.mark.parametrize("without", [[], ["first-errors", "out-of-domain"]])
@pytest.mark.parametrize("people", [False, True])
def test_the_plan_makes_all_that_its_stages_need_without_circles(
    tmp_path: Path, without: list[str], people: bool
) -> None:
    options = Namespace(scale=1.0, people=people, without=without, data=tmp_path)
    judges, plan = planned(tmp_path, FULL, options)
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

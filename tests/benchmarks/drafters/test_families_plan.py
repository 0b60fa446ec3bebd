"""What `make bench` would do and write: every family within the hour, in shapes that it can draft. Nothing is trained."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.drafters import families
from benchmarks.drafters.families_plan import (
    DEFAULT,
    FAMILY_RECIPES,
    FEWEST_SECONDS,
    FULL,
    FULL_ALONE,
    OTHER_TARGETS,
    Bench,
    fitted,
    jobs,
)
from draftsmith.embedded import path
from draftsmith.models.drafters.drafter_folder import load_drafter
from draftsmith.models.drafters.registry import all_families
from draftsmith.models.target.target import TargetEnds
from draftsmith.models.tree.shapes import parse_shape

BENCHES = [Bench("embedded", "embedded:target", 200, 60.0, 24, rate=188.0), Bench("chat-6m", "chat-6m", 200, 120.0, 24)]


@pytest.mark.parametrize("benches", [BENCHES, BENCHES[:1]], ids=["both targets", "one"])
def test_the_default_ends_within_the_hour_and_trains_each_drafter_long_enough(benches: list[Bench]) -> None:
    fitting = fitted(benches, DEFAULT, 60.0)
    assert sum(job.seconds for job in jobs(fitting, DEFAULT, full=False)) <= 0.9 * 3600 + 1e-6
    for bench, wanted in zip(fitting, benches, strict=True):
        assert FEWEST_SECONDS <= bench.seconds <= wanted.seconds
        assert replace(bench, seconds=wanted.seconds) == wanted


def test_less_time_shortens_the_trainings_and_too_little_is_an_error() -> None:
    long, short = (fitted(BENCHES, DEFAULT, minutes)[1].seconds for minutes in (60.0, 55.0))
    assert short < long
    with pytest.raises(ValueError, match="give more --minutes, fewer --targets or fewer --drafters"):
        fitted(BENCHES, DEFAULT, 20.0)


def test_every_family_and_every_recipe_has_its_place() -> None:
    trained = {entry.recipe.family.kind for entry in DEFAULT if entry.recipe is not None}  # type: ignore[attr-defined]
    own = {
        family.name: family.drafter for family in all_families() if family.drafter.__module__.startswith("draftsmith.")
    }
    assert {name for name, kind in own.items() if kind not in trained} == {*OTHER_TARGETS, *FULL_ALONE}
    assert {entry.name for entry in FULL} == {*FAMILY_RECIPES, "suffix"}
    assert {entry.name for entry in DEFAULT} <= {entry.name for entry in FULL}


@pytest.mark.parametrize("entry", FULL, ids=lambda entry: entry.name)
def test_every_drafter_can_draft_its_shapes(entry: families.Entry) -> None:
    ends = TargetEnds.load(str(path("target")))
    if entry.recipe is None:
        drafter = load_drafter(Path(entry.folder))
    else:
        drafter = entry.recipe.family(**entry.recipe.options).build(ends, None, entry.recipe.module["num_steps"], "")
    shapes = [*entry.shapes.split(","), *entry.warm.split(",")]
    short = next(each for each in DEFAULT if each.name == entry.name).shapes.split(",") if entry in DEFAULT else []
    for shape in (*shapes, *short):
        if "{static}" not in shape:
            drafter.check_depth(parse_shape(shape))


def test_the_plan_is_printed_and_nothing_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "families",
        "--plan",
        "--data",
        str(tmp_path),
        "--work",
        str(tmp_path / "work"),
        "--out",
        str(tmp_path / "out"),
    ]
    monkeypatch.setattr(sys, "argv", words)
    assert families.main() == 0
    printed = capsys.readouterr().out
    for entry in DEFAULT:
        assert (f"| embedded | train {entry.name} |" in printed) == (entry.recipe is not None)
    assert "chat-6m" not in printed, "its data is not there"
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_drafter_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        families._options(["--drafters", "eagle,falcon"])
    assert "--drafters has falcon; there are redrafter, eagle" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--scale", "0.5"], ["--full"]])
def test_minutes_beside_a_scale_or_all_recipes_are_an_error(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        families._options(["--minutes", "5", *words])
    assert "--minutes plans a run of the usual size" in capsys.readouterr().err


def test_a_run_writes_one_page_one_file_of_rows_and_the_table(tmp_path: Path) -> None:
    results, out = tmp_path / "results.md", tmp_path / "out"
    results.write_text(f"before\n{families.MARKS[0]}\nold\n{families.MARKS[1]}\nbehind\n")
    out.mkdir()
    row = {"drafter": "eagle", "shape": "1x4", "tokens_per_step": 2.5, "speedup": 1.5, "exact_share": 1.0}
    options = argparse.Namespace(out=out, name="today-families", results=results)
    families.publish(["# Every family"], {"embedded": {"seconds": [row]}}, options)
    assert sorted(path.name for path in out.iterdir()) == ["today-families.json", "today-families.md"]
    assert json.loads((out / "today-families.json").read_text())["rows"] == [row]
    assert "| embedded | eagle | 1x4 | 2.50 | 1.50 | all |" in results.read_text()
    assert "old" not in results.read_text()

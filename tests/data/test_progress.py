"""Lines of a log file: what they say, and that long work is never silent."""

import time

import pytest

from draftsmith.data import progress as module
from draftsmith.data.progress import ProgressMeter, metered, progress


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line every 50 ms instead of every 30 s."""
    monkeypatch.setattr(module, "LINE_EVERY_SECONDS", 0.05)


def test_a_unit_that_takes_long_gets_lines_that_say_what_is_done(
    quick: None, capsys: pytest.CaptureFixture[str]
) -> None:
    with metered("evaluate T=0", 96, "replies") as meter:
        meter.say("mine 2x3 warms up, untimed")
        time.sleep(0.3)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) >= 2, "nothing was done, and still there is a line now and then"
    assert set(lines) == {"evaluate T=0: 0 of 96 replies, 0 s so far, mine 2x3 warms up, untimed"}


def test_what_an_earlier_run_did_is_in_the_total_and_not_in_the_rate(
    quick: None, capsys: pytest.CaptureFixture[str]
) -> None:
    with progress("extract", 1_200, "tokens", done=1_000) as advance:
        time.sleep(0.2)
        advance(100)
        time.sleep(0.2)
    *_, latest, last = capsys.readouterr().err.splitlines()
    _, done, rate, left = latest.replace("1,", "1").replace(",", ":").split(": ")
    assert done == "1100 of 1200 tokens"
    assert 100 / 2 < float(rate.removesuffix(" tokens/s")) < 100 / 0.2
    assert left == "0 s left"
    assert last.startswith("extract: 100 tokens in 0.")


def test_quick_work_gets_its_last_line_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("project", 3, "samples") as advance:
        for _ in range(3):
            advance(1)
    assert [line.split(" in ")[0] for line in capsys.readouterr().err.splitlines()] == ["project: 3 samples"]


def test_a_meter_that_is_stopped_says_nothing_more(quick: None, capsys: pytest.CaptureFixture[str]) -> None:
    meter = ProgressMeter("train", None, "steps")
    meter.start()
    meter.stop()
    capsys.readouterr()
    time.sleep(0.15)
    assert capsys.readouterr().err == ""


def test_brief_work_is_silent_unless_it_takes_long(quick: None, capsys: pytest.CaptureFixture[str]) -> None:
    with progress("check the shards", 3, "shards", brief=True) as advance:
        advance(3)
    assert capsys.readouterr().err == ""
    with progress("check the shards", 3, "shards", brief=True) as advance:
        time.sleep(0.2)
        advance(3)
    first, *_, last = capsys.readouterr().err.splitlines()
    assert first == "check the shards: 0 of 3 shards, 0 s so far"
    assert last.startswith("check the shards: 3 shards in 0.")

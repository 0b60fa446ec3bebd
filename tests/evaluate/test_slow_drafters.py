"""The line about a drafter that does not pay."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from draftsmith.decode.sampling import DrawOptions, ReplyOptions
from draftsmith.evaluate.measure import Plan
from draftsmith.evaluate.records import Row
from draftsmith.evaluate.report import to_markdown
from draftsmith.evaluate.slow_drafters import slow_drafters, slow_shapes
from draftsmith.evaluate.tune.tune_command import TimingOptions

RowMaker = Callable[..., Row]


def plain_row(make_row: RowMaker, **changes: object) -> Row:
    return make_row(drafter="plain", shape="", speedup=1.0, **changes)


def lookup_row(make_row: RowMaker, speedup: float, **changes: object) -> Row:
    return make_row(drafter="transformers prompt lookup 3", shape="", speedup=speedup, **changes)


def test_a_drafter_slower_than_plain_decoding_is_named_with_what_to_try(make_row: RowMaker) -> None:
    [line] = slow_drafters([plain_row(make_row), make_row(speedup=0.8)])
    assert "redrafter 1x4 at T = 0 decodes at 0.80 times the speed of plain decoding" in line
    assert "prompt lookup" not in line
    assert "train longer" in line
    assert "`draftsmith tune`" in line
    assert "trained for less than a minute" in line


def test_a_drafter_slower_than_prompt_lookup_is_named_too(make_row: RowMaker) -> None:
    [line] = slow_drafters([plain_row(make_row), lookup_row(make_row, 1.5), make_row(speedup=1.2)])
    assert "0.80 times the speed of prompt lookup" in line
    assert "plain decoding" not in line
    [line] = slow_drafters([plain_row(make_row), lookup_row(make_row, 1.0), make_row(speedup=0.5)])
    assert "0.50 times the speed of plain decoding and 0.50 times the speed of prompt lookup" in line


def test_a_trained_head_slower_than_a_drafter_without_weights_is_named(make_row: RowMaker) -> None:
    suffix = make_row(drafter="suffix", shape="1x16", speedup=1.5, parameters=0)
    [line] = slow_drafters([plain_row(make_row), suffix, make_row(speedup=1.2, parameters=9)])
    assert "redrafter 1x4 at T = 0 decodes at 0.80 times the speed of suffix 1x16, which needs no training" in line
    assert slow_drafters([suffix, make_row(speedup=1.6, parameters=9)]) == []
    assert slow_drafters([suffix, make_row(drafter="phrases", speedup=1.2, parameters=0)]) == [], "neither was trained"
    assert slow_drafters([suffix, make_row(speedup=1.2, parameters=9, temperature=1.0)]) == []


def test_a_fast_drafter_gets_no_line(make_row: RowMaker) -> None:
    assert slow_drafters([plain_row(make_row), lookup_row(make_row, 1.1), make_row(speedup=1.2)]) == []


def test_only_the_fastest_shape_of_a_drafter_counts(make_row: RowMaker) -> None:
    shapes = [make_row(speedup=0.9, shape="1x8"), make_row(speedup=1.3, shape="1x2")]
    assert slow_drafters(shapes) == []
    [line] = slow_drafters([replace(row, speedup=row.speedup / 2) for row in shapes])
    assert "redrafter 1x2 at T = 0 decodes at 0.65 times" in line


def test_each_temperature_and_drafter_is_judged_by_itself(make_row: RowMaker) -> None:
    rows = [
        lookup_row(make_row, 2.0, temperature=1.0),
        make_row(speedup=1.5),
        make_row(speedup=1.5, temperature=1.0),
        make_row(speedup=0.7, drafter="eagle"),
    ]
    lines = slow_drafters(rows)
    assert len(lines) == 2
    assert any("T = 1 decodes at 0.75 times the speed of prompt lookup" in line for line in lines)
    assert any("eagle" in line and "plain decoding" in line for line in lines)
    assert ["To try" in line for line in lines] == [False, True], "the advice is the same for all"


def test_the_report_carries_the_line_as_text(make_row: RowMaker) -> None:
    assert "\n\nSlow: red\\|r 1x4 at T = 0" in to_markdown("", {}, {}, [make_row(speedup=0.8, drafter="red|r")])
    assert "`draftsmith tune`" in to_markdown("", {}, {}, [make_row(speedup=0.8)])
    assert "Slow:" not in to_markdown("", {}, {}, [make_row()])


def test_a_grid_without_a_shape_that_pays_says_so() -> None:
    [line] = slow_shapes(0.9)
    assert "the fastest shape of this grid would decode at 0.90 times the speed of plain decoding." in line
    assert "trained for less than a minute" in line
    assert slow_shapes(1.0) == []


def test_a_grid_whose_best_shape_is_slower_than_prompt_lookup_says_so() -> None:
    [line] = slow_shapes(1.2, lookup=1.5)
    assert "would decode at 0.80 times the speed of prompt lookup, which needs no training" in line
    assert "plain decoding" not in line
    assert slow_shapes(1.2, lookup=1.2) == []


def test_both_commands_print_the_line(
    tmp_path: Path,
    target: Path,
    drafter: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A shape that drafts far ahead with random weights cannot pay."""
    from draftsmith.evaluate.command import evaluate
    from draftsmith.evaluate.tune_command import tune

    mine = tmp_path / "mine"  # tune keeps its shapes there
    shutil.copytree(drafter, mine)
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(f'{{"id": "p{n}", "prompt_ids": [{4 + n}, 9, 30, 5], "source": "s"}}\n' for n in range(2)))
    evaluate(
        str(target),
        file,
        tmp_path / "report",
        drafters=[f"mine={mine}@1x8"],
        reply=ReplyOptions(max_new_tokens=12),
        plan=Plan(transformers_prompts=0, ledger_prompts=0),
    )
    assert "Slow: mine 1x8 at T = 0 decodes at " in capsys.readouterr().out
    tune(
        str(target),
        f"mine={mine}",
        file,
        tmp_path / "tune",
        widths=[1],
        depths=[8],
        nodes=[8],
        draw=DrawOptions(max_new_tokens=12),
        timing=TimingOptions(rounds=1),
    )
    assert "Slow: the fastest shape of this grid would decode at " in capsys.readouterr().out
    timed = json.loads((tmp_path / "tune" / "tune.json").read_text())["prompt_lookup_speedup"]
    assert timed > 0
    assert f"measured at {timed:.2f} times the speed of plain decoding" in (tmp_path / "tune" / "tune.md").read_text()


def test_prompt_lookup_is_timed_by_default_where_one_prompt_is_decoded_at_a_time() -> None:
    assert Plan().lookup_tokens == TimingOptions().lookup_tokens == 5
    assert Plan(batch_size=2).lookup_tokens == TimingOptions(batch_size=2).lookup_tokens == 0
    assert Plan(transformers_prompts=0).lookup_tokens == 0
    assert Plan(prompt_lookup=0).lookup_tokens == TimingOptions(prompt_lookup=0).lookup_tokens == 0
    with pytest.raises(ValueError, match="needs batch_size 1"):
        TimingOptions(prompt_lookup=3, batch_size=2)

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from draftsmith.evaluate.records import Divergence, Row, Slice
from draftsmith.evaluate.report import read_rows, to_json, to_markdown, write_report, write_scalars
from draftsmith.evaluate.roofline.roofline import Roofline

RowMaker = Callable[..., Row]

KEYS = {
    "target",
    "drafter",
    "temperature",
    "prompts",
    "exact_share",
    "tokens_per_step",
    "tokens_per_step_interval",
    "speedup",
    "tokens_per_second",
    "baseline_tokens_per_second",
    "transformers_tokens_per_second",
}


def test_json_has_the_promised_keys_and_no_others_on_top(make_row: RowMaker) -> None:
    report = json.loads(to_json("draftsmith evaluate", {"cpu": "x"}, {"torch": "2"}, [make_row()]))
    assert list(report) == ["command", "machine", "versions", "rows"]
    assert set(report["rows"][0]) >= KEYS
    assert report["rows"][0]["tokens_per_step_interval"] == [2.9, 3.3]
    assert report["rows"][0]["acceptance_by_depth"][0]["depth"] == 1


def test_json_writes_null_for_what_has_no_value(make_row: RowMaker) -> None:
    row = make_row(speedup_median=float("nan"), tokens_per_step=None)
    written = json.loads(to_json("", {}, {}, [row]))["rows"][0]
    assert written["speedup_median"] is None
    assert written["tokens_per_step"] is None


def test_markdown_flags_a_suspicious_row_in_the_table_and_in_words(make_row: RowMaker) -> None:
    text = to_markdown("", {}, {}, [make_row(speedup=3.5, tokens_per_step=3.1, suspicious=True)])
    assert "3.50 (1.70 to 1.90) (suspicious)" in text
    assert "**Suspicious:** `redrafter 1x4` at T = 0 is 3.50 times faster with only 3.10 tokens per step" in text
    assert "uspicious" not in to_markdown("", {}, {}, [make_row()])


def test_foreign_names_are_text_in_the_report(make_row: RowMaker) -> None:
    row = make_row(drafter="a|b [x](http://e) \x1b[31m", target="t`u", suspicious=True)
    text = to_markdown("evil\n```\n# head", {"cpu": "<img>"}, {}, [row])
    assert "| a\\|b \\[x\\](http\\://e) \\\\x1b\\[31m 1x4 | 0 |" in text
    assert "Target ``t`u``," in text
    assert "````sh\nevil\n```\n# head\n````" in text
    assert "- cpu: \\<img\\>" in text
    assert "\x1b" not in text


def test_markdown_never_rounds_up_to_all_identical(make_row: RowMaker) -> None:
    assert "| 99.9 % |" in to_markdown("", {}, {}, [make_row(exact_share=0.9999)])
    assert "| 100 % |" in to_markdown("", {}, {}, [make_row(exact_share=1.0)])


def test_markdown_reports_looping_replies_apart(make_row: RowMaker) -> None:
    part = Slice("looping", "yes", 3, 380, 4.8, (4.7, 4.9), 2.9)
    assert "| redrafter 1x4 | 0 | looping: yes | 3 | 380 | 4.80 (4.70 to 4.90) | 2.90 |" in to_markdown(
        "", {}, {}, [make_row(slices=(part,))]
    )


def test_shapes_that_differ_in_their_budget_alone_have_names_of_their_own(make_row: RowMaker) -> None:
    assert make_row(shape="10x4n16").label == "redrafter 10x4n16"
    assert make_row(shape="1x4p0.1").label == "redrafter 1x4p0.1"


def test_markdown_names_replies_that_differ(make_row: RowMaker) -> None:
    text = to_markdown("", {}, {}, [make_row(divergences=(Divergence("p7", 12, 5, 6, 1e-6),))])
    assert "prompt `p7`, token 12: plain 5, got 6; the target's logits are 1e-06 apart" in text


def test_markdown_says_how_the_baseline_compares_with_transformers(make_row: RowMaker) -> None:
    plain = make_row(drafter="plain", shape="", beam_width=None, draft_length=None, acceptance_by_depth=(), speedup=1.0)
    assert "the engine decodes plainly at 1.05 times the speed of `transformers.generate` (380 tokens/s" in to_markdown(
        "", {}, {}, [plain]
    )


def test_rows_read_back_are_the_rows_written(tmp_path: Path, make_row: RowMaker) -> None:
    write_report(tmp_path / "new" / "place", "cmd", {}, {}, [make_row(), make_row(drafter="other")], chart=b"png")
    assert [row["drafter"] for row in read_rows(tmp_path / "new" / "place" / "report.json")] == ["redrafter", "other"]
    assert (tmp_path / "new" / "place" / "report.png").read_bytes() == b"png"
    assert "](report.png)" in (tmp_path / "new" / "place" / "report.md").read_text()


@pytest.mark.parametrize(
    ("text", "message"), [("{", "not valid JSON"), ("[]", "no list of rows"), ('{"rows": 1}', "no list of rows")]
)
def test_a_broken_report_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_rows(tmp_path / "report.json")


def test_a_missing_report_is_refused_with_the_command_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such report; make one with `draftsmith evaluate"):
        read_rows(tmp_path / "report.json")


def test_scalars_can_be_read_back_by_tensorboard(tmp_path: Path, make_row: RowMaker) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write_scalars(tmp_path, [make_row(), make_row(temperature=1.0, tokens_per_step=2.5)])
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    found = [(event.step, round(event.value, 3)) for event in events.Scalars("evaluate/redrafter_1x4/tokens_per_step")]
    assert found == [(0, 3.1), (1000, 2.5)]


def test_rooflines_are_in_the_report_with_their_chart(tmp_path: Path, make_row: RowMaker) -> None:
    seconds = {"draft": 0.002, "verify": 0.004, "accept": 0.001, "rest": 0.0005}
    figures = Roofline(8e9, None, 1, 70.0, 1.0, 12_000_000, 300_000, 6_000_000, 5, False, 0.0023, seconds, seconds, 0.3)
    write_report(tmp_path, "cmd", {}, {}, [make_row(roofline=figures)], roofline_chart=b"png")
    text = (tmp_path / "report.md").read_text()
    assert "| redrafter 1x4 | 0 | 18.3 MB (6 MB in 5 draft steps) | 2.30 ms | 7.50 ms | 30 % |" in text
    assert "](roofline.png)" in text
    assert read_rows(tmp_path / "report.json")[0]["roofline"]["left_over_seconds"]["draft"] == 0.002


def test_rows_without_rooflines_have_no_such_part(make_row: RowMaker) -> None:
    assert "roofline" not in to_markdown("", {}, {}, [make_row()])


def test_reports_of_versions_without_rooflines_are_read(tmp_path: Path, make_row: RowMaker) -> None:
    write_report(tmp_path, "cmd", {}, {}, [make_row()])
    report = json.loads((tmp_path / "report.json").read_text())
    del report["rows"][0]["roofline"]
    (tmp_path / "report.json").write_text(json.dumps(report))
    assert read_rows(tmp_path / "report.json")[0]["drafter"] == "redrafter"

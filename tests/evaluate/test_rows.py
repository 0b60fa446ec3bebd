from dataclasses import replace

import pytest

from draftsmith.evaluate.records import Sample, Timed
from draftsmith.evaluate.report_rows import Contestant, Setting, make_row
from draftsmith.evaluate.strata.decoded import Decoded
from draftsmith.models.tree.limits import DraftLimits

SAMPLES = [Sample("a", "sums", (1,)), Sample("b", "sums", (2,)), Sample("c", "tales", (3,))]
SETTING = Setting("tiny", 0.0, "float32", "cpu", 1, 64, 1, eos_token_ids=(0,))
LIMITS = DraftLimits(beam_width=2, draft_length=3)
LOOP = tuple([7, 8] * 10)


def runs(replies: list[tuple[int, ...]], seconds: list[float], accepted: list[tuple[int, ...]]) -> list[Timed]:
    return [
        Timed((n,), n, 0, seconds[n], (Decoded(replies[n], accepted[n], (3,) * len(accepted[n])),))
        for n in range(len(replies))
    ]


def plain(replies: list[tuple[int, ...]], seconds: list[float]) -> list[Timed]:
    return [
        Timed((n,), n, 0, seconds[n], (Decoded(replies[n], (0,) * (len(replies[n]) - 1)),)) for n in range(len(replies))
    ]


REPLIES = [tuple(range(10, 19)), tuple(range(30, 35)), LOOP]


def row_of(fast_seconds: list[float], accepted: list[tuple[int, ...]], replies: list[tuple[int, ...]] = REPLIES):
    found = {
        "plain": plain(REPLIES, [9.0, 5.0, 20.0]),
        "transformers": plain(REPLIES[:2], [18.0, 10.0]),
        "mine 2x3": runs(replies, fast_seconds, accepted),
    }
    return make_row(Contestant("mine 2x3", "mine", LIMITS, 7, "ff"), found, SAMPLES, SETTING)


def test_a_row_pools_over_prompts() -> None:
    row = row_of([3.0, 2.0, 5.0], [(3, 3), (0, 0, 0, 0), (3, 3, 3, 3, 2)])
    assert row.tokens_per_step == pytest.approx((8 + 4 + 19) / (2 + 4 + 5))
    assert row.speedup == pytest.approx(34 / 10)
    assert row.speedup_median == pytest.approx(3.0)
    assert row.tokens_per_second == pytest.approx(34 / 10)
    assert row.baseline_tokens_per_second == pytest.approx(1.0)
    assert row.transformers_tokens_per_second == pytest.approx(0.5)
    assert row.engine_vs_transformers == pytest.approx(2.0)
    assert row.speedup_over_transformers == pytest.approx((14 / 5) / (14 / 28))
    assert (row.exact_share, row.transformers_exact_share) == (1.0, 1.0)
    assert row.accepted_lengths == (4, 0, 1, 6)
    assert (row.beam_width, row.draft_length, row.parameters) == (2, 3, 7)
    assert row.label == "mine 2x3"


def test_a_row_faster_than_its_tokens_per_step_is_flagged() -> None:
    steps = [(3, 3), (0, 0, 0, 0), (3, 3, 3, 3, 2)]
    assert row_of([3.0, 2.0, 5.0], steps).suspicious  # 3.4 with 2.8 tokens per step
    assert not row_of([4.0, 4.0, 8.0], steps).suspicious


def test_looping_replies_and_sources_are_reported_apart() -> None:
    row = row_of([3.0, 2.0, 5.0], [(3, 3), (0, 0, 0, 0), (3, 3, 3, 3, 2)])
    parts = {(part.by, part.value): part for part in row.slices}
    assert set(parts) == {("source", "sums"), ("source", "tales"), ("looping", "yes"), ("looping", "no")}
    assert parts["looping", "yes"].tokens_per_step == pytest.approx(19 / 5)
    assert parts["looping", "no"].tokens_per_step == pytest.approx(12 / 6)
    assert parts["looping", "yes"].speedup == pytest.approx(4.0)
    assert parts["source", "sums"].prompts == 2
    assert row.looping_share == pytest.approx(1 / 3)


def test_modes_are_reported_apart_and_a_prompt_may_be_in_several(monkeypatch: pytest.MonkeyPatch) -> None:
    modes = [("thinking", "tools"), ("thinking",), ("thinking", "long")]
    samples = [replace(sample, modes=own) for sample, own in zip(SAMPLES, modes, strict=True)]
    monkeypatch.setitem(globals(), "SAMPLES", samples)
    row = row_of([3.0, 2.0, 5.0], [(3, 3), (0, 0, 0, 0), (3, 3, 3, 3, 2)])
    parts = {part.value: part for part in row.slices if part.by == "mode"}
    assert {value: part.prompts for value, part in parts.items()} == {"thinking": 3, "tools": 1, "long": 1}
    assert parts["long"].tokens_per_step == pytest.approx(19 / 5)
    assert parts["thinking"].tokens_per_step == row.tokens_per_step


def test_a_reply_that_differs_lowers_the_exact_share() -> None:
    changed = [(*REPLIES[0][:-1], 99), *REPLIES[1:]]
    row = row_of([3.0, 2.0, 5.0], [(3, 3), (0, 0, 0, 0), (3, 3, 3, 3, 2)], changed)
    assert row.exact_share == pytest.approx(2 / 3)
    assert [(one.prompt_id, one.position) for one in row.divergences] == [("a", 8)]


def test_plain_is_its_own_baseline() -> None:
    row = make_row(Contestant("plain", "plain"), {"plain": plain(REPLIES, [9.0, 5.0, 20.0])}, SAMPLES, SETTING)
    assert (row.speedup, row.tokens_per_step, row.exact_share, row.suspicious) == (1.0, 1.0, 1.0, False)
    assert row.transformers_tokens_per_second is None
    assert row.acceptance_by_depth == ()

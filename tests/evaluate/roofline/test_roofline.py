from dataclasses import replace

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from draftsmith.evaluate.roofline.bytes_read import cached_bytes, draft_bytes, target_weights
from draftsmith.evaluate.roofline.memory_speed import MemorySpeed
from draftsmith.evaluate.roofline.roofline import CycleClock, CycleLoad, Roofline, cycle_load, roofline
from draftsmith.evaluate.roofline.words import NamedRoofline, roofline_text
from draftsmith.models.families.redrafter import ReDrafter
from draftsmith.models.target.key_values import key_values_of
from draftsmith.models.target.target import Target
from draftsmith.models.tree.shapes import parse_shape

CLOCK = CycleClock({"prefill": 9.0, "draft": 1.0, "verify": 4.0, "accept": 0.5, "host": 0.25}, cycles=10)


@pytest.fixture(scope="module")
def target() -> Target:
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return Target.from_model(LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=40)))


def plain(target: Target, clock: CycleClock | None = CLOCK) -> Roofline:
    return roofline(target, None, None, CycleLoad(context=10), MemorySpeed(bandwidth=1e5, caches=100), clock)


def test_the_bound_of_a_step_is_its_bytes_over_the_bandwidth(target: Target) -> None:
    figures = plain(target)
    read = target_weights(target).read_by(1) + cached_bytes(key_values_of(target), 10)
    assert figures.total_bytes == read
    assert figures.bound_seconds == pytest.approx(read / 1e5)
    assert figures.cycle_seconds == pytest.approx(0.575)
    assert figures.share == pytest.approx(read / 1e5 / 0.575)


def test_the_bound_of_a_cycle_adds_the_draft_steps_and_what_is_left_over_adds_up(target: Target) -> None:
    drafter, limits = ReDrafter.for_target(target.ends), parse_shape("4x5n15")
    load = CycleLoad(context=10, num_nodes=16)
    figures = roofline(target, drafter, limits, load, MemorySpeed(1e5), CLOCK)
    drafted = draft_bytes(drafter, limits).total
    verified = target_weights(target).read_by(16) + cached_bytes(key_values_of(target), 10)
    assert (figures.draft_bytes, figures.draft_steps) == (drafted, 5)
    assert figures.bound_seconds == pytest.approx((drafted + verified) / 1e5)
    assert figures.left_over_seconds == {
        "draft": pytest.approx(0.1 - drafted / 1e5),
        "verify": pytest.approx(0.4 - verified / 1e5),
        "accept": pytest.approx(0.05),
        "rest": pytest.approx(0.025),
    }
    assert sum(figures.left_over_seconds.values()) == pytest.approx(figures.cycle_seconds - figures.bound_seconds)


def test_a_cycle_that_runs_as_one_graph_is_one_stage(target: Target) -> None:
    figures = plain(target, CycleClock({"prefill": 9.0, "cycle": 2.0, "host": 1.0}, cycles=10))
    assert figures.stage_seconds == {"cycle": pytest.approx(0.2), "rest": pytest.approx(0.1)}
    assert figures.left_over_seconds["cycle"] == pytest.approx(0.2 - figures.bound_seconds)


@pytest.mark.parametrize("clock", [None, CycleClock({}, 0)])
def test_without_a_clock_the_bound_is_there_and_no_share(target: Target, clock: CycleClock | None) -> None:
    figures = plain(target, clock)
    assert figures.share is None
    assert figures.bound_seconds > 0
    assert "give --ledger-prompts 8" in roofline_text([NamedRoofline("plain", 0.0, figures)])


def test_the_mean_text_counts_prompts_and_what_was_emitted_before() -> None:
    assert cycle_load([10], [[0, 0]], 1) == CycleLoad(11.5, 1.0, 1.0)
    assert cycle_load([10], [[2, 0]], 1, num_nodes=4) == CycleLoad((11 + 14) / 2, 1.0, 4)


def test_a_batch_has_as_many_forwards_as_its_longest_reply() -> None:
    load = cycle_load([10, 20], [[0, 0, 0], [0]], 2)
    assert load.num_rows == pytest.approx(4 / 3)
    assert load.context == pytest.approx((11 + 12 + 13 + 21) / 4)


def test_replies_without_any_cycle_have_the_text_of_their_prompts() -> None:
    assert cycle_load([10, 20], [[], []], 1) == CycleLoad(16.0, 1.0, 1.0)


def text_of(figures: Roofline) -> str:
    return roofline_text([NamedRoofline("plain", 0.0, figures)])


def test_a_row_that_caches_make_faster_than_memory_is_told_in_words_and_not_in_percent(target: Target) -> None:
    cached = replace(plain(target), share=3.0, caches=2**30)
    assert "300 %" not in text_of(cached)
    assert "| faster than memory |" in text_of(cached)
    assert "Faster than memory: plain. A processor's caches are faster than main memory" in text_of(cached)
    assert "faster than memory" in text_of(replace(cached, caches=None))


def test_small_weights_below_the_roofline_come_with_the_reason(target: Target) -> None:
    assert "fits into the processor's caches (1.07 GB)" in text_of(replace(plain(target), share=0.4, caches=2**30))
    assert "fits into" not in text_of(replace(plain(target), share=0.4, caches=100))


def test_reading_faster_than_a_copy_keeps_its_percentage_with_a_remark(target: Target) -> None:
    text = text_of(replace(plain(target), share=1.08, caches=100))
    assert "| 108 % |" in text
    assert "Above 100 %: the roofline is measured with a copy" in text


def test_a_small_share_is_not_rounded_to_nothing(target: Target) -> None:
    assert "| below 1 % |" in text_of(replace(plain(target), share=0.004))


def test_upper_bounds_are_called_so(target: Target) -> None:
    assert "| up to " in text_of(replace(plain(target), upper_bound=True))
    assert "Mixture of experts" in text_of(replace(plain(target), upper_bound=True))
    assert "Mixture of experts" not in text_of(plain(target))


def test_the_text_names_bytes_and_bandwidth_in_plain_units(target: Target) -> None:
    figures = replace(
        plain(target), bandwidth=4.3e12, weight_bytes=15_000_000_000, cached_bytes=33_500_000, context=256
    )
    text = text_of(figures)
    assert "copies 4300.0 GB/s, measured in this run" in text
    assert "reads 15 GB: 15 GB of weights and 33.5 MB of keys and values (mean text 256 tokens)" in text


def test_no_rooflines_give_no_text() -> None:
    assert roofline_text([]) == ""

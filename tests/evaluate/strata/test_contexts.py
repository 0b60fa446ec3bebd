import pytest

from draftsmith.evaluate.strata.contexts import by_context, cycles_of
from draftsmith.evaluate.strata.decoded import Decoded


def reply(num_tokens: int, accepted: tuple[int, ...], prefill_tokens: int = 1) -> Decoded:
    return Decoded(tuple(range(num_tokens)), accepted, prefill_tokens=prefill_tokens)


def test_a_cycle_has_the_context_before_it_and_emits_no_more_than_is_left() -> None:
    assert list(cycles_of(10, reply(6, (2, 3)))) == [(11, 3), (14, 2)]
    assert list(cycles_of(10, reply(6, (2,), prefill_tokens=3))) == [(13, 3)]


def test_cycles_are_pooled_by_the_context_that_they_had() -> None:
    bins = by_context([(253, reply(9, (1, 1, 3))), (5000, reply(3, (0, 0)))])
    assert [(part.name, part.prompts, part.cycles, part.tokens) for part in bins] == [
        ("below 256", 1, 1, 2),
        ("256 to 1k", 1, 2, 6),
        ("4k to 16k", 1, 2, 2),
    ]
    assert bins[1].tokens_per_step == 3.0
    assert bins[1].tokens_per_step_interval == (3.0, 3.0)


def test_bins_hold_all_cycles_and_tokens_of_the_replies() -> None:
    replies = [(200 + 700 * n, reply(60, tuple(n % 4 for n in range(30)))) for n in range(5)]
    bins = by_context(replies)
    assert sum(part.cycles for part in bins) == 150
    assert sum(part.tokens for part in bins) == sum(own.stepped_tokens for _, own in replies)


def test_intervals_are_over_the_prompts_of_a_bin() -> None:
    (part,) = by_context([(10, reply(5, (3,))), (10, reply(5, (0, 0, 0, 0)))])
    assert part.tokens_per_step == pytest.approx(8 / 5)
    assert part.tokens_per_step_interval == (1.0, 4.0)


@pytest.mark.parametrize(("length", "name"), [(255, "256 to 1k"), (4**8 * 256, "from 4M"), (2**19, "256k to 1M")])
def test_bins_grow_by_four(length: int, name: str) -> None:
    assert [part.name for part in by_context([(length, reply(2, (0,)))])] == [name]


def test_replies_without_a_cycle_have_no_bin() -> None:
    assert by_context([(10, reply(1, ()))]) == ()

import numpy as np
import pytest

from draftsmith.evaluate.strata.acceptance import (
    acceptance_by_depth,
    accepted_length_counts,
    is_looping,
    ratio_interval,
    tokens_per_step,
    tokens_per_step_interval,
)
from draftsmith.evaluate.strata.decoded import Decoded


def reply(*accepted: int, drafted: tuple[int, ...] = ()) -> Decoded:
    """A reply whose prefill gave one token and whose cycles each gave accepted + 1."""
    return Decoded(tuple(range(1 + sum(count + 1 for count in accepted))), accepted, drafted)


def test_tokens_per_step_pools_over_prompts_and_counts_the_bonus() -> None:
    # 2 cycles, 7 tokens after the prefill's and 8 cycles, 8 tokens: 15 / 10, not the mean of 3.5 and 1.0
    assert tokens_per_step([reply(3, 2), reply(*[0] * 8)]) == pytest.approx(1.5)


def test_plain_decoding_is_exactly_one_token_per_step() -> None:
    assert tokens_per_step([reply(*[0] * 5), reply(0)]) == 1.0


def test_a_reply_cut_by_the_budget_counts_only_what_was_emitted() -> None:
    assert tokens_per_step([Decoded((1, 2, 3), (3,))]) == 2.0


def test_replies_of_one_token_have_no_tokens_per_step() -> None:
    assert tokens_per_step([Decoded((5,), ())]) is None
    assert tokens_per_step_interval([Decoded((5,), ())]) is None


def test_interval_of_equal_prompts_has_no_width() -> None:
    assert ratio_interval([6.0] * 20, [3.0] * 20) == (2.0, 2.0)


def test_interval_covers_the_true_ratio_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(7)
    covered = 0
    for trial in range(200):
        cycles = generator.integers(5, 40, size=60).astype(float)
        emitted = cycles * generator.normal(2.5, 0.5, size=60)
        low, high = ratio_interval(list(emitted), list(cycles), num_resamples=300, seed=trial)
        covered += low <= 2.5 <= high
    assert 178 <= covered <= 199


def test_interval_width_matches_the_delta_method_on_known_data() -> None:
    top = np.arange(1.0, 201.0)
    low, high = ratio_interval(list(top), [1.0] * 200, num_resamples=4000)
    standard_error = top.std() / np.sqrt(200)
    assert low == pytest.approx(top.mean() - 1.96 * standard_error, rel=0.02)
    assert high == pytest.approx(top.mean() + 1.96 * standard_error, rel=0.02)


def test_interval_is_the_same_under_one_seed_and_differs_under_another() -> None:
    top, bottom = [float(i * i % 17) for i in range(40)], [float(i % 7 + 1) for i in range(40)]
    assert ratio_interval(top, bottom, seed=1) == ratio_interval(top, bottom, seed=1)
    assert ratio_interval(top, bottom, seed=1) != ratio_interval(top, bottom, seed=2)


@pytest.mark.parametrize(("top", "bottom"), [([], []), ([1.0], [1.0, 2.0]), ([1.0], [0.0])])
def test_interval_refuses_what_has_no_ratio(top: list[float], bottom: list[float]) -> None:
    with pytest.raises(ValueError, match=r"prompt|shorter|longer"):
        ratio_interval(top, bottom)


def test_acceptance_by_depth_tells_conditional_from_marginal() -> None:
    depths = acceptance_by_depth([reply(0, 1, 3, 3, drafted=(3, 3, 3, 3))])
    assert [(d.depth, d.reached, d.accepted) for d in depths] == [(1, 4, 3), (2, 3, 2), (3, 2, 2)]
    assert [d.conditional for d in depths] == pytest.approx([3 / 4, 2 / 3, 1.0])
    assert [d.marginal for d in depths] == pytest.approx([3 / 4, 2 / 4, 2 / 4])


def test_marginals_add_up_to_tokens_per_step() -> None:
    decoded = [reply(0, 1, 3, drafted=(3, 3, 3)), reply(2, 2, drafted=(3, 3))]
    assert 1 + sum(d.marginal for d in acceptance_by_depth(decoded)) == pytest.approx(tokens_per_step(decoded))


def test_a_shallow_tree_does_not_count_against_deeper_levels() -> None:
    depths = acceptance_by_depth([reply(1, 2, drafted=(1, 2))])
    assert depths[1].reached == 1
    assert depths[1].conditional == 1.0


def test_depths_that_do_not_match_the_cycles_are_refused() -> None:
    with pytest.raises(ValueError, match="2 accepted lengths but 1 draft depths"):
        acceptance_by_depth([reply(1, 1, drafted=(4,))])


def test_plain_decoding_has_no_depths() -> None:
    assert acceptance_by_depth([reply(0, 0)]) == ()


def test_histogram_counts_cycles_by_accepted_length() -> None:
    assert accepted_length_counts([reply(0, 2, 2), reply(0)]) == (2, 0, 2)
    assert accepted_length_counts([]) == ()


def test_a_reply_that_repeats_its_tail_loops() -> None:
    assert is_looping([9, 8, 7, *[1, 2, 3, 4] * 5])
    assert is_looping([9, 8, 7, *[1, 2, 3, 4] * 5, 0], eos_token_ids=(0,))
    assert is_looping([5] * 20)
    assert is_looping([*range(100, 140), *[1, 2, 3, 4, 5, 6] * 3, 1, 2])


def test_a_reply_that_moves_on_does_not_loop() -> None:
    assert not is_looping(list(range(60)))
    assert not is_looping([*[1, 2, 3, 4] * 5, 50, 51])
    assert not is_looping([1, 2] * 5)
    assert not is_looping([*range(30), *range(30)])
    assert not is_looping([])

"""Noise: the hash against its published outputs, draws by chi-square tests along every axis, tails, and what rounding can change."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from draftsmith.decode.sampling import GenerationSettings, choose, process
from draftsmith.models.tree.noise import draw, draw_at, exponentials, keys_at, keys_behind, request_keys, uniforms

CPU = torch.device("cpu")
# Of SplitMix64 seeded with 1234567, as unsigned numbers.
PUBLISHED = [
    6457827717110365317,
    3203168211198807973,
    9817491932198370423,
    4593380528125082431,
    16408922859458223821,
]


def keys_along(axis: str, count: int) -> Tensor:
    """int64 [count]: keys that differ in one of the three things that make them, by consecutive numbers."""
    if axis == "seeds":
        return keys_at(torch.cat([request_keys(seed, [3], "choices", CPU) for seed in range(count)]), torch.tensor(7))
    if axis == "requests":
        return keys_at(request_keys(5, range(count), "choices", CPU), torch.tensor(7))
    return keys_at(request_keys(5, [3], "choices", CPU), torch.arange(count))


def chi_square(observed: Tensor, expected_probs: Tensor) -> float:
    counts = observed.double().flatten().numpy()
    return float(stats.chisquare(counts, expected_probs.double().flatten().numpy() * counts.sum()).pvalue)


def test_the_hash_is_splitmix64() -> None:
    keys = keys_at(torch.tensor(1234567), torch.arange(5))
    assert keys.numpy().view(np.uint64).tolist() == PUBLISHED


def test_keys_behind_a_place_are_those_of_the_places_that_follow() -> None:
    keys = torch.tensor([1234567, -7])
    behind = keys_behind(keys, torch.tensor([2, 0]), 3)
    assert behind[0].numpy().view(np.uint64).tolist() == PUBLISHED[2:]
    assert behind[1].tolist() == keys_at(keys[1], torch.arange(3)).tolist()


@pytest.mark.parametrize("axis", ["seeds", "requests", "positions"])
def test_draws_have_the_distribution_and_neighbours_are_independent(axis: str) -> None:
    probs = torch.tensor([0.4, 0.3, 0.05, 0.25], dtype=torch.float64)
    drawn = draw(probs, keys_along(axis, 6000)[:, None])[:, 0]
    assert chi_square(drawn.bincount(minlength=4), probs) > 1e-3
    pairs = (drawn[:-1] * 4 + drawn[1:])[::2]
    assert chi_square(pairs.bincount(minlength=16), probs[:, None] * probs) > 1e-3


@pytest.mark.parametrize("axis", ["seeds", "requests", "positions"])
def test_the_numbers_of_one_token_are_uniform_and_those_of_two_tokens_independent(axis: str) -> None:
    keys = keys_along(axis, 4000)
    cells_KV = (uniforms(keys_at(keys[:, None], torch.arange(6))) * 8).long()
    even = torch.full((8, 8), 1 / 64)
    for one, other in ((0, 1), (1, 2), (0, 5)):
        pairs = cells_KV[:, one] * 8 + cells_KV[:, other]
        assert chi_square(pairs.bincount(minlength=64), even) > 1e-3


def test_no_two_places_share_a_key() -> None:
    keys = [
        keys_at(request_keys(seed, [0, 1, 2**32, 2**40], stream, CPU)[:, None], torch.arange(50))
        for seed in (0, 1, 2**32, 2**32 + 1, 2**62)
        for stream in ("choices", "cycles")
    ]
    assert torch.stack(keys).unique().numel() == 5 * 2 * 4 * 50


def test_keys_depend_on_no_other_request_of_the_batch() -> None:
    together = request_keys(4, [9, 2, 7], "choices", CPU)
    assert torch.equal(together[1:2], request_keys(4, [2], "choices", CPU))


@pytest.mark.parametrize(("seed", "request_id", "told"), [(-1, 0, "a seed is -1"), (0, -3, "a request id is -3")])
def test_negative_numbers_are_refused_by_name(seed: int, request_id: int, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        request_keys(seed, [4, request_id], "choices", CPU)


def test_the_tail_is_fine_enough_for_a_large_vocabulary() -> None:
    """The shortest of V exponential times, times V, is exponential too; coarse uniforms would give few different values."""
    V = 2**17
    shortest = torch.stack([exponentials(key, V).amin() for key in keys_along("positions", 150)]) * V
    assert shortest.unique().numel() == 150
    assert float(stats.kstest(shortest.numpy(), "expon").pvalue) > 1e-3
    times = exponentials(keys_along("requests", 16), V).flatten()
    assert float(stats.binomtest(int((times < 2.0**-14).sum()), times.numel(), 2.0**-14).pvalue) > 1e-3


def test_numbers_of_extreme_bits_are_inside_the_open_interval() -> None:
    numbers = uniforms(torch.tensor([0, -1, 2**63 - 1, -(2**63)]))
    assert bool((numbers > 0.0).all())
    assert bool((numbers < 1.0).all())
    times = numbers.neg().log1p().neg()
    assert bool((times > 0.0).all())
    assert bool(times.isfinite().all())


@settings(deadline=None)
@given(kept=st.sets(st.integers(0, 39), min_size=1), key=st.integers(-(2**63), 2**63 - 1))
def test_a_token_of_weight_zero_is_never_drawn(kept: set[int], key: int) -> None:
    logits = torch.full((1, 1, 40), -torch.inf)
    logits[..., list(kept)] = -torch.arange(len(kept), dtype=torch.float32) * 20
    keys = keys_at(torch.tensor([[key]]), torch.arange(8))
    assert set(draw(logits[:, 0].softmax(-1), keys)[0].tolist()) <= kept
    drawn = draw_at(logits.expand(1, 8, 40), keys, torch.arange(8)[None])
    assert set(drawn[0].tolist()) <= kept


@pytest.mark.parametrize(
    "request_settings",
    [
        GenerationSettings(temperature=1.5, top_k=3),
        GenerationSettings(temperature=1.5, top_p=0.3),
        GenerationSettings(temperature=1.5, min_p=0.4),
    ],
    ids=["top-k", "top-p", "min-p"],
)
def test_what_the_processors_rule_out_is_never_chosen(request_settings: GenerationSettings) -> None:
    processed = process(torch.randn(1, 1, 64, generator=torch.Generator().manual_seed(0)), request_settings)
    allowed = set(processed[0, 0].isfinite().nonzero().squeeze(1).tolist())
    place = torch.arange(400)[None]
    chosen = choose(processed.expand(1, 400, 64), request_settings, keys_along("positions", 400)[None], place)
    assert set(chosen[0].tolist()) == allowed


def test_nodes_at_one_place_draw_alike_and_parts_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(2, 1, 50, generator=torch.Generator().manual_seed(1)).expand(2, 7, 50)
    keys, place = keys_along("requests", 6).view(2, 3), torch.tensor([[0, 1, 1, 2, 2, 2, 1]] * 2)
    whole = draw_at(logits, keys, place)
    assert torch.equal(whole[:, 1], whole[:, 2])
    assert torch.equal(whole[:, 3], whole[:, 5])
    assert torch.equal(whole[:, :1], draw(logits[:, 0].softmax(-1), keys[:, :1]))
    assert torch.equal(whole[:, :1], draw_at(logits[:, :1], keys[:, :1], place[:, :1]))
    monkeypatch.setattr("draftsmith.models.tree.noise._PART", 100)
    assert torch.equal(draw_at(logits, keys, place), whole)


def test_rounding_of_many_weights_does_not_add_up() -> None:
    """Errors of float32 in every one of 32,768 logits leave the draws alone; a draw by cumulative sums would change now and then."""
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(1, 1, 2**15, generator=generator)
    rounded = logits + torch.randn(logits.shape, generator=generator) * 1e-6
    keys, place = keys_along("positions", 200)[None], torch.arange(200)[None]
    one, other = (draw_at(scores.expand(1, 200, -1), keys, place) for scores in (logits, rounded))
    assert torch.equal(one, other)


@pytest.mark.gpu
def test_a_gpu_has_the_same_keys_and_draws() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    keys, logits = keys_along("positions", 64)[None], torch.randn(1, 64, 2048)
    place = torch.arange(64)[None]
    there = draw_at(logits.cuda(), keys.cuda(), place.cuda())
    assert torch.equal(keys_at(keys.cuda(), place.cuda()).cpu(), keys_at(keys, place))
    assert torch.equal(there.cpu(), draw_at(logits, keys, place))

"""Losslessness, the product: what speculative decoding emits is what the target emits alone, token for token."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from doubles import BOS, VOCAB, Manner, PlannedDrafter, family_configs, greedy_by_hand, random_target
from hypothesis import given, settings
from hypothesis import strategies as st

from draftsmith.decode import Engine, GenerationSettings
from draftsmith.models import DraftLimits, ReDrafter, Target

PROMPTS = [[BOS, 5, 9, 11, 4], [BOS, 7], [BOS, 8, 8, 8, 30, 31, 32, 33, 34, 35, 36]]
MANNERS: tuple[Manner, ...] = ("oracle", "random", "wrong", "same", "half", "late")


@pytest.fixture(scope="module")
def target() -> Target:
    return random_target()


def tokens(engine: Engine, prompts: list[list[int]], request: GenerationSettings) -> list[list[int]]:
    return [generation.token_ids for generation in engine.generate(prompts, request)]


@pytest.mark.parametrize("family", sorted(family_configs()))
def test_greedy_equals_the_models_own_greedy_for_every_family_with_ragged_batches(family: str) -> None:
    target = random_target(family)
    expected = [greedy_by_hand(target, prompt, 14) for prompt in PROMPTS]
    request = GenerationSettings(max_new_tokens=14)
    assert tokens(Engine(target), PROMPTS, request) == expected
    drafter = ReDrafter.for_target(target.ends)
    for limits in (DraftLimits(1, 3), DraftLimits(4, 3), DraftLimits(4, 3, node_budget=5)):
        assert tokens(Engine(target, drafter, limits), PROMPTS, request) == expected
    assert [tokens(Engine(target), [prompt], request)[0] for prompt in PROMPTS] == expected
    oracle = PlannedDrafter(target, "late")
    assert tokens(Engine(target, oracle, DraftLimits(3, 4)), PROMPTS, request) == expected


@pytest.mark.parametrize("manner", MANNERS)
@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:1]], ids=["ragged", "single"])
def test_greedy_is_the_same_whatever_the_drafter_proposes(
    target: Target, manner: Manner, prompts: list[list[int]]
) -> None:
    request = GenerationSettings(max_new_tokens=17)
    expected = [greedy_by_hand(target, prompt, 17) for prompt in prompts]
    engine = Engine(target, PlannedDrafter(target, manner), DraftLimits(3, 4))
    assert tokens(engine, prompts, request) == expected


def test_an_oracle_is_accepted_whole_and_a_liar_never(target: Target) -> None:
    request = GenerationSettings(max_new_tokens=16)
    oracle = Engine(target, PlannedDrafter(target, "oracle"), DraftLimits(3, 4)).generate(PROMPTS[:1], request)[0]
    liar = Engine(target, PlannedDrafter(target, "wrong"), DraftLimits(3, 4)).generate(PROMPTS[:1], request)[0]
    assert oracle.accepted == [4, 4, 4]
    assert liar.accepted == [0] * 15


@pytest.mark.parametrize("manner", ["oracle", "random", "half", "late"])
@pytest.mark.parametrize(
    "request_settings",
    [
        GenerationSettings(max_new_tokens=15, temperature=1.0, seed=3),
        GenerationSettings(max_new_tokens=15, temperature=0.7, top_k=8, seed=4),
        GenerationSettings(max_new_tokens=15, temperature=1.3, top_p=0.8, seed=5),
        GenerationSettings(max_new_tokens=15, temperature=1.0, min_p=0.05, repetition_penalty=1.3, seed=6),
        GenerationSettings(max_new_tokens=15, repetition_penalty=1.5),
    ],
    ids=["plain", "top-k", "top-p", "min-p+penalty", "greedy+penalty"],
)
def test_sampling_emits_the_same_tokens_as_plain_sampling_under_one_seed(
    target: Target, manner: Manner, request_settings: GenerationSettings
) -> None:
    expected = tokens(Engine(target), PROMPTS, request_settings)
    speculative = Engine(target, PlannedDrafter(target, manner), DraftLimits(3, 4))
    assert tokens(speculative, PROMPTS, request_settings) == expected
    other_seed = tokens(speculative, PROMPTS, replace(request_settings, seed=99))
    assert (other_seed == expected) == (request_settings.temperature == 0.0)


def test_a_row_of_a_batch_samples_what_it_would_alone(target: Target) -> None:
    request = GenerationSettings(max_new_tokens=12, temperature=1.0, seed=8)
    together = tokens(Engine(target), PROMPTS, request)
    alone = [
        Engine(target).generate([prompt], request, request_ids=[i])[0].token_ids for i, prompt in enumerate(PROMPTS)
    ]
    assert together == alone


@settings(max_examples=12, deadline=None)
@given(
    prompts=st.lists(st.lists(st.integers(3, VOCAB - 1), min_size=0, max_size=9), min_size=1, max_size=4),
    budget=st.integers(1, 11),
    eos=st.sets(st.integers(3, VOCAB - 1), max_size=12),
    manner=st.sampled_from(MANNERS),
    width=st.integers(1, 4),
    depth=st.integers(1, 6),
)
def test_any_prompts_budget_and_eos_set_end_where_plain_decoding_ends(
    prompts: list[list[int]], budget: int, eos: set[int], manner: Manner, width: int, depth: int
) -> None:
    target = random_target()
    request = GenerationSettings(max_new_tokens=budget, eos_token_ids=tuple(sorted(eos)))
    rows = [[BOS, *prompt] for prompt in prompts]
    width = max(width, 2) if manner == "half" else width
    plain = Engine(target).generate(rows, request)
    drafted = Engine(target, PlannedDrafter(target, manner, width, depth), DraftLimits(width, depth)).generate(
        rows, request
    )
    for row, one, other in zip(rows, plain, drafted, strict=True):
        assert (one.token_ids, one.finish) == (other.token_ids, other.finish)
        full = greedy_by_hand(target, row, budget)
        ends = [place for place, token in enumerate(full) if token in eos]
        assert one.token_ids == (full[: ends[0] + 1] if ends else full)
        assert one.finish == ("eos" if ends else "length")


def test_eos_inside_an_accepted_block_cuts_the_block(target: Target) -> None:
    full = greedy_by_hand(target, PROMPTS[0], 8)
    place = next(i for i in range(2, 8) if full[i] not in full[:i])
    request = GenerationSettings(max_new_tokens=40, eos_token_ids=(full[place],))
    result = Engine(target, PlannedDrafter(target, "oracle", depth=8), DraftLimits(3, 8)).generate(
        PROMPTS[:1], request
    )[0]
    assert result.token_ids == full[: place + 1]
    assert result.finish == "eos"
    assert sum(result.accepted) + len(result.accepted) + 1 == len(result.token_ids)


def test_the_contexts_end_is_a_budget_and_not_an_error(target: Target) -> None:
    prompt = [BOS, *range(3, 60), *range(3, 33)]
    assert target.max_positions == 96
    request = GenerationSettings(max_new_tokens=50)
    plain = Engine(target).generate([prompt], request)[0]
    oracle = Engine(target, PlannedDrafter(target, "oracle", depth=6), DraftLimits(3, 6)).generate([prompt], request)[0]
    assert len(plain.token_ids) == 96 - len(prompt)
    assert (plain.token_ids, plain.finish) == (oracle.token_ids, "length")


def test_prompts_longer_than_a_prefill_chunk_decode_the_same(target: Target) -> None:
    request = GenerationSettings(max_new_tokens=6)
    assert tokens(Engine(target, prefill_chunk=3), PROMPTS, request) == tokens(Engine(target), PROMPTS, request)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("manner", MANNERS)
def test_greedy_is_lossless_on_cuda_and_a_cycle_reads_back_once(manner: Manner) -> None:
    target = random_target()
    expected = [greedy_by_hand(target, prompt, 17) for prompt in PROMPTS]
    on_gpu = Target.from_model(target.model.cuda())
    drafter = ReDrafter.for_target(on_gpu.ends).cuda()
    request = GenerationSettings(max_new_tokens=17)
    for limits in (DraftLimits(1, 4), DraftLimits(4, 4), DraftLimits(4, 4, node_budget=6)):
        assert tokens(Engine(on_gpu, drafter, limits), PROMPTS, request) == expected

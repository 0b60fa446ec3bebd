"""Sampling: processors against Transformers' own, exact enumeration of the walk, and a statistical test of the real engine."""

from __future__ import annotations

import itertools

import pytest
import torch
from doubles import BOS, PlannedDrafter, random_target
from joint_law import chi_square_pvalue
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from draftsmith.decode import Engine, GenerationSettings
from draftsmith.decode.sampling import process
from draftsmith.decode.verify.lossless import walk
from draftsmith.models import DraftLimits, tree_from_paths


@pytest.mark.parametrize(
    ("request_settings", "reference"),
    [
        (GenerationSettings(temperature=0.7), [TemperatureLogitsWarper(0.7)]),
        (GenerationSettings(temperature=1.0, top_k=5), [TopKLogitsWarper(5)]),
        (GenerationSettings(temperature=0.9, top_p=0.6), [TemperatureLogitsWarper(0.9), TopPLogitsWarper(0.6)]),
        (GenerationSettings(temperature=1.0, min_p=0.2), [MinPLogitsWarper(0.2)]),
        (GenerationSettings(temperature=1.0, repetition_penalty=1.7), [RepetitionPenaltyLogitsProcessor(1.7)]),
        (GenerationSettings(repetition_penalty=1.7), [RepetitionPenaltyLogitsProcessor(1.7)]),
    ],
    ids=["temperature", "top-k", "top-p", "min-p", "penalty", "greedy penalty"],
)
def test_processors_equal_transformers(request_settings: GenerationSettings, reference: list) -> None:
    logits = torch.randn(4, 33, generator=torch.Generator().manual_seed(1)) * 3
    text = torch.tensor([[1, 2, 3], [4, 4, 4], [0, 9, 8], [30, 31, 32]])
    seen = torch.zeros(4, 33, dtype=torch.bool).scatter_(1, text, True)
    expected = LogitsProcessorList(reference)(text, logits.clone())
    got = process(logits[:, None], request_settings, seen[:, None])[:, 0]
    torch.testing.assert_close(got, expected.float())


@pytest.mark.parametrize("seed", range(6))
def test_the_walk_is_exact_by_enumeration_for_any_tree(seed: int) -> None:
    """Sum over every joint draw of a two-level tree on three tokens; the first two emitted follow the target's own law."""
    generator = torch.Generator().manual_seed(seed)
    vocab = 3
    first = torch.rand(vocab, generator=generator, dtype=torch.float64).pow(2)
    second = torch.rand(vocab, vocab, generator=generator, dtype=torch.float64).pow(2)
    first, second = first / first.sum(), second / second.sum(-1, keepdim=True)
    beams = torch.randint(0, vocab, (1, 3, 2), generator=generator)
    tree = tree_from_paths(torch.tensor([0]), beams)
    laws = []
    for node in range(tree.num_nodes):
        depth = int(tree.depths_BN[0, node])
        laws.append(
            first
            if depth == 0
            else second[int(tree.tokens_BN[0, node])]
            if depth == 1
            else torch.full((vocab,), 1 / 3, dtype=torch.float64)
        )
    emitted = torch.zeros(vocab, vocab, dtype=torch.float64)
    for draws in itertools.product(range(vocab), repeat=tree.num_nodes):
        weight = float(torch.stack([law[draw] for law, draw in zip(laws, draws, strict=True)]).prod())
        steps = walk(tree, tree.ancestors(), torch.tensor([draws]))
        one = int(steps.emitted_BE[0, 0])
        if int(steps.counts_B[0]) > 1:
            emitted[one, int(steps.emitted_BE[0, 1])] += weight
        else:  # the cycle ended after one token; the next cycle draws the second from the target
            emitted[one] += weight * second[one]
    total_variation = float((emitted - first[:, None] * second).abs().sum() / 2)
    assert total_variation < 1e-12


def test_the_engines_joint_of_three_tokens_passes_a_chi_square_test() -> None:
    """The real engine with a tree drafter, against the target's exact joint law of the first three tokens."""
    target = random_target()
    request = GenerationSettings(max_new_tokens=3, temperature=1.0, top_k=3, seed=11)
    engine = Engine(target, PlannedDrafter(target, "late", width=2, depth=2), DraftLimits(2, 2))
    assert chi_square_pvalue(engine, [BOS, 5, 9], request, num_draws=3000) > 1e-3


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", -1.0),
        ("top_p", 0.0),
        ("top_k", -2),
        ("min_p", 1.0),
        ("repetition_penalty", 0.0),
    ],
)
def test_settings_out_of_range_name_the_field_and_the_rule(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{field} is .*; it must be"):
        GenerationSettings(**{field: value})

"""A judge that reads the target's opinion: decoding gives it the numbers that training gave it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from doubles import random_target
from ruling import PROMPTS, random_judge, reread
from torch import Tensor

from draftsmith.decode import Engine, GenerationSettings
from draftsmith.decode.verify.lossy_rules import JudgeRule, opinion_of_draft
from draftsmith.models import Target
from draftsmith.models.drafters.draft_lm import LMDrafter
from draftsmith.models.judge import WITH_OPINION
from draftsmith.models.opinion import opinion_of_text
from draftsmith.models.tree.shapes import parse_shape
from draftsmith.models.tree.tree import DraftTree, tree_from_paths


@pytest.fixture(scope="module")
def target() -> Target:
    return random_target()


def trained_opinion(target: Target, prompt: list[int], reply: list[int]) -> tuple[Tensor, Tensor]:
    """As training reads it, from states and ends alone: the states of the reply's tokens, and the six numbers of each."""
    ids = torch.tensor(prompt + reply)
    with torch.inference_mode():
        states = target.prefix(ids[None]).pre_norm[0]
    positions = torch.arange(len(prompt), len(ids))
    return states[positions], opinion_of_text(target.ends, states, ids, positions)


def test_every_path_of_a_draft_has_the_numbers_of_the_same_text(target: Target) -> None:
    paths = torch.tensor([[[5, 6, 7], [5, 8, 9], [10, 6, 7]]])
    tree = tree_from_paths(torch.tensor([4]), paths, torch.zeros(1, 3, 3))
    seen = {}
    logits = torch.zeros(1, tree.num_nodes, target.ends.vocab_size)
    for node in range(tree.num_nodes):
        path = [node]
        while path[0] > 0:
            path.insert(0, int(tree.parents_BN[0, path[0]]))
        text = [int(tree.tokens_BN[0, place]) for place in path]
        seen[node] = [1, 2, *text]
        with torch.inference_mode():
            logits[0, node] = target.logits(target.prefix(torch.tensor([seen[node]])).normed)[0, -1]
    drafted = opinion_of_draft(tree, logits)
    for node in range(1, tree.num_nodes):
        if bool(tree.valid_BN[0, node]):
            _, of_text = trained_opinion(target, seen[node][:-1], seen[node][-1:])
            assert torch.allclose(drafted[0, node], of_text[0], atol=1e-5)


@pytest.mark.parametrize("shape", ["1x16", "3x4"])
def test_the_rule_accepts_what_the_judge_accepts_of_the_same_text(target: Target, shape: str) -> None:
    judge = random_judge(target, 0.6, WITH_OPINION)
    drafter = LMDrafter(random_target("llama", seed=5))
    engine = Engine(target, drafter, parse_shape(shape), rule=JudgeRule(judge))
    by_rule = 0
    for prompt, reply in zip(
        PROMPTS, engine.generate(PROMPTS, GenerationSettings(24, eos_token_ids=(2,))), strict=True
    ):
        logits, _ = reread(target, prompt, reply.token_ids)
        states, numbers = trained_opinion(target, prompt, reply.token_ids)
        accepted = judge.accepts(states, opinion=numbers)
        for place in reply.by_rule:
            assert bool(accepted[place])
            assert int(logits[place].argmax()) != reply.token_ids[place]
        by_rule += len(reply.by_rule)
    assert by_rule > 0, "the judge never had a say, so nothing was tested"


@pytest.mark.parametrize("shaping", [{"temperature": 0.3, "top_k": 3}, {"repetition_penalty": 3.0}])
def test_the_numbers_are_those_of_the_model_however_the_request_shapes_its_logits(
    target: Target, shaping: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []

    def kept(tree: DraftTree, logits_BNV: Tensor) -> Tensor:
        seen.append(opinion_of_draft(tree, logits_BNV))
        return seen[-1]

    monkeypatch.setattr("draftsmith.decode.verify.lossy_rules.opinion_of_draft", kept)
    drafter = LMDrafter(random_target("llama", seed=5))
    rule = JudgeRule(random_judge(target, 0.3, WITH_OPINION))
    prompt = PROMPTS[0]
    [reply] = Engine(target, drafter, parse_shape("1x4"), rule=rule).generate(
        [prompt], GenerationSettings(8, eos_token_ids=(2,), seed=1, **shaping)
    )
    # The first number that stays of the first cycle: the greatest log-probability at the place of its first drafted token.
    _, numbers = trained_opinion(target, prompt, reply.token_ids)
    place = 1  # the prompt's forward gives the first token, and the first draft follows it
    assert torch.allclose(seen[0][0, 1, [1, 3]], numbers[place, [1, 3]], atol=1e-4)


def test_an_opinion_judge_decodes_under_a_request_that_rules_tokens_out(target: Target) -> None:
    engine = Engine(
        target,
        LMDrafter(random_target("llama", seed=5)),
        parse_shape("1x8"),
        rule=JudgeRule(random_judge(target, 0.3, WITH_OPINION)),
    )
    settings = GenerationSettings(12, temperature=0.7, top_k=3, eos_token_ids=(2,), seed=1)
    assert all(len(reply.token_ids) > 0 for reply in engine.generate(PROMPTS, settings))

"""Rules that read the draft's distribution too: the ensemble, and the divergence where the target is unsure."""

from __future__ import annotations

import pytest
import torch
from doubles import random_target
from ruling import PROMPTS, reread

from draftsmith.decode import Engine, GenerationSettings
from draftsmith.decode.verify.lossy_rules import Divergence, Ensemble, UnsureDivergence
from draftsmith.decode.verify.rule_text import parse_rule
from draftsmith.models import DraftTree
from draftsmith.models.drafters.draft_lm import LMDrafter
from draftsmith.models.tree.shapes import parse_shape


def chain(tokens: list[int], draft_probs: list[list[float]]) -> DraftTree:
    places = torch.arange(len(tokens) + 1)[None]
    return DraftTree(
        torch.tensor([[0, *tokens]]),
        places - 1,
        places,
        torch.ones_like(places, dtype=torch.bool),
        max_depth=len(tokens),
        chain=True,
        draft_probs_BMV=torch.tensor([draft_probs]),
    )


def allowed(rule: Ensemble | Divergence, tree: DraftTree, target_probs: list[list[float]]) -> list[bool]:
    logits = torch.tensor([[*target_probs, [0.25] * 4]]).log()
    return rule.allows(tree, logits, None)[0, 1:].tolist()  # type: ignore[arg-type]


def test_an_ensemble_allows_the_likeliest_token_of_the_mixture() -> None:
    drafted, target = [[0.1, 0.8, 0.05, 0.05]] * 2, [[0.6, 0.3, 0.05, 0.05], [0.9, 0.0, 0.05, 0.05]]
    tree = chain([1, 1], drafted)
    # Of token 1 the mixtures hold 0.5 * 0.3 + 0.5 * 0.8 = 0.55 and 0.4, of token 0 0.35 and 0.5.
    assert allowed(Ensemble(0.5), tree, target) == [True, False]
    assert allowed(Ensemble(0.9), tree, target) == [False, False]
    assert allowed(Ensemble(0.1), tree, target) == [True, True]


def test_an_unsure_divergence_asks_for_a_target_that_is_not_sure() -> None:
    tree = chain([1, 1], [[0.92, 0.04, 0.02, 0.02], [0.5, 0.4, 0.05, 0.05]])
    target = [[0.92, 0.04, 0.02, 0.02], [0.5, 0.4, 0.05, 0.05]]
    assert allowed(Divergence(0.1), tree, target) == [True, True]
    assert allowed(UnsureDivergence(0.1), tree, target) == [False, True]


def test_an_ensembles_tokens_are_the_mixtures_likeliest_in_whole_replies() -> None:
    target, drafter = random_target(), LMDrafter(random_target("llama", seed=5))
    engine = Engine(target, drafter, parse_shape("1x8"), rule=parse_rule("ensemble@0.4")[1])
    by_rule = 0
    for prompt, reply in zip(
        PROMPTS, engine.generate(PROMPTS, GenerationSettings(24, eos_token_ids=(2,))), strict=True
    ):
        logits, _ = reread(target, prompt, reply.token_ids)
        drafted, _ = reread(drafter.lm, prompt, reply.token_ids)
        mixture = 0.4 * logits.softmax(-1) + 0.6 * drafted.softmax(-1)
        for place in reply.by_rule:
            assert int(mixture[place].argmax()) == reply.token_ids[place]
        by_rule += len(reply.by_rule)
    assert by_rule > 0, "the rule never had a say, so nothing was tested"


@pytest.mark.parametrize("weight", [0.0, 1.0, float("nan")])
def test_a_weight_that_mixes_nothing_is_an_error(weight: float) -> None:
    with pytest.raises(ValueError, match="above 0 and below 1"):
        Ensemble(weight)


def test_rules_of_both_are_known_by_name_and_draft_chains() -> None:
    assert parse_rule("kl-unsure@0.5") == ("kl-unsure", UnsureDivergence(0.5))
    with pytest.raises(ValueError, match="draft a chain"):
        Engine(random_target(), LMDrafter(random_target("llama", seed=5)), parse_shape("2x3"), rule=Ensemble(0.5))

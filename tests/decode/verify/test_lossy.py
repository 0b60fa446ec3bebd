"""Lossy verification: what stands is the target's own or allowed by the rule, a shut rule is lossless, each rule holds to its formula."""

from __future__ import annotations

import math

import pytest
import torch
from doubles import PlannedDrafter, random_target
from hypothesis import given, settings
from hypothesis import strategies as st
from ruling import PROMPTS, random_judge, reread

from draftsmith.decode import Engine, Generation, GenerationSettings
from draftsmith.decode.verify.lossless import walk
from draftsmith.decode.verify.lossy_rule import LossyRule
from draftsmith.decode.verify.lossy_rules import Divergence, Everything, JudgeRule, TopK, Typical, divergence
from draftsmith.decode.verify.lossy_walk import lossy_walk
from draftsmith.models import Drafter, DraftLimits, DraftTree, Eagle, ReDrafter, Target, tree_from_paths
from draftsmith.models.drafters.draft_lm import LMDrafter
from draftsmith.models.judge import Judge, JudgeConfig
from draftsmith.models.tree.shapes import parse_shape

GREEDY = GenerationSettings(max_new_tokens=24, eos_token_ids=(2,))


@pytest.fixture(scope="module")
def target() -> Target:
    return random_target()


@pytest.fixture(scope="module")
def draft_lm() -> LMDrafter:
    return LMDrafter(random_target("llama", seed=5))


def drafters(target: Target, draft_lm: LMDrafter) -> dict[str, tuple[Drafter, str]]:
    torch.manual_seed(0)
    return {
        "oracle": (PlannedDrafter(target, "half"), "3x4"),
        "random": (PlannedDrafter(target, "random"), "3x4"),
        "redrafter": (ReDrafter.for_target(target.ends), "3x3"),
        "eagle": (Eagle.for_target(target.ends), "4x3n9"),
        "static": (Eagle.for_target(target.ends), "t3.2.1"),
        "lm": (draft_lm, "1x16"),
        "stopped lm": (draft_lm, "1x32e0.3"),
    }


def rules(target: Target) -> dict[str, LossyRule]:
    return {
        "judge": JudgeRule(random_judge(target, 0.6)),
        "top-k": TopK(5),
        "typical": Typical(0.05),
        "everything": Everything(),
    }


def decode(
    target: Target, drafter: Drafter, shape: str, rule: LossyRule | None, prompts: list[list[int]] = PROMPTS
) -> list[Generation]:
    return Engine(target, drafter, parse_shape(shape), rule=rule).generate(prompts, GREEDY)


@pytest.mark.parametrize("drafter", ["oracle", "random", "redrafter", "eagle", "static", "lm", "stopped lm"])
@pytest.mark.parametrize("rule", ["judge", "top-k", "typical", "everything"])
def test_every_token_is_the_targets_own_choice_or_marked_as_the_rules_and_allowed(
    target: Target, draft_lm: LMDrafter, drafter: str, rule: str
) -> None:
    chosen, shape = drafters(target, draft_lm)[drafter]
    judge = random_judge(target, 0.6).attach(target.ends)
    by_rule = 0
    for prompt, generation in zip(PROMPTS, decode(target, chosen, shape, rules(target)[rule]), strict=True):
        logits, states = reread(target, prompt, generation.token_ids)
        by_rule += len(generation.by_rule)
        for place, token in enumerate(generation.token_ids):
            own = token == int(logits[place].argmax())
            assert own == (place not in generation.by_rule)
            if own:
                continue
            assert token not in GREEDY.eos_token_ids, "the rule ended a reply"
            probs = logits[place].softmax(-1)
            if rule == "judge":
                assert bool(judge.accepts(states[place]))
            elif rule == "top-k":
                assert token in logits[place].topk(5).indices
            elif rule == "typical":
                entropy = float(torch.special.entr(probs).sum())
                assert float(probs[token]) > min(0.05, math.sqrt(0.05) * math.exp(-entropy))
    if drafter == "random" or drafter.endswith("lm"):
        assert by_rule > 0, "the rule never had a say, so nothing was tested"


@pytest.mark.parametrize("drafter", ["oracle", "random", "redrafter", "eagle", "static", "lm", "stopped lm"])
def test_a_judge_with_threshold_1_gives_the_lossless_output_in_the_same_cycles(
    target: Target, draft_lm: LMDrafter, drafter: str
) -> None:
    chosen, shape = drafters(target, draft_lm)[drafter]
    plain = Engine(target).generate(PROMPTS, GREEDY)
    shut = decode(target, drafters(target, draft_lm)[drafter][0], shape, JudgeRule(random_judge(target, 1.0)))
    lossless = decode(target, chosen, shape, None)
    assert [one.token_ids for one in shut] == [one.token_ids for one in plain]
    assert [one.accepted for one in shut] == [one.accepted for one in lossless]
    assert not any(one.by_rule for one in shut)


@pytest.mark.parametrize("rule", ["judge", "top-k", "typical", "everything"])
@pytest.mark.parametrize("drafter", ["redrafter", "eagle", "lm"])
def test_a_batch_decodes_as_its_rows_would_alone(target: Target, draft_lm: LMDrafter, drafter: str, rule: str) -> None:
    chosen, shape = drafters(target, draft_lm)[drafter]
    together = decode(target, chosen, shape, rules(target)[rule])
    alone = [decode(target, chosen, shape, rules(target)[rule], [prompt])[0] for prompt in PROMPTS]
    assert [one.token_ids for one in together] == [one.token_ids for one in alone]
    assert [one.by_rule for one in together] == [one.by_rule for one in alone]


def test_everything_accepts_whole_chains_up_to_the_end_of_the_reply(target: Target, draft_lm: LMDrafter) -> None:
    for generation in decode(target, draft_lm, "1x5", Everything()):
        assert all(count == 5 for count in generation.accepted[:-1])


def test_kl_allows_where_the_two_distributions_are_near(target: Target, draft_lm: LMDrafter) -> None:
    threshold = 3.0
    ruled = 0
    for prompt, generation in zip(PROMPTS, decode(target, draft_lm, "1x8", Divergence(threshold)), strict=True):
        logits, _ = reread(target, prompt, generation.token_ids)
        with torch.inference_mode():
            text = torch.tensor([prompt + generation.token_ids])
            draft = draft_lm.lm.model(input_ids=text, use_cache=False).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        apart = (draft.exp() * (draft - logits.log_softmax(-1))).sum(-1)
        for place in generation.by_rule:
            assert float(apart[place]) < threshold
            ruled += 1
    assert ruled > 0
    nothing = decode(target, draft_lm, "1x8", Divergence(0.0))
    assert [one.token_ids for one in nothing] == [one.token_ids for one in decode(target, draft_lm, "1x8", None)]


@given(st.integers(0, 10**6))
def test_the_divergence_of_a_distribution_from_itself_is_zero_and_tokens_without_probability_add_nothing(
    seed: int,
) -> None:
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(seed))
    logits[:, 3] = -torch.inf
    log_others = logits.log_softmax(-1)
    assert divergence(logits.softmax(-1), log_others).abs().max() < 1e-5


def random_tree(seed: int) -> DraftTree:
    generator = torch.Generator().manual_seed(seed)
    paths_BML = torch.randint(0, 4, (3, 4, 3), generator=generator)
    scores_BML = -torch.rand(3, 4, 3, generator=generator).cumsum(-1)
    return tree_from_paths(torch.tensor([5, 6, 7]), paths_BML, scores_BML)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6))
def test_the_walk_goes_along_the_targets_choices_first_and_never_stops_where_a_child_stands(seed: int) -> None:
    tree = random_tree(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    choices_BN = torch.randint(0, 4, tree.tokens_BN.shape, generator=generator)
    allowed_BN = torch.rand(tree.tokens_BN.shape, generator=generator) < 0.4
    steps = lossy_walk(tree, choices_BN, allowed_BN)
    for row in range(3):
        node, emitted, ruled = 0, [], []
        while True:
            children = [
                child
                for child in range(1, tree.num_nodes)
                if bool(tree.valid_BN[row, child]) and int(tree.parents_BN[row, child]) == node
            ]
            own = [child for child in children if tree.tokens_BN[row, child] == choices_BN[row, node]]
            standing = own or [child for child in children if bool(allowed_BN[row, child])]
            if not standing:
                break
            assert tree.scores_BN is not None
            chosen = max(standing, key=lambda child: float(tree.scores_BN[row, child]))  # type: ignore[index]
            ruled.append(chosen not in own)
            emitted.append(int(tree.tokens_BN[row, chosen]))
            node = chosen
        count = int(steps.counts_B[row])
        assert steps.emitted_BE[row, :count].tolist() == [*emitted, int(choices_BN[row, node])]
        assert steps.by_rule_BE[row].tolist() == [*ruled, *[False] * (steps.by_rule_BE.shape[1] - len(ruled))]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6))
def test_a_walk_on_which_nothing_is_allowed_is_the_lossless_one(seed: int) -> None:
    tree = random_tree(seed)
    choices_BN = torch.randint(0, 4, tree.tokens_BN.shape, generator=torch.Generator().manual_seed(seed))
    lossy = lossy_walk(tree, choices_BN, torch.zeros_like(tree.valid_BN))
    lossless = walk(tree, tree.ancestors(), choices_BN)
    assert torch.equal(lossy.counts_B, lossless.counts_B)
    place_E = torch.arange(lossy.emitted_BE.shape[1])
    real_BE = place_E < lossy.counts_B[:, None]
    assert torch.equal(lossy.emitted_BE[real_BE], lossless.emitted_BE[real_BE])
    assert not lossy.by_rule_BE.any()


def test_sampled_trees_and_rules_are_refused_together(target: Target, draft_lm: LMDrafter) -> None:
    with pytest.raises(ValueError, match="verified by rejection"):
        Engine(target, draft_lm, parse_shape("s2.1"), rule=TopK(2))


@pytest.mark.parametrize("shape", ["2x3", "t2.1", "3x3n5"])
def test_kl_is_refused_for_drafts_that_are_no_chains(target: Target, draft_lm: LMDrafter, shape: str) -> None:
    with pytest.raises(ValueError, match="draft a chain"):
        Engine(target, draft_lm, parse_shape(shape), rule=Divergence(0.1))


def test_a_judge_of_another_target_is_refused_when_the_engine_is_made(target: Target) -> None:
    judge = Judge(JudgeConfig(hidden_size=16))
    with pytest.raises(ValueError, match="hidden size 16"):
        Engine(target, PlannedDrafter(target, "random"), DraftLimits(), rule=JudgeRule(judge))


def test_a_judge_that_reads_the_draft_model_is_refused() -> None:
    with pytest.raises(ValueError, match="reads the draft model's states"):
        JudgeRule(Judge(JudgeConfig(hidden_size=16, draft_hidden_size=8)))


@pytest.mark.parametrize(
    ("rule", "value", "told"),
    [
        (TopK, 0, "top-k is 0; it counts tokens"),
        (TopK, 1.5, "top-k is 1.5; it counts tokens"),
        (Typical, 0.0, "epsilon is 0.0; it is a probability"),
        (Typical, 2.0, "epsilon is 2.0; it is a probability"),
        (Divergence, -1.0, "threshold is -1.0; a divergence is at least 0"),
    ],
)
def test_numbers_out_of_range_are_refused(rule: type[TopK], value: float, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        rule(value)


def test_sampling_with_a_shut_rule_draws_what_plain_sampling_draws(target: Target, draft_lm: LMDrafter) -> None:
    warm = GenerationSettings(max_new_tokens=20, temperature=1.0, seed=3, eos_token_ids=(2,))
    shut = Engine(target, draft_lm, parse_shape("1x6"), rule=JudgeRule(random_judge(target, 1.0)))
    plain = Engine(target).generate(PROMPTS, warm)
    assert [one.token_ids for one in shut.generate(PROMPTS, warm)] == [one.token_ids for one in plain]

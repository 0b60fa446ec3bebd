"""FLy and the margin: each against its formula on whole replies, and the runs of agreement in chains and trees."""

from __future__ import annotations

import math

import pytest
import torch
from doubles import random_target
from ruling import PROMPTS, reread
from torch import Tensor

from draftsmith.decode import Engine, GenerationSettings
from draftsmith.decode.verify.lossy_rule import LossyRule
from draftsmith.decode.verify.lossy_walk import lossy_walk
from draftsmith.decode.verify.rule_text import parse_rule
from draftsmith.decode.verify.uncertain_rules import Fly, Margin, agreeing_behind
from draftsmith.models import DraftTree, Target, tree_from_paths
from draftsmith.models.drafters.draft_lm import LMDrafter
from draftsmith.models.tree.shapes import parse_shape

GREEDY = GenerationSettings(max_new_tokens=24, eos_token_ids=(2,))
V = 12


@pytest.fixture(scope="module")
def target() -> Target:
    return random_target()


def chain(*tokens: int) -> DraftTree:
    return tree_from_paths(torch.tensor([1]), torch.tensor([[tokens]]))


def peaked(*weights: dict[int, float]) -> Tensor:
    """Logits [1, N, V] whose softmax has these probabilities; the rest is shared by the other tokens."""
    rows = []
    for probs in weights:
        row = torch.full((V,), (1.0 - sum(probs.values())) / (V - len(probs)))
        for token, prob in probs.items():
            row[token] = prob
        rows.append(row.log())
    return torch.stack(rows)[None]


def test_the_run_of_agreement_is_counted_below_each_node() -> None:
    assert agreeing_behind(chain(5, 6, 7), torch.tensor([[9, 6, 7, 8]])).tolist() == [[0, 2, 1, 0]]
    # root -> 5 -> {6 -> 7, 8}, and 3: the choice behind 5 is 6, behind 6 it is 7.
    tree = tree_from_paths(torch.tensor([1]), torch.tensor([[[5, 6, 7], [5, 8, 2], [3, 4, 4]]]))
    choice = {1: 9, 5: 6, 6: 7, 3: 0}
    choices_BN = torch.tensor([[choice.get(token, 0) for token in tree.tokens_BN[0].tolist()]])
    runs = dict(zip(tree.tokens_BN[0].tolist(), agreeing_behind(tree, choices_BN)[0].tolist(), strict=True))
    assert (runs[5], runs[6], runs[8], runs[3]) == (2, 1, 0, 0)


def test_fly_defers_a_rejection_where_the_target_hesitates_and_then_agrees() -> None:
    tree = chain(5, 6, 7)
    agreeing = [{6: 0.9}, {7: 0.9}, {8: 0.9}]
    hesitant, sure = {9: 0.5, 5: 0.4}, {9: 0.96, 5: 0.02}
    for first, allowed in ((hesitant, True), (sure, False)):
        logits_BNV = peaked(first, *agreeing)
        choices_BN = logits_BNV.argmax(-1)
        rule = Fly(0.3, window=2)
        allowed_BN = rule.allows_beside(tree, logits_BNV, None, choices_BN)  # type: ignore[arg-type]
        assert bool(allowed_BN[0, 1]) is allowed
        emitted = lossy_walk(tree, choices_BN, allowed_BN)
        assert emitted.emitted_BE[0, : int(emitted.counts_B)].tolist() == ([5, 6, 7, 8] if allowed else [9])
    # The draft must show the whole window behind the token: here it disagrees at its second place.
    logits_BNV = peaked(hesitant, {6: 0.9}, {3: 0.9}, {8: 0.9})
    allowed_BN = rule.allows_beside(tree, logits_BNV, None, logits_BNV.argmax(-1))  # type: ignore[arg-type]
    assert not allowed_BN.any()


def test_the_margin_allows_the_second_choice_alone_and_only_close_to_the_first() -> None:
    tree = tree_from_paths(torch.tensor([1]), torch.tensor([[[5], [6], [7]]]))
    logits_BNV = peaked({9: 0.4, 5: 0.35, 6: 0.15}, {1: 0.5}, {1: 0.5}, {1: 0.5})
    for logits in (logits_BNV, logits_BNV + 100.0):
        assert Margin(0.2).allows(tree, logits, None)[0, 1:].tolist() == [True, False, False]  # type: ignore[arg-type]
        assert not Margin(0.1).allows(tree, logits, None)[0, 1:].any()  # type: ignore[arg-type]


@pytest.mark.parametrize("rule", [Fly(0.2, window=2), Margin(0.5)], ids=str)
@pytest.mark.parametrize("shape", ["1x8", "3x4n9"])
def test_what_stands_by_the_rule_keeps_to_its_formula_on_whole_replies(
    target: Target, rule: LossyRule, shape: str
) -> None:
    engine = Engine(target, LMDrafter(random_target("llama", seed=5)), parse_shape(shape), rule=rule)
    for prompt, generation in zip(PROMPTS, engine.generate(PROMPTS, GREEDY), strict=True):
        logits, _ = reread(target, prompt, generation.token_ids)
        for place, token in enumerate(generation.token_ids):
            own = token == int(logits[place].argmax())
            assert own == (place not in generation.by_rule)
            if own:
                continue
            best = logits[place].log_softmax(-1).topk(3).values
            if isinstance(rule, Margin):
                assert token in logits[place].topk(2).indices
                assert float(best[0] - best[1]) < 0.5
            else:
                assert float(-(best.exp() * best).sum()) >= 0.2
                assert not {place + 1, place + 2} & set(generation.by_rule), "the window behind is the target's own"


def test_rules_are_named_on_the_command_line_and_bad_numbers_are_errors() -> None:
    assert parse_rule("fly@0.3") == ("fly", Fly(0.3))
    assert parse_rule("close=margin@0.3") == ("close", Margin(0.3))
    for text, fault in (("fly@-1", "nats of at least 0"), ("margin@0", "nats above 0"), ("margin@inf", "nats above 0")):
        with pytest.raises(ValueError, match=fault):
            parse_rule(text)
    with pytest.raises(ValueError, match="at least one token behind"):
        Fly(0.3, window=0)
    assert math.isclose(Fly(0.3).threshold, 0.3)

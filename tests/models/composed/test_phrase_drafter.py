"""Phrases behind a draft: exact as every other draft, from a row's own text and the target's own choices alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from doubles import BOS, draft, first_cycle, opening, random_target
from every_family import EVERY_FAMILY, fresh
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from draftsmith.decode import Engine, GenerationSettings
from draftsmith.decode.runners import CompiledRunner
from draftsmith.decode.verify.lossy_rules import Divergence
from draftsmith.models import DraftLimits, Target
from draftsmith.models.composed.phrase_drafter import PhraseConfig, PhraseDrafter
from draftsmith.models.composed.phrases import PhraseRing, best_leaves, rejected_phrases, tails_of
from draftsmith.models.drafters.drafter_folder import load_drafter
from draftsmith.models.tree.shapes import parse_shape
from draftsmith.models.tree.tree import DraftTree, tree_from_paths

PROMPTS = [[BOS, 5, 9, 11, 4, 5, 9, 11, 4, 5, 9], [BOS, 7], [BOS, 8, 8, 8, 30, 31, 32, 30, 31, 32, 30]]
REQUESTS = [GenerationSettings(max_new_tokens=40), GenerationSettings(max_new_tokens=24, temperature=0.8, seed=4)]
SHORT = {"phrase_length": 3, "num_leaves": 3, "pool_size": 16}


@pytest.fixture(scope="module")
def lm() -> Target:
    return random_target()


def alone(**fields: Any) -> PhraseDrafter:
    return PhraseDrafter(PhraseConfig(**(SHORT | fields))).eval()


def with_head(lm: Target, name: str = "eagle") -> PhraseDrafter:
    family = next(family for family in EVERY_FAMILY if family.name == name)
    return PhraseDrafter(PhraseConfig(head="head", **SHORT), fresh(family, lm.ends)).eval()


@pytest.mark.parametrize("request_", REQUESTS, ids=["greedy", "sampled"])
@pytest.mark.parametrize("shape", ["1x6", "3x5p0.05", "4x6n9"])
@pytest.mark.parametrize("kind", ["alone", "eagle"])
def test_replies_are_the_targets_own_in_a_batch_and_alone(
    lm: Target, kind: str, shape: str, request_: GenerationSettings
) -> None:
    drafter = alone() if kind == "alone" else with_head(lm, kind)
    expected = [each.token_ids for each in Engine(lm).generate(PROMPTS, request_)]
    engine = Engine(lm, drafter, parse_shape(shape))
    together = engine.generate(PROMPTS, request_)
    assert [each.token_ids for each in together] == expected
    assert max(max(each.accepted) for each in together) <= parse_shape(shape).draft_length
    in_turn = engine.generate(PROMPTS, request_, num_rows=2)
    assert [each.token_ids for each in in_turn] == expected
    if kind == "alone":  # the draft of an untrained head hangs on the rounding of a batch
        assert [each.accepted for each in in_turn] == [each.accepted for each in together]


@pytest.mark.parametrize(("headed", "shape"), [(False, "2x3n4"), (True, "2x5n6"), (True, "1x5")])
def test_a_whole_cycle_is_one_graph(lm: Target, headed: bool, shape: str) -> None:
    graphs = 0

    def counting(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        return graph.forward

    torch._dynamo.reset()
    drafter = with_head(lm) if headed else alone()
    engine = Engine(lm, drafter, parse_shape(shape), runner=lambda cycle: CompiledRunner(cycle, counting))
    request = GenerationSettings(max_new_tokens=12, temperature=1.0, seed=3)
    expected = [each.token_ids for each in Engine(lm).generate(PROMPTS, request)]
    assert [each.token_ids for each in engine.generate(PROMPTS, request, num_rows=2)] == expected
    assert graphs == 1


def test_a_row_is_drafted_for_from_its_own_text(lm: Target) -> None:
    tree = draft(lm, alone(), [[BOS, 5, 6, 7, 5, 6], [5, 6, 40, 41, 42, 43]], DraftLimits(1, 3))
    assert tree.tokens_BN[0].tolist() == [6, 7, 5, 6]
    assert tree.valid_BN.tolist() == [[True] * 4, [True, False, False, False]]


def test_a_rejected_phrase_is_proposed_where_its_first_token_comes_again(lm: Target) -> None:
    drafter = alone().bound(lm.ends)
    limits = DraftLimits(2, 3, 4)
    start = opening(lm, [[BOS, 5, 6, 40], [BOS, 5, 6, 40]], limits, ())
    state = drafter.start(start)
    tree = tree_from_paths(torch.tensor([6, 6]), torch.tensor([[[5, 8], [40, 9]]]).expand(2, -1, -1))
    choices = torch.full_like(tree.tokens_BN, 63)
    choices[0, tree.tokens_BN[0].tolist().index(40)] = (
        9  # row 0 alone: rejected 40 is followed by 9, which the draft holds
    )
    state = drafter.take_choices(state, tree, choices)
    drafted = drafter.propose(state, first_cycle(start), limits)
    assert drafted.tokens_BN[0][drafted.valid_BN[0]].tolist() == [40, 9, 63]
    assert drafted.valid_BN[1].sum() == 1, "another row's phrase is not proposed"


def phrases_by_hand(tree: DraftTree, choices: list[int], num_slots: int) -> dict[int, list[int]]:
    """The rule written out, node by node."""
    tokens, parents, valid = (part[0].tolist() for part in (tree.tokens_BN, tree.parents_BN, tree.valid_BN))
    phrases = {}
    for node in range(1, len(tokens)):
        if not valid[node] or choices[parents[node]] == tokens[node]:
            continue
        phrase, at = [tokens[node]], node
        while True:
            phrase.append(choices[at])
            children = [child for child in range(1, len(tokens)) if valid[child] and parents[child] == at]
            onward = [child for child in children if tokens[child] == choices[at]]
            if not onward:
                break
            at = onward[0]
        if len(phrase) > 2:
            phrases[node] = phrase[:num_slots]
    return phrases


@settings(max_examples=100, deadline=None)
@given(data=st.data(), num_paths=st.integers(1, 5), depth=st.integers(1, 4), num_slots=st.integers(3, 5))
def test_rejected_phrases_are_the_rule_written_out(
    data: st.DataObject, num_paths: int, depth: int, num_slots: int
) -> None:
    token = st.integers(0, 2)
    path = st.lists(token, min_size=depth, max_size=depth)
    paths = data.draw(st.lists(path, min_size=num_paths, max_size=num_paths))
    tree = tree_from_paths(torch.tensor([7]), torch.tensor([paths]))
    choices = data.draw(st.lists(token, min_size=tree.num_nodes, max_size=tree.num_nodes))
    got = rejected_phrases(tree, torch.tensor([choices]), num_slots)[0].tolist()
    kept = {node: [each for each in phrase if each >= 0] for node, phrase in enumerate(got) if phrase[0] >= 0}
    assert kept == phrases_by_hand(tree, choices, num_slots)


def test_a_ring_keeps_the_latest_phrases_with_gaps() -> None:
    ring = PhraseRing.empty(2, 7, torch.device("cpu"))
    ring = ring.with_phrases(torch.tensor([[[-1, -1, -1], [4, 5, -1]], [[1, 2, 3], [-1, -1, -1]]]))
    assert ring.tokens_BR.tolist() == [[4, 5, -1, -1, -1, -1, -1], [1, 2, 3, -1, -1, -1, -1]]
    ring = ring.with_phrases(torch.tensor([[[6, 7, 8], [9, 9, -1]], [[-1, -1, -1], [-1, -1, -1]]]))
    assert ring.tokens_BR.tolist() == [[9, 9, -1, 6, 7, 8, -1], [1, 2, 3, -1, -1, -1, -1]]
    assert ring.ends_B.tolist() == [3, 4]


def test_tails_go_from_the_draft_into_the_text() -> None:
    tree = tree_from_paths(
        torch.tensor([7]), torch.tensor([[[1, 2], [3, 4]]]), torch.tensor([[[-1.0, -2.0], [-0.5, -3.0]]])
    )
    leaves, scores = best_leaves(tree, 3)
    assert scores[0].tolist() == [-2.0, -3.0, -torch.inf]
    tails = tails_of(tree, leaves[:, :2], torch.tensor([[5, 6, 7, 0]]), torch.tensor([2]), 6)
    assert tails.tolist() == [[[2, 1, 7, 6, 5, -1], [4, 3, 7, 6, 5, -1]]]


def test_shapes_and_rules_that_do_not_fit_are_errors(lm: Target) -> None:
    for shape in ("t2.1", "s1.1", "1x4e0.5"):
        with pytest.raises(ValueError, match="has no distribution at its nodes"):
            Engine(lm, alone(), parse_shape(shape)).generate(PROMPTS, GenerationSettings(temperature=1.0))
    with pytest.raises(ValueError, match=r"of which phrases are 3.*draft deeper"):
        Engine(lm, with_head(lm), DraftLimits(2, 3)).generate(PROMPTS, REQUESTS[0])
    engine = Engine(lm, alone(), DraftLimits(1, 4), rule=Divergence(0.5))
    with pytest.raises(ValueError, match="give another rule"):
        engine.generate(PROMPTS, REQUESTS[0])


def test_a_folder_names_the_head_and_the_fields(drafter: Path, tmp_path: Path) -> None:
    def write(**fields: object) -> Path:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "draftsmith_phrases", **fields}))
        return tmp_path

    own = load_drafter(write(head=str(drafter), phrase_length=4, longest_match=1))
    assert isinstance(own, PhraseDrafter)
    assert own.head is not None
    assert (own.config.phrase_length, own.config.rule.longest_match) == (4, 1)
    for fields, fault in (
        ({"pool_size": 0}, "pool_size"),
        ({"token_chance": 0}, "a number above 0, at most 1"),
        ({"head": "embedded:suffix"}, "reads the text as well"),
    ):
        with pytest.raises(ValueError, match=fault):
            load_drafter(write(**fields))

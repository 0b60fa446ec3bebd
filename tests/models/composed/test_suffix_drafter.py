"""The drafter without weights: exact as every other, from a row's own text alone, and together with a head."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from doubles import BOS, draft, greedy_by_hand, random_target
from every_family import EVERY_FAMILY, fresh
from torch import Tensor

from draftsmith.decode import Engine, GenerationSettings
from draftsmith.decode.runners import CompiledRunner
from draftsmith.decode.verify.lossy_rules import Divergence
from draftsmith.models import DraftLimits, Target
from draftsmith.models.composed.suffix_drafter import SuffixConfig, SuffixDrafter
from draftsmith.models.drafters.drafter_folder import drafter_fingerprint, drafter_folder, load_drafter
from draftsmith.models.drafters.other_layouts import TargetBond
from draftsmith.models.tree.shapes import parse_shape
from draftsmith.models.tree.tree import DraftTree

PROMPTS = [[BOS, 5, 9, 11, 4, 5, 9, 11, 4, 5, 9], [BOS, 7], [BOS, 8, 8, 8, 30, 31, 32, 30, 31, 32, 30]]
SHAPES = ["1x6", "3x4", "4x6n9", "2x4p0.5"]
LONG = GenerationSettings(max_new_tokens=40)


@pytest.fixture(scope="module")
def lm() -> Target:
    return random_target()


def alone() -> SuffixDrafter:
    return SuffixDrafter(SuffixConfig()).eval()


def with_head(lm: Target) -> SuffixDrafter:
    family = next(family for family in EVERY_FAMILY if family.name == "eagle")
    return SuffixDrafter(SuffixConfig(), fresh(family, lm.ends)).eval()


@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_replies_are_the_targets_own(lm: Target, shape: str) -> None:
    expected = [greedy_by_hand(lm, prompt, 40) for prompt in PROMPTS]
    engine = Engine(lm, alone(), parse_shape(shape))
    results = engine.generate(PROMPTS, LONG)
    assert [each.token_ids for each in results] == expected
    assert sum(sum(each.accepted) for each in results) > 0, "a random model repeats itself now and then"
    assert [each.token_ids for each in engine.generate(PROMPTS, LONG, num_rows=1)] == expected


@pytest.mark.parametrize("shape", ["3x4n7", "2x3"])
def test_with_a_head_replies_stay_the_targets_own_at_every_temperature(lm: Target, shape: str) -> None:
    for request in (LONG, GenerationSettings(max_new_tokens=24, temperature=0.8, seed=4)):
        expected = [each.token_ids for each in Engine(lm).generate(PROMPTS, request)]
        results = Engine(lm, with_head(lm), parse_shape(shape)).generate(PROMPTS, request, num_rows=2)
        assert [each.token_ids for each in results] == expected


def test_text_may_lead_deeper_than_the_head_can_draft(lm: Target) -> None:
    family = next(family for family in EVERY_FAMILY if family.name == "headsdrafter")
    head = fresh(family, lm.ends)
    both = SuffixDrafter(SuffixConfig(), head).eval()
    assert head.max_draft_steps == 3
    tree = draft(lm, both, [[BOS, 5, 6, 7, 8, 9, 10, 11, 5, 6, 7, 8]], DraftLimits(2, 6, 12))
    assert [9, 10, 11, 5, 6, 7] in paths_of(tree)
    results = Engine(lm, both, DraftLimits(2, 6, 12)).generate(PROMPTS, LONG)
    assert [each.token_ids for each in results] == [greedy_by_hand(lm, prompt, 40) for prompt in PROMPTS]


def test_a_head_can_be_kept_shallower_than_the_text(lm: Target) -> None:
    head, prompt, shape = with_head(lm).head, [BOS, 5, 6, 7, 8, 9, 10, 11, 5, 6, 7, 8], DraftLimits(2, 6, 40)
    both = SuffixDrafter(SuffixConfig(head_steps=2), head).eval()
    assert both.limits_of_parts(shape) == DraftLimits(2, 2, 40)
    paths = paths_of(draft(lm, both, [prompt], shape))
    assert [9, 10, 11, 5, 6, 7] in paths
    of_text = paths_of(draft(lm, alone(), [prompt], shape))
    assert max(len(path) for path in paths if path not in of_text) == 2
    assert max(map(len, paths_of(draft(lm, head, [prompt], shape)))) > 2
    results = Engine(lm, both, shape).generate(PROMPTS, LONG)
    assert [each.token_ids for each in results] == [greedy_by_hand(lm, each, 40) for each in PROMPTS]


def test_steps_of_a_head_that_is_not_there_are_an_error() -> None:
    with pytest.raises(ValueError, match="head_steps is 2, and there is no head"):
        SuffixDrafter(SuffixConfig(head_steps=2))
    with pytest.raises(ValueError, match="head_steps"):
        SuffixDrafter(SuffixConfig(head_steps=0))


def paths_of(tree: DraftTree) -> list[list[int]]:
    """The tokens below the root that lead to each node of the first row."""
    paths = []
    for node in range(1, tree.num_nodes):
        path, at = [], node
        while at > 0:
            path.append(int(tree.tokens_BN[0, at]))
            at = int(tree.parents_BN[0, at])
        paths.append(path[::-1])
    return paths


@pytest.mark.parametrize("joined", [False, True], ids=["alone", "with a head"])
def test_a_whole_cycle_is_one_graph(lm: Target, joined: bool) -> None:
    graphs = 0

    def counting(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        return graph.forward

    torch._dynamo.reset()
    drafter = with_head(lm) if joined else alone()
    engine = Engine(lm, drafter, parse_shape("2x3n4"), runner=lambda cycle: CompiledRunner(cycle, counting))
    request = GenerationSettings(max_new_tokens=12, temperature=1.0, seed=3)
    expected = [each.token_ids for each in Engine(lm).generate(PROMPTS, request)]
    assert [each.token_ids for each in engine.generate(PROMPTS, request, num_rows=2)] == expected
    assert graphs == 1


def test_a_row_is_drafted_for_from_its_own_text(lm: Target) -> None:
    tree = draft(lm, alone(), [[BOS, 5, 6, 7, 5, 6], [5, 6, 40, 41, 42, 43]], DraftLimits(1, 3))
    assert tree.tokens_BN[0].tolist() == [6, 7, 5, 6]
    assert tree.valid_BN.tolist() == [[True] * 4, [True, False, False, False]]


def test_shapes_and_rules_that_need_distributions_are_errors(lm: Target) -> None:
    for shape in ("t2.1", "s1.1", "1x4e0.5"):
        with pytest.raises(ValueError, match=r"has no distribution at its nodes.*give a chain such as 1x16"):
            Engine(lm, alone(), parse_shape(shape)).generate(PROMPTS, GenerationSettings(temperature=1.0))
    with pytest.raises(ValueError, match=r"merge is 2, and a drafter without a head .* leave m2 out of the shape"):
        Engine(lm, alone(), parse_shape("4x6n24m2")).generate(PROMPTS, LONG)
    with pytest.raises(ValueError, match="together are a tree; give a shape such as 10x5n24"):
        Engine(lm, with_head(lm), DraftLimits(1, 4)).generate(PROMPTS, LONG)
    engine = Engine(lm, alone(), DraftLimits(1, 4), rule=Divergence(0.5))
    with pytest.raises(ValueError, match="a drafter without a model has none; give another rule"):
        engine.generate(PROMPTS, LONG)


def write(folder: Path, **fields: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "draftsmith_suffix", **fields}))
    return folder


def test_the_embedded_one_and_a_users_own_folder_load(tmp_path: Path, lm: Target) -> None:
    embedded = load_drafter(Path("embedded:suffix"))
    assert isinstance(embedded, SuffixDrafter)
    assert embedded.config.rule == SuffixConfig().rule
    own = load_drafter(write(tmp_path / "own", longest_match=5, tokens_per_match=1))
    assert isinstance(own, SuffixDrafter)
    assert own.config.rule.longest_match == 5
    for fields, fault in (
        ({"num_places": 0}, "num_places"),
        ({"least_probability": 2}, "a number from 0 to 1"),
        ({"longest_match": 2, "shortest_match": 3}, "above longest_match 2"),
        ({"head": 3}, "head"),
        ({"head": "embedded:suffix"}, "reads the text as well"),
    ):
        with pytest.raises(ValueError, match=fault):
            load_drafter(write(tmp_path / "bad", **fields))


def test_a_head_beside_the_config_is_loaded_and_counts_for_the_fingerprint(drafter: Path, tmp_path: Path) -> None:
    own = write(tmp_path / "own", head=str(drafter))
    both = load_drafter(own)
    assert isinstance(both, SuffixDrafter)
    assert both.head is not None
    assert both.features == both.head.features
    first = drafter_fingerprint(own)
    assert first != drafter_fingerprint(write(tmp_path / "own", head=str(drafter), num_places=4))
    assert drafter_fingerprint(drafter_folder("embedded:suffix")) != first
    link = tmp_path / "own" / "trained"
    link.symlink_to(drafter)
    assert isinstance(load_drafter(write(tmp_path / "own", head="trained")), SuffixDrafter)


def test_a_head_of_another_target_is_an_error(drafter: Path, tmp_path: Path, lm: Target) -> None:
    both = load_drafter(write(tmp_path / "own", head=str(drafter)), target=TargetBond(lm.ends))
    with pytest.raises(ValueError, match=r"expects hidden size|was trained for target"):
        both.attach(lm.ends)

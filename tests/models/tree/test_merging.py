"""Branches that share what follows: the copies against the rule written out, the search that links, and exactness."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from doubles import BOS, random_target
from every_family import EVERY_FAMILY, fresh
from hypothesis import given, settings
from hypothesis import strategies as st
from table_expander import TableExpander, found, noise_table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from draftsmith.decode import Engine, GenerationSettings
from draftsmith.decode.runners import CompiledRunner
from draftsmith.models import DraftLimits, Target
from draftsmith.models.tree.merging import Links, merged
from draftsmith.models.tree.search import search
from draftsmith.models.tree.shapes import parse_shape
from draftsmith.models.tree.tree import prune_marked, tree_from_paths

Path = tuple[int, ...]
PROMPTS = [[BOS, 5, 9, 11, 4], [BOS, 7], [BOS, 8, 8, 8, 30, 31, 32]]
ROOT = 2


@pytest.fixture(scope="module")
def lm() -> Target:
    return random_target()


def merged_by_hand(nodes: dict[Path, float], agreeing: int, max_depth: int) -> dict[Path, float]:
    """The rule, path by path."""
    nodes = {(): 0.0, **nodes}

    def ends(path: Path) -> Path:
        return ((-1,) * agreeing + (ROOT, *path))[-agreeing:]

    inner = {path[:-1] for path in nodes if path}
    result = dict(nodes)
    for leaf in nodes.keys() - inner - {()}:
        sources = [path for path in inner if ends(path) == ends(leaf)]
        if not sources:
            continue
        source = max(sources, key=lambda path: nodes[path])
        for path, score in nodes.items():
            if len(path) > len(source) and path[: len(source)] == source:
                copy = leaf + path[len(source) :]
                if len(copy) <= max_depth:
                    result[copy] = nodes[leaf] + score - nodes[source]
    del result[()]
    return result


@settings(max_examples=100, deadline=None)
@given(data=st.data(), agreeing=st.integers(1, 3), depth=st.integers(1, 4), more=st.integers(0, 2))
def test_copies_are_the_rule_written_out(data: st.DataObject, agreeing: int, depth: int, more: int) -> None:
    paths = data.draw(
        st.lists(st.lists(st.integers(0, 3), min_size=depth, max_size=depth), min_size=1, max_size=5, unique_by=tuple)
    )
    lengths = data.draw(st.lists(st.integers(1, depth), min_size=len(paths), max_size=len(paths)))
    drops = {prefix: 0.0 for path in paths for prefix in [tuple(path[:end]) for end in range(1, depth + 1)]}
    for number, prefix in enumerate(drops):  # no two scores are equal
        drops[prefix] = data.draw(st.floats(0.1, 2.0)) + number * 1e-4
    scores = [
        [-sum(drops[tuple(path[: end + 1])] for end in range(place + 1)) for place in range(depth)] for path in paths
    ]
    kept = {tuple(path[:end]) for path, length in zip(paths, lengths, strict=True) for end in range(1, length + 1)}
    table = torch.tensor([scores])
    for number, path in enumerate(paths):
        for end in range(1, depth + 1):
            if tuple(path[:end]) not in kept:
                table[0, number, end - 1] = -torch.inf
    tree = tree_from_paths(torch.tensor([ROOT]), torch.tensor([paths]), table)
    expected = merged_by_hand(found(tree, 0), agreeing, depth + more)
    got = found(merged(tree, agreeing, depth + more), 0)
    assert set(got) == set(expected)
    assert got == pytest.approx(expected, abs=1e-4)


def test_the_example_holds() -> None:
    paths = torch.tensor([[[3, 4, 5, 6], [7, 4, 5, 9]]])
    scores = torch.tensor([[[-0.1, -0.2, -0.3, -0.5], [-1.0, -1.5, -2.0, -torch.inf]]])
    nodes = found(merged(tree_from_paths(torch.tensor([ROOT]), paths, scores), 2, 4), 0)
    assert nodes[(7, 4, 5, 6)] == pytest.approx(-2.2)
    assert len(nodes) == 8


def test_a_linked_node_leaves_its_place_in_the_search_to_another() -> None:
    """1 and 2 are both followed by 3, then 4 by a path that only a third node begins."""

    def logits(row: int, path: Path) -> list[float]:
        after: dict[Path, dict[int, float]] = {
            (): {1: 3.0, 2: 2.9},
            (1,): {3: 5.0, 4: 4.0},
            (2,): {3: 5.0, 4: 4.0},
        }
        row_logits = [-8.0] * 6
        for token, logit in after.get(path, {0: 4.0}).items():
            row_logits[token] = logit
        return row_logits

    def continued(merge: int | None) -> set[Path]:
        expander = TableExpander(logits, 1)
        search(expander, None, DraftLimits(2, 3, 8, merge=merge))
        return set(expander._paths[0])

    assert continued(None) == {(1, 3), (2, 3)}
    assert continued(1) == {(1, 3), (1, 4)}


@settings(max_examples=100, deadline=None)
@given(data=st.data(), agreeing=st.integers(1, 3), width=st.integers(1, 4))
def test_the_links_of_a_layer_are_the_rule_written_out(data: st.DataObject, agreeing: int, width: int) -> None:
    links, continued = Links(torch.tensor([ROOT]), agreeing), [(-1,) * (agreeing - 1) + (ROOT,)]
    above = continued
    for _ in range(3):
        nodes = [(row, place) for row in range(len(above)) for place in range(width)]
        tokens = [data.draw(st.permutations(range(width + 1)))[:width] for _ in above]
        scores = data.draw(st.lists(st.integers(-4, 0), min_size=len(nodes), max_size=len(nodes)))
        shape = (1, len(above), width)
        left = links.unlinked(torch.tensor([tokens]), torch.tensor(scores).float().view(shape)) > -torch.inf
        ends = {(row, place): (*above[row], tokens[row][place])[1:] for row, place in nodes}
        kept: list[tuple[int, int]] = []
        for _, node in sorted(zip(scores, nodes, strict=True), key=lambda each: (-each[0], each[1])):
            if ends[node] not in [*continued, *(ends[other] for other in kept)]:
                kept.append(node)
        assert {(row, place) for _, row, place in left.nonzero().tolist()} == set(kept)
        best = kept[:2] or nodes[:1]
        links.take(
            torch.tensor([[tokens[row][place] for row, place in best]]), torch.tensor([[row for row, _ in best]])
        )
        above = [ends[node] for node in best]
        continued = continued + above


def test_linking_a_wide_layer_makes_nothing_of_pairs_of_its_nodes() -> None:
    num_nodes, most = 64, 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal most
            out = func(*args, **(kwargs or {}))
            most = max([most, *(each.numel() for each in tree_leaves(out) if isinstance(each, Tensor))])
            return out

    generator = torch.Generator().manual_seed(0)
    links = Links(torch.tensor([ROOT]), 2)
    tokens = torch.randint(0, 9, (1, num_nodes, num_nodes), generator=generator)
    links.take(tokens[:, 0], torch.zeros(1, num_nodes, dtype=torch.int64))
    with Largest():
        links.unlinked(tokens, -torch.rand(1, num_nodes, num_nodes, generator=generator))
    assert most <= 4 * num_nodes**2


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 500), agreeing=st.integers(1, 2), budget=st.integers(2, 16))
def test_a_merged_search_keeps_the_best_nodes_and_their_parents(seed: int, agreeing: int, budget: int) -> None:
    tree = search(TableExpander(noise_table(seed), 3), None, DraftLimits(3, 4, budget, merge=agreeing), cut=False)
    assert tree.tokens_BN.shape == (3, budget + 1), "the shape does not follow what was drafted"
    for row in range(3):
        nodes = found(tree, row)
        assert len(nodes) <= budget
        assert all(score <= nodes.get(path[:-1], 0.0) + 1e-5 for path, score in nodes.items())
    again = prune_marked(merged(tree, agreeing, 4), budget)
    assert again.num_nodes <= budget + 1


@pytest.mark.parametrize("family", ["eagle", "redrafter", "blockdrafter"])
@pytest.mark.parametrize("shape", ["3x4n9m1", "4x5n12m2p0.01"])
def test_replies_stay_the_targets_own(lm: Target, family: str, shape: str) -> None:
    drafter = fresh(next(each for each in EVERY_FAMILY if each.name == family), lm.ends)
    for request in (
        GenerationSettings(max_new_tokens=16),
        GenerationSettings(max_new_tokens=16, temperature=0.9, seed=2),
    ):
        expected = [each.token_ids for each in Engine(lm).generate(PROMPTS, request)]
        limits = parse_shape(shape).no_deeper_than(drafter.max_draft_steps or 5)
        results = Engine(lm, drafter, limits).generate(PROMPTS, request, num_rows=2)
        assert [each.token_ids for each in results] == expected


def test_a_whole_cycle_is_one_graph(lm: Target) -> None:
    graphs = 0

    def counting(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        return graph.forward

    torch._dynamo.reset()
    drafter = fresh(next(each for each in EVERY_FAMILY if each.name == "redrafter"), lm.ends)
    engine = Engine(lm, drafter, parse_shape("2x3n5m1"), runner=lambda cycle: CompiledRunner(cycle, counting))
    request = GenerationSettings(max_new_tokens=9)
    expected = [each.token_ids for each in Engine(lm).generate(PROMPTS, request)]
    assert [each.token_ids for each in engine.generate(PROMPTS, request, num_rows=2)] == expected
    assert graphs == 1


def test_only_dynamic_trees_merge() -> None:
    for fields in (
        {"beam_width": 1, "node_budget": 4},
        {"beam_width": 2},
        {"beam_width": 2, "node_budget": 4, "merge": 0},
    ):
        with pytest.raises(ValueError, match="such as 4x6n24m2"):
            DraftLimits(**({"merge": 1} | fields))  # type: ignore[arg-type]

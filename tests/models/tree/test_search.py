"""Every manner of deterministic drafting against brute force, and the early stop against values worked out by hand.

Shape legend: B batch rows, M nodes of a layer, V draft vocabulary.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from doubles import BOS, draft, random_target, served_logits
from hypothesis import given, settings
from hypothesis import strategies as st
from table_expander import Table, TableExpander, found, noise_table

from draftsmith.decode import Engine, GenerationSettings
from draftsmith.models import Drafter, DraftLimits, DraftTree, Eagle, Eagle3, EarlyStop, ReDrafter, Target
from draftsmith.models.tree.early_stop import StopState
from draftsmith.models.tree.search import acceptance_bound, search
from draftsmith.models.tree.shapes import full_tree, parse_shape
from draftsmith.models.tree.tree import root_tree

Path = tuple[int, ...]
DRAFT_IDS = [3, 5, 9, 20, 21, 30, 44]
TEXTS = [[BOS, 7, 9, 3], [BOS, 30, 5, 21]]


@pytest.fixture(scope="module")
def target() -> Target:
    return random_target()


def log_probs(logits: Sequence[float]) -> list[float]:
    return torch.tensor(logits).log_softmax(-1).tolist()


def best_children(
    after: Callable[[Path], list[float]], path: Path, score: float, count: int
) -> list[tuple[float, Path]]:
    """The ``count`` likeliest continuations of a path with their cumulative log-probabilities, best first."""
    steps = after(path)
    order = sorted(range(len(steps)), key=lambda place: -steps[place])[:count]
    return [(score + steps[place], (*path, place)) for place in order]


def brute_dynamic(after: Callable[[Path], list[float]], width: int, depth: int, budget: int) -> dict[Path, float]:
    """EAGLE-2: continue the best of each layer, rerank everything, keep the best; draft ids."""
    frontier: list[tuple[float, Path]] = [(0.0, ())]
    every: list[tuple[float, Path]] = []
    for _ in range(depth):
        layer = [child for score, path in frontier for child in best_children(after, path, score, width)]
        every += layer
        frontier = sorted(layer, key=lambda one: -one[0])[:width]
    every.sort(key=lambda one: (-one[0], len(one[1])))
    return {path: score for score, path in every[:budget]}


def brute_static(after: Callable[[Path], list[float]], paths: Sequence[Path]) -> dict[Path, float]:
    """The node of each path of ranks; draft ids."""
    nodes: dict[Path, tuple[Path, float]] = {(): ((), 0.0)}
    for path in sorted(paths, key=len):
        above, score = nodes[path[:-1]]
        score, tokens = best_children(after, above, score, path[-1] + 1)[-1]
        nodes[path] = (tokens, score)
    return {tokens: score for ranks, (tokens, score) in nodes.items() if ranks}


def assert_same(got: dict[Path, float], wanted: dict[Path, float]) -> None:
    assert set(got) == set(wanted)
    for path, score in wanted.items():
        assert got[path] == pytest.approx(score, rel=1e-4, abs=1e-4)


def shaken(drafter: Drafter, seed: int = 0) -> Drafter:
    """Random weights everywhere, so that no part is an identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return drafter.eval()


def families(target: Target) -> dict[str, Drafter]:
    ids = torch.tensor(DRAFT_IDS)
    return {
        "redrafter": shaken(ReDrafter.for_target(target.ends, draft_token_ids=ids, head_init="random")),
        "eagle": shaken(Eagle.for_target(target.ends, draft_token_ids=ids)),
        "eagle3": shaken(Eagle3.for_target(target.ends, draft_token_ids=ids)),
    }


def served_after(target: Target, drafter: Drafter, text: list[int]) -> Callable[[Path], list[float]]:
    """Draft log-probabilities behind a path of draft ids, each path run alone and from the start."""

    def after(path: Path) -> list[float]:
        whole = text + [DRAFT_IDS[place] for place in path]
        return log_probs(served_logits(target, drafter, whole, len(path) + 1)[-1].tolist())

    return after


def as_tokens(nodes: dict[Path, float]) -> dict[Path, float]:
    return {tuple(DRAFT_IDS[place] for place in path): score for path, score in nodes.items()}


@pytest.mark.parametrize("name", ["redrafter", "eagle", "eagle3"])
@pytest.mark.parametrize(("width", "depth", "budget"), [(3, 3, 7), (2, 4, 5), (4, 2, 60), (1, 3, 2)])
def test_a_dynamic_tree_is_what_brute_force_finds_for_every_row(
    target: Target, name: str, width: int, depth: int, budget: int
) -> None:
    drafter = families(target)[name]
    tree = draft(target, drafter, TEXTS, DraftLimits(width, depth, budget))
    for row, text in enumerate(TEXTS):
        wanted = brute_dynamic(served_after(target, drafter, text), width, depth, budget)
        assert_same(found(tree, row), as_tokens(wanted))
        assert len(wanted) == min(budget, width + width**2 * (depth - 1))


STATIC: list[tuple[Path, ...]] = [
    full_tree((3, 2, 1)),
    ((0,), (2,), (0, 1), (0, 4), (2, 0), (0, 4, 0), (0, 4, 0, 1), (2, 0, 3)),
    ((0,), (0, 0), (0, 0, 0), (0, 0, 0, 0)),
    ((4,),),
]


@pytest.mark.parametrize("name", ["redrafter", "eagle", "eagle3"])
@pytest.mark.parametrize("paths", STATIC, ids=["full", "ragged", "chain", "one"])
def test_a_static_tree_holds_the_token_of_each_rank(target: Target, name: str, paths: tuple[Path, ...]) -> None:
    drafter = families(target)[name]
    tree = draft(target, drafter, TEXTS, DraftLimits(paths=paths))
    for row, text in enumerate(TEXTS):
        assert_same(found(tree, row), as_tokens(brute_static(served_after(target, drafter, text), paths)))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 4), st.integers(1, 30))
def test_dynamic_trees_of_any_table_are_what_brute_force_finds(seed: int, width: int, depth: int, budget: int) -> None:
    table = noise_table(seed)
    tree = search(TableExpander(table, 3), None, DraftLimits(width, depth, budget))
    for row in range(3):
        wanted = brute_dynamic(lambda path, row=row: log_probs(table(row, path)), width, depth, budget)  # type: ignore[misc]
        assert_same(found(tree, row), {tuple(place + 10 for place in path): score for path, score in wanted.items()})


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.5, 2.5, 8.0]), st.sampled_from(["2x3", "3x3n7", "t2.2.1"]))
def test_a_score_scale_does_what_scaled_logits_would(seed: int, scale: float, shape: str) -> None:
    table, limits = noise_table(seed), parse_shape(shape)
    scaled = search(TableExpander(table, 2), None, limits, scale)
    wanted = search(TableExpander(lambda row, path: [scale * one for one in table(row, path)], 2), None, limits)
    for row in range(2):
        assert_same(found(scaled, row), found(wanted, row))


def test_sharper_scores_send_a_dynamic_tree_deeper() -> None:
    def table(row: int, path: Path) -> list[float]:
        return [2.0, 1.0, 0.5, 0.0, 0.0]

    depths = [
        max(map(len, found(search(TableExpander(table, 1), None, DraftLimits(5, 6, 8), scale), 0)))
        for scale in (0.5, 1.0, 4.0)
    ]
    assert depths[0] < depths[1] < depths[2] == 6


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 4), st.integers(1, 40))
def test_a_dynamic_tree_stays_connected_where_certain_children_tie_with_their_parents(
    seed: int, width: int, depth: int, budget: int
) -> None:
    def table(row: int, path: Path) -> list[float]:
        drawn = noise_table(seed, scale=1.0)(row, path)
        certain = drawn.index(max(drawn))
        # A gap of 200 leaves a log-probability of exactly 0 in float32: the child scores what its parent scores.
        return [200.0 * (place == certain) for place in range(5)] if drawn[0] > 0 else [round(one) for one in drawn]

    tree = search(TableExpander(table, 2), None, DraftLimits(width, depth, budget))
    for row in range(2):
        nodes = found(tree, row)  # asserts that no node hangs in the air
        assert len(nodes) == min(budget, width + width**2 * (depth - 1))


def test_nodes_below_the_least_probability_are_left_out_with_everything_under_them() -> None:
    table = noise_table(3)
    whole = found(search(TableExpander(table, 1), None, DraftLimits(paths=full_tree((3, 3)))), 0)
    floored = DraftLimits(paths=full_tree((3, 3)), min_probability=0.1)
    likely = found(search(TableExpander(table, 1), None, floored), 0)
    assert likely == {path: score for path, score in whole.items() if math.exp(score) >= 0.1}
    assert 0 < len(likely) < len(whole)


# ---- early stop ----------------------------------------------------------------------------------------------------


def uniform(row: int, path: Path) -> list[float]:
    return [0.0] * 8


MANNERS = ["1x4", "3x4", "3x4n50", "t2.2.2.2"]


def stopped_search(table: Table, shape: str, threshold: float, num_rows: int = 1) -> tuple[DraftTree, TableExpander]:
    limits = replace(parse_shape(shape), early_stop=EarlyStop())
    expander = TableExpander(table, num_rows)
    return search(expander, torch.full((num_rows,), threshold), limits), expander


def test_the_bound_on_acceptance_is_the_papers() -> None:
    even = torch.tensor([0.25, 0.25, 0.25, 0.25]).log()
    assert float(acceptance_bound(even, 0.2)) == pytest.approx(1 - math.sqrt(0.2 * math.log(4)))
    assert float(acceptance_bound(even, 0.2)) == pytest.approx(0.47345, abs=1e-5)
    uneven = torch.tensor([0.5, 0.25, 0.25]).log()
    assert float(acceptance_bound(uneven, 0.3)) == pytest.approx(1 - math.sqrt(0.3 * 1.5 * math.log(2)))
    certain = torch.tensor([[0.0, -math.inf], [0.0, -200.0]])
    assert acceptance_bound(certain, 0.2).tolist() == [1.0, 1.0]


def test_the_controller_follows_a_trace_worked_out_by_hand() -> None:
    """Two rows, drafts of at most 4: row 0 accepts 4 of 4, 2 of 2, 0 of 1; row 1 accepts nothing of 4, 4, 4."""
    stop = StopState.begin(EarlyStop(0.5), 4, 2, torch.device("cpu"))
    assert (stop.threshold_B.tolist(), stop.rate_B.tolist()) == ([0.5, 0.5], pytest.approx([0.9, 0.9]))
    # rate = 0.5 * 0.9 + 0.5 * 1 = 0.95: enough, and the longest draft was accepted whole: nothing to gain. Row 1: 0.45, raised.
    stop = stop.after(chains(4, 4), torch.tensor([5, 1]))
    assert stop.rate_B.tolist() == pytest.approx([0.95, 0.45])
    assert stop.threshold_B.tolist() == pytest.approx([0.5, 0.9 * 0.5 + 0.1 * 0.51])
    # row 0 accepts all of a draft that was stopped early: the next may be longer.
    stop = stop.after(chains(2, 4), torch.tensor([3, 1]))
    assert stop.rate_B.tolist() == pytest.approx([0.975, 0.225])
    assert stop.threshold_B.tolist() == pytest.approx([0.499, 0.502])
    stop = stop.after(chains(1, 4), torch.tensor([1, 1]))
    assert stop.rate_B.tolist() == pytest.approx([0.4875, 0.1125])
    assert stop.threshold_B.tolist() == pytest.approx([0.9 * 0.499 + 0.1 * 0.509, 0.503])
    kept = stop.select_rows(torch.tensor([1]))
    assert kept.threshold_B.tolist() == pytest.approx([0.503])
    assert kept.after(chains(4), torch.tensor([1])).rate_B.tolist() == pytest.approx([0.05625])


def chains(*depths: int) -> DraftTree:
    """A chain of so many drafted nodes in each row."""
    tree = root_tree(torch.zeros(len(depths), dtype=torch.int64))
    longest = max(depths)
    depths_BN = torch.tensor([[place if place <= depth else 0 for place in range(longest + 1)] for depth in depths])
    return replace(tree, depths_BN=depths_BN, max_depth=longest)


@pytest.mark.parametrize(("shape", "num_first"), [("1x4", 1), ("3x4", 3), ("3x4n50", 3), ("t2.2.2.2", 2)])
def test_an_unsure_drafter_drafts_exactly_one_level_and_never_none(shape: str, num_first: int) -> None:
    """Eight equal tokens: entropy 2.08, bound 0.355."""
    tree, expander = stopped_search(uniform, shape, 0.36)
    assert [len(path) for path in found(tree, 0)] == [1] * num_first
    assert expander.num_extended == 1
    assert tree.max_depth == 1
    whole, _ = stopped_search(uniform, shape, 0.35)
    assert max(map(len, found(whole, 0))) == 4


@pytest.mark.parametrize("shape", MANNERS)
def test_a_node_that_was_certain_itself_can_be_stopped_at(shape: str) -> None:
    """Its score is 0 like the root's, which alone is always continued."""

    def table(row: int, path: Path) -> list[float]:
        return [300.0, 0.0, 0.0, 0.0] if not path else [0.0] * 4

    nodes = found(stopped_search(table, shape, 0.9)[0], 0)
    assert nodes[(10,)] == 0.0
    assert max(map(len, nodes)) == 1


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.2, 0.8), st.sampled_from(["1x5", "t3.2.2", "paths:0.1.0+2.0"]))
def test_what_is_left_out_is_what_lies_below_nodes_of_high_entropy(seed: int, threshold: float, shape: str) -> None:
    """Which continuation would have been drawn plays no part: the decision is the node's, and comes before."""
    table = noise_table(seed, scale=3.0)
    tree, _ = stopped_search(table, shape, threshold, num_rows=2)
    whole = search(TableExpander(table, 2), None, parse_shape(shape))
    for row in range(2):

        def worth_it(path: Path, row: int = row) -> bool:
            steps = torch.tensor(log_probs(table(row, tuple(token - 10 for token in path))))
            return float(1 - (0.2 * -(steps.exp() * steps).sum()).sqrt()) >= threshold

        wanted = {
            path: score
            for path, score in found(whole, row).items()
            if all(worth_it(path[:end]) for end in range(1, len(path)))
        }
        assert found(tree, row) == pytest.approx(wanted)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.2, 0.8), st.sampled_from([*MANNERS, "2x5", "4x3n9"]))
def test_a_row_of_a_batch_is_stopped_as_it_would_be_alone(seed: int, threshold: float, shape: str) -> None:
    table = noise_table(seed, scale=3.0)
    together, _ = stopped_search(table, shape, threshold, num_rows=3)
    for row in range(3):
        alone, _ = stopped_search(lambda _, path, row=row: table(row, path), shape, threshold)  # type: ignore[misc]
        assert found(together, row) == pytest.approx(found(alone, 0))


def test_a_beam_that_is_stopped_keeps_its_place_among_the_beams() -> None:
    """Beam 10 is the likelier one and unsure of what follows, beam 11 is sure: both are verified as far as they go."""

    def table(row: int, path: Path) -> list[float]:
        if not path:
            return [1.0, 0.5, -300.0, -300.0]
        return [0.0] * 4 if path[0] == 0 else [300.0, 0.0, 0.0, 0.0]

    tree, _ = stopped_search(table, "2x3", 0.8)
    assert set(found(tree, 0)) == {(10,), (11,), (11, 10), (11, 10, 10)}


def test_a_node_that_is_stopped_takes_no_place_in_the_layer_of_a_dynamic_tree() -> None:
    """Beside the unsure node 10 stands 11, both of whose continuations are continued in turn."""

    def table(row: int, path: Path) -> list[float]:
        if not path:
            return [5.0, 0.5, -300.0, -300.0]
        return [0.0] * 4 if path[0] == 0 else [1.0, 0.9, -300.0, -300.0]

    tree, _ = stopped_search(table, "2x3n50", 0.6)
    below = [(11, 10), (11, 11)]
    assert set(found(tree, 0)) == {(10,), (11,), *below, *((*path, last) for path in below for last in (10, 11))}


def test_without_a_threshold_nothing_is_stopped() -> None:
    limits = replace(parse_shape("2x3n9"), early_stop=EarlyStop(0.9))
    tree = search(TableExpander(uniform, 2), None, limits)
    assert tree.num_nodes == 10


PROMPTS = [[BOS, 5, 9, 11, 4], [BOS, 7], [BOS, 8, 8, 8, 30, 31, 32]]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("family", [ReDrafter, Eagle])
def test_stopping_early_changes_no_token(target: Target, family: type[Drafter], temperature: float) -> None:
    """Every threshold, every manner, ragged batches; the drafters are the target's own first guess and noise."""
    request = GenerationSettings(max_new_tokens=14, temperature=temperature, seed=5)
    expected = [one.token_ids for one in Engine(target).generate(PROMPTS, request)]
    drafter = family.for_target(target.ends)  # type: ignore[attr-defined]
    for shape, threshold in itertools.product(["1x5", "3x4", "3x4n8", "3x6n2", "t3.2.1"], [0.3, 0.6, 0.9]):
        limits = parse_shape(f"{shape}e{threshold}")
        got = Engine(target, drafter, limits).generate(PROMPTS, request)
        assert [one.token_ids for one in got] == expected, (shape, threshold)


@pytest.mark.parametrize("family", [ReDrafter, Eagle])
def test_a_high_threshold_drafts_less_and_a_low_one_as_much_as_ever(target: Target, family: type[Drafter]) -> None:
    request = GenerationSettings(max_new_tokens=20)
    drafter = family.for_target(target.ends)  # type: ignore[attr-defined]
    depths = {}
    for shape in ("1x6", "1x6e0.0", "1x6e0.95"):
        depths[shape] = Engine(target, drafter, parse_shape(shape)).generate(PROMPTS[:1], request)[0].depths
    assert set(depths["1x6"]) == set(depths["1x6e0.0"]) == {6}
    assert sum(depths["1x6e0.95"]) / len(depths["1x6e0.95"]) < 3
    assert min(depths["1x6e0.95"]) == 1

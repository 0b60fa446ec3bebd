"""Continuations of earlier places of a text, against the rule written out in plain Python; and paths hung on a tree."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from draftsmith.models.composed.shared_pool import SharedPool
from draftsmith.models.composed.suffixes import SuffixRule, continuations
from draftsmith.models.tree.tree import joined, prune, tree_from_paths

Tree = dict[tuple[int, ...], float]


def by_hand(text: list[int], depth: int, rule: SuffixRule, pool: Sequence[list[int]] = ()) -> Tree:
    """Every proposed prefix with its share, one place and one level after the other."""
    texts = [*pool, text]
    stream = [(number, token) for number, each in enumerate(texts) for token in each]
    found = []
    for place in range(len(stream) - 1):
        if stream[place][0] != stream[place + 1][0]:
            continue  # nothing followed the end of a text
        match = 0
        before = [token for number, token in stream[: place + 1] if number == stream[place][0]]
        while match < min(rule.longest_match, len(before), len(text)) and before[-1 - match] == text[-1 - match]:
            match += 1
        found.append((match, place))
    found = [each for each in sorted(found, reverse=True)[: rule.num_places] if each[0] >= rule.shortest_match]
    best: Tree = {}
    for level in sorted({match for match, _ in found}, reverse=True):
        places = [place for match, place in found if match >= level]
        reach = min(depth, max(1, math.ceil(level * rule.tokens_per_match)))
        tree: Tree = {}
        for place in places:
            behind = [token for number, token in stream[place + 1 :] if number == stream[place][0]]
            for end in range(1, min(reach, len(behind)) + 1):
                prefix = tuple(behind[:end])
                tree[prefix] = tree.get(prefix, 0.0) + 1 / len(places)
        tree = {prefix: share for prefix, share in tree.items() if share >= rule.least_probability - 1e-9}
        if sum(tree.values()) > sum(best.values()) + 1e-6:
            best = tree
    return best


def proposed(text: list[int], depth: int, rule: SuffixRule, padding: int = 0, pool: Sequence[list[int]] = ()) -> Tree:
    text_BT = torch.tensor([text + [text[-1]] * padding])
    pool_T = SharedPool.of(pool, 99).tokens_T if pool else None
    paths_BPL, scores_BPL = continuations(text_BT, torch.tensor([len(text)]), depth, rule, pool_T)
    tree: Tree = {}
    for path, scores in zip(paths_BPL[0].tolist(), scores_BPL[0].tolist(), strict=True):
        for end, score in enumerate(scores, start=1):
            if score > -math.inf:
                tree[tuple(path[:end])] = math.exp(score)
    return tree


@settings(max_examples=150, deadline=None)
@given(
    text=st.lists(st.integers(0, 3), min_size=1, max_size=24),
    depth=st.integers(1, 6),
    rule=st.builds(
        SuffixRule,
        longest_match=st.integers(2, 6),
        shortest_match=st.integers(1, 2),
        num_places=st.integers(1, 8),
        tokens_per_match=st.sampled_from([0.5, 1.0, 2.0]),
        least_probability=st.sampled_from([0.0, 0.1, 0.34]),
    ),
    padding=st.integers(0, 3),
    pool=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=8), max_size=3),
)
def test_what_is_proposed_is_the_rule_written_out(
    text: list[int], depth: int, rule: SuffixRule, padding: int, pool: list[list[int]]
) -> None:
    expected = by_hand(text, depth, rule, pool)
    assert proposed(text, depth, rule, padding, pool) == pytest.approx(expected, abs=1e-5)


def test_a_pool_is_searched_as_well_and_the_own_text_counts_first() -> None:
    pool = [[7, 8, 9], [5, 6, 40]]
    assert proposed([1, 7, 8], 2, SuffixRule(shortest_match=2), pool=pool) == pytest.approx({(9,): 1.0})
    assert proposed([1, 7, 8], 2, SuffixRule(shortest_match=2)) == {}
    assert proposed([2, 9], 2, SuffixRule(), pool=pool) == {}, "no continuation leads from one text into the next"
    only_one = SuffixRule(num_places=1)
    assert proposed([5, 6, 30, 5, 6], 1, only_one, pool=pool) == pytest.approx({(30,): 1.0})


def test_the_longest_match_decides_and_the_example_holds() -> None:
    assert proposed([5, 6, 7, 5, 6, 8, 5, 6], 1, SuffixRule()) == pytest.approx({(7,): 0.5, (8,): 0.5})
    # "2 3" was followed by 4 twice; "1 2 3" once, by 9.
    text = [2, 3, 4, 2, 3, 4, 1, 2, 3, 9, 1, 2, 3]
    assert proposed(text, 1, SuffixRule(shortest_match=3)) == pytest.approx({(9,): 1.0})


def test_rows_of_a_batch_are_searched_alone() -> None:
    """Only row 1 holds what row 0 would need."""
    text_BT = torch.tensor([[1, 2, 3, 4, 5, 6], [6, 9, 6, 9, 6, 9]])
    _, scores_BPL = continuations(text_BT, torch.tensor([6, 6]), 3, SuffixRule())
    assert (scores_BPL[0] == -torch.inf).all()
    assert (scores_BPL[1] > -torch.inf).any()


def test_joined_paths_share_nodes_with_the_tree_and_keep_the_better_score() -> None:
    root_B = torch.tensor([7])
    own = tree_from_paths(root_B, torch.tensor([[[1, 2], [3, 4]]]), torch.tensor([[[-0.5, -0.9], [-1.0, -2.0]]]))
    paths = torch.tensor([[[1, 5, 6], [1, 5, 8], [9, 9, 9]]])
    scores = torch.tensor([[[-0.1, -0.2, -1.5], [-0.1, -0.2, -3.0], [-4.0, -torch.inf, -torch.inf]]])
    tree = prune(joined(own, paths, scores), 20)
    nodes = {}
    for node in range(1, tree.num_nodes):
        path, at = [], node
        while at > 0:
            assert int(tree.parents_BN[0, at]) < at
            path.append(int(tree.tokens_BN[0, at]))
            at = int(tree.parents_BN[0, at])
        assert tree.scores_BN is not None
        assert len(path) == int(tree.depths_BN[0, node])
        nodes[tuple(reversed(path))] = float(tree.scores_BN[0, node])
    assert nodes == pytest.approx(
        {(1,): -0.1, (1, 2): -0.9, (3,): -1.0, (3, 4): -2.0, (1, 5): -0.2, (1, 5, 6): -1.5, (1, 5, 8): -3.0, (9,): -4.0}
    )
    assert prune(joined(own, paths, scores), 3).tokens_BN.tolist() == [[7, 1, 2, 5]]

"""Trees: literal shapes that the eye can check, and invariants of every builder."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from draftsmith.decode.verify.lossless import walk
from draftsmith.models import DraftTree, root_tree, tree_from_layers, tree_from_paths
from draftsmith.models.tree.mask import slot_mask, slot_positions
from draftsmith.models.tree.tree import pack, prune


def paths_of(tree: DraftTree, row: int) -> set[tuple[int, ...]]:
    """All root-to-node paths, the root left out."""
    found = set()
    for node in range(1, tree.num_nodes):
        if tree.valid_BN[row, node]:
            path, at = [], node
            while at > 0:
                path.append(int(tree.tokens_BN[row, at]))
                at = int(tree.parents_BN[row, at])
            found.add(tuple(reversed(path)))
    return found


def check_shape(tree: DraftTree) -> None:
    for row in range(tree.tokens_BN.shape[0]):
        assert tree.parents_BN[row, 0] == -1
        for node in range(1, tree.num_nodes):
            if tree.valid_BN[row, node]:
                parent = int(tree.parents_BN[row, node])
                assert 0 <= parent < node
                assert tree.valid_BN[row, parent]
                assert tree.depths_BN[row, node] == tree.depths_BN[row, parent] + 1


def test_three_beams_that_share_prefixes_become_one_tree() -> None:
    beams = torch.tensor([[[91, 92, 93, 95], [91, 92, 94, 96], [91, 92, 93, 97]]])
    tree = tree_from_paths(torch.tensor([7]), beams)
    assert tree.tokens_BN.tolist() == [[7, 91, 92, 93, 95, 94, 96, 97]]
    assert tree.parents_BN.tolist() == [[-1, 0, 1, 2, 3, 2, 5, 3]]
    assert tree.depths_BN.tolist() == [[0, 1, 2, 3, 4, 3, 4, 4]]
    expected = [
        [1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0, 1, 0, 0],
        [1, 1, 1, 0, 0, 1, 1, 0],
        [1, 1, 1, 1, 0, 0, 0, 1],
    ]
    assert tree.ancestors()[0].int().tolist() == expected


def test_rows_of_different_sizes_are_padded_behind_their_nodes() -> None:
    beams = torch.tensor([[[5, 6], [5, 6]], [[5, 6], [7, 6]]])
    tree = tree_from_paths(torch.tensor([1, 2]), beams)
    assert tree.valid_BN.tolist() == [[True, True, True, False, False], [True] * 5]
    assert tree.tokens_BN[1].tolist() == [2, 5, 6, 7, 6]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.lists(st.lists(st.integers(0, 3), min_size=3, max_size=3), min_size=4, max_size=4), min_size=1, max_size=3
    )
)
def test_merging_keeps_every_prefix_once(beams: list[list[list[int]]]) -> None:
    tree = tree_from_paths(torch.zeros(len(beams), dtype=torch.int64), torch.tensor(beams))
    check_shape(tree)
    for row, paths in enumerate(beams):
        prefixes = {tuple(path[: end + 1]) for path in paths for end in range(3)}
        assert paths_of(tree, row) == prefixes
        assert int(tree.valid_BN[row].sum()) == len(prefixes) + 1


def test_the_mask_shows_cached_tokens_ancestors_and_self_only() -> None:
    tree = tree_from_paths(torch.tensor([3, 3]), torch.tensor([[[5], [7]], [[5], [7]]]))
    mask = slot_mask(tree.ancestors(), torch.tensor([2, 1]), window=5)
    key_positions = slot_positions(tree.depths_BN, torch.tensor([2, 1]), window=5)
    assert mask[0, 0].int().tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 0, 1]]
    assert mask[1, 0].int().tolist() == [[1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 0, 1, 0]]
    assert key_positions.tolist() == [[0, 1, 2, 3, 3], [0, 1, 2, 2, 4]]


def test_the_walk_follows_choices_and_emits_the_first_that_is_no_child() -> None:
    tree = tree_from_paths(torch.tensor([1, 1]), torch.tensor([[[5, 6], [7, 8]], [[5, 6], [7, 8]]]))
    assert tree.tokens_BN[0].tolist() == [1, 5, 6, 7, 8]
    choices = torch.tensor([[7, 0, 0, 8, 9], [4, 6, 0, 0, 0]])
    steps = walk(tree, tree.ancestors(), choices)
    assert steps.counts_B.tolist() == [3, 1]
    assert steps.path_BE.tolist()[0] == [0, 3, 4]
    assert steps.emitted_BE[0].tolist() == [7, 8, 9]
    assert steps.emitted_BE[1, 0] == 4


def layers(scores: Tensor, above: Tensor) -> DraftTree:
    tokens = torch.arange(scores.numel()).reshape(scores.shape) + 10
    width = scores.shape[2]
    offsets = 1 + (torch.arange(scores.shape[1]) - 1)[None, :, None] * width
    parents = torch.where(offsets > 0, above + offsets, 0)
    return tree_from_layers(torch.tensor([1]), tokens.unbind(1), parents.unbind(1), scores.unbind(1))


def test_a_budget_keeps_the_best_nodes_and_their_ancestors() -> None:
    scores = torch.tensor([[[-0.1, -1.0], [-0.2, -1.1], [-0.3, -2.0]]])
    above = torch.tensor([[[0, 0], [0, 1], [0, 1]]])
    tree = prune(layers(scores, above), 3)
    assert paths_of(tree, 0) == {(10,), (10, 12), (10, 12, 14)}
    assert paths_of(prune(layers(scores, above), 4), 0) == {(10,), (10, 12), (10, 12, 14), (11,)}


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_what_a_budget_keeps_is_connected_even_when_scores_tie(data: st.DataObject) -> None:
    depth, width = 4, 3
    drops = data.draw(st.lists(st.sampled_from([0.0, 0.0, -0.5, -1.0]), min_size=depth * width, max_size=depth * width))
    above = torch.tensor(
        [[data.draw(st.lists(st.integers(0, width - 1), min_size=width, max_size=width)) for _ in range(depth)]]
    )
    drop = torch.tensor(drops).reshape(1, depth, width)
    scores = drop.clone()
    for layer in range(1, depth):
        scores[0, layer] += scores[0, layer - 1, above[0, layer]]
    for budget in (1, 2, 5, 12, 40):
        tree = prune(layers(scores, above), budget)
        check_shape(tree)
        assert int(tree.valid_BN.sum()) == min(budget, depth * width) + 1


def test_a_budget_without_scores_or_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="gives no scores"):
        prune(root_tree(torch.tensor([1])), 4)
    with pytest.raises(ValueError, match="at least 1"):
        prune(layers(torch.zeros(1, 2, 2), torch.zeros(1, 2, 2, dtype=torch.int64)), 0)


def test_packing_to_a_static_width_keeps_parents_right() -> None:
    tree = layers(torch.zeros(1, 2, 2), torch.tensor([[[0, 0], [1, 1]]]))
    tree.valid_BN[0, 1] = False  # neither child hangs on it
    packed = pack(tree, width=4)
    assert packed.tokens_BN.tolist() == [[1, 11, 12, 13]]
    assert packed.parents_BN.tolist() == [[-1, 0, 1, 1]]

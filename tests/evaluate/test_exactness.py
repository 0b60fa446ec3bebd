import pytest
import torch

from draftsmith.evaluate.exactness import compare, first_difference, with_gaps
from draftsmith.evaluate.records import Divergence, Sample
from draftsmith.models.target.target import Target

SAMPLES = [Sample("a", "all", (5,)), Sample("b", "all", (6,)), Sample("c", "all", (7,))]


@pytest.mark.parametrize(
    ("plain", "other", "place"),
    [([1, 2], [1, 2], None), ([1, 2], [1, 3], 1), ([1, 2], [1], 1), ([1], [1, 2], 1), ([], [4], 0), ([], [], None)],
)
def test_first_difference(plain: list[int], other: list[int], place: int | None) -> None:
    assert first_difference(plain, other) == place


def test_share_counts_prompts_and_names_the_first_difference() -> None:
    plain = {0: [(1, 2, 3)], 1: [(4, 5)], 2: [(6,)]}
    share, divergences = compare(SAMPLES, plain, {0: [(1, 2, 3)], 1: [(4, 9)], 2: [(6, 7)]})
    assert share == pytest.approx(1 / 3)
    assert divergences == (Divergence("b", 1, 5, 9), Divergence("c", 1, None, 7))


def test_one_repeat_that_differs_is_enough() -> None:
    share, divergences = compare(SAMPLES, {0: [(1, 2)]}, {0: [(1, 2), (1, 3)]})
    assert share == 0
    assert divergences[0].contender_token == 3


def test_prompts_that_were_not_decoded_do_not_count() -> None:
    assert compare(SAMPLES, {0: [(1,)], 1: [(2,)]}, {1: [(2,)]}) == (1.0, ())


def test_the_gap_is_that_of_the_targets_own_logits(target) -> None:
    model = Target.load(str(target))
    expected = model.model(torch.tensor([[5, 11]])).logits[0, -1]
    (told,) = with_gaps([Divergence("a", 1, 20, 30)], SAMPLES, {0: [(11, 20)]}, model)
    assert told.gap == pytest.approx(float(expected[20] - expected[30]), abs=1e-4)

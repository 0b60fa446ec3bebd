import pytest
import torch

from draftsmith.evaluate.exactness import compare, first_difference, measured_gaps, num_places
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
    difference = Divergence("a", 1, 20, 30)
    gaps = measured_gaps([difference], SAMPLES, {0: [(11, 20)]}, model)
    assert gaps == {difference: pytest.approx(float(expected[20] - expected[30]), abs=1e-4)}


def test_a_place_where_several_contenders_differ_is_read_once_and_one_behind_the_end_of_a_reply_never(
    target, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, read, advanced = Target.load(str(target)), [], []
    prefix = model.prefix

    def counted(ids_BT: torch.Tensor, *arguments: object, **named: object) -> object:
        read.append(ids_BT[0].tolist())
        return prefix(ids_BT, *arguments, **named)

    monkeypatch.setattr(model, "prefix", counted)
    same = [Divergence("a", 1, 20, 30), Divergence("a", 1, 20, 31), Divergence("a", 1, 20, 30)]
    ended = Divergence("c", 1, None, 7)
    differences = [*same, Divergence("b", 0, 4, 9), ended]
    gaps = measured_gaps(differences, SAMPLES, {0: [(11, 20)], 1: [(4,)], 2: [(6,)]}, model, advanced.append)
    assert read == [[5, 11], [6]]
    assert advanced == [1] * num_places(differences) == [1, 1]
    assert gaps.keys() == set(differences) - {ended}
    assert gaps[same[0]] != gaps[same[1]]

"""The check that every checkpoint must pass."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from draftsmith.models.files.tables import Table, TensorSpec, membership, target_ids, vocabulary_faults

TABLE = Table(
    "thing",
    10,
    {
        "w": TensorSpec((2, 3)),
        "b": TensorSpec((2,), optional=True),
        "d2t": TensorSpec((3,), "int64"),
        "t2d": TensorSpec((10,), "bool", optional=True),
    },
)


def whole() -> dict[str, Tensor]:
    ids = torch.tensor([1, 4, 9])
    return {"w": torch.ones(2, 3), "d2t": ids - torch.arange(3), "t2d": membership(ids, 10)}


def test_a_whole_checkpoint_passes_with_and_without_what_is_optional() -> None:
    TABLE.check(whole(), "here")
    TABLE.check(whole() | {"b": torch.ones(2, dtype=torch.bfloat16)}, "here")
    TABLE.check({name: tensor for name, tensor in whole().items() if name != "t2d"}, "here")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("w"), r"w is missing \(float \[2, 3\]\)"),
        (lambda t: t.update(x=torch.zeros(1)), "x is unknown"),
        (lambda t: t.update(w=torch.zeros(3, 2)), r"w is float32 \[3, 2\], not float \[2, 3\]"),
        (lambda t: t.update(w=torch.zeros(2, 3, dtype=torch.int64)), r"w is int64 \[2, 3\], not float"),
        (lambda t: t["w"].fill_(float("inf")), "w holds NaN or infinity"),
        (lambda t: t.update(d2t=t["d2t"].int()), r"d2t is int32 \[3\], not int64 \[3\]"),
        (lambda t: t.update(d2t=torch.tensor([1, 1, 1])), r"t2d does not mark the token ids that d2t maps to"),
        (lambda t: t.update(d2t=torch.tensor([1, 0, -1])), "d2t does not map to increasing token ids below 10"),
        (lambda t: t.update(d2t=torch.tensor([-1, 0, 0])), "d2t does not map to increasing token ids below 10"),
        (lambda t: t.update(d2t=torch.tensor([0, 0, 8])), "d2t does not map to increasing token ids below 10"),
        (lambda t: t.update(t2d=t["t2d"].int()), r"t2d is int32 \[10\], not bool \[10\]"),
    ],
)
def test_every_fault_is_told_by_name(change, message: str) -> None:
    tensors = whole()
    change(tensors)
    with pytest.raises(ValueError, match=rf"here is not a whole thing of its config.json: {message}"):
        TABLE.check(tensors, "here")


def test_all_faults_are_told_at_once() -> None:
    with pytest.raises(ValueError, match=r"d2t is missing .*; w is missing .*; x is unknown"):
        TABLE.check({"x": torch.zeros(1)}, "here")


def test_offsets_stand_for_ids_of_the_target() -> None:
    assert target_ids(torch.tensor([0, 2, 2])).tolist() == [0, 3, 4]
    assert membership(torch.tensor([0, 3]), 5).tolist() == [True, False, False, True, False]


def test_ids_that_rise_only_because_steps_overflow_are_no_map() -> None:
    ids = torch.tensor([0, 2**63 - 1, -(2**63), -1, 5])
    assert bool((ids.diff() > 0).all())
    assert vocabulary_faults({"d2t": ids - torch.arange(5)}, 10) == [
        "d2t does not map to increasing token ids below 10"
    ]


@given(st.sets(st.integers(0, 30), min_size=1), st.integers(0, 30))
def test_a_map_is_sound_exactly_when_it_gives_the_ids_it_was_made_of(chosen: set[int], other: int) -> None:
    ids = torch.tensor(sorted(chosen))
    tensors = {"d2t": ids - torch.arange(len(ids)), "t2d": membership(ids, 31)}
    assert vocabulary_faults(tensors, 31) == []
    tensors["t2d"][other] = ~tensors["t2d"][other]
    assert vocabulary_faults(tensors, 31) == ["t2d does not mark the token ids that d2t maps to"]

"""Which layers are read, in every engine's counting."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from draftsmith.export.layouts.layer_ids import KEY, block_counts, default_counts, id_fields, layer_names, read_counts
from draftsmith.models import PRE_NORM
from draftsmith.models.families.eagle3 import default_layers


def test_names_and_numbers_literally() -> None:
    names = ["layer.0.output", "layer.9.output", PRE_NORM]
    assert block_counts(names, 12) == [1, 10, 12]
    assert layer_names([1, 10, 12], 12, "here") == names
    assert layer_names([1, 10, 12], None, "here") == ["layer.0.output", "layer.9.output", "layer.11.output"]
    assert id_fields([1, 10, 12], 12) == {
        KEY: [1, 10, 12],
        "eagle_config": {"use_aux_hidden_state": True, KEY: [0, 9, 11]},
    }


@pytest.mark.parametrize("num_layers", [7, 8, 16, 32, 80])
def test_the_default_is_what_fresh_drafters_read_and_is_not_written(num_layers: int) -> None:
    counts = block_counts(default_layers(num_layers), num_layers)
    assert counts == default_counts(num_layers)
    assert id_fields(counts, num_layers) == {}
    for empty in ({}, {KEY: []}, {"eagle_config": {KEY: [], "use_aux_hidden_state": True}}):
        assert read_counts(empty, num_layers, "here") == counts


def test_without_a_target_the_layers_are_always_written() -> None:
    assert id_fields([2, 16, 29], None)[KEY] == [2, 16, 29]


@pytest.mark.parametrize(
    "fields",
    [
        {KEY: [1, 3, 4]},
        {"eagle_config": {KEY: [0, 2, 3]}},
        {KEY: [1, 3, 4], "eagle_config": {KEY: [0, 2, 3]}},
        {KEY: [1, 3, 4], "eagle_config": None},
    ],
)
def test_both_conventions_are_read(fields: dict) -> None:
    assert read_counts(fields, 6, "here") == [1, 3, 4]


def test_what_cannot_be_said_or_is_in_doubt_is_refused() -> None:
    with pytest.raises(ValueError, match=r"names layers \[1, 3, 4\] for vLLM and \[1, 3, 4\] for SGLang"):
        read_counts({KEY: [1, 3, 4], "eagle_config": {KEY: [1, 3, 4]}}, 6, "here")
    with pytest.raises(ValueError, match=r"the default \[2, 2, 1\] has no sense for a target of 4"):
        read_counts({}, 4, "here")
    with pytest.raises(ValueError, match="the default depends on the target; add --target"):
        read_counts({}, None, "here")
    with pytest.raises(ValueError, match=r"reads 'last.pre_norm', whose number is known with its target only"):
        block_counts(["layer.0.output", PRE_NORM], None)
    with pytest.raises(ValueError, match="are not from low to high"):
        block_counts(["layer.3.output", "layer.0.output"], 6)
    with pytest.raises(ValueError, match=r"\[3, 1\], which are not from low to high"):
        layer_names([3, 1], 6, "here")
    for counts in ([0, 1], [1, 7], []):
        with pytest.raises(ValueError, match="of blocks counted from 1; the target has 6"):
            layer_names(counts, 6, "here")


@given(st.integers(1, 90).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(1, n), min_size=1))))
def test_what_is_written_reads_back_as_the_same_layers(case: tuple[int, set[int]]) -> None:
    num_layers, chosen = case
    names = layer_names(sorted(chosen), num_layers, "here")
    fields = id_fields(block_counts(names, num_layers), num_layers)
    assert layer_names(read_counts(fields, num_layers, "here"), num_layers, "here") == names

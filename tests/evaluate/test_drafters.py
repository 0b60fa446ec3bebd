from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from draftsmith.evaluate.drafters import load_drafter, parse_entries, parse_shape, shape_name
from draftsmith.models.drafter import DraftLimits
from draftsmith.models.redrafter import ReDrafter


@pytest.mark.parametrize(
    ("text", "limits"),
    [
        ("1x4", DraftLimits(1, 4)),
        ("45x5", DraftLimits(45, 5)),
        ("10x4n16", DraftLimits(10, 4, 16)),
        ("1x8p0.1", DraftLimits(1, 8, None, 0.1)),
        ("3x6n9p0.05", DraftLimits(3, 6, 9, 0.05)),
    ],
)
def test_a_shape_reads_as_it_is_written(text: str, limits: DraftLimits) -> None:
    assert parse_shape(text) == limits
    assert shape_name(limits) == text


@pytest.mark.parametrize("text", ["", "4", "x4", "1x", "1x4x2", "ax4", "1x4 n2", "1x4n"])
def test_what_is_no_shape_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match="is not WIDTHxLENGTH, such as 1x4 or 10x4"):
        parse_shape(text)


def test_a_shape_of_no_width_is_refused() -> None:
    with pytest.raises(ValueError, match="beam_width is 0; it must be at least 1"):
        parse_shape("0x4")


def test_entries_have_names_and_may_have_shapes_of_their_own(drafter: Path) -> None:
    entries = parse_entries([str(drafter), f"wide={drafter}@10x4,2x3"], ["1x4"])
    assert [entry.name for entry in entries] == [drafter.name, "wide"]
    assert [len(entry.shapes) for entry in entries] == [1, 2]
    assert entries[1].shapes[0] == DraftLimits(10, 4)


def test_entries_that_cannot_be_told_apart_or_found_are_refused(drafter: Path) -> None:
    with pytest.raises(ValueError, match="is taken; name the drafters apart"):
        parse_entries([str(drafter), str(drafter)], ["1x4"])
    with pytest.raises(ValueError, match="'plain' is taken"):
        parse_entries([f"plain={drafter}"], ["1x4"])
    with pytest.raises(ValueError, match=r"is no folder with a config.json"):
        parse_entries(["runs/nowhere"], ["1x4"])
    with pytest.raises(ValueError, match="has no beam shape"):
        parse_entries([str(drafter)], [])
    with pytest.raises(ValueError, match="has one beam shape twice"):
        parse_entries([str(drafter)], ["1x4", "1x4"])


def test_a_whole_drafter_loads_and_one_that_lacks_a_tensor_does_not(tmp_path: Path, drafter: Path) -> None:
    assert isinstance(load_drafter(drafter), ReDrafter)
    ReDrafter.from_pretrained(drafter).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["rnn_u.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"not a whole drafter \(missing keys: rnn_u.weight\)"):
        load_drafter(tmp_path)


def test_a_target_is_not_taken_for_a_drafter(target: Path) -> None:
    with pytest.raises(ValueError, match="drafter"):
        load_drafter(target)

"""What a drafter's folder must hold before anything is decoded with it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from draftsmith.models import ReDrafter
from draftsmith.models.drafter_folder import load_drafter


def with_tensors(drafter: Path, folder: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """A copy of a drafter's folder, its tensors changed."""
    ReDrafter.from_pretrained(drafter).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_whole_drafter_loads_as_its_family_ready_to_decode(drafter: Path) -> None:
    loaded = load_drafter(drafter)
    assert isinstance(loaded, ReDrafter)
    assert not loaded.training


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("rnn_u.weight"), r"\(missing keys: rnn_u.weight\)"),
        (lambda tensors: tensors.update(stray=torch.zeros(2)), r"\(unexpected keys: stray\)"),
        (lambda tensors: tensors.update({"rnn_u.weight": torch.zeros(3, 5)}), r"\(mismatched shapes: rnn_u.weight\)"),
    ],
    ids=["missing", "unexpected", "mismatched"],
)
def test_a_drafter_that_does_not_load_whole_is_refused(
    tmp_path: Path, drafter: Path, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    with pytest.raises(ValueError, match=f"is not a whole drafter {message}; export it again"):
        load_drafter(with_tensors(drafter, tmp_path / "changed", change))


def test_what_is_no_drafters_folder_is_refused_with_the_remedy(tmp_path: Path, drafter: Path) -> None:
    with pytest.raises(
        ValueError, match=r"no folder with a config.json; give what `draftsmith export` or training wrote"
    ):
        load_drafter(tmp_path / "nowhere")
    ReDrafter.from_pretrained(drafter).save_pretrained(tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").rename(tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"holds no model.safetensors"):
        load_drafter(tmp_path / "pickled")

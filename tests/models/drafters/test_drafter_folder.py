"""What a drafter's folder must hold before anything is decoded with it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import save_drafter
from torch import Tensor
from transformers import AutoModelForCausalLM

from draftsmith.export.layouts.layouts import load_any
from draftsmith.models import ReDrafter
from draftsmith.models.drafters.drafter_folder import load_drafter
from draftsmith.models.files.model_folder import resolve
from draftsmith.models.files.pretrained import read_model


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


TENSOR_FAULTS: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "missing": (lambda tensors: tensors.pop("rnn_u.weight"), r"rnn_u.weight is missing \(float \[32, 32\]\)"),
    "unexpected": (lambda tensors: tensors.update(stray=torch.zeros(2)), r"stray is unknown"),
    "shape": (lambda tensors: tensors.update({"rnn_u.weight": torch.zeros(3, 5)}), r"rnn_u.weight is float32 \[3, 5\]"),
    "dtype": (lambda tensors: tensors.update({"rnn_u.bias": torch.zeros(32).long()}), r"rnn_u.bias is int64 \[32\]"),
    "NaN": (lambda tensors: tensors["rnn_w.weight"][3].fill_(float("nan")), r"rnn_w.weight holds NaN or infinity"),
    "infinity": (lambda tensors: tensors["rnn_u.bias"][-1:].fill_(float("inf")), r"rnn_u.bias holds NaN or infinity"),
    "ids": (lambda tensors: tensors["d2t"][4:].sub_(10), r"d2t does not map to increasing token ids below 300"),
    "ids beyond": (lambda tensors: tensors["d2t"][-1:].add_(300), r"d2t does not map to increasing token ids"),
}
FIELD_FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "no size": ({"hidden_size": 0}, r"config.json: hidden_size is 0, it must be a whole number of at least 1"),
    "a text for a size": ({"vocab_size": "300"}, r"vocab_size is '300'"),
    "truth for a size": ({"num_draft_steps": True}, r"num_draft_steps is True"),
    "a draft vocabulary beyond the target's": ({"draft_vocab_size": 301}, r"draft_vocab_size 301, which is above"),
    "a scale that is no number": (
        {"score_scale": float("nan")},
        r"score_scale is nan, it must be a finite number above 0",
    ),
    "no flag": ({"rnn": 1}, r"rnn is 1, it must be true or false"),
    "layers without end": ({"num_draft_layers": 2**40}, r"num_draft_layers is 1099511627776"),
    "a null fingerprint": ({"target_fingerprint": None}, r"target_fingerprint is None, it must be text"),
}


@pytest.fixture(scope="module")
def truncated(tmp_path_factory: pytest.TempPathFactory, target: Path) -> Path:
    """A whole drafter with a draft vocabulary."""
    return save_drafter(tmp_path_factory.mktemp("truncated"), target, torch.arange(3, 283, 7))


@pytest.mark.parametrize("fault", TENSOR_FAULTS)
def test_a_drafter_whose_tensors_are_not_its_familys_is_refused(tmp_path: Path, truncated: Path, fault: str) -> None:
    change, message = TENSOR_FAULTS[fault]
    folder = with_tensors(truncated, tmp_path / "changed", change)
    for read in (load_drafter, ReDrafter.from_pretrained, load_any):
        with pytest.raises(ValueError, match=rf"changed is not a whole ReDrafter of its config.json: .*{message}"):
            read(folder)


@pytest.mark.parametrize("fault", FIELD_FAULTS)
def test_a_drafter_whose_config_breaks_a_rule_is_refused(tmp_path: Path, truncated: Path, fault: str) -> None:
    fields, message = FIELD_FAULTS[fault]
    shutil.copytree(truncated, tmp_path / "changed")
    path = tmp_path / "changed" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    for read in (load_drafter, ReDrafter.from_pretrained, load_any):
        with pytest.raises(ValueError, match=message):
            read(tmp_path / "changed")


def test_reading_a_drafter_draws_no_random_numbers(truncated: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    load_drafter(truncated)
    assert torch.equal(torch.rand(3), expected)


def test_what_is_no_drafters_folder_is_refused_with_the_remedy(tmp_path: Path, drafter: Path) -> None:
    with pytest.raises(
        ValueError, match=r"no folder with a config.json; give what `draftsmith export` or training wrote"
    ):
        load_drafter(tmp_path / "nowhere")
    ReDrafter.from_pretrained(drafter).save_pretrained(tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").rename(tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model.bin but no model.safetensors"):
        load_drafter(tmp_path / "pickled")


def test_a_draft_lm_that_holds_nan_is_refused(tmp_path: Path, target: Path) -> None:
    folder = Path(shutil.copytree(target, tmp_path / "lm"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][-1] = float("nan")  # a token that no first text has
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"holds NaN or infinity in model.embed_tokens.weight"):
        load_drafter(folder)


@pytest.mark.parametrize(
    "name", ["embedded:../..", "embedded:..", "embedded:", "embedded:target/../target", "embedded:/etc", "a\0b"]
)
def test_a_name_of_an_embedded_model_is_no_path(name: str) -> None:
    with pytest.raises(ValueError, match=r"there is no embedded model|has a NUL"):
        resolve(name)


@pytest.mark.parametrize("name", ["../../victim.safetensors", "/victim.safetensors", 7])
def test_an_index_of_weights_names_files_of_its_folder_only(tmp_path: Path, target: Path, name: object) -> None:
    folder = Path(shutil.copytree(target, tmp_path / "lm"))
    (folder / "model.safetensors").rename(tmp_path / "victim.safetensors")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(
        ValueError, match=r"index.json: the file of 'model.norm.weight' is .*, which is no plain file name"
    ):
        read_model(AutoModelForCausalLM, folder)

"""What `auto` means for device and dtype, with and without CUDA, and what a run records of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import save_target

from draftsmith.models.files.device_and_dtype import checkpoint_dtype, resolved_device, resolved_dtype
from draftsmith.models.target.options import PlacementOptions, TargetOptions


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with two GPUs, as far as names are resolved."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.fixture
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def narrow(tmp_path: Path) -> Path:
    """A target whose checkpoint is in bfloat16."""
    folder = save_target(tmp_path / "narrow")
    file = folder / "model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config.pop("torch_dtype", None)
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    return folder


def test_on_a_cpu_auto_is_the_cpu_and_float32(no_cuda: None, narrow: Path) -> None:
    options = TargetOptions().resolved(str(narrow))
    assert (options.device, options.dtype) == ("cpu", "float32")
    assert TargetOptions(dtype="bfloat16").resolved(str(narrow)).dtype == "bfloat16"


def test_on_cuda_auto_is_cuda_and_the_checkpoints_own_dtype(cuda: None, narrow: Path) -> None:
    options = TargetOptions().resolved(str(narrow))
    assert (options.device, options.dtype) == ("cuda", "bfloat16")
    assert TargetOptions(device="cpu").resolved(str(narrow)).dtype == "float32"
    assert TargetOptions(device="cpu", device_map="auto").resolved(str(narrow)).dtype == "bfloat16"
    assert TargetOptions(device_map="cpu", device="cpu").resolved(str(narrow)).dtype == "float32"
    assert PlacementOptions().resolve_dtype(str(narrow), "float16") == "float16"


def test_under_a_launcher_auto_is_a_gpu_for_each_process(cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert [resolved_device(name) for name in ("auto", "cuda", "cuda:0", "cpu")] == [
        "cuda:1",
        "cuda:1",
        "cuda:0",
        "cpu",
    ]


def test_a_checkpoint_whose_config_names_no_dtype_is_asked_for_its_tensors(narrow: Path) -> None:
    config = json.loads((narrow / "config.json").read_text())
    (narrow / "config.json").write_text(json.dumps({key: value for key, value in config.items() if key != "dtype"}))
    assert checkpoint_dtype(str(narrow)) == "bfloat16"
    weights = narrow / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(
        ValueError, match=r"model\.safetensors is cut off or no safetensors file: .*copy the folder again"
    ):
        checkpoint_dtype(str(narrow))


def test_a_checkpoint_in_a_dtype_that_no_target_runs_in_asks_for_a_name(cuda: None, narrow: Path) -> None:
    config = json.loads((narrow / "config.json").read_text())
    (narrow / "config.json").write_text(json.dumps(config | {"dtype": "float8_e4m3fn"}))
    with pytest.raises(ValueError, match="float8_e4m3fn, in which no target runs; name one of float32"):
        resolved_dtype("auto", str(narrow), "cuda")
    assert resolved_dtype("float16", str(narrow), "cuda") == "float16"


def test_a_resolved_target_is_loaded_as_it_is_recorded(no_cuda: None, narrow: Path) -> None:
    options = TargetOptions().resolved(str(narrow))
    target = options.load(str(narrow))
    assert (str(target.device), target.dtype) == (options.device, torch.float32)

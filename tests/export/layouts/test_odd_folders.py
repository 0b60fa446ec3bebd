"""Folders of every layout, broken in one place: reading one ends in an error in words, whatever is wrong, and never in a traceback."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from doubles import random_model
from heads import deep_config, deep_target
from safetensors.torch import load_file, save_file
from torch import Tensor

from draftsmith.export.contents import contents_of
from draftsmith.export.layouts.layouts import load_any, write
from draftsmith.models import Drafter, Eagle3, Target
from draftsmith.models.drafters.drafter_folder import load_drafter
from draftsmith.models.drafters.other_layouts import TargetBond
from draftsmith.models.families.block import BlockDrafter
from draftsmith.models.families.heads import HeadsDrafter
from draftsmith.models.families.riders.chimera import Chimera
from draftsmith.models.families.riders.mtp import MtpHead
from draftsmith.models.families.riders.rider_drafter import RiderDrafter
from draftsmith.models.other_software.named_kinds import NESTED

IDS = torch.tensor([0, 3, 9, 10, 40, 63])
BLOCK: dict[str, Any] = {"mask_token_id": 63, "num_draft_layers": 2, "num_draft_steps": 3, "correction_rank": 5}
DSPARK: dict[str, Any] = {"correction": "recurrent", "sample_from_anchor": True, "draft_token_ids": IDS}
DFLASH2: dict[str, Any] = {"correction": "selector", "convolution": True, "candidates": 5}
LAYOUTS: dict[str, tuple[str, type[Any], dict[str, Any]]] = {
    "DFlash": ("dflash", BlockDrafter, BLOCK | {"draft_token_ids": IDS}),
    "JetSpec": ("dflash", BlockDrafter, BLOCK | {"causal": True}),
    "DFlash 2": ("dflash2", BlockDrafter, BLOCK | DFLASH2),
    "DSpark": ("dspark", BlockDrafter, BLOCK | DSPARK | {"confidence": True}),
    "DSpark of speculators": ("speculators", BlockDrafter, BLOCK | DSPARK),
    "P-EAGLE": ("peagle", Eagle3, {"draft_token_ids": IDS, "mask_token_id": 63}),
    "P-EAGLE of speculators": ("speculators", Eagle3, {"draft_token_ids": IDS, "mask_token_id": 63}),
    "Qwen3's of speculators": ("speculators", Eagle3, {"draft_token_ids": IDS, "head_norms": True}),
    "Medusa": ("medusa", HeadsDrafter, {"head": "per_step", "draft_token_ids": IDS, "num_draft_steps": 3}),
    "MLP": ("mlp_speculator", HeadsDrafter, {"network": "mlp", "tied": False, "head": "per_step"}),
    "MTP": ("mtp", MtpHead, {}),
    "own block": ("draftsmith", BlockDrafter, BLOCK | DSPARK),
    "own MTP": ("draftsmith", MtpHead, {}),
    "own Hydra": ("draftsmith", HeadsDrafter, {"network": "hydra"}),
    "own Chimera": ("draftsmith", Chimera, {}),
    "own riders": ("draftsmith", RiderDrafter, {"riders": "firp", "entries": [2, 2], "num_draft_steps": 2}),
    "own prompt tokens": ("draftsmith", RiderDrafter, {"riders": "prompt", "entries": [0, 0], "num_draft_steps": 2}),
}
JUNK: tuple[Any, ...] = ("x", -1, 0, 1.5, True, [], {}, 10**12, [1, "a"], [[1]], float("nan"))
LAYERS_READ = ["layer.1.output", "layer.3.output", "layer.5.output"]


@pytest.fixture(scope="module")
def target() -> Target:
    return deep_target()


@pytest.fixture(scope="module")
def folders(target: Target, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A whole folder of each layout, which tests copy from."""
    root, whole = tmp_path_factory.mktemp("layouts"), {}
    for name, (layout, kind, chosen) in LAYOUTS.items():
        layers = {"layers": LAYERS_READ} if kind in (BlockDrafter, Eagle3) else {}
        drafter = kind.for_target(target.ends, **layers, **chosen)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in drafter.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        whole[name] = root / name
        whole[name].mkdir()
        write(drafter.eval(), whole[name], layout, target.ends)
    return whole


def read(folder: Path, target: Target) -> Drafter:
    return load_drafter(folder, target=TargetBond(target.ends)).attach(target.ends)


def answered(folder: Path, target: Target) -> str:
    """What reading a folder, describing it and exporting from it say; empty where all go through. Only errors in words pass."""
    said = []
    for look in (read, load_any_of, described):
        try:
            look(folder, target)
        except ValueError as error:
            said.append(str(error))
    return "\n".join(said)


def load_any_of(folder: Path, target: Target) -> object:
    return load_any(folder, target.ends)


def described(folder: Path, target: Target) -> object:
    return contents_of(folder)


def copied(whole: Path, folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((whole / name).read_bytes())
    return json.loads((whole / "config.json").read_text()), load_file(whole / "model.safetensors")


def places_in(fields: dict[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, value in fields.items():
        yield (*above, name)
        if isinstance(value, dict):
            yield from places_in(value, (*above, name))


@pytest.mark.parametrize("name", LAYOUTS)
def test_no_value_of_any_field_ends_in_a_traceback(
    folders: dict[str, Path], target: Target, tmp_path: Path, name: str
) -> None:
    fields, _ = copied(folders[name], tmp_path)
    assert answered(tmp_path, target) == ""
    refused = 0
    for number, place in enumerate(places_in(fields)):
        # Each field meets two of the values, other fields other ones; all layouts together meet all.
        for value in (JUNK * 2)[number % len(JUNK) :][:2]:
            changed = json.loads(json.dumps(fields))
            inner = changed
            for part in place[:-1]:
                inner = inner[part]
            inner[place[-1]] = value
            (tmp_path / "config.json").write_text(json.dumps(changed))
            refused += bool(answered(tmp_path, target))
    assert refused > 2


@pytest.mark.parametrize("name", LAYOUTS)
def test_no_tensor_of_another_shape_or_dtype_is_read(
    folders: dict[str, Path], target: Target, tmp_path: Path, name: str
) -> None:
    _, tensors = copied(folders[name], tmp_path)
    whole = [part for part, tensor in tensors.items() if not tensor.is_floating_point()]
    chosen = [*whole, next(iter(tensors)), list(tensors)[-1]]
    broken: dict[str, Callable[[Tensor], Tensor]] = {
        "one row less": lambda tensor: tensor[:-1],
        "no dimension": lambda tensor: tensor.flatten()[0].clone(),
        "empty": lambda tensor: tensor[:0],
        "eight bits": lambda tensor: tensor.float().to(torch.float8_e4m3fn),
        "complex": lambda tensor: tensor.to(torch.complex64),
        "double": lambda tensor: tensor.double(),
    }
    for part in dict.fromkeys(chosen):
        for change in broken.values():
            save_file(tensors | {part: change(tensors[part]).contiguous()}, tmp_path / "model.safetensors")
            assert part in answered(tmp_path, target)
        save_file({other: tensor for other, tensor in tensors.items() if other != part}, tmp_path / "model.safetensors")
        assert answered(tmp_path, target) or part == "t2d", "t2d follows from d2t"
    floating = next(part for part, tensor in tensors.items() if tensor.is_floating_point())
    tensors[floating].view(-1)[0] = torch.nan
    save_file(tensors, tmp_path / "model.safetensors")
    assert f"{floating} holds NaN or infinity" in answered(tmp_path, target)


OTHER_TARGETS = {"hidden_size": 48, "vocab_size": 70, "num_hidden_layers": 3}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_target_of_other_sizes_is_named(folders: dict[str, Path], target: Target, tmp_path: Path, name: str) -> None:
    copied(folders[name], tmp_path)
    for field, size in OTHER_TARGETS.items():
        other = other_target(field, size)
        if field == "num_hidden_layers" and name in ("Medusa", "MLP"):
            continue  # they read the last state, whatever the depth
        said = answered(tmp_path, other)
        assert str(tmp_path) in said
        rest = said.replace(str(tmp_path), "")  # whose name has the word in it
        assert "target" in rest or "layers" in rest


def other_target(field: str, size: int) -> Target:
    config = deep_config()
    setattr(config, field, size)
    return Target.from_model(random_model(config, 5), name=f"other {field}")


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("DFlash", {"draft_vocab_size": 7}, "draft_vocab_size 7, and d2t maps 6 tokens"),
        ("DFlash", {"num_target_layers": 9}, "num_target_layers 9, and 'deep' has 8 layers"),
        (
            "JetSpec",
            {"num_hidden_layers": 10**6},
            "num_hidden_layers is 1000000, it must be a whole number from 1 to 1024",
        ),
        ("JetSpec", {"layer_types": ["linear_attention"] * 2}, "layer_types with linear attention"),
        ("JetSpec", {"rope_scaling": {"factor": 4.0}}, "a factor and no rope_type"),
        ("P-EAGLE", {"mask_token_id": 62}, "names {'mask_token_id': 62, 'pard_token': 63}; give the one token"),
        (
            "JetSpec",
            {"rope_theta": 77.0, "rope_parameters": {"rope_type": "default", "rope_theta": 123.0}},
            "several values of rope_type, rope_theta in rope_parameters and rope_scaling and rope_theta",
        ),
        ("P-EAGLE", {"rope_scaling": {"rope_type": "linear", "factor": 0}}, "rope is .* and numbers above 0"),
        ("DSpark of speculators", {"speculators_model_type": ["dspark"]}, r"is a \['dspark'\] of the speculators"),
        ("Medusa", {"truncated_vocab_size": 7}, "truncated_vocab_size 7, and the map token_map has 6 tokens"),
        ("Medusa", {"medusa_fc_bias": False}, r"medusa_fc_bias false, and 0\.0\.linear\.bias is not zero"),
        ("MTP", {"vocab_size": 65}, "has vocab_size 65, and 'deep' has 64"),
        ("MTP", {"num_nextn_predict_layers": 2}, "num_nextn_predict_layers is 2, it must be 1"),
        ("own block", {"sample_from_anchor": False}, "num_draft_steps 3 and block_size 3, of which 2 slots predict"),
        ("own block", {"num_draft_layers": 10**6}, "num_draft_layers is 1000000"),
        ("own MTP", {"hidden_size": 33}, "no MtpHead can be made of its config.json"),
        ("own riders", {"entries": [2, 9]}, "entries"),
        ("own riders", {"model_type": None}, "a drafter of a family that is not known here"),
        ("own Hydra", {"num_blocks": 10**6}, "num_blocks is 1000000"),
    ],
)
def test_fields_that_contradict_the_tensors_or_the_target_are_named(
    folders: dict[str, Path], target: Target, tmp_path: Path, name: str, changes: dict[str, Any], message: str
) -> None:
    fields, _ = copied(folders[name], tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(fields | changes))
    with pytest.raises(ValueError, match=message):
        read(tmp_path, target)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_setting_that_is_not_read_is_named(
    folders: dict[str, Path], target: Target, tmp_path: Path, name: str, recwarn: pytest.WarningsRecorder
) -> None:
    fields, _ = copied(folders[name], tmp_path)
    read(tmp_path, target)
    assert "does not read" not in "".join(str(warning.message) for warning in recwarn), "of a folder that is whole"
    if name == "MTP":
        return  # its config may be the target's own
    places = [fields, *(fields[part] for part in NESTED if part in fields)]
    for number, place in enumerate(places):
        place[f"mystery_{number}"] = 0.5
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.warns(UserWarning, match="mystery_0 0.5.* which draftsmith does not read") as caught:
        read(tmp_path, target)
    said = "".join(str(warning.message) for warning in caught)
    assert all(f"mystery_{number} 0.5" in said for number in range(len(places)))


def test_an_mtp_layer_of_a_deeper_target_is_named_by_its_number(
    folders: dict[str, Path], target: Target, tmp_path: Path
) -> None:
    copied(folders["MTP"], tmp_path)
    with pytest.raises(ValueError, match=r"model\.layers\.8\. is the MTP layer of a target of 8 layers"):
        read(tmp_path, other_target("num_hidden_layers", 3))


@pytest.mark.parametrize("name", LAYOUTS)
def test_files_in_disorder_are_named(folders: dict[str, Path], target: Target, tmp_path: Path, name: str) -> None:
    _, tensors = copied(folders[name], tmp_path)
    weights, whole = tmp_path / "model.safetensors", (tmp_path / "model.safetensors").read_bytes()
    for length in (0, 8, len(whole) - 1):
        weights.write_bytes(whole[:length])
        assert "model.safetensors is cut off or no safetensors file" in answered(tmp_path, target)
    weights.unlink()
    assert "holds no model.safetensors" in answered(tmp_path, target)
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    assert "pickled weights can run code and are not read" in answered(tmp_path, target)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "model-00001-of-00002.safetensors")}))
    assert "names model-00001-of-00002.safetensors, which" in answered(tmp_path, target)
    index.unlink()
    weights.write_bytes(whole)
    for text in ("", "[]", '{"a":', "null"):
        (tmp_path / "config.json").write_text(text)
        assert "config.json is not" in answered(tmp_path, target)


@pytest.mark.parametrize("name", LAYOUTS)
def test_code_in_the_folder_never_runs(folders: dict[str, Path], target: Target, tmp_path: Path, name: str) -> None:
    fields, _ = copied(folders[name], tmp_path)
    code = "from pathlib import Path\nPath(__file__).with_suffix('.ran').touch()\n"
    (tmp_path / "modeling_own.py").write_text(code)
    own = {"auto_map": {"AutoConfig": "modeling_own.Config", "AutoModel": "modeling_own.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(fields | own))
    load_drafter(tmp_path, trust_remote_code=True, target=TargetBond(target.ends))
    contents_of(tmp_path)
    assert not (tmp_path / "modeling_own.ran").exists()


def test_an_empty_folder_is_named(target: Target, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is a directory without config\.json"):
        read(tmp_path, target)

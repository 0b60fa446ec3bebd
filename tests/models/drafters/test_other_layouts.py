"""Drafters of other software are loaded as ours are, for the target that is named."""

import json
from pathlib import Path

import pytest
import torch
from heads import eagle3
from public_heads import DRAFTED, LAYERS, READ, dflash, normed_residual, official_eagle3, with_verifier
from safetensors.torch import load_file, save_file

from draftsmith.models import Drafter, Eagle3, TargetEnds
from draftsmith.models.drafters.drafter_folder import load_drafter
from draftsmith.models.drafters.other_layouts import TargetBond
from draftsmith.models.drafters.registry import family_of


@pytest.fixture(scope="module")
def ends(target: Path) -> TargetEnds:
    return TargetEnds.load(str(target))


@pytest.fixture(scope="module")
def other_ends(other_target: Path) -> TargetEnds:
    return TargetEnds.load(str(other_target))


def load(folder: Path, ends: TargetEnds) -> Drafter:
    return load_drafter(folder, target=TargetBond(ends, "abc"))


@pytest.mark.parametrize("name", READ)
def test_every_public_layout_is_loaded_and_bound_to_its_target(tmp_path: Path, ends: TargetEnds, name: str) -> None:
    build, kind = READ[name]
    build(tmp_path, ends)
    drafter = load(tmp_path, ends)
    assert family_of(drafter).about.title == kind
    assert drafter.config.target_fingerprint == ends.fingerprint
    assert drafter.config.tokenizer_fingerprint == "abc"
    assert drafter.loaded_from == tmp_path
    assert not drafter.training
    with pytest.raises(ValueError, match="layout, which names no target; say which one it is for with --target"):
        load_drafter(tmp_path)


def test_the_weights_and_switches_are_those_of_the_files(tmp_path: Path, ends: TargetEnds) -> None:
    normed_residual(tmp_path, ends)
    drafter = load(tmp_path, ends)
    assert isinstance(drafter, Eagle3)
    expected = eagle3(ends, DRAFTED, LAYERS, norm_before_residual=True)
    assert drafter.config.switches == expected.config.switches
    own, others = drafter.state_dict(), expected.state_dict()
    assert own.keys() == others.keys()
    assert all(torch.equal(own[name], others[name]) for name in own)
    assert drafter.config.num_draft_steps == 3


def test_a_folder_in_parts_is_read_by_its_index(tmp_path: Path, ends: TargetEnds) -> None:
    official_eagle3(tmp_path, ends)
    whole = load(tmp_path, ends).state_dict()
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    parts = {name: f"model-0000{1 + index % 2}-of-00002.safetensors" for index, name in enumerate(tensors)}
    for part in set(parts.values()):
        save_file({name: tensors[name] for name in tensors if parts[name] == part}, tmp_path / part)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": parts}))
    read = load(tmp_path, ends).state_dict()
    assert all(torch.equal(read[name], whole[name]) for name in whole)
    save_file({"d2t": tensors["d2t"] + 1, "fc.weight": tensors["fc.weight"]}, tmp_path / "stale.safetensors")
    index.write_text(json.dumps({"weight_map": parts | {"other": "stale.safetensors"}}))
    with pytest.raises(ValueError, match=r"stale.safetensors holds d2t, as another part of .* does"):
        load(tmp_path, ends)
    index.write_text(json.dumps({"weight_map": parts | {"d2t": "../other.safetensors"}}))
    with pytest.raises(ValueError, match=r"weight_map is '../other.safetensors', which is no plain file name"):
        load(tmp_path, ends)
    index.write_text(json.dumps({"weight_map": parts | {"d2t": "model-00003-of-00002.safetensors"}}))
    with pytest.raises(ValueError, match=r"names model-00003-of-00002.safetensors, which .* lacks"):
        load(tmp_path, ends)


@pytest.mark.parametrize("name", ["speculators", "speculators-verifier-inside", "speculators-eagle", "EAGLE-1"])
def test_tensors_of_another_target_are_an_error(
    tmp_path: Path, ends: TargetEnds, other_ends: TargetEnds, name: str
) -> None:
    READ[name][0](tmp_path, ends)
    with pytest.raises(ValueError, match=r"(?:embed_tokens|verifier_lm_head).weight differs from .* of "):
        load(tmp_path, other_ends)


def test_the_norm_of_another_target_is_an_error(tmp_path: Path, ends: TargetEnds) -> None:
    with_verifier(tmp_path, ends)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["verifier_norm.weight"][0] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"verifier_norm.weight differs from that of"):
        load(tmp_path, ends)


def test_a_folder_that_does_not_say_where_it_normalises_is_read_with_a_warning(
    tmp_path: Path, ends: TargetEnds
) -> None:
    normed_residual(tmp_path, ends)
    fields = json.loads((tmp_path / "config.json").read_text())
    del fields["norm_before_residual"]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.warns(
        UserWarning, match="does not name norm_before_residual; draftsmith and the speculators package take false"
    ):
        drafter = load(tmp_path, ends)
    assert isinstance(drafter, Eagle3)
    assert not drafter.config.norm_before_residual


@pytest.mark.parametrize("junk", [7, [], {"verifier": 3, "proposal_methods": "greedy"}, {"proposal_methods": [4]}])
def test_parts_of_the_config_that_are_of_the_wrong_kind_do_not_matter(
    tmp_path: Path, ends: TargetEnds, junk: object
) -> None:
    normed_residual(tmp_path, ends)
    fields = json.loads((tmp_path / "config.json").read_text()) | {"speculators_config": junk}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert load(tmp_path, ends).config.num_draft_steps == 7


def test_a_kind_that_nothing_here_decodes_is_named(tmp_path: Path, ends: TargetEnds) -> None:
    dflash(tmp_path, ends)
    fields = json.loads((tmp_path / "config.json").read_text()) | {
        "architectures": ["X"],
        "speculators_model_type": "xpress",
    }
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(
        ValueError, match=r"a 'xpress' of the speculators package \(XPress\), which draftsmith does not"
    ):
        load(tmp_path, ends)


@pytest.mark.parametrize("name", ["EAGLE-1", "EAGLE-3", "speculators"])
def test_pickled_heads_are_never_opened_and_the_error_converts_them(
    tmp_path: Path, ends: TargetEnds, name: str
) -> None:
    READ[name][0](tmp_path, ends)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pickled weights can run code and are not read. Convert them") as caught:
        load(tmp_path, ends)
    code = str(caught.value).partition('python -c "')[2].rpartition('"')[0]
    script = code.replace("'pytorch_model.bin'", repr(str(tmp_path / "pytorch_model.bin")))
    exec(script.replace("'model.safetensors'", repr(str(tmp_path / "model.safetensors"))), {})
    assert load(tmp_path, ends).config.target_name == ends.name


def test_early_speculators_with_norms_of_their_own_are_an_error(tmp_path: Path, ends: TargetEnds) -> None:
    READ["speculators-eagle"][0](tmp_path, ends)
    fields = json.loads((tmp_path / "config.json").read_text()) | {"layernorms": True}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="asks for layernorms, which an EAGLE-1 does not have"):
        load(tmp_path, ends)

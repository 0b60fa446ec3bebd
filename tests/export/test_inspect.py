"""`draftsmith inspect`: its files tell what lies in a folder, whoever wrote them."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from public_heads import READ, dflash
from safetensors.torch import load_file, save_file

from draftsmith.cli import main
from draftsmith.models import Eagle3, TargetEnds
from draftsmith.models.families.block import BlockDrafter


@pytest.fixture(scope="module")
def ends(target: Path) -> TargetEnds:
    return TargetEnds.load(str(target))


def told(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, str]:
    """The lines of two columns."""
    assert main(["inspect", *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    pairs = [line.split("  ", 1) for line in lines if "  " in line]
    return {name.strip(): value.strip() for name, value in pairs} | {"last": lines[-1]}


@pytest.mark.parametrize("name", READ)
def test_every_public_layout_is_recognised_without_its_target_and_checked_with_it(
    tmp_path: Path, target: Path, ends: TargetEnds, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    build, kind = READ[name]
    build(tmp_path, ends)
    shown = told(capsys, "--drafter", str(tmp_path))
    assert shown["kind"] == kind
    assert shown["hidden size"] == "32"
    assert "add --target to check that it is whole" in shown["last"]
    shown = told(capsys, "--drafter", str(tmp_path), "--target", str(target))
    assert shown["last"].startswith("whole, and fits ")


def test_the_facts_of_a_speculators_folder(
    tmp_path: Path, ends: TargetEnds, capsys: pytest.CaptureFixture[str]
) -> None:
    READ["speculators-all-norms"][0](tmp_path, ends)
    shown = told(capsys, "--drafter", str(tmp_path))
    assert shown["layout"] == "the speculators package's"
    assert shown["draft vocabulary"] == f"8 of {ends.vocab_size} tokens, ids 0 to 36"
    assert shown["reads outputs of blocks"] == "[1, 2]"
    assert (shown["norm_before_residual"], shown["norm_before_fc"], shown["norm_output"]) == ("True", "True", "True")
    assert shown["target"] == ends.name
    assert shown["tokens per draft"] == "3"
    assert shown["embedding"] == "in the folder"


def test_a_trained_bias_is_shown(tmp_path: Path, ends: TargetEnds, capsys: pytest.CaptureFixture[str]) -> None:
    READ["EAGLE-1"][0](tmp_path, ends)
    shown = told(capsys, "--drafter", str(tmp_path))
    assert (shown["fc.bias"], shown["target"]) == ("trained", "not named")
    assert shown["draft vocabulary"] == "the whole vocabulary"


def test_an_xpress_is_named_and_not_decoded(
    tmp_path: Path, target: Path, ends: TargetEnds, capsys: pytest.CaptureFixture[str]
) -> None:
    dflash(tmp_path, ends)
    fields = json.loads((tmp_path / "config.json").read_text()) | {
        "architectures": ["X"],
        "speculators_model_type": "xpress",
    }
    (tmp_path / "config.json").write_text(json.dumps(fields))
    shown = told(capsys, "--drafter", str(tmp_path), "--target", str(target))
    assert (shown["kind"], shown["block size"], shown["layers of its own"]) == ("XPress", "16", "5")
    assert shown["reads outputs of blocks (from 0)"] == "[1, 9, 17, 25, 33]"
    assert shown["last"] == "draftsmith names the kind XPress and does not decode it yet"


def test_our_own_folders_and_whole_models_are_told_too(
    target: Path, drafter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = told(capsys, "--drafter", str(drafter), "--target", str(target))
    assert (shown["kind"], shown["layout"]) == ("ReDrafter", "draftsmith's")
    assert shown["target"] == str(target)
    assert shown["residual blocks"] == str(json.loads((drafter / "config.json").read_text())["num_draft_layers"])
    shown = told(capsys, "--drafter", str(target))
    assert (shown["kind"], shown["architecture"]) == ("whole model (a draft LM)", "LlamaForCausalLM")


def test_layers_of_our_own_heads_are_called_layers(
    tmp_path: Path, ends: TargetEnds, capsys: pytest.CaptureFixture[str]
) -> None:
    layers = ["layer.0.output"]
    Eagle3.for_target(ends, layers=layers, num_draft_layers=2, head_norms=True).save_pretrained(tmp_path / "eagle3")
    BlockDrafter.for_target(ends, layers=layers, num_draft_layers=2).save_pretrained(tmp_path / "block")
    shown = told(capsys, "--drafter", str(tmp_path / "eagle3"))
    assert (shown["layers of its own"], shown["norms of its heads"]) == ("2", "True")
    assert told(capsys, "--drafter", str(tmp_path / "block"))["layers of its own"] == "2"


def test_another_target_pickles_and_unknown_folders_are_errors(
    tmp_path: Path, ends: TargetEnds, other_target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    READ["speculators"][0](tmp_path / "head", ends)
    assert main(["inspect", "--drafter", str(tmp_path / "head"), "--target", str(other_target)]) == 1
    assert "differs from the embedding" in capsys.readouterr().err
    tensors = load_file(tmp_path / "head" / "model.safetensors")
    (tmp_path / "head" / "model.safetensors").unlink()
    torch.save(tensors, tmp_path / "head" / "pytorch_model.bin")
    assert main(["inspect", "--drafter", str(tmp_path / "head")]) == 1
    assert "pickled weights can run code and are not read" in capsys.readouterr().err
    (tmp_path / "head" / "config.json").write_text(json.dumps({"model_type": "bert"}))
    (tmp_path / "head" / "pytorch_model.bin").unlink()
    assert main(["inspect", "--drafter", str(tmp_path / "head")]) == 1


def test_names_of_somebody_else_reach_the_terminal_as_text(
    tmp_path: Path, ends: TargetEnds, capsys: pytest.CaptureFixture[str]
) -> None:
    READ["speculators"][0](tmp_path, ends)
    fields = json.loads((tmp_path / "config.json").read_text())
    fields["speculators_config"]["verifier"]["name_or_path"] = "org/\x1b[31mred\nname"
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert told(capsys, "--drafter", str(tmp_path))["target"] == r"org/\x1b[31mred name"


def _rewritten(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    tensors = change(load_file(folder / "model.safetensors"))
    save_file(tensors, folder / "model.safetensors")


def _as_pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def _one_deeper(folder: Path) -> None:
    (folder / "step-7").mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).rename(folder / "step-7" / name)


def _in_parts(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    for number, names in enumerate((list(tensors)[:5], list(tensors)[5:]), 1):
        save_file({name: tensors[name] for name in names}, folder / f"part-{number}.safetensors")


FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "pointer": (_as_pointer, r"model.safetensors is a pointer of Git LFS.*git lfs pull"),
    "nested": (_one_deeper, r"without config.json \(step-7 in it has one\)"),
    "other file": (
        lambda at: Path(at / "model.safetensors").rename(at / "eagle.safetensors") and None,
        "rename the file to",
    ),
    "part": (
        lambda at: Path(at / "model.safetensors").rename(at / "model-00001-of-00004.safetensors") and None,
        r"holds model-00001-of-00004.safetensors, of 4 parts, without model.safetensors.index.json.*copy the whole folder",
    ),
    "adapter": (
        lambda at: Path(at / "model.safetensors").rename(at / "adapter_model.safetensors") and None,
        r"holds adapter_model.safetensors, which is an adapter \(LoRA\) and no drafter",
    ),
    "parts": (_in_parts, r"part-1.safetensors, part-2.safetensors without model.safetensors.index.json"),
    "prefix": (
        lambda at: _rewritten(at, lambda tensors: {f"model.{name}": tensor for name, tensor in tensors.items()}),
        r"EAGLE by its config.json .*but lacks fc.weight and holds the tensors model\..*without a prefix.*Otherwise give a folder in",
    ),
    "no fc": (
        lambda at: _rewritten(at, lambda tensors: {name: t for name, t in tensors.items() if name != "fc.weight"}),
        "but lacks fc.weight",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_broken_folder_of_an_eagle_is_named_with_its_remedy(
    tmp_path: Path, ends: TargetEnds, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    READ["EAGLE-3"][0](tmp_path, ends)
    spoil, message = FAULTS[name]
    spoil(tmp_path)
    assert main(["inspect", "--drafter", str(tmp_path)]) == 1
    assert re.search(message, capsys.readouterr().err)


def test_a_file_in_place_of_a_folder_is_named(
    tmp_path: Path, ends: TargetEnds, capsys: pytest.CaptureFixture[str]
) -> None:
    READ["EAGLE-3"][0](tmp_path, ends)
    assert main(["inspect", "--drafter", str(tmp_path / "model.safetensors")]) == 1
    assert "is a file; give the directory that it lies in" in capsys.readouterr().err


def test_saved_rotary_frequencies_say_nothing_that_the_config_does_not(
    tmp_path: Path, target: Path, ends: TargetEnds, capsys: pytest.CaptureFixture[str]
) -> None:
    READ["EAGLE-3"][0](tmp_path, ends)
    _rewritten(tmp_path, lambda tensors: tensors | {"midlayer.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    assert told(capsys, "--drafter", str(tmp_path), "--target", str(target))["last"].startswith("whole, and fits ")
    _rewritten(tmp_path, lambda tensors: tensors | {"midlayer.gate.weight": torch.ones(4)})
    assert main(["inspect", "--drafter", str(tmp_path), "--target", str(target)]) == 1
    assert re.search("midlayer.gate.weight is unknown; take config.json and weights", capsys.readouterr().err)

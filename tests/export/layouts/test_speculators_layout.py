"""EAGLE-3 in the layout of the speculators package, and that package reading it where it is installed (extra `conformity`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from heads import DRAFT_IDS, TEXT, eagle, eagle3, our_logits, states
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig

from draftsmith.export.layouts.layouts import load_any, write
from draftsmith.export.layouts.readback import tensors_of
from draftsmith.models import Eagle3, Eagle3Config, Target, TargetEnds

LAYERS = ["layer.0.output", "layer.3.output", "layer.5.output"]
NUM_STEPS = 3


def fields_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def test_the_config_says_what_the_package_asks_for(tmp_path: Path, deep_ends: TargetEnds) -> None:
    [note] = write(eagle3(deep_ends, DRAFT_IDS, LAYERS), tmp_path, "speculators", deep_ends)
    assert "names the target by a path" in note
    fields = fields_of(tmp_path)
    assert fields["speculators_model_type"] == "eagle3"
    assert fields["speculators_config"]["proposal_methods"] == [{"proposal_type": "greedy", "speculative_tokens": 7}]
    assert fields["speculators_config"]["verifier"] == {
        "name_or_path": deep_ends.name,
        "architectures": ["LlamaForCausalLM"],
    }
    assert fields["norm_before_residual"] is False
    assert fields["draft_vocab_size"] == 6
    assert fields["eagle_aux_hidden_state_layer_ids"] == [1, 4, 6]
    layer = fields["transformer_layer_config"]
    assert (layer["model_type"], layer["num_hidden_layers"]) == ("llama", 1)
    assert (layer["rope_theta"], layer["rope_scaling"]["rope_type"]) == (50000.0, "llama3")


def test_the_tensors_are_named_by_layers_and_bring_the_embedding(tmp_path: Path, deep_ends: TargetEnds) -> None:
    write(eagle3(deep_ends, DRAFT_IDS), tmp_path, "speculators", deep_ends)
    tensors = load_file(tmp_path / "model.safetensors")
    assert not any(name.startswith("midlayer") for name in tensors)
    assert {"layers.0.hidden_norm.weight", "fc.weight", "norm.weight", "lm_head.weight", "d2t", "t2d"} < tensors.keys()
    assert torch.equal(tensors["embed_tokens.weight"], deep_ends.embed(torch.arange(64)))


def test_the_number_of_steps_comes_back(tmp_path: Path, deep_ends: TargetEnds) -> None:
    drafter = eagle3(deep_ends)
    drafter.config.num_draft_steps = 4
    write(drafter, tmp_path, "speculators", deep_ends)
    assert load_any(tmp_path, deep_ends).config.num_draft_steps == 4


def test_what_the_package_leaves_out_is_llamas_default(tmp_path: Path, deep_ends: TargetEnds) -> None:
    fields = eagle3(deep_ends).config.to_dict() | {"num_attention_heads": 32, "head_dim": 2}
    drafter = Eagle3(Eagle3Config.from_dict(fields)).eval()
    write(drafter, tmp_path, "speculators", deep_ends)
    fields = fields_of(tmp_path)
    assert fields["transformer_layer_config"].pop("num_attention_heads") == LlamaConfig().num_attention_heads
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert load_any(tmp_path, deep_ends).config.num_attention_heads == 32


def test_it_needs_the_target_and_an_eagle_3(tmp_path: Path, deep_ends: TargetEnds) -> None:
    with pytest.raises(ValueError, match="names its architecture; add --target"):
        write(eagle3(deep_ends), tmp_path, "speculators")
    with pytest.raises(
        ValueError,
        match=r"'speculators' is for Block drafter and EAGLE-3, this drafter is EAGLE-1; use draftsmith or eagle or custom_generate$",
    ):
        write(eagle(deep_ends), tmp_path, "speculators", deep_ends)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"speculators_model_type": "dflash"}, "is not a Qwen3 layer's"),
        ({"speculators_model_type": "peagle"}, r"says that it is a P-EAGLE .* and has no tensor mask_hidden"),
        (
            {"speculators_model_type": "newer"},
            "is a 'newer' of the speculators package, which draftsmith does not decode",
        ),
        ({"norm_before_residual": "yes"}, "norm_before_residual is 'yes', it must be true or false"),
        ({"transformer_layer_config": {"model_type": "gemma"}}, "is not a Llama or Qwen3 layer's"),
        ({"transformer_layer_config": None}, "is not a Llama or Qwen3 layer's"),
    ],
)
def test_other_speculators_are_refused(tmp_path: Path, deep_ends: TargetEnds, changes: dict, message: str) -> None:
    write(eagle3(deep_ends), tmp_path, "speculators", deep_ends)
    (tmp_path / "config.json").write_text(json.dumps(fields_of(tmp_path) | changes))
    with pytest.raises(ValueError, match=message):
        load_any(tmp_path, deep_ends)


# ---- the package itself ----------------------------------------------------------------------------------------------


def loaded(folder: Path) -> Any:
    """The package's own model from a folder."""
    speculators = pytest.importorskip("speculators", reason="needs the extra `conformity` and the speculators package")
    config = speculators.SpeculatorModelConfig.from_pretrained(str(folder))
    config.transformer_layer_config._attn_implementation = "eager"
    return speculators.SpeculatorModel.from_pretrained(str(folder), config=config).eval()


@pytest.fixture(params=[None, DRAFT_IDS], ids=["full", "truncated"])
def written(request: pytest.FixtureRequest, tmp_path: Path, deep_ends: TargetEnds) -> tuple[Eagle3, Path]:
    drafter = eagle3(deep_ends, request.param, LAYERS)
    folder = tmp_path / "ours"
    folder.mkdir()
    write(drafter, folder, "speculators", deep_ends)
    return drafter, folder


def test_the_package_loads_every_tensor_and_misses_none(written: tuple[Eagle3, Path]) -> None:
    _, folder = written
    model = loaded(folder)
    assert type(model).__name__ == "Eagle3DraftModel"
    # The target's norm and head, which the package takes from the target and never saves.
    of_the_target = {"verifier_lm_head.weight", "verifier_norm.weight"}
    ours, theirs = load_file(folder / "model.safetensors"), dict(model.state_dict())
    assert theirs.keys() - of_the_target == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)


def test_the_package_saves_the_same_bytes_again_and_we_read_them(
    written: tuple[Eagle3, Path], tmp_path: Path, deep_ends: TargetEnds
) -> None:
    drafter, folder = written
    loaded(folder).save_pretrained(tmp_path / "theirs")
    ours = load_file(folder / "model.safetensors")
    theirs = load_file(tmp_path / "theirs" / "model.safetensors")
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)
    imported = load_any(tmp_path / "theirs", deep_ends)
    before, after = tensors_of(drafter), tensors_of(imported)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert imported.config.rope == drafter.config.rope
    assert imported.config.layers == drafter.config.layers


@torch.no_grad()
def their_logits(model: Any, target: Target, drafter: Eagle3) -> list[Tensor]:
    """[1, T - 1, Vd] of each training step, caught at the package's output head."""
    caught: list[Tensor] = []
    hook = model.lm_head.register_forward_hook(lambda _module, _inputs, output: caught.append(output))
    known = states(target, drafter)
    length = len(TEXT) - 1
    try:
        model(
            hidden_states=torch.cat([known[name] for name in drafter.features], dim=-1)[None, :length],
            input_ids=torch.tensor([TEXT[1:]]),
            document_ids=torch.zeros(1, length, dtype=torch.int64),
            position_ids=torch.arange(length)[None],
            ttt_steps=NUM_STEPS,
        )
    finally:
        hook.remove()
    return caught


def test_the_package_computes_our_logits_at_every_training_step(
    written: tuple[Eagle3, Path], deep: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    drafter, folder = written
    theirs = their_logits(loaded(folder), deep, drafter)
    ours = our_logits(deep, drafter, NUM_STEPS)
    assert len(theirs) == NUM_STEPS
    for step, (their, our) in enumerate(zip(theirs, ours, strict=True)):
        within = len(our) - 1 - step  # steps that predict a token of the text
        torch.testing.assert_close(their[0, :within], our[:within], rtol=1e-4, atol=1e-4)


def test_a_fault_in_the_folder_would_show_in_those_logits(
    written: tuple[Eagle3, Path], deep: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    drafter, folder = written
    pytest.importorskip("speculators")
    tensors = load_file(folder / "model.safetensors")
    tensors["fc.weight"] = tensors["fc.weight"].roll(32, dims=1)  # the layers in another order
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    theirs = their_logits(loaded(folder), deep, drafter)
    assert (theirs[0][0] - our_logits(deep, drafter)[0]).abs().max() > 0.1

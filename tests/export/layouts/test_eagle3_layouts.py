"""EAGLE-3 in the common layout, TensorRT-LLM's and the official one."""

import json
from pathlib import Path

import pytest
import torch
from doubles import random_target
from heads import DRAFT_IDS, eagle3, logits_of_files, our_logits
from safetensors.torch import load_file, save_file

from draftsmith.export.layouts.eagle3 import read
from draftsmith.export.layouts.layouts import load_any, write
from draftsmith.export.layouts.readback import tensors_of
from draftsmith.models import PRE_NORM, Eagle3, Target

LAYER = {
    "midlayer.self_attn.q_proj.weight": (64, 64),
    "midlayer.self_attn.k_proj.weight": (32, 64),
    "midlayer.self_attn.v_proj.weight": (32, 64),
    "midlayer.self_attn.o_proj.weight": (32, 64),
    "midlayer.mlp.gate_proj.weight": (48, 32),
    "midlayer.mlp.up_proj.weight": (48, 32),
    "midlayer.mlp.down_proj.weight": (32, 48),
    "midlayer.hidden_norm.weight": (32,),
    "midlayer.input_layernorm.weight": (32,),
    "midlayer.post_attention_layernorm.weight": (32,),
}
TRUNCATED = LAYER | {"fc.weight": (32, 96), "norm.weight": (32,), "lm_head.weight": (6, 32), "d2t": (6,)}
FULL = LAYER | {"fc.weight": (32, 96), "norm.weight": (32,), "lm_head.weight": (64, 32)}
IDS = "eagle_aux_hidden_state_layer_ids"


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in load_file(folder / "model.safetensors").items()}


def fields_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def change_fields(folder: Path, **changes: object) -> Path:
    fields = fields_of(folder) | changes
    kept = {name: value for name, value in fields.items() if value != "absent"}
    (folder / "config.json").write_text(json.dumps(kept))
    return folder


def test_the_common_layout_with_a_draft_vocabulary(tmp_path: Path, deep: Target) -> None:
    assert write(eagle3(deep.ends, DRAFT_IDS), tmp_path, "eagle3", deep.ends) == ()
    assert shapes(tmp_path) == TRUNCATED | {"t2d": (64,)}
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors["d2t"].dtype == torch.int64
    assert tensors["d2t"].tolist() == [0, 2, 7, 7, 36, 58]
    assert tensors["t2d"].dtype == torch.bool
    assert tensors["t2d"].nonzero().flatten().tolist() == DRAFT_IDS
    fields = fields_of(tmp_path)
    assert fields["architectures"] == ["LlamaForCausalLMEagle3"]
    assert fields["draft_vocab_size"] == 6
    assert (fields["rope_theta"], fields["rope_scaling"]["rope_type"]) == (50000.0, "llama3")
    assert IDS not in fields


@pytest.mark.parametrize("layout", ["eagle3", "tensorrt-llm", "speculators"])
def test_a_full_vocabulary_has_no_maps_but_the_key_and_a_head(tmp_path: Path, deep: Target, layout) -> None:
    write(eagle3(deep.ends), tmp_path, layout, deep.ends)
    assert not {"d2t", "t2d"} & shapes(tmp_path).keys()
    assert shapes(tmp_path)["lm_head.weight"] == (64, 32)
    assert fields_of(tmp_path)["draft_vocab_size"] == 64


def test_tensorrts_variant_has_neither_t2d_nor_an_embedding(tmp_path: Path, deep: Target) -> None:
    for folder in ("truncated", "full"):
        (tmp_path / folder).mkdir()
    [note] = write(eagle3(deep.ends, DRAFT_IDS), tmp_path / "truncated", "tensorrt-llm", deep.ends)
    assert "`eagle3_layers_to_capture={1, 3, 4}`" in note
    assert shapes(tmp_path / "truncated") == TRUNCATED
    write(eagle3(deep.ends), tmp_path / "full", "tensorrt-llm", deep.ends)
    assert shapes(tmp_path / "full") == FULL


def test_other_layers_are_told_in_both_conventions(tmp_path: Path, deep: Target) -> None:
    layers = ["layer.0.output", "layer.2.output", "layer.5.output"]
    write(eagle3(deep.ends, layers=layers), tmp_path, "eagle3", deep.ends)
    fields = fields_of(tmp_path)
    assert fields[IDS] == [1, 3, 6]
    assert fields["eagle_config"] == {"use_aux_hidden_state": True, IDS: [0, 2, 5]}
    assert list(load_any(tmp_path, deep.ends).features) == layers
    change_fields(tmp_path, **{IDS: "absent"})
    assert list(load_any(tmp_path, deep.ends).features) == layers


def test_another_number_of_layers_is_told_as_well(tmp_path: Path, deep: Target) -> None:
    layers = ["layer.1.output", "layer.6.output"]
    write(eagle3(deep.ends, layers=layers), tmp_path, "eagle3", deep.ends)
    assert shapes(tmp_path)["fc.weight"] == (32, 64)
    assert fields_of(tmp_path)["eagle_config"][IDS] == [1, 6]
    assert list(load_any(tmp_path, deep.ends).features) == layers


def test_the_last_layers_number_needs_the_target(tmp_path: Path, deep: Target) -> None:
    drafter = eagle3(deep.ends, layers=["layer.1.output", "layer.3.output", PRE_NORM])
    with pytest.raises(ValueError, match="whose number is known with its target only; add --target"):
        write(drafter, tmp_path, "eagle3")
    [note] = write(drafter, tmp_path, "eagle3", deep.ends)
    assert "no other engine was tried" in note
    assert fields_of(tmp_path)[IDS] == [2, 4, 8]
    assert load_any(tmp_path, deep.ends).features[-1] == PRE_NORM


@pytest.mark.parametrize("draft_ids", [None, DRAFT_IDS])
@pytest.mark.parametrize("layout", ["eagle3", "tensorrt-llm", "speculators"])
def test_the_files_mean_to_the_papers_formula_what_the_module_meant(
    tmp_path: Path, deep: Target, layout, draft_ids: list[int] | None
) -> None:
    drafter = eagle3(deep.ends, draft_ids)
    write(drafter, tmp_path, layout, deep.ends)
    expected = logits_of_files(tmp_path, deep)
    torch.testing.assert_close(our_logits(deep, drafter)[0], expected, rtol=1e-4, atol=1e-4)
    reread = load_any(tmp_path, deep.ends)
    assert torch.equal(our_logits(deep, reread, 3), our_logits(deep, drafter, 3))


@pytest.mark.parametrize("draft_ids", [None, DRAFT_IDS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["draftsmith", "eagle3", "tensorrt-llm", "speculators"])
def test_there_and_back_is_the_same_drafter_bit_for_bit(
    tmp_path: Path, deep: Target, layout, dtype: torch.dtype, draft_ids: list[int] | None
) -> None:
    drafter = eagle3(deep.ends, draft_ids)
    for parameter in drafter.parameters():
        parameter.data = parameter.data.to(dtype)
    write(drafter, tmp_path, layout, deep.ends)
    reread = load_any(tmp_path, deep.ends, "abc")
    assert isinstance(reread, Eagle3)
    before, after = tensors_of(drafter), tensors_of(reread)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert reread.config.layers == drafter.config.layers
    assert reread.config.rope == drafter.config.rope
    assert reread.config.target_fingerprint == deep.fingerprint
    (tmp_path / "again").mkdir()
    write(reread, tmp_path / "again", layout, deep.ends)
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


def test_an_official_folder_is_read_by_either_name_of_its_layer(tmp_path: Path, deep: Target) -> None:
    drafter = eagle3(deep.ends, DRAFT_IDS)
    write(drafter, tmp_path, "eagle3", deep.ends)
    # What the official training leaves beyond ours: the target's embedding, in half precision as all the rest is not here.
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["embed_tokens.weight"] = deep.ends.embed(torch.arange(64)).half()
    for prefix in ("midlayer.", "layers.0."):
        named = {name.replace("midlayer.", prefix): tensor for name, tensor in tensors.items()}
        save_file(named, tmp_path / "model.safetensors")
        imported = load_any(tmp_path, deep.ends)
        assert torch.equal(our_logits(deep, imported, 2), our_logits(deep, drafter, 2))


def test_an_official_folder_is_bound_to_the_target_that_its_embedding_is_of(
    tmp_path: Path, deep: Target, other_deep: Target
) -> None:
    write(eagle3(deep.ends), tmp_path, "speculators", deep.ends)
    with pytest.raises(ValueError, match=r"embed_tokens.weight differs from the embedding of 'other'"):
        load_any(tmp_path, other_deep.ends)


def test_without_a_target_what_is_written_still_names_its_layers(tmp_path: Path, deep: Target) -> None:
    write(eagle3(deep.ends), tmp_path, "eagle3")
    assert fields_of(tmp_path)[IDS] == [2, 4, 5]
    with pytest.raises(ValueError, match="common EAGLE-3 layout, which names no target"):
        load_any(tmp_path)


def test_an_embedding_that_is_more_than_a_table_comes_along(tmp_path: Path) -> None:
    gemma = random_target("gemma2")
    [note] = write(
        Eagle3.for_target(gemma.ends, layers=["layer.0.output", "layer.1.output"]).eval(),
        tmp_path,
        "eagle3",
        gemma.ends,
    )
    assert "A constant factor makes no difference" in note
    assert torch.equal(
        load_file(tmp_path / "model.safetensors")["embed_tokens.weight"], gemma.ends.embed(torch.arange(61))
    )


@torch.no_grad()
def test_a_folder_without_a_head_takes_the_targets(tmp_path: Path, deep: Target) -> None:
    drafter = eagle3(deep.ends)
    drafter.lm_head.weight.copy_(deep.ends.head_weight)
    write(drafter, tmp_path, "eagle3", deep.ends)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    change_fields(tmp_path, draft_vocab_size=None, **{IDS: [2, 4, 5]})
    with pytest.warns(UserWarning, match=r"holds no lm_head\.weight; a copy of the target's head takes its place"):
        again = load_any(tmp_path, deep.ends)
    assert torch.equal(our_logits(deep, again, 2), our_logits(deep, drafter, 2))
    with pytest.raises(ValueError, match="so its head is the target's; add --target"):
        read(fields_of(tmp_path), tensors, None, "here")


@torch.no_grad()
def test_maps_of_a_whole_vocabulary_and_of_32_bits_are_read(tmp_path: Path, deep: Target) -> None:
    for ids, vocab_size in ((None, 64), (DRAFT_IDS, 6)):
        drafter = eagle3(deep.ends, ids)
        write(drafter, tmp_path, "eagle3", deep.ends)
        tensors = load_file(tmp_path / "model.safetensors")
        whole = {"d2t": torch.zeros(64, dtype=torch.int64), "t2d": torch.ones(64, dtype=torch.bool)}
        added = whole if ids is None else {"d2t": tensors["d2t"].to(torch.int32)}
        save_file({**tensors, **added}, tmp_path / "model.safetensors")
        again = load_any(change_fields(tmp_path, draft_vocab_size=vocab_size), deep.ends)
        assert torch.equal(again.draft_ids(), drafter.draft_ids())
        assert torch.equal(our_logits(deep, again, 2), our_logits(deep, drafter, 2))


def test_a_window_of_the_layer_is_read(tmp_path: Path, deep: Target) -> None:
    write(eagle3(deep.ends), tmp_path, "eagle3", deep.ends)
    with pytest.warns(UserWarning, match="sliding_window 9 and no layer_types, so it is read without a window"):
        assert load_any(change_fields(tmp_path, sliding_window=9), deep.ends).config.sliding_window is None
    change_fields(tmp_path, layer_types=["sliding_attention"])
    assert load_any(tmp_path, deep.ends).config.sliding_window == 9
    for changes, message in (
        ({"use_sliding_window": False}, "sliding_window 9 and use_sliding_window False; give the window"),
        ({"sliding_window": None, "use_sliding_window": "absent"}, "sliding_window None and use_sliding_window None"),
        ({"sliding_window": 0}, "sliding_window is 0, it must be a whole number of at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            load_any(change_fields(tmp_path, **changes), deep.ends)


@pytest.mark.parametrize("layout", ["eagle3", "speculators"])
@torch.no_grad()
def test_biases_of_attention_come_along(tmp_path: Path, deep: Target, layout: str) -> None:
    drafter = eagle3(deep.ends, DRAFT_IDS, attention_bias=True)
    notes = write(drafter, tmp_path, layout, deep.ends)
    assert layout == "speculators" or "attention has biases. SGLang's EAGLE-3 has none" in notes[0]
    tensors = load_file(tmp_path / "model.safetensors")
    assert sum(name.endswith("_proj.bias") for name in tensors) == 4
    expected = logits_of_files(tmp_path, deep)
    torch.testing.assert_close(our_logits(deep, drafter)[0], expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(our_logits(deep, load_any(tmp_path, deep.ends), 2), our_logits(deep, drafter, 2))
    with pytest.raises(ValueError, match="has attention_bias, which TensorRT-LLM does not read"):
        write(drafter, tmp_path, "tensorrt-llm", deep.ends)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("norm.weight"), r"norm.weight is missing \(float \[32\]\)"),
        (lambda t: t.pop("lm_head.weight"), r"lm_head.weight is missing \(float \[6, 32\]\)"),
        (lambda t: t.pop("d2t"), r"d2t is missing \(int64 \[6\]\)"),
        (lambda t: t.pop("midlayer.hidden_norm.weight"), "midlayer.hidden_norm.weight is missing"),
        (lambda t: t.update({"fc.bias": torch.zeros(32)}), "fc.bias is unknown"),
        (lambda t: t.update({"input_norm.weight": torch.ones(96)}), "input_norm.weight is unknown"),
        (
            lambda t: t.update({"layers.0.mlp.up_proj.weight": torch.zeros(48, 32)}),
            "midlayer.mlp.up_proj.weight is unknown",
        ),
        (
            lambda t: t.update({"fc.weight": torch.zeros(32, 128)}),
            r"fc.weight is float32 \[32, 128\], not float \[32, 96\]",
        ),
        (lambda t: t.update(d2t=t["d2t"] - 1), "d2t does not map to increasing token ids below 64"),
        (lambda t: t["t2d"].logical_not_(), "t2d does not mark the token ids that d2t maps to"),
        (lambda t: t.update(d2t=t["d2t"].float()), r"d2t is float32 \[6\], not int64 \[6\]"),
    ],
)
def test_a_folder_that_breaks_the_table_is_refused(tmp_path: Path, deep: Target, change, message: str) -> None:
    write(eagle3(deep.ends, DRAFT_IDS), tmp_path, "eagle3", deep.ends)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        load_any(tmp_path, deep.ends)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"draft_vocab_size": 64}, "d2t is unknown"),
        ({"attention_bias": True}, r"self_attn\.q_proj\.bias is missing"),
        ({"attention_bias": "yes"}, "attention_bias is 'yes', it must be true or false"),
        ({"draft_vocab_size": "absent"}, "d2t is unknown"),
        ({"norm_before_residual": 1}, "norm_before_residual is 1, it must be true or false"),
        ({"norm_before_fc": True}, r"input_norm.weight is missing \(float \[96\]\)"),
        ({"fc_norm": True}, r"fc_norm.0.weight is missing \(float \[32\]\)"),
        (
            {"norm_before_fc": True, "fc_norm": True},
            "norm_before_fc and fc_norm, of which a drafter has one at the most",
        ),
        ({"parallel_drafting": True}, "asks for parallel_drafting True"),
        ({"pard_token": 63}, r"says that it is a P-EAGLE \(pard_token\) and has no tensor mask_hidden"),
        ({"architectures": ["PEagleDraftModel"]}, r"says that it is a P-EAGLE \(by its kind\) and has no tensor"),
        ({"eagle_config": {"use_aux_hidden_state": False}}, "asks for use_aux_hidden_state False, which our EAGLE-3"),
        ({"eagle_config": {"next_layer_regular": False}}, "asks for next_layer_regular False, which our EAGLE-3"),
        ({"parallel_draft_step": 4, "use_mtp_layernorm": True}, "use_mtp_layernorm True, parallel_draft_step 4, which"),
        (
            {"norm_output": True, "eagle_config": {"norm_output": False}},
            "has norm_output True, and False in eagle_config; correct one",
        ),
        ({IDS: "2, 4, 5"}, "it must be a list of whole numbers"),
        ({"eagle_config": {IDS: [1, "3", 4]}}, "it must be a list of whole numbers"),
        ({"target_hidden_size": 48}, "asks for target_hidden_size 48"),
        ({IDS: [2, 4]}, r"fc.weight is float32 \[32, 96\], not float \[32, 64\]"),
        ({IDS: [2, 4, 9]}, "the target has 8"),
    ],
)
def test_a_config_that_means_another_head_is_refused(tmp_path: Path, deep: Target, changes: dict, message: str) -> None:
    write(eagle3(deep.ends, DRAFT_IDS), tmp_path, "eagle3", deep.ends)
    with pytest.raises(ValueError, match=message):
        load_any(change_fields(tmp_path, **changes), deep.ends)

"""EAGLE-1 in the engines' and the official layout."""

import json
from pathlib import Path

import pytest
import torch
from doubles import random_target
from heads import DRAFT_IDS, eagle, logits_of_files, our_logits
from safetensors.torch import load_file, save_file
from torch import Tensor

from draftsmith.export.layouts.layouts import load_any, write
from draftsmith.export.layouts.readback import assemble, probe_logits, refuse_difference, tensors_of
from draftsmith.models import Eagle, EagleConfig, Target, TargetEnds
from draftsmith.models.families.eagle_config import rope_of

NAMES = {
    "fc.weight": (32, 64),
    "fc.bias": (32,),
    "layers.0.self_attn.q_proj.weight": (64, 32),
    "layers.0.self_attn.k_proj.weight": (32, 32),
    "layers.0.self_attn.v_proj.weight": (32, 32),
    "layers.0.self_attn.o_proj.weight": (32, 64),
    "layers.0.mlp.gate_proj.weight": (48, 32),
    "layers.0.mlp.up_proj.weight": (48, 32),
    "layers.0.mlp.down_proj.weight": (32, 48),
    "layers.0.post_attention_layernorm.weight": (32,),
}


def with_bias(drafter: Eagle) -> Eagle:
    """The same with a trained bias, as official heads have one."""
    biased = Eagle(EagleConfig.from_dict(drafter.config.to_dict() | {"bias": True}))
    biased.load_state_dict(drafter.state_dict() | {"fc.bias": torch.linspace(-1, 1, 32)})
    return biased.eval()


def official(folder: Path, ends: TargetEnds, tensors: dict[str, Tensor], **changes: object) -> Path:
    """A folder as the official code's training leaves it (with its embedding, a config of few keys, no target named)."""
    folder.mkdir(exist_ok=True)
    save_file(tensors | {"embed_tokens.weight": ends.embed(torch.arange(64)).half()}, folder / "model.safetensors")
    fields = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_hidden_layers": 1,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_scaling": {key: value for key, value in rope_of(ends.config).items() if key != "rope_theta"},
        "rope_theta": 50000.0,
        "vocab_size": 64,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "transformers_version": "4.31.0",
    }
    (folder / "config.json").write_text(json.dumps(fields | changes))
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_folder_names_both_engines_classes_and_holds_just_their_tensors(
    tmp_path: Path, deep: Target, dtype: torch.dtype
) -> None:
    drafter = eagle(deep.ends)
    for parameter in drafter.parameters():
        parameter.data = parameter.data.to(dtype)
    assert write(drafter, tmp_path, "eagle", deep.ends) == ()
    tensors = load_file(tmp_path / "model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == NAMES
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    assert not tensors["fc.bias"].any()
    fields = json.loads((tmp_path / "config.json").read_text())
    assert fields["architectures"] == ["LlamaForCausalLMEagle", "EagleLlamaForCausalLM"]
    assert (fields["model_type"], fields["num_hidden_layers"]) == ("llama", 1)
    assert fields["rope_theta"] == 50000.0
    assert fields["rope_scaling"]["rope_type"] == "llama3"


def test_the_files_mean_to_the_papers_formula_what_the_module_meant(tmp_path: Path, deep: Target) -> None:
    drafter = eagle(deep.ends)
    write(drafter, tmp_path, "eagle", deep.ends)
    expected = logits_of_files(tmp_path, deep)
    torch.testing.assert_close(our_logits(deep, drafter)[0], expected, rtol=1e-4, atol=1e-4)
    reread = load_any(tmp_path, deep.ends)
    assert torch.equal(our_logits(deep, reread, 3), our_logits(deep, drafter, 3))


@pytest.mark.parametrize("layout", ["draftsmith", "eagle"])
def test_there_and_back_is_the_same_drafter_bit_for_bit(tmp_path: Path, deep: Target, layout) -> None:
    drafter = eagle(deep.ends)
    write(drafter, tmp_path, layout, deep.ends)
    reread = load_any(tmp_path, deep.ends, "abc")
    assert isinstance(reread, Eagle)
    before, after = tensors_of(drafter), tensors_of(reread)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (reread.config.target_name, reread.config.target_fingerprint) == ("deep", deep.fingerprint)
    if layout == "eagle":
        assert reread.config.tokenizer_fingerprint == "abc"
        (tmp_path / "again").mkdir()
        write(reread, tmp_path / "again", layout, deep.ends)
        for name in ("model.safetensors", "config.json"):
            assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()


def test_a_draft_vocabulary_is_ours_alone(tmp_path: Path, deep: Target) -> None:
    drafter = eagle(deep.ends, DRAFT_IDS)
    for layout in ("own", "engines"):
        (tmp_path / layout).mkdir()
    write(drafter, tmp_path / "own", "draftsmith")
    assert load_any(tmp_path / "own", deep.ends).draft_ids().tolist() == DRAFT_IDS
    [note] = write(drafter, tmp_path / "engines", "eagle", deep.ends)
    assert "draft vocabulary of 6 tokens could not come along" in note
    assert set(load_file(tmp_path / "engines" / "model.safetensors")) == set(NAMES)
    served = our_logits(deep, load_any(tmp_path / "engines", deep.ends), 3)
    torch.testing.assert_close(served[..., DRAFT_IDS], our_logits(deep, drafter, 3), rtol=1e-4, atol=1e-4)


def test_an_embedding_that_is_more_than_a_table_comes_along(tmp_path: Path) -> None:
    gemma = random_target("gemma2")
    drafter = Eagle.for_target(gemma.ends).eval()
    [note] = write(drafter, tmp_path, "eagle", gemma.ends)
    assert "SGLang takes the target's bare matrix instead" in note
    written = load_file(tmp_path / "model.safetensors")["embed_tokens.weight"]
    assert torch.equal(written, gemma.ends.embed(torch.arange(61)))
    assert not torch.equal(written, gemma.ends.embedding.weight)
    load_any(tmp_path, gemma.ends)


def test_a_trained_bias_is_read_kept_and_refused_where_an_engine_would_drop_it(tmp_path: Path, deep: Target) -> None:
    biased = with_bias(eagle(deep.ends))
    source = official(tmp_path / "official", deep.ends, tensors_of(biased))
    imported = load_any(source, deep.ends)
    assert imported.config.bias
    assert torch.equal(probe_logits(imported), probe_logits(biased))
    assert not torch.equal(probe_logits(imported), probe_logits(eagle(deep.ends)))
    torch.testing.assert_close(our_logits(deep, imported)[0], logits_of_files(source, deep), rtol=1e-4, atol=1e-4)
    (tmp_path / "own").mkdir()
    write(imported, tmp_path / "own", "draftsmith")
    again = load_any(tmp_path / "own", deep.ends)
    assert torch.equal(again.fc.bias, torch.linspace(-1, 1, 32))
    with pytest.raises(ValueError, match=r"fc.bias of this drafter is not zero, and vLLM drops it in silence"):
        write(imported, tmp_path, "eagle", deep.ends)


def test_a_bias_of_zeros_is_none(tmp_path: Path, deep: Target) -> None:
    drafter = eagle(deep.ends)
    imported = load_any(official(tmp_path, deep.ends, tensors_of(drafter) | {"fc.bias": torch.zeros(32)}), deep.ends)
    assert not imported.config.bias
    assert tensors_of(imported).keys() == tensors_of(drafter).keys()


def test_tensors_of_several_dtypes_are_read_without_loss(tmp_path: Path, deep: Target) -> None:
    tensors = {name: tensor.half() for name, tensor in tensors_of(eagle(deep.ends)).items()}
    tensors["fc.weight"] = tensors["fc.weight"].bfloat16()
    imported = tensors_of(load_any(official(tmp_path, deep.ends, tensors), deep.ends))
    assert all(torch.equal(imported[name], tensor.float()) for name, tensor in tensors.items())


def test_what_old_transformers_left_in_official_folders_is_passed_over(tmp_path: Path, deep: Target) -> None:
    tensors = tensors_of(eagle(deep.ends)) | {"layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    load_any(official(tmp_path, deep.ends, tensors), deep.ends)


def test_an_official_folder_is_bound_to_the_target_that_its_embedding_is_of(
    tmp_path: Path, deep: Target, other_deep: Target
) -> None:
    source = official(tmp_path, deep.ends, tensors_of(eagle(deep.ends)))
    with pytest.raises(ValueError, match=r"embed_tokens.weight differs from the embedding of 'other' in 64 of 64 rows"):
        load_any(source, other_deep.ends)
    with pytest.raises(ValueError, match="the common EAGLE-1 layout, which names no target; say which one"):
        load_any(source)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("fc.weight"), r"lacks fc.weight and holds the tensors fc.bias.*in draftsmith.s layout or in"),
        (
            lambda t: t.pop("layers.0.mlp.up_proj.weight"),
            r"layers.0.mlp.up_proj.weight is missing \(float \[48, 32\]\)",
        ),
        (lambda t: t.update({"lm_head.weight": torch.zeros(64, 32)}), "lm_head.weight is unknown"),
        (lambda t: t.update({"layers.0.input_layernorm.weight": torch.ones(32)}), "input_layernorm.weight is unknown"),
        (lambda t: t.update({"layers.1.mlp.up_proj.weight": torch.ones(1)}), "layers.1.mlp.up_proj.weight is unknown"),
        (
            lambda t: t.update({"fc.weight": torch.ones(64, 32)}),
            r"fc.weight is float32 \[64, 32\], not float \[32, 64\]",
        ),
        (lambda t: t.update({"fc.bias": torch.ones(32, 1)}), r"fc.bias is float32 \[32, 1\], not float \[32\]"),
        (lambda t: t["fc.bias"].fill_(float("nan")), "fc.bias holds NaN or infinity"),
    ],
)
def test_an_engine_folder_that_breaks_the_table_is_refused(tmp_path: Path, deep: Target, change, message: str) -> None:
    write(eagle(deep.ends), tmp_path, "eagle", deep.ends)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        load_any(tmp_path, deep.ends)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bias": True}, "config says bias true, but fc.bias is missing"),
        ({"attention_bias": True}, "asks for attention_bias True"),
        ({"num_hidden_layers": 2}, "asks for num_hidden_layers 2"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"num_key_value_heads": 4}, r"k_proj.weight is float32 \[32, 32\], not float \[64, 32\]"),
    ],
)
def test_an_official_config_that_means_another_head_is_refused(
    tmp_path: Path, deep: Target, changes: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load_any(official(tmp_path, deep.ends, tensors_of(eagle(deep.ends)), **changes), deep.ends)


@pytest.mark.parametrize(
    ("name", "layout"), [("fc.weight", "draftsmith"), ("layers.0.mlp.up_proj.weight", "eagle"), ("fc.bias", "eagle")]
)
def test_a_disk_that_changes_a_byte_is_noticed(
    tmp_path: Path, deep: Target, monkeypatch: pytest.MonkeyPatch, name: str, layout
) -> None:
    def changing(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        tensors[name] = tensors[name].clone()
        tensors[name].view(-1)[0] += 1e-3
        save_file(tensors, path, metadata)

    monkeypatch.setattr("draftsmith.models.files.checkpoint_files.save_file", changing)
    with pytest.raises(ValueError, match=rf"read back, .*{name}.* differ from what was written; check the disk"):
        write(eagle(deep.ends), tmp_path, layout, deep.ends)


def test_logits_that_differ_over_equal_tensors_are_noticed(tmp_path: Path, deep: Target) -> None:
    drafter = eagle(deep.ends)
    other = assemble(
        Eagle, EagleConfig.from_dict(drafter.config.to_dict() | {"rms_norm_eps": 0.5}), tensors_of(drafter)
    )
    refuse_difference(drafter, drafter, tmp_path)
    with pytest.raises(ValueError, match="read back, the logits differ"):
        refuse_difference(drafter, other, tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickles_are_refused_with_the_way_to_convert_them(tmp_path: Path, deep: Target, name: str) -> None:
    source = official(tmp_path, deep.ends, tensors_of(eagle(deep.ends)))
    (source / "model.safetensors").rename(source / name)
    with pytest.raises(ValueError, match=rf"{name} but no model.safetensors.*weights_only=True"):
        load_any(source, deep.ends)

"""A folder that is opened runs none of its code unasked, and gives a whole model or an error that names the tensors."""

from __future__ import annotations

import builtins
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from doubles import family_configs, random_model
from safetensors.torch import load_file, save_file
from tiny import save_target
from torch import Tensor

from draftsmith.models import Target, TargetEnds
from draftsmith.models.drafters.drafter_folder import load_drafter
from draftsmith.models.files.loading import load_tokenizer
from draftsmith.models.files.pretrained import announce_reading, name_faults

Change = Callable[[dict[str, Tensor]], None]
HEAD, LAYER = "lm_head.weight", "model.layers.2.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    random_model(family_configs()["llama"]).save_pretrained(folder)
    return folder


@pytest.fixture
def changed(whole: Path, tmp_path: Path) -> Callable[[Change], str]:
    """The checkpoint with its tensors changed."""

    def change(how: Change) -> str:
        tensors = load_file(whole / "model.safetensors")
        how(tensors)
        save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
        (tmp_path / "config.json").write_bytes((whole / "config.json").read_bytes())
        return str(tmp_path)

    return change


FAULTS: dict[str, tuple[Change, str]] = {
    "head": (lambda tensors: tensors.pop(HEAD), r"missing keys: lm_head\.weight\)"),
    "layer": (lambda tensors: tensors.pop(LAYER), r"missing keys: model\.layers\.2\.mlp\.up_proj\.weight\)"),
    "norm": (lambda tensors: tensors.pop("model.norm.weight"), r"missing keys: model\.norm\.weight\)"),
    "extra": (
        lambda tensors: tensors.update({"model.layers.3.mlp.up_proj.weight": torch.zeros(2, 2)}),
        r"unexpected keys: model\.layers\.3\.mlp\.up_proj\.weight\)",
    ),
    "shape": (
        lambda tensors: tensors.update({LAYER: torch.zeros(40, 32)}),
        r"mismatched shapes: model\.layers\.2\.mlp\.up_proj\.weight\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_weights_that_do_not_fit_the_config_are_named_for_the_whole_target_and_for_its_ends(
    changed: Callable[[Change], str], fault: str
) -> None:
    change, message = FAULTS[fault]
    path = changed(change)
    with pytest.raises(ValueError, match=message):
        Target.load(path)
    with pytest.raises(ValueError, match=message):
        TargetEnds.load(path)
    with pytest.raises(ValueError, match=message):
        load_drafter(Path(path))  # the same folder as a draft LM


def test_what_a_family_is_known_to_have_beside_its_weights_is_let_pass(changed: Callable[[Change], str]) -> None:
    """Old Llama checkpoints hold each layer's rotary frequencies."""
    old = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.zeros(4) for layer in range(3)}
    path = changed(lambda tensors: tensors.update(old))
    assert Target.load(path).fingerprint == TargetEnds.load(path).fingerprint


def test_masks_that_old_releases_saved_with_a_family_are_let_pass(tmp_path: Path) -> None:
    """Checkpoints of GPT-J hold each layer's causal mask, which Transformers no longer lists."""
    sizes = {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4}
    transformers.AutoModelForCausalLM.from_config(transformers.GPTJConfig(**sizes)).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    masks = {
        f"transformer.h.{layer}.attn.{name}": torch.zeros(1) for layer in (0, 1) for name in ("bias", "masked_bias")
    }
    save_file(tensors | masks, tmp_path / "model.safetensors", {"format": "pt"})
    assert Target.load(str(tmp_path)).fingerprint == TargetEnds.load(str(tmp_path)).fingerprint


def test_a_tied_head_needs_no_tensor_of_its_own(tmp_path: Path) -> None:
    config = family_configs()["qwen3"]
    config.tie_word_embeddings = True
    random_model(config).save_pretrained(tmp_path)
    assert HEAD not in load_file(tmp_path / "model.safetensors")
    assert torch.equal(TargetEnds.load(str(tmp_path)).head_weight, Target.load(str(tmp_path)).ends.head_weight)


def test_many_names_are_shortened_and_counted() -> None:
    assert name_faults({"missing": list("abcde"), "unexpected": [], "other": ["f"]}) == (
        "missing: a, b, c, ... (5 in all); other: f"
    )


def test_weights_that_are_no_numbers_are_named_before_any_proof(changed: Callable[[Change], str]) -> None:
    path = changed(lambda tensors: tensors[LAYER].fill_(float("nan")))
    with pytest.raises(ValueError, match=r"logits of its first tokens hold NaN or infinity \(float32\)"):
        Target.load(path)


def test_an_overflow_of_a_narrow_dtype_names_the_dtype(changed: Callable[[Change], str]) -> None:
    path = changed(lambda tensors: tensors[HEAD].mul_(1e5))
    Target.load(path)
    with pytest.raises(ValueError, match="float16 may be too narrow"):
        Target.load(path, dtype="float16")


def spoilt_config(**fields: object) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return spoil


ROPE = {"rope_theta": 10000.0, "factor": 2.0}
SPOILT: dict[str, Callable[[Path], object]] = {
    "half of the weights": lambda folder: os.truncate(folder / "model.safetensors", 9000),
    "a config that is no JSON": lambda folder: (folder / "config.json").write_text("{"),
    "a generation config that is a list": lambda folder: (folder / "generation_config.json").write_text("[3]"),
    "no heads": spoilt_config(num_attention_heads=0),
    "a size in words": spoilt_config(num_hidden_layers="two"),
    "a negative size": spoilt_config(vocab_size=-3),
    "an unknown activation": spoilt_config(hidden_act="none such"),
    "a package that is not there": spoilt_config(quantization_config={"quant_method": "gptq", "bits": 4}),
    "an endless context": spoilt_config(rope_parameters=ROPE | {"rope_type": "linear", "factor": float("inf")}),
    "no context": spoilt_config(max_position_embeddings=0),
    "a soft-cap in words": spoilt_config(final_logit_softcapping="x"),
    "a kernel of the hub": spoilt_config(attn_implementation="some/kernel"),
    "an adapter beside the weights": lambda folder: (folder / "adapter_config.json").write_text("{}"),
}


@pytest.mark.parametrize("spoilt", SPOILT)
def test_a_folder_that_says_nonsense_is_one_error_for_the_target_and_for_its_ends(
    whole: Path, tmp_path: Path, spoilt: str
) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(whole, folder)
    SPOILT[spoilt](folder)
    for load in (Target.load, TargetEnds.load):
        with pytest.raises(ValueError, match=r"folder|config says"):
            load(str(folder))


CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

(Path(MARK)).touch()

class OwnConfig(LlamaConfig):
    model_type = "own_llama"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig

class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def with_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A target whose config and tokenizer are classes of its own folder, and a standard input that agrees to everything."""
    folder = save_target(tmp_path / "own")
    (folder / "own.py").write_text(f"MARK = {str(tmp_path / 'ran')!r}\n{CODE}", encoding="utf-8")
    fields = json.loads((folder / "config.json").read_text())
    fields |= {"model_type": "own_llama", "architectures": ["OwnModel"]}
    fields["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (folder / "config.json").write_text(json.dumps(fields))
    fields = json.loads((folder / "tokenizer_config.json").read_text())
    fields |= {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))
    monkeypatch.setattr(builtins, "input", lambda prompt="": "y")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    return folder


@pytest.mark.parametrize(
    "opening",
    [Target.load, TargetEnds.load, load_tokenizer, lambda path: load_drafter(Path(path))],
    ids=["target", "ends", "tokenizer", "drafter"],
)
def test_code_in_a_folder_runs_only_when_it_is_allowed(with_code: Path, opening: Callable[[str], object]) -> None:
    with pytest.raises(ValueError, match="--trust_remote_code true"):
        opening(str(with_code))
    assert not (with_code.parent / "ran").exists()


def test_allowed_code_makes_a_target_like_any_other(with_code: Path) -> None:
    target = Target.load(str(with_code), trust_remote_code=True)
    tokenizer = load_tokenizer(str(with_code), trust_remote_code=True)
    assert (with_code.parent / "ran").exists()
    assert [type(target.model).__name__, type(tokenizer).__name__] == ["OwnModel", "OwnTokenizer"]
    drafter = load_drafter(with_code, trust_remote_code=True)
    assert drafter.config.vocab_size == target.ends.vocab_size


def test_reading_many_bytes_of_weights_is_announced_and_few_are_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="draftsmith")
    for name in ("model-1.safetensors", "model-2.safetensors"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(2**31 - (name == "model-2.safetensors"))  # takes no room on the disk
    announce_reading(tmp_path)
    assert caplog.messages == []
    with (tmp_path / "model-3.safetensors").open("wb") as file:
        file.truncate(3 * 10**9)
    announce_reading(tmp_path)
    assert caplog.messages == [f"reading 7.3 GB of weights from {tmp_path}"]

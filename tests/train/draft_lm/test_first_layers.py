"""A target's own first layers as its draft LM: they compute what they computed in the whole model, train, are saved and draft."""

import json
from pathlib import Path

import pytest
import torch
from distilling import REPLY, distil_data, distil_module, fit, save_replies
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from draftsmith.decode.engine import Engine
from draftsmith.decode.sampling import GenerationSettings
from draftsmith.models.drafters.drafter_folder import load_drafter
from draftsmith.models.target.target import Target
from draftsmith.models.tree.limits import DraftLimits
from draftsmith.train.draft_lm.callbacks import KeepBestDraftLM
from draftsmith.train.draft_lm.first_layers import keep_first_layers
from draftsmith.train.drafter.starting_drafter import LoraSettings


def llama(target_dir: Path) -> PreTrainedModel:
    return LlamaForCausalLM.from_pretrained(target_dir).eval()


def windowed() -> PreTrainedModel:
    """Layers of two kinds, the kind of each in its config."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        use_sliding_window=True,
        sliding_window=3,
        max_window_layers=2,
        eos_token_id=[1, 2, 3, 4],
    )
    return Qwen3ForCausalLM(config).eval()


@torch.inference_mode()
def test_the_first_layers_give_what_the_whole_model_has_behind_them(target_dir: Path) -> None:
    for whole, num_layers in ((llama(target_dir), 1), (windowed(), 3)):
        ids = torch.arange(2, 12)[None]
        behind = whole(input_ids=ids, output_hidden_states=True).hidden_states[num_layers]
        wanted = whole.lm_head(whole.model.norm(behind))
        keep_first_layers(whole, num_layers, "m")
        assert torch.allclose(whole(input_ids=ids).logits, wanted, atol=1e-6)


def test_a_saved_folder_says_what_each_kept_layer_is(tmp_path: Path) -> None:
    lm = windowed()
    keep_first_layers(lm, 3, "m")
    lm.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["num_hidden_layers"] == 3
    assert config["layer_types"] == ["full_attention", "full_attention", "sliding_attention"]
    assert config["eos_token_id"] == [1, 2, 3, 4]
    read = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.arange(2, 12)[None]
    with torch.no_grad():
        assert torch.equal(read(input_ids=ids).logits, lm(input_ids=ids).logits)


@pytest.mark.parametrize("num_layers", [0, 5])
def test_a_number_of_layers_that_there_are_not_is_an_error(num_layers: int) -> None:
    with pytest.raises(ValueError, match=f"num_layers is {num_layers}, and m has 4 layers"):
        keep_first_layers(windowed(), num_layers, "m")


def test_a_model_whose_layers_are_elsewhere_is_an_error() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=8, n_layer=2, n_head=1))
    with pytest.raises(ValueError, match="no list of layers called `layers`"):
        keep_first_layers(model, 1, "m")


def test_a_model_whose_other_tensors_follow_the_number_of_layers_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = windowed()
    lm.model.register_buffer("of_each_layer", torch.zeros(4))
    with pytest.raises(ValueError, match=r"model\.of_each_layer depends on the number of layers"):
        keep_first_layers(lm, 2, "m")


def test_an_adapter_of_the_first_layers_is_an_error(target_dir: Path) -> None:
    with pytest.raises(ValueError, match="num_layers is 1, and an adapter needs a base"):
        distil_module(target_dir, target_dir, lora=LoraSettings(2), num_layers=1)


def test_a_targets_first_layer_is_distilled_towards_it_and_drafts(target_dir: Path, tmp_path: Path) -> None:
    replies = save_replies(tmp_path / "replies.jsonl", Target.load(str(target_dir)))
    module = distil_module(target_dir, target_dir, num_layers=1)
    fit(tmp_path, module, distil_data(replies, on_policy=0.5), callbacks=[KeepBestDraftLM()])
    kept = tmp_path / "draft_lm"
    assert json.loads((kept / "config.json").read_text())["num_hidden_layers"] == 1
    assert json.loads((kept / "provenance.json").read_text())["config"]["num_layers"] == 1
    target = Target.load(str(target_dir))
    settings = GenerationSettings(REPLY, eos_token_ids=target.eos_token_ids)
    prompts = [[5, 6, 7], [8, 9]]
    drafted = Engine(target, load_drafter(kept), DraftLimits(1, 3)).generate(prompts, settings)
    plain = Engine(target).generate(prompts, settings)
    assert [reply.token_ids for reply in drafted] == [reply.token_ids for reply in plain]

"""Families whose parts lie elsewhere or are missing: saved to disk, loaded whole and by their ends, and decoded as Transformers does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from doubles import PlannedDrafter

from draftsmith.decode.engine import Engine
from draftsmith.decode.sampling import GenerationSettings
from draftsmith.models import DraftLimits, Target, TargetEnds
from draftsmith.models.families.eagle import Eagle

V, NEW = 61, 12
SIZES = {
    "vocab_size": V,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 96,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TEXT = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2}
GRANITE = {
    "shared_intermediate_size": 48,
    "num_local_experts": 0,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_expand": 2,
}
OPT = {**SIZES, "ffn_dim": 48}
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
QWEN_VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "patch_size": 4,
    "out_hidden_size": 32,
}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}


def families() -> dict[str, Callable[[], transformers.PreTrainedConfig]]:
    t = transformers
    return {
        "olmo: a norm without weights": lambda: t.OlmoConfig(**TEXT),
        "nanochat: a norm without weights": lambda: t.NanoChatConfig(**TEXT),
        "granite-4 that only attends": lambda: t.GraniteMoeHybridConfig(
            **TEXT, **GRANITE, layer_types=["full_attention"] * 3
        ),
        "gemma-3n: lists of sizes": lambda: t.Gemma3nTextConfig(
            **(TEXT | {"intermediate_size": [32, 40, 48]}), head_dim=8, num_kv_shared_layers=1, laurel_rank=4, sliding_window=7,
            hidden_size_per_layer_input=8, vocab_size_per_layer_input=V, altup_num_inputs=2, activation_sparsity_pattern=[0.0] * 3,
            layer_types=["full_attention", "sliding_attention", "full_attention"],
        ),
        "opt": lambda: t.OPTConfig(**OPT, word_embed_proj_dim=32),
        "xglm: scaled embeddings": lambda: t.XGLMConfig(
            vocab_size=V, d_model=32, ffn_dim=48, num_layers=3, attention_heads=4, max_position_embeddings=96, scale_embedding=True,
            pad_token_id=0, bos_token_id=1, eos_token_id=2,
        ),
        "biogpt: scaled embeddings": lambda: t.BioGptConfig(**SIZES, intermediate_size=48, scale_embedding=True),
        "qwen2.5-vl": lambda: t.Qwen2_5_VLConfig(
            text_config={**TEXT, "rope_parameters": MROPE}, vision_config={**QWEN_VISION, "fullatt_block_indexes": [0]}
        ),
        "qwen3-vl": lambda: t.Qwen3VLConfig(
            text_config={**TEXT, "head_dim": 8, "rope_parameters": MROPE},
            vision_config={**QWEN_VISION, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
        ),
        "gemma-3": lambda: t.Gemma3Config(
            text_config={**TEXT, "head_dim": 8, "sliding_window": 7, "query_pre_attn_scalar": 8},
            vision_config={**VISION, "num_hidden_layers": 1},
        ),
        "mistral-small": lambda: t.Mistral3Config(
            text_config={**TEXT, "model_type": "mistral", "head_dim": 8},
            vision_config={**VISION, "model_type": "pixtral", "num_hidden_layers": 1, "head_dim": 8},
        ),
    }  # fmt: skip


def saved(config: transformers.PreTrainedConfig, folder: Path) -> transformers.PreTrainedModel:
    """A random model whose choices vary, as it is on the disk."""
    torch.manual_seed(0)
    kinds = (transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText)
    model = next(kind for kind in kinds if type(config) in kind._model_mapping).from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0.0, 0.25) if parameter.ndim > 1 else parameter.add_(0.1 * ("bias" in name))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("family", families())
def test_a_saved_family_is_loaded_whole_and_by_its_ends_and_decoded_as_transformers_does(
    family: str, tmp_path: Path
) -> None:
    own = saved(families()[family](), tmp_path)
    target, ends = Target.load(str(tmp_path)), TargetEnds.load(str(tmp_path))
    prompts = [[1, 7, 9], [1, *range(5, 20)]]

    states = target.prefix(torch.tensor(prompts[1:]))
    assert torch.equal(ends.logits(ends.final_norm(states.pre_norm)), target.logits(states.normed))
    assert (ends.fingerprint, ends.dtype, ends.max_positions) == (target.fingerprint, torch.float32, 96)

    settings = GenerationSettings(max_new_tokens=NEW)
    expected = [
        own.generate(
            input_ids=torch.tensor([prompt]), do_sample=False, max_new_tokens=NEW, eos_token_id=None, pad_token_id=0
        )[0, len(prompt) :].tolist()
        for prompt in prompts
    ]
    limits = DraftLimits(beam_width=3, draft_length=4)
    for drafter in (None, PlannedDrafter(target, "half"), Eagle.for_target(ends)):
        replies = Engine(target, drafter, limits).generate(prompts, settings)
        assert [list(reply.token_ids) for reply in replies] == expected


def test_a_head_that_reads_less_than_the_states_is_refused_by_name(tmp_path: Path) -> None:
    """OPT-350m projects its states down to narrower embeddings."""
    saved(transformers.OPTConfig(**OPT, word_embed_proj_dim=16), tmp_path)
    for load in (Target.load, TargetEnds.load):
        with pytest.raises(
            ValueError, match="OPTForCausalLM is not supported: its head reads 16 numbers, its states have 32"
        ):
            load(str(tmp_path))


def test_a_granite_with_recurrent_layers_takes_chains_and_its_trees_are_refused_by_name(tmp_path: Path) -> None:
    config = transformers.GraniteMoeHybridConfig(
        **TEXT, **GRANITE, layer_types=["linear_attention", "full_attention", "full_attention"]
    )
    own = saved(config, tmp_path)
    target, prompt = Target.load(str(tmp_path)), [1, 7, 9]
    expected = own.generate(
        input_ids=torch.tensor([prompt]), do_sample=False, max_new_tokens=NEW, eos_token_id=None, pad_token_id=0
    )[0, len(prompt) :].tolist()
    drafter = Eagle.for_target(target.ends)
    [reply] = Engine(target, drafter, DraftLimits(draft_length=3)).generate(
        [prompt], GenerationSettings(max_new_tokens=NEW)
    )
    assert reply.token_ids == expected
    with pytest.raises(ValueError, match="keeps a recurrent state"):
        Engine(target, drafter, DraftLimits(beam_width=3, draft_length=4))

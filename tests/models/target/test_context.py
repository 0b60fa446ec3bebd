"""A model's context is the one that serving engines derive, everywhere, unless the user says otherwise."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from doubles import family_configs, random_model

from draftsmith.export.layouts.llama import llama_fields
from draftsmith.models import Target, TargetEnds
from draftsmith.models.families.eagle import Eagle
from draftsmith.models.target.context import context_of

_LLAMA = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 61}


def llama(length: int, **rope: object) -> transformers.PreTrainedConfig:
    return transformers.LlamaConfig(
        **_LLAMA, max_position_embeddings=length, rope_parameters={"rope_theta": 10000.0, **rope}
    )


EIGHT = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
CONTEXTS = {
    "plain": (llama(64, rope_type="default"), 64),
    "yarn beside the old length": (
        llama(64, rope_type="yarn", factor=4.0, original_max_position_embeddings=64),
        256,
    ),
    "yarn beside the new length": (
        llama(256, rope_type="yarn", factor=4.0, original_max_position_embeddings=64),
        256,
    ),
    "yarn without the old length": (llama(64, rope_type="yarn", factor=4.0), 256),
    "linear": (llama(64, rope_type="linear", factor=2.5), 160),
    "dynamic": (llama(64, rope_type="dynamic", factor=2.0), 128),
    "dynamic, counted": (llama(128, rope_type="dynamic", factor=2.0, original_max_position_embeddings=64), 128),
    "llama3": (llama(256, rope_type="llama3", factor=4.0, original_max_position_embeddings=64, **LLAMA3), 256),
    "longrope": (llama(256, rope_type="longrope", factor=4.0, original_max_position_embeddings=64, **EIGHT), 256),
    "gemma3": (
        transformers.Gemma3TextConfig(
            hidden_size=32,
            max_position_embeddings=256,
            rope_parameters={
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        ),
        256,
    ),
    "gpt2": (family_configs()["gpt2"], 96),
    "of a multimodal model its text part's": (
        transformers.Qwen2_5_VLConfig(text_config={"max_position_embeddings": 77}),
        77,
    ),
}


@pytest.mark.parametrize("case", CONTEXTS)
def test_the_context_is_the_one_that_serving_engines_derive(case: str) -> None:
    config, expected = CONTEXTS[case]
    assert context_of(config) == expected
    assert context_of(config, asked=40) == 40


def test_a_context_without_room_for_a_reply_is_refused() -> None:
    with pytest.raises(ValueError, match="context is 1"):
        context_of(llama(64), asked=1)


@pytest.fixture(scope="module")
def yarn(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder: Path = tmp_path_factory.mktemp("yarn")
    random_model(CONTEXTS["yarn beside the old length"][0]).save_pretrained(folder)
    return str(folder)


def test_target_ends_and_drafter_agree_on_the_context_and_on_the_users(yarn: str) -> None:
    whole, ends = Target.load(yarn), TargetEnds.load(yarn)
    assert whole.max_positions == ends.max_positions == Eagle.for_target(ends).config.max_position_embeddings == 256
    short = TargetEnds.load(yarn, context=100)
    assert Target.load(yarn, context=100).max_positions == short.max_positions == 100
    old_drafter = Eagle.for_target(ends).config
    old_drafter.max_position_embeddings = 64
    assert llama_fields(old_drafter, torch.float32, ends)["max_position_embeddings"] == 256
    assert llama_fields(old_drafter, torch.float32, short)["max_position_embeddings"] == 100


def test_no_context_reaches_past_learned_positions() -> None:
    model = random_model(family_configs()["gpt2"])
    assert Target(model, "tiny", "", context=96).max_positions == 96
    with pytest.raises(ValueError, match="context is 97, but the model has learned 96 positions"):
        Target(model, "tiny", "", context=97)

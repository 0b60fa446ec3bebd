"""The layer's sizes as a Llama's config: what Transformers reads there is what the drafter computes with."""

import pytest
import torch
from heads import ROPE, deep_config, eagle
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig

from draftsmith.export.layouts.llama import layer_settings, llama_fields, refuse_other_layers
from draftsmith.models import EagleConfig, Target
from draftsmith.models.families.eagle_config import rope_of

SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps")


def test_rotary_settings_are_written_in_the_legacy_form_alone() -> None:
    fields = llama_fields(EagleConfig(hidden_size=8, vocab_size=9, rope=dict(ROPE)), torch.bfloat16, None)
    assert fields["rope_theta"] == 50000.0
    assert fields["rope_scaling"] == {key: value for key, value in ROPE.items() if key != "rope_theta"}
    assert "rope_parameters" not in fields
    assert fields["torch_dtype"] == "bfloat16"
    plain = llama_fields(EagleConfig(hidden_size=8, vocab_size=9), torch.float32, None)
    assert (plain["rope_theta"], plain["rope_scaling"]) == (10000.0, None)


@pytest.mark.parametrize("rope", [ROPE, {"rope_type": "default", "rope_theta": 1e6}])
def test_transformers_reads_the_fields_as_the_drafters_own_layer(deep: Target, rope: dict) -> None:
    config = eagle(deep.ends).config
    config.rope = dict(rope)
    theirs = LlamaConfig.from_dict(llama_fields(config, torch.float32, deep.ends))
    assert rope_of(theirs) == rope
    for name in SIZES:
        assert getattr(theirs, name) == getattr(config.llama(), name) == getattr(deep.config, name), name
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, 2, 0)


@given(
    heads=st.integers(1, 64),
    head_dim=st.sampled_from([8, 64, 80, 128]),
    epsilon=st.floats(1e-8, 1e-3),
    theta=st.floats(1e3, 1e7),
    scaling=st.sampled_from([{}, {"rope_type": "linear", "factor": 2.0}, {"rope_type": "dynamic", "factor": 4.0}]),
)
def test_settings_go_there_and_back(heads: int, head_dim: int, epsilon: float, theta: float, scaling: dict) -> None:
    rope = {"rope_type": "default", **scaling, "rope_theta": theta}
    given_settings = {
        "hidden_size": 48,
        "vocab_size": 99,
        "intermediate_size": 7,
        "num_attention_heads": heads,
        "num_key_value_heads": 1,
        "head_dim": head_dim,
        "rms_norm_eps": epsilon,
        "max_position_embeddings": 17,
        "rope": rope,
    }
    fields = llama_fields(EagleConfig(**given_settings), torch.float32, None)
    assert layer_settings(fields, "here") == given_settings


def test_a_config_of_transformers_5_is_read_as_well() -> None:
    settings = layer_settings(deep_config().to_dict() | {"num_hidden_layers": 1}, "here")
    assert settings["rope"] == ROPE
    assert settings["head_dim"] == 16


def test_an_older_config_takes_llamas_defaults() -> None:
    old = {"hidden_size": 32, "vocab_size": 64, "intermediate_size": 48, "num_attention_heads": 4}
    settings = layer_settings(old | {"rope_scaling": {"type": "linear", "factor": 2.0}}, "here")
    assert (settings["num_key_value_heads"], settings["head_dim"], settings["rms_norm_eps"]) == (4, 8, 1e-6)
    assert settings["rope"] == {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}


def test_rotary_settings_that_contradict_each_other_are_refused() -> None:
    fields = {"hidden_size": 32, "vocab_size": 64, "intermediate_size": 48, "num_attention_heads": 4}
    linear = {"type": "linear", "factor": 2.0}
    same = {"rope_parameters": {"rope_type": "linear", "factor": 2, "rope_theta": 50000}, "rope_theta": 50000.0}
    assert layer_settings(fields | same | {"rope_scaling": linear}, "here")["rope"]["rope_theta"] == 50000.0
    for changes, message in (
        (
            {"rope_parameters": {"rope_theta": 10000.0}, "rope_theta": 50000.0},
            "rope_theta in rope_parameters and rope_theta",
        ),
        (
            {"rope_parameters": linear | {"factor": 4.0}, "rope_scaling": linear},
            "factor in rope_parameters and rope_scaling",
        ),
        (
            {"rope_parameters": {"rope_type": "default"}, "rope_scaling": linear},
            "rope_type in rope_parameters and rope_sc",
        ),
    ):
        with pytest.raises(ValueError, match=f"here has several values of {message}"):
            layer_settings(fields | changes, "here")


def test_missing_sizes_and_unknown_rotary_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="here lacks vocab_size, intermediate_size"):
        layer_settings({"hidden_size": 32, "num_attention_heads": 4}, "here")
    fields = {"hidden_size": 32, "vocab_size": 64, "intermediate_size": 48, "num_attention_heads": 4}
    with pytest.raises(ValueError, match="rotary settings that are not known here"):
        layer_settings(fields | {"rope_scaling": {"rope_type": "spiral", "factor": 2.0}}, "here")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 2}, "num_hidden_layers 2"),
        ({"attention_bias": True}, "attention_bias True"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"norm_before_residual": True}, "norm_before_residual True"),
        ({"eagle_config": {"norm_before_fc": True}}, "norm_before_fc True"),
        ({"fc_norm": True, "norm_output": True}, "fc_norm True, norm_output True"),
        ({"target_hidden_size": 64}, "target_hidden_size 64"),
        ({"layer_types": ["sliding_attention"]}, "layer_types with sliding attention"),
    ],
)
def test_settings_that_change_the_computation_are_refused(changes: dict, message: str) -> None:
    refuse_other_layers({"hidden_size": 32, "target_hidden_size": 32, "num_hidden_layers": 1}, "here")
    with pytest.raises(ValueError, match=f"here asks for {message}, which our draft layer does not do"):
        refuse_other_layers({"hidden_size": 32, **changes}, "here")

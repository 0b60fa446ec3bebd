"""A field that nobody reads is named, wherever it stands, unless it asks for nothing or is of no computation."""

import warnings

import pytest

from draftsmith.models.other_software.unread_fields import warn_of_unread


def test_fields_that_ask_for_something_are_named_with_their_values() -> None:
    fields = {
        "hidden_size": 32,
        "residual_multiplier": 0.3,
        "dflash_config": {"block_size": 4, "sinks": True},
        "quantization_config": {"quant_method": "fp8"},
    }
    with pytest.warns(UserWarning, match="which draftsmith does not read") as caught:
        warn_of_unread(fields, ("hidden_size", "block_size"), "here")
    assert len(caught) == 1
    message = str(caught[0].message)
    assert message.startswith(
        "here: config.json has residual_multiplier 0.3, dflash_config.sinks True, quantization_config {'quant_method': 'fp8'}, which "
    )


def test_what_asks_for_nothing_or_is_of_no_computation_is_not_named() -> None:
    fields = {
        "sinks": False,
        "scale": None,
        "layers": [],
        "rank": 0,
        "initializer_range": 0.02,
        "temperature": 0.6,  # of older Transformers, in every config
        "torch_dtype": "bfloat16",
        "num_lookback_tokens": 1,  # of Apple's decoder
        "transformers_version": "4.57.1",
        "transformer_layer_config": {"pretraining_tp": 1, "hidden_size": 32},
        "eagle_config": "none",
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_unread(fields, ("hidden_size", "eagle_config"), "here")

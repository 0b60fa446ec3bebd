"""The first layers of a causal LM as a smaller one, with its embedding, final norm and head: where a draft LM can start from.

Owns: which layers stay, and what of the config follows. Does not know: where the LM comes from, how it is trained.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from draftsmith.models.trunk.known_models import text_base


def keep_first_layers(lm: PreTrainedModel, num_layers: int, name: str) -> None:
    """Remove all layers of an LM but the first ones, in place. Its config then describes the smaller LM.

    Args:
        lm: as loaded.
        num_layers: how many layers stay.
        name: what the user calls the LM, for messages.

    Raises:
        ValueError: the LM has fewer layers, or keeps them where nothing is known of them.
    """
    base = text_base(lm)
    layers = getattr(base, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(
            f"{name} has no list of layers called `layers`, so none can be left out; set num_layers to null"
        )
    if not 1 <= num_layers <= len(layers):
        raise ValueError(
            f"num_layers is {num_layers}, and {name} has {len(layers)} layers; give a number from 1 to that"
        )
    _shorten_config(lm, num_layers, len(layers))
    base.layers = layers[:num_layers]
    _check_rebuilds(lm, num_layers, name)


def _shorten_config(lm: PreTrainedModel, num_layers: int, whole: int) -> None:
    """The number of layers, and every list that says something of each layer, such as `layer_types`."""
    config = lm.config.get_text_config()
    for key, value in vars(config).items():
        if "layer" in key and isinstance(value, list) and len(value) == whole:
            setattr(config, key, value[:num_layers])
    config.num_hidden_layers = num_layers


def _check_rebuilds(lm: PreTrainedModel, num_layers: int, name: str) -> None:
    """Compare the LM with a new one of its config, as whoever loads the saved folder builds it.

    Raises:
        ValueError: names or shapes of tensors differ.
    """
    with torch.device("meta"):
        rebuilt = type(lm)(lm.config)
    own, wanted = ({key: value.shape for key, value in model.state_dict().items()} for model in (lm, rebuilt))
    different = sorted(key for key in own.keys() | wanted.keys() if own.get(key) != wanted.get(key))
    if different:
        raise ValueError(
            f"the first {num_layers} layers of {name} are no model of its kind: {different[0]} depends on the number of layers; "
            "set num_layers to null"
        )

"""Which of the target's layers an EAGLE-3 drafter reads, as each engine counts them.

Owns every shift between our names and their numbers. Let k count outputs of decoder blocks, so that k = 0 is the embedding and k is
both the output of 0-based block k - 1 and the input of block k:

    our name               k     vLLM, speculators    SGLang, TensorRT-LLM (the block's own index, k - 1)
    layer.0.output         1     1                    0
    layer.9.output         10    10                   9
    last.pre_norm, L = 12  12    12                   11

Knows no tensor and no layout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from draftsmith.models.families.eagle_config import block_outputs
from draftsmith.models.files.field_rules import Rule, check_fields, is_whole
from draftsmith.models.target.target import PRE_NORM

KEY = "eagle_aux_hidden_state_layer_ids"
_IDS: Rule = (
    lambda value: isinstance(value, list) and all(is_whole(number, 0) for number in value),
    "a list of whole numbers",
)
_REMEDY = "correct it by hand"


def block_counts(layers: Sequence[str], num_layers: int | None) -> list[int]:
    """Our names -> k, as vLLM and speculators have them. ``num_layers`` is L, None where no target is at hand.

    Raises:
        ValueError: the last block is named and L is unknown, or the order is not from low to high, into which engines would sort them.
    """
    if PRE_NORM in layers and num_layers is None:
        raise ValueError(f"this drafter reads {PRE_NORM!r}, whose number is known with its target only; add --target")
    counts = [num_layers or 0 if name == PRE_NORM else int(name.split(".")[1]) + 1 for name in layers]
    if any(after <= before for before, after in pairwise(counts)):
        raise ValueError(
            f"layers {', '.join(layers)} are not from low to high, as engines read them; train it in order"
        )
    return counts


def layer_names(counts: Sequence[int], num_layers: int | None, where: str) -> list[str]:
    """k -> our names. ``num_layers`` is L; None takes no k for the last.

    Raises:
        ValueError: a layer that the target has not, the embedding, or an order that is not from low to high.
    """
    if not counts or min(counts) < 1 or (num_layers is not None and max(counts) > num_layers):
        raise ValueError(f"{where} reads outputs {list(counts)} of blocks counted from 1; the target has {num_layers}")
    if any(after <= before for before, after in pairwise(counts)):
        raise ValueError(
            f"{where} reads outputs {list(counts)}, which are not from low to high; engines disagree there"
        )
    return list(block_outputs((count - 1 for count in counts), num_layers))


def default_counts(num_layers: int) -> list[int]:
    """What every engine captures where the config names no layers; not from low to high for a target of fewer than seven layers."""
    return [2, num_layers // 2, num_layers - 3]


def id_fields(counts: Sequence[int], num_layers: int | None) -> dict[str, Any]:
    """The config's fields that say which layers, in both conventions; none where every engine's default says the same."""
    if num_layers is not None and list(counts) == default_counts(num_layers):
        return {}
    return {
        KEY: list(counts),
        "eagle_config": {"use_aux_hidden_state": True, KEY: [count - 1 for count in counts]},
    }


def read_counts(fields: Mapping[str, Any], num_layers: int | None, where: str) -> list[int]:
    """k from a config in either convention, or in none, which means the default for the target's L.

    Raises:
        ValueError: a list that is not of numbers, the two conventions name different layers, or neither names any and the default has no
            sense for this target.
    """
    places = (fields, fields.get("eagle_config") or {})
    for place in places:
        check_fields({name: value for name, value in place.items() if value is not None}, {KEY: _IDS}, where, _REMEDY)
    top, nested = (place.get(KEY) or None for place in places)  # trainers write [] for the default
    if top is not None and nested is not None and [count - 1 for count in top] != list(nested):
        raise ValueError(
            f"{where} names layers {list(top)} for vLLM and {list(nested)} for SGLang, which are not one less each; correct one"
        )
    if top is not None:
        return list(top)
    if nested is not None:
        return [count + 1 for count in nested]
    if num_layers is None:
        raise ValueError(f"{where} names no layers, and the default depends on the target; add --target")
    counts = default_counts(num_layers)
    if not 0 < counts[0] < counts[1] < counts[2]:
        raise ValueError(
            f"{where} names no layers, and the default {counts} has no sense for a target of {num_layers}; add {KEY} to it, "
            "counting outputs of blocks from 1"
        )
    return counts

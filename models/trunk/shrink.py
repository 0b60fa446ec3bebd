"""A tiny copy of a config, for a model of the same kind that takes milliseconds: few channels, a layer of each kind, short lengths.

Owns which numbers of a config are sizes and which are lengths of text, and what they become. Knows nothing of what the tiny model is for.
"""

from __future__ import annotations

import re
from typing import Any

from transformers import PreTrainedConfig

SHORT, ORIGINAL, CONTEXT = 7, 16, 64
"""What windows and the like, original contexts and contexts become where they are longer."""

_LENGTHS = {
    CONTEXT: r"max_position_embeddings|n_positions|n_ctx|max_seq_len|model_max_length|context_length",
    ORIGINAL: r"original_max_position_embeddings|floor_scale|log_scaling_n_floor",
    SHORT: r".*window(_size|_len)?|.*chunk_(size|length)|.*block_size|index_topk|local_attention|mem_len|rel_extent",
}
_LARGE = 96
"""Channels above which sizes are shrunk, too; a model below is tiny as it is."""
_HEADS, _HEAD = 4, 16
_SIZES = {
    _HEADS * _HEAD: r"hidden_size|word_embed_proj_dim|vocab_size.*|.*_vocab_size",
    32: r".*intermediate_size.*|n_inner|dff|.*ffn_(dim|hidden_size)|.*hidden_size_.*|.*_rank",
    _HEAD: r".*head_dim|query_pre_attn_scalar|kv_channels",
    _HEAD // 2: r"qk_(rope|nope)_head_dim|rotary_dim",
    _HEADS: r"(swa_)?num_attention_heads|(num|n)_.*experts|num_.*_experts|moe_num_experts",
    2: r".*_per_tok(en)?|moe_top_?k|num_selected_experts|index_n_heads|(attn|expert)_layer_period",
    1: r"n_group|topk_group|first_k_dense_replace|(attn|expert)_layer_offset",
    0: r"pad_token_id",
}
_KEY_VALUE_HEADS = r"(swa_|global_)?num_(swa_|global_)?(key_value|kv)_heads|num_query_groups"
# Of the checkpoint, not of the model: a tiny copy is whole and not quantized. Indices of layers say what layer_types says, too.
_LEFT_OUT = ("architectures", "dtype", "full_attn_idxs", "model_type", "quantization_config", "transformers_version")


def shrunk(config: PreTrainedConfig) -> PreTrainedConfig:
    """Make a tiny copy of a config.

    Lengths that are short already stay as they are, and so do the sizes of a model that is tiny already.

    Args:
        config: a text config.

    Returns:
        A config of the same class.
    """
    names = {own: common for common, own in config.attribute_map.items()}
    values = {names.get(name, name): value for name, value in config.to_dict().items() if name not in _LEFT_OUT}
    values["num_hidden_layers"] = config.num_hidden_layers  # which some compute from their lists
    if values["hidden_size"] > _LARGE:
        values = _with_sizes(_with_layers(values))
    values = _marked(values, _LENGTHS)
    # Shorter ones grow, too: learned positions end with their table.
    values |= {name: CONTEXT for name, value in values.items() if _is_context(name, value)}
    if "'dynamic'" in str(values.get("rope_parameters")):  # whose original context is the context itself
        values["max_position_embeddings"] = min(values["max_position_embeddings"], ORIGINAL)
    # By the config's own names: some compute further fields from these.
    return type(config)(**{config.attribute_map.get(name, name): value for name, value in values.items()})


def _is_context(name: str, value: Any) -> bool:
    return isinstance(value, int) and re.fullmatch(_LENGTHS[CONTEXT], name) is not None


def _marked(value: Any, marks: dict[int, str], name: str = "") -> Any:
    """Numbers by these names, at any depth, become the mark that they are above."""
    if isinstance(value, dict):
        return {key: _marked(inner, marks, str(key)) for key, inner in value.items()}
    if isinstance(value, list):
        return [_marked(inner, marks, name) for inner in value]
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    # The last pattern that fits: some are special cases of those before.
    sizes = [mark for mark, names in marks.items() if re.fullmatch(names, name)]
    return min(value, sizes[-1]) if sizes else value


def _with_layers(values: dict[str, Any]) -> dict[str, Any]:
    """One layer of each kind, two at least, as lists by layer tell them apart."""
    count = values["num_hidden_layers"]
    lists = {name: value for name, value in values.items() if isinstance(value, list) and len(value) == count}
    by_layer = {int(layer): own for layer, own in (values.get("per_layer_config") or {}).items()}
    shared = values.get("num_kv_shared_layers") or 0
    kinds = [
        str((layer >= count - shared, by_layer.get(layer), *(value[layer] for value in lists.values())))
        for layer in range(count)
    ]
    kept = sorted({kinds.index(kind) for kind in kinds} | {0, min(1, count - 1)})
    small = values | {name: [value[layer] for layer in kept] for name, value in lists.items()}
    if by_layer:
        small["per_layer_config"] = {place: by_layer[layer] for place, layer in enumerate(kept) if layer in by_layer}
    if shared:
        small["num_kv_shared_layers"] = sum(layer >= count - shared for layer in kept)
    return small | {"num_hidden_layers": len(kept)}


def _with_sizes(values: dict[str, Any]) -> dict[str, Any]:
    """Few channels and heads: as many key/value heads as heads, one, or half as many, whichever the model is like."""
    heads = values.get("num_attention_heads") or 1
    head = values.get("head_dim") or values["hidden_size"] // heads
    rotary = values.get("qk_rope_head_dim")
    small = _marked(values, _SIZES)
    for name, groups in values.items():
        if re.fullmatch(_KEY_VALUE_HEADS, name) and isinstance(groups, int):
            small[name] = min(groups, _HEADS if groups == heads else _HEADS // 2)
    if small.get("mamba_n_heads"):  # of layers that need not be there, but must fit
        small |= {"mamba_n_heads": _HEADS, "mamba_d_head": small["mamba_expand"] * small["hidden_size"] // _HEADS}
    if rotary is not None and head == rotary:
        small["head_dim"] = small["qk_rope_head_dim"]
    return small | {"rope_parameters": _rotary(small.get("rope_parameters"), _HEAD / head)}


def _rotary(value: Any, ratio: float, name: str = "") -> Any:
    """Rope parameters whose lists by channel are as long, and whose sections are as wide, as fewer channels want them."""
    if isinstance(value, dict):
        return {key: _rotary(inner, ratio, key) for key, inner in value.items()}
    if not isinstance(value, list):
        return value
    if name == "mrope_section":
        return [max(1, round(section * ratio)) for section in value]
    return value[: max(1, round(len(value) * ratio))]

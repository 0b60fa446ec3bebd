"""A tiny copy of a config, for a model of the same kind that takes milliseconds: few channels, a layer of each kind, short lengths.

Owns which numbers of a config are sizes and which are lengths of text, and what they become. Knows nothing of what the tiny model is for.
"""

from __future__ import annotations

import copy
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
    _HEAD: r"(?!index_).*head_dim|query_pre_attn_scalar|index_head_dim",
    _HEAD // 2: r"qk_(rope|nope)_head_dim|rotary_dim",
    _HEADS: r"(swa_)?num_attention_heads|(num|n)_.*experts|num_.*_experts|moe_num_experts",
    2: r".*_per_tok(en)?|moe_top_?k|num_selected_experts|index_n_heads",
    1: r"n_group|topk_group|first_k_dense_replace",
    0: r"pad_token_id",
}


def shrunk(config: PreTrainedConfig) -> PreTrainedConfig:
    """The copy. Lengths that are short already stay as they are, and so do the sizes of a model that is tiny already."""
    tiny = copy.deepcopy(config)
    if config.hidden_size > _LARGE:
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        _shrink_layers(tiny)
        _shrink_heads(tiny)
        _shrink(tiny, _SIZES)
        tiny.rope_parameters = _rotary(getattr(tiny, "rope_parameters", None), _HEAD / head)
    _shrink(tiny, _LENGTHS)
    if "'dynamic'" in str(getattr(tiny, "rope_parameters", "")):  # whose original context is the context itself
        tiny.max_position_embeddings = min(tiny.max_position_embeddings, ORIGINAL)
    return tiny


def _shrink(config: PreTrainedConfig, marks: dict[int, str]) -> None:
    """Numbers by these names become the mark that they are above."""
    aliases = config.attribute_map
    for name in sorted({*config.to_dict(), *aliases} - set(aliases.values())):
        value = getattr(config, name, None)
        small = _marked(name, value, marks)
        if small != value:
            setattr(config, name, small)


def _marked(name: str, value: Any, marks: dict[int, str]) -> Any:
    if isinstance(value, dict):
        return {key: _marked(str(key), one, marks) for key, one in value.items()}
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    # The last pattern that fits: some are special cases of those before.
    found = [mark for mark, names in marks.items() if re.fullmatch(names, name)]
    return min(value, found[-1]) if found else value


def _shrink_layers(config: PreTrainedConfig) -> None:
    """One layer of each kind, two at least, as the config's lists by layer tell them apart."""
    count = config.num_hidden_layers
    lists = {name: value for name, value in config.to_dict().items() if isinstance(value, list) and len(value) == count}
    shared = getattr(config, "num_kv_shared_layers", None) or 0
    kinds = [(index >= count - shared, *(str(value[index]) for value in lists.values())) for index in range(count)]
    kept = sorted({kinds.index(kind) for kind in kinds} | {0, min(1, count - 1)})
    for name, value in lists.items():
        setattr(config, name, [value[index] for index in kept])
    if shared:
        config.num_kv_shared_layers = sum(index >= count - shared for index in kept)
    config.num_hidden_layers = len(kept)


def _shrink_heads(config: PreTrainedConfig) -> None:
    """As many key/value heads as heads, one, or half as many, whichever the model is like."""
    for prefix in ("", "swa_", "global_"):
        heads = getattr(config, f"{prefix}num_attention_heads", None) or config.num_attention_heads
        for name in (f"{prefix}num_key_value_heads", f"num_{prefix}key_value_heads", f"num_{prefix}kv_heads"):
            groups = getattr(config, name, None)
            if isinstance(groups, int):
                setattr(config, name, min(groups, _HEADS if groups == heads else _HEADS // 2))


def _rotary(value: Any, ratio: float) -> Any:
    """Rope parameters whose lists by channel are as long, and whose sections are as wide, as fewer channels want them."""
    if isinstance(value, dict):
        return {
            key: [max(1, round(part * ratio)) for part in one]
            if key == "mrope_section"
            else one[: max(1, round(len(one) * ratio))]
            if isinstance(one, list)
            else _rotary(one, ratio)
            for key, one in value.items()
        }
    return value

"""How many tokens a model reads, prompt and reply together: the only module that asks a config.

Owns the derivation, which is that of serving engines (vLLM's `max_model_len`), and the option that overrides it. Does not know who asks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from draftsmith.models.files.field_rules import is_number

_LENGTHS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "seq_length",
    "max_target_positions",
    "max_sequence_length",
    "max_seq_length",
    "seq_len",
)
_COUNTED = ("default", "llama3", "longrope", "su")
"""Rotary types with which the config's length is the whole context already."""
_TABLES = ("wpe", "embed_positions", "position_embeddings")


def context_of(config: PreTrainedConfig, asked: int | None = None) -> int | None:
    """The longest context of a model.

    Scaled rotary positions stretch it: YaRN to ``original_max_position_embeddings`` x ``factor``, linear and dynamic scaling to
    ``max_position_embeddings`` x ``factor``. Llama-3's and LongRoPE's scaling, and Gemma-3, have the stretched length in the config.

    Args:
        config: of a model; of a multimodal one, its text part counts.
        asked: what to say instead.

    Returns:
        Tokens of prompt and reply together; None where neither the config nor the caller names a length.

    Raises:
        ValueError: fewer than 2 tokens, which leave no room for a prompt and a reply; or a field that is no length.

    Example:
        ``max_position_embeddings`` 32768 and ``{"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}``: 131072.
    """
    if asked is not None:
        if asked < 2:
            raise ValueError(f"context is {asked}; it counts tokens of prompt and reply together: give at least 2")
        return asked
    config = config.get_text_config()
    named = {name: getattr(config, name, None) for name in ("model_max_length", *_LENGTHS)}
    lengths = {name: int(_number(length, name, 2)) for name, length in named.items() if length is not None}
    own = lengths.get("model_max_length") or min(lengths.values(), default=None)
    if own is None or "gemma3" in str(config.model_type):
        return own
    return max((_stretched(own, rope) for rope in _ropes(config)), default=own)


def refuse_past_table(base: nn.Module, context: int | None, name: str) -> None:
    """Check that a model with learned positions has as many of them as its context is long.

    Args:
        base: its decoder without the head.
        context: in tokens; None checks nothing.
        name: of the model, for the message.

    Raises:
        ValueError: it has fewer; the message has both numbers.
    """
    for table in (getattr(base, each, None) for each in _TABLES):
        if context is None or not isinstance(table, nn.Embedding):
            continue
        longest = table.num_embeddings - int(getattr(table, "offset", 0))
        if context > longest:
            raise ValueError(
                f"{name}: context is {context}, but the model has learned {longest} positions; give at most that"
            )


def _ropes(config: PreTrainedConfig) -> Iterator[Mapping[str, Any]]:
    """The rotary settings; of a model whose layers differ, those of each kind of layer."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    nested = [each for each in rope.values() if isinstance(each, Mapping)]
    yield from nested or [rope]


def _stretched(own: int, rope: Mapping[str, Any]) -> int:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind in _COUNTED:
        return own
    factor = float(_number(rope.get("factor") or 1.0, "factor", 0))
    original = rope.get("original_max_position_embeddings")
    if original is not None:
        original = _number(original, "original_max_position_embeddings", 1)
    if kind == "yarn":
        return int((original or own) * factor)
    # Where the config names the length before stretching and the one after it, the latter is counted already.
    return own if original is not None and int(original * factor) == own else int(own * factor)


def _number(value: Any, name: str, least: int) -> Any:
    if not is_number(value) or value < least:
        raise ValueError(
            f"the config says {name} = {value!r:.80}, which is no number of at least {least}; correct its config.json, or say how long "
            "texts may be with --context"
        )
    return value

"""Which model families can be targets: where they keep their parts, and which ones cannot be targets, with the reason.

Owns the names under which families keep blocks and final norm, and the reasons for a refusal. Knows nothing of how a model was
loaded or is run.
"""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

_FINAL_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "norm_f", "layer_norm", "embedding_norm")
_BLOCKS = ("layers", "h", "blocks")
_RECURRENT = {"linear_attention", "mamba", "recurrent", "conv", "hybrid"}


def text_base(model: PreTrainedModel) -> nn.Module:
    """Find the decoder without its head; of a multimodal model, the one that reads text.

    Args:
        model: whole.

    Returns:
        The decoder.
    """
    base = getattr(model.base_model, "language_model", model.base_model)
    has_blocks = any(isinstance(getattr(base, name, None), nn.Module) for name in _BLOCKS)
    return base if has_blocks else getattr(base, "decoder", base)


def final_norm(model: PreTrainedModel) -> nn.Module:
    """Find the norm between the last block and the head.

    Args:
        model: whole.

    Returns:
        The norm.

    Raises:
        ValueError: it is at none of the known names.
    """
    return _child(text_base(model), _FINAL_NORMS, "final norm")


def decoder_blocks(model: PreTrainedModel) -> list[nn.Module]:
    """Find the decoder blocks.

    Args:
        model: whole.

    Returns:
        The blocks in order.

    Raises:
        ValueError: they are at none of the known names.
    """
    return list(_child(text_base(model), _BLOCKS, "decoder blocks").children())


def keeps_state(model: PreTrainedModel) -> bool:
    """Tell whether layers of a model keep a recurrent state, by which they know the text before.

    Args:
        model: whole, or its decoder alone.

    Returns:
        True where some do.
    """
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    # A class of stateful models also has members all of whose layers attend (Granite-4).
    return bool(kinds & _RECURRENT) or (bool(getattr(model, "_is_stateful", False)) and not kinds)


def refuse_unsupported(model: PreTrainedModel, name: str) -> None:
    """Check that nothing is known by which a model cannot be decoded with drafts; the proof at loading tries the rest.

    Args:
        model: whole.
        name: for the message.

    Raises:
        ValueError: an encoder, chunked attention, positional bias in attention, or flash attention.
    """
    config, kind = model.config.get_text_config(), type(model).__name__
    kinds = set(getattr(config, "layer_types", None) or ())
    reasons = {
        "is an encoder-decoder": getattr(config, "is_encoder_decoder", False),
        "attends in chunks, which tree masks cannot follow": "chunked_attention" in kinds,
        "keeps the window of its local attention in mask buffers of its own, which follow neither trees nor rows of unequal length": (
            "local" in (getattr(config, "attention_layers", None) or ())
        ),
        "loses its text in transformers' own generation where it grows past original_max_position_embeddings": (
            config.model_type == "phi4_multimodal"
        ),
        "drops keys by scores of its own in texts longer than keep_window_size, which masks cannot follow": hasattr(
            config, "keep_window_size"
        ),
        "selects keys by an index of its own, which masks cannot follow": any(
            name.startswith(("index_topk", "indexer")) for name in config.to_dict()
        ),
        "adds a position bias to attention (ALiBi), which tree positions cannot express": getattr(
            config, "alibi", False
        )
        or config.model_type in ("bloom", "mpt"),
        "runs flash attention, which takes no tree mask; load it with sdpa or eager": "flash"
        in str(getattr(config, "_attn_implementation", "")),
    }
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(f"{name}: {kind} ({config.model_type}) is not supported as a target: it {reason}")


def _child(base: nn.Module, names: tuple[str, ...], what: str) -> nn.Module:
    for name in names:
        module = getattr(base, name, None)
        if isinstance(module, nn.Module):
            return module
    raise ValueError(f"{type(base).__name__} is not supported: its {what} is not at any of {', '.join(names)}")

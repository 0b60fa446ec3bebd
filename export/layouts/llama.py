"""What every layout of a drafter with decoder layers shares: the fields by which Llama's config, and Qwen3's, tell their sizes.

Owns the way between :class:`LayerConfig` and those fields, rotary settings in the legacy form (``rope_theta``, ``rope_scaling``), since
Transformers 4 reads no other; and what Qwen3's fields mean where some are left out. Knows no tensors and no folder.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config

from draftsmith.models.families.eagle3 import SWITCHES
from draftsmith.models.families.eagle_config import EagleConfig, LayerConfig
from draftsmith.models.files.field_rules import (
    COUNT,
    COUNT_OR_ZERO,
    FLAG,
    LIST,
    OBJECT,
    PARTS,
    POSITIVE,
    Rule,
    check_fields,
)
from draftsmith.models.target.ends import TargetEnds
from draftsmith.models.target.key_values import SLIDING

SIZES = ("hidden_size", "vocab_size", "intermediate_size", "num_attention_heads")
_RULES: dict[str, Rule] = {
    **{
        name: EagleConfig.rules[name]
        for name in (*SIZES, "num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings")
    },
    "draft_vocab_size": COUNT,
    "rope_theta": POSITIVE,
    "rope_parameters": OBJECT,
    "rope_scaling": OBJECT,
    "eagle_config": OBJECT,
    "num_hidden_layers": PARTS,
    "layer_types": LIST,
    "attention_bias": FLAG,
    **dict.fromkeys(SWITCHES, FLAG),
}
_WINDOW_RULES: dict[str, Rule] = {"sliding_window": COUNT, "use_sliding_window": FLAG}
_WHICH_SLIDE: dict[str, Rule] = {"max_window_layers": COUNT_OR_ZERO, "use_sliding_window": FLAG}
_QWEN3_DEFAULTS = (*SIZES[2:], "num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings")
# What our layer is. Another value means another computation, which loading the weights alone would hide.
_FIXED: dict[str, tuple[Any, ...]] = {
    "num_hidden_layers": (1,),
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    **dict.fromkeys((*SWITCHES, "use_aux_norm"), (False,)),
    "parallel_drafting": (False,),
    "partial_rotary_factor": (1.0,),
    "logit_scale": (1.0,),
}

LAYER_FIELDS = frozenset({*_RULES, *_WINDOW_RULES, *_WHICH_SLIDE, *_FIXED, "target_hidden_size"})
"""The fields that are read of a config with decoder layers, or that must have one value."""


def llama_fields(config: LayerConfig, dtype: torch.dtype, ends: TargetEnds | None) -> dict[str, Any]:
    """The layers as the fields of a Llama's ``config.json``. Token ids are the target's, as far as it is at hand.

    Raises:
        ValueError: the layer has a sliding window.
    """
    if isinstance(config, EagleConfig) and config.sliding_window is not None:
        raise ValueError(
            f"this drafter has sliding_window {config.sliding_window}, and draftsmith writes no engine's layout of an EAGLE head with a "
            "window; serve it from --layout draftsmith or custom_generate, or train one without a window"
        )
    rope = dict(config.rope)
    theta = float(rope.pop("rope_theta", 10000.0))
    return {
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": getattr(config, "num_draft_layers", 1),
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": _context(config, ends),
        "rope_theta": theta,
        "rope_scaling": None if rope.get("rope_type", "default") == "default" else dict(sorted(rope.items())),
        "attention_bias": bool(getattr(config, "attention_bias", False)),
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": str(dtype).removeprefix("torch."),
        **_special_tokens(ends),
    }


def _context(config: LayerConfig, ends: TargetEnds | None) -> int:
    """The target's context; the layer's own where no target is at hand, or where its rotary frequencies depend on that number."""
    known = None if ends is None or config.rope.get("rope_type") == "dynamic" else ends.max_positions
    return config.max_position_embeddings if known is None else known


def _special_tokens(ends: TargetEnds | None) -> dict[str, Any]:
    if ends is None:
        return dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    end_ids = ends.eos_token_ids
    return {
        "bos_token_id": getattr(ends.config, "bos_token_id", None),
        "eos_token_id": end_ids[0] if len(end_ids) == 1 else list(end_ids) or None,
        "pad_token_id": getattr(ends.config, "pad_token_id", None),
    }


def layer_settings(fields: Mapping[str, Any], where: str, understood: Collection[str] = ()) -> dict[str, Any]:
    """The keyword arguments of :class:`LayerConfig` that such fields stand for.

    Args:
        fields: of the config.
        where: for messages.
        understood: settings that the caller reads itself, so that they may have any value.

    Raises:
        ValueError: a size is missing, a field breaks its rule, or a setting asks for a computation that our layer does not do.
    """
    missing = [name for name in SIZES if fields.get(name) is None]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}; without them no tensor can be checked, add them by hand")
    given = {name: value for name, value in fields.items() if value is not None}
    check_fields(given, _RULES, where, "correct it by hand")
    nested = {name: value for name, value in given.get("eagle_config", {}).items() if value is not None}
    check_fields(nested, dict.fromkeys(SWITCHES, FLAG), f"{where}: eagle_config", "correct it by hand")
    refuse_other_layers(fields, where, understood)
    heads = int(fields["num_attention_heads"])
    return {
        "hidden_size": int(fields["hidden_size"]),
        "vocab_size": int(fields["vocab_size"]),
        "intermediate_size": int(fields["intermediate_size"]),
        "num_attention_heads": heads,
        "num_key_value_heads": int(fields.get("num_key_value_heads") or heads),
        "head_dim": int(fields.get("head_dim") or int(fields["hidden_size"]) // heads),
        "rms_norm_eps": float(fields.get("rms_norm_eps") or 1e-6),
        "max_position_embeddings": int(fields.get("max_position_embeddings") or 2048),
        "rope": _rope(fields, where),
    }


def refuse_other_layers(fields: Mapping[str, Any], where: str, understood: Collection[str] = ()) -> None:
    """Refuse settings under which the same tensors would mean something else.

    Raises:
        ValueError: naming each.
    """
    nested = fields.get("eagle_config") or {}
    given = [(name, place[name]) for place in (fields, nested) for name in _FIXED if place.get(name) is not None]
    faults = [f"{name} {value!r}" for name, value in given if name not in understood and value not in _FIXED[name]]
    width = fields.get("target_hidden_size")
    if width is not None and width != fields["hidden_size"]:
        faults.append(f"target_hidden_size {width!r}")
    known = ("full_attention", SLIDING) if "layer_types" in understood else ("full_attention",)
    others = dict.fromkeys(str(kind) for kind in fields.get("layer_types") or () if kind not in known)
    faults += [f"layer_types with {kind.replace('_', ' '):.40}" for kind in others]
    if faults:
        raise ValueError(
            f"{where} asks for {', '.join(faults)}, which our draft layer does not do; such a drafter cannot be read"
        )


def with_qwen3_defaults(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a Qwen3 without those that are null, and Qwen3's defaults where they leave a size out."""
    defaults = Qwen3Config()
    given = {name: value for name, value in fields.items() if value is not None}
    return {name: getattr(defaults, name) for name in _QWEN3_DEFAULTS} | given


def qwen3_kinds(fields: Mapping[str, Any], count: int, where: str) -> Sequence[Any]:
    """Kinds of the layers of a Qwen3, as ``layer_types`` names them; without it, Qwen3's rule says which layers slide.

    Args:
        fields: of the config.
        count: how many layers there are.
        where: for messages.

    Raises:
        ValueError: a field of the rule breaks its own rule.
    """
    kinds: Sequence[Any] | None = fields.get("layer_types")
    if kinds is not None:
        return kinds
    given = {name: fields[name] for name in _WHICH_SLIDE if fields.get(name) is not None}
    check_fields(given, _WHICH_SLIDE, where, "correct it by hand")
    first = given.get("max_window_layers", Qwen3Config().max_window_layers)
    slides = given.get("use_sliding_window", False) and fields.get("sliding_window") is not None
    return [SLIDING if slides and layer >= first else "" for layer in range(count)]


def sliding_layers(fields: Mapping[str, Any], kinds: Sequence[Any], where: str) -> tuple[int | None, list[int]]:
    """Which layers have a sliding window.

    Args:
        fields: of the config.
        kinds: of the layers, in order, as ``layer_types`` names them.
        where: for messages.

    Returns:
        The window, and the layers by number; None and no layers where none has one.

    Raises:
        ValueError: a layer has one, and the config gives no window or turns windows off.
    """
    layers = [layer for layer, kind in enumerate(kinds) if kind == SLIDING]
    if not layers:
        return None, []
    given = {name: fields[name] for name in _WINDOW_RULES if fields.get(name) is not None}
    check_fields(given, _WINDOW_RULES, where, "correct it by hand")
    window = given.get("sliding_window")
    if window is None or given.get("use_sliding_window") is False:
        raise ValueError(
            f"{where} has layer_types with sliding attention, sliding_window {window} and use_sliding_window "
            f"{given.get('use_sliding_window')}; give the window and set use_sliding_window true, or name full_attention"
        )
    return int(window), layers


def warn_of_idle_window(fields: Mapping[str, Any], where: str) -> None:
    """Warn of a window that a config has without ``layer_types``, where neither engines nor this reader take it.

    Args:
        fields: of the config.
        where: for messages.
    """
    window = fields.get("sliding_window")
    if window is not None and fields.get("use_sliding_window") is not False and not fields.get("layer_types"):
        warnings.warn(
            f"{where} has sliding_window {window!r:.80} and no layer_types, so it is read without a window, as engines read it; if it was "
            "trained with one, add layer_types with sliding_attention",
            stacklevel=2,
        )


def _rope(fields: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Either form, Transformers 5's ``rope_parameters`` or the legacy one, as one flat dictionary."""
    forms = {name: dict(fields[name]) for name in ("rope_parameters", "rope_scaling") if fields.get(name)}
    rope = dict(next(iter(forms.values()), {}))
    if fields.get("rope_theta") is not None:
        forms["rope_theta"] = {"rope_theta": fields["rope_theta"]}
    if differ := _differing(list(forms.values())):
        raise ValueError(
            f"{where} has several values of {', '.join(differ)} in {' and '.join(forms)}, between which software differs; correct one"
        )
    given = [kind for kind in (rope.pop("type", None), rope.pop("rope_type", None)) if kind is not None]
    if not given and "factor" in rope:
        raise ValueError(f"{where} has rotary settings with a factor and no rope_type ({rope}); add the type by hand")
    kind = given[-1] if given else "default"
    if kind not in ("default", *ROPE_INIT_FUNCTIONS) or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"{where} has rotary settings that are not known here ({rope | {'rope_type': kind}})")
    theta = rope.pop("rope_theta", None) or fields.get("rope_theta") or 10000.0
    settings = {**rope, "rope_type": kind, "rope_theta": theta}
    check_fields({"rope": settings}, {"rope": EagleConfig.rules["rope"]}, where, "correct it by hand")
    return settings | {"rope_theta": float(theta)}


def _differing(forms: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of rotary settings that have several values; ``type`` is an older name of ``rope_type``."""
    named = [{"rope_type" if name == "type" else name: value for name, value in form.items()} for form in forms]
    names = dict.fromkeys(name for form in named for name, value in form.items() if value is not None)
    given = {name: [form[name] for form in named if form.get(name) is not None] for name in names}
    return [name for name, values in given.items() if any(value != values[0] for value in values)]


def has_own_head(tensors: Iterable[str]) -> bool:
    """Whether names of tensors are those of an EAGLE-3, which has a norm and a head of its own; an EAGLE-1 has the target's."""
    return any(name.startswith(("norm.", "midlayer.")) for name in tensors)

"""The configs of drafters with decoder layers, and what of them follows the target.

Owns sizes, rotary settings and layer names: how a Llama layer is cut to a target of any family. Knows no weights and no runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from transformers import LlamaConfig

from draftsmith.models.drafters.drafter_config import DrafterConfig
from draftsmith.models.files.field_rules import COUNT, COUNT_OR_NULL, FLAG, NOT_NEGATIVE, Rule, is_number, is_whole
from draftsmith.models.target.target import PRE_NORM, TargetEnds

_ROPE_NUMBERS = (
    "rope_theta",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "short_factor",
    "long_factor",
)
_ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")


def _is_rope(value: Any) -> bool:
    """Whether these are rotary settings: a known type, numbers above 0, and further numbers, lists of numbers and flags."""
    if not isinstance(value, dict) or value.get("rope_type", "default") not in _ROPE_TYPES:
        return False
    if "factor" in value and "rope_type" not in value:
        return False
    settings = {name: setting for name, setting in value.items() if name != "rope_type"}
    return all(_is_rotary(name, setting) for name, setting in settings.items())


def _is_rotary(name: str, setting: Any) -> bool:
    """Whether a rotary setting other than the type may have a value: what angles are computed from is above 0, or null."""
    parts = setting if isinstance(setting, list) else [setting]
    if name in _ROPE_NUMBERS:
        return all(is_number(part) and part > 0 for part in parts) or (setting is None and name != "rope_theta")
    return all(part is None or isinstance(part, bool) or is_number(part) for part in parts)


class LayerConfig(DrafterConfig):
    """The sizes of a decoder layer, which follow the target's, and the common fields.

    Attributes:
        intermediate_size, num_attention_heads, num_key_value_heads, head_dim, rms_norm_eps, max_position_embeddings: as in Llama.
        rope: rotary settings in Transformers' form (``rope_type``, ``rope_theta`` and the type's own).
    """

    rules: ClassVar[Mapping[str, Rule]] = {
        **DrafterConfig.rules,
        "intermediate_size": COUNT,
        "num_attention_heads": COUNT,
        "num_key_value_heads": COUNT,
        "head_dim": (lambda value: is_whole(value, 2) and value % 2 == 0, "an even number of at least 2"),
        "rms_norm_eps": NOT_NEGATIVE,
        "max_position_embeddings": COUNT,
        "rope": (_is_rope, f"an object of rotary settings: rope_type {', '.join(_ROPE_TYPES)}, and numbers above 0"),
    }

    def __init__(
        self,
        intermediate_size: int = 0,
        num_attention_heads: int = 1,
        num_key_value_heads: int = 1,
        head_dim: int = 0,
        rms_norm_eps: float = 1e-6,
        max_position_embeddings: int = 2048,
        rope: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.intermediate_size = intermediate_size
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.rms_norm_eps = rms_norm_eps
        self.max_position_embeddings = max_position_embeddings
        self.rope = {"rope_type": "default", "rope_theta": 10000.0} if rope is None else rope

    def fault(self) -> str:
        """See :meth:`DrafterConfig.fault`."""
        if self.num_attention_heads % self.num_key_value_heads:
            return f"num_attention_heads {self.num_attention_heads}, which num_key_value_heads {self.num_key_value_heads} does not divide"
        return super().fault()

    def llama(self) -> LlamaConfig:
        """Describe the layer as a one-layer Llama.

        Returns:
            Its config.
        """
        return LlamaConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=1,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_key_value_heads,
            head_dim=self.head_dim,
            rms_norm_eps=float(self.rms_norm_eps),  # JSON's 1 is an int, which Transformers refuses
            max_position_embeddings=self.max_position_embeddings,
            rope_parameters=dict(self.rope),
        )


class EagleConfig(LayerConfig):
    """The decoder layer's sizes, and the common fields.

    Attributes:
        bias: whether EAGLE-1's ``fc`` has one, as the public heads of its authors do. Ours begin without: vLLM drops it in silence.
        sliding_window: the layer sees only so many of the last tokens, itself among them; None for all. No draft is deeper.
    """

    model_type = "draftsmith_eagle"
    rules: ClassVar[Mapping[str, Rule]] = {**LayerConfig.rules, "bias": FLAG, "sliding_window": COUNT_OR_NULL}

    def __init__(self, bias: bool = False, sliding_window: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.bias, self.sliding_window = bias, sliding_window


def check_window(sliding_window: int | None, num_steps: int, name: str = "num_steps") -> None:
    """Check that a sliding window holds a whole draft.

    Args:
        sliding_window: in tokens; None for no window.
        num_steps: of a draft.
        name: of that setting.

    Raises:
        ValueError: it is shorter.
    """
    if sliding_window is not None and sliding_window < num_steps:
        raise ValueError(
            f"sliding_window is {sliding_window} and {name} {num_steps}; a draft lies within the window, so draft at most "
            f"{sliding_window} tokens, or train with a window of at least {num_steps}"
        )


NO_LAYERS = "layers [], but it reads at least one of the target's"
"""The fault of a drafter over several layers that names none."""


def block_outputs(blocks: Iterable[int], num_layers: int | None) -> tuple[str, ...]:
    """Name the outputs of some of the target's blocks; the last one's is its state before the final norm.

    Example: blocks 1 and 7 of 8 -> ``layer.1.output``, ``last.pre_norm``.

    Args:
        blocks: counted from 0.
        num_layers: blocks of the target; None takes no block for the last.

    Returns:
        Their names, in the same order.
    """
    return tuple(PRE_NORM if block + 1 == num_layers else f"layer.{block}.output" for block in blocks)


def layer_fields(ends: TargetEnds) -> dict[str, Any]:
    """The config's fields that follow the target's, for a Llama layer whatever the target's family is.

    Args:
        ends: the target's.

    Returns:
        The fields by name.
    """
    target = ends.config
    heads = _size(target, "num_attention_heads")
    epsilons = (getattr(target, name, None) for name in ("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps"))
    return {
        "hidden_size": ends.hidden_size,
        "vocab_size": ends.vocab_size,
        "target_name": ends.name,
        "target_fingerprint": ends.fingerprint,
        "intermediate_size": _size(target, "intermediate_size", "ffn_dim") or 4 * ends.hidden_size,
        "num_attention_heads": heads,
        "num_key_value_heads": _size(target, "num_key_value_heads") or heads,
        "head_dim": _size(target, "head_dim") or ends.hidden_size // heads,
        "rms_norm_eps": float(next((epsilon for epsilon in epsilons if epsilon is not None), 1e-6)),
        "max_position_embeddings": ends.max_positions or 2048,
        "rope": rope_of(target),
    }


def layer_sizes(ends: TargetEnds) -> dict[str, Any]:
    """Those of :func:`layer_fields` that are a layer's alone, without the fields of every config.

    Args:
        ends: the target's.

    Returns:
        The fields by name.
    """
    return {name: value for name, value in layer_fields(ends).items() if name not in DrafterConfig.rules}


def _size(target: Any, *names: str) -> int:
    """The first of these fields that the config has, or 0. Where it differs by layer, the last layer's, which the drafter continues."""
    value = next((size for name in names if (size := getattr(target, name, None))), 0)
    return int(value[-1] if isinstance(value, list | tuple) else value)


def rope_of(target: Any) -> dict[str, Any]:
    """The target's rotary settings as one flat dictionary; those of full attention where layers differ, plain ones where it has none.

    Args:
        target: its config.

    Returns:
        ``rope_type``, ``rope_theta`` and the type's own numbers.
    """
    rope = getattr(target, "rope_parameters", None) or {}
    if rope and all(isinstance(of_layers, dict) for of_layers in rope.values()):
        rope = rope.get("full_attention") or next(iter(rope.values()))
    rope = {key: value for key, value in rope.items() if key != "partial_rotary_factor"}
    theta = float(rope.get("rope_theta") or getattr(target, "rope_theta", None) or 10000.0)
    if rope.get("rope_type", "default") not in _ROPE_TYPES or rope.get("mrope_section"):
        rope = {}
    return {"rope_type": "default", **rope, "rope_theta": theta}

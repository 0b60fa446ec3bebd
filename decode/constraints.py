"""What a model's maker forbids or demands in replies.

Owns which settings these are. Knows neither where they come from (:mod:`draftsmith.decode.model_settings`) nor what carries them out
(:mod:`draftsmith.decode.processors`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import WatermarkingConfig


@dataclass(frozen=True)
class Constraints:
    """Settings of Transformers' GenerationConfig, under its names; each default changes nothing."""

    sequence_bias: tuple[tuple[tuple[int, ...], float], ...] = ()
    encoder_repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    encoder_no_repeat_ngram_size: int = 0
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    min_length: int = 0
    min_new_tokens: int = 0
    forced_bos_token_id: int | None = None
    forced_eos_token_id: tuple[int, ...] = ()
    remove_invalid_values: bool = False
    exponential_decay_length_penalty: tuple[int, float] | None = None
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    top_h: float | None = None
    typical_p: float = 1.0
    epsilon_cutoff: float = 0.0
    eta_cutoff: float = 0.0
    watermarking_config: tuple[tuple[str, Any], ...] = ()

    def asked(self) -> dict[str, Any]:
        """The settings that are not at their defaults."""
        neutral = Constraints()
        return {name: value for name, value in vars(self).items() if value != getattr(neutral, name)}

    def in_transformers(self) -> dict[str, Any]:
        """The same as arguments of a GenerationConfig."""
        fields = {name: _as_lists(value) for name, value in self.asked().items()}
        if self.watermarking_config:
            fields["watermarking_config"] = WatermarkingConfig(**dict(self.watermarking_config))
        return fields


def _as_lists(value: Any) -> Any:
    """Tuples at any depth as lists, which Transformers checks for."""
    return [_as_lists(item) for item in value] if isinstance(value, tuple) else value

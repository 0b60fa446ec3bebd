"""Every field of a model's generation config: honoured, a flag's, without effect on the text, or refused by name.

Owns that division, so that no setting is dropped in silence. Knows neither commands nor how processors work
(:mod:`draftsmith.decode.processors`). Which tokens end a reply is read by :mod:`draftsmith.models.files.end_tokens`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import GenerationConfig, WatermarkingConfig

from draftsmith.decode.constraints import Constraints
from draftsmith.decode.processors import processors_of
from draftsmith.decode.sampling import GenerationSettings
from draftsmith.models.target.target import Target

_OF_FLAGS = "do_sample temperature top_k top_p min_p repetition_penalty max_new_tokens max_length eos_token_id"
_WITHOUT_EFFECT = """
use_cache cache_implementation cache_config max_cache_len compile_config disable_compile prefill_chunk_size low_memory
continuous_batching_config output_attentions output_hidden_states output_scores output_logits return_dict_in_generate
pad_token_id bos_token_id decoder_start_token_id transformers_version renormalize_logits
early_stopping length_penalty diversity_penalty num_beam_groups
is_assistant num_assistant_tokens num_assistant_tokens_schedule assistant_confidence_threshold assistant_early_exit
assistant_lookbehind target_lookbehind assistant_ensemble_weight prompt_lookup_num_tokens max_matching_ngram_size speculation_type
use_mtp
"""
# Values of a run, by flag; `data respond` and `label generate` take the model's own where no flag is given.
OF_FLAGS = frozenset(_OF_FLAGS.split())
# About caches, speed and outputs, tokens that end no reply, and details of beams and assistants that no other field asks for.
WITHOUT_EFFECT = frozenset(_WITHOUT_EFFECT.split())
# With the values, besides None, that ask for nothing.
REFUSED: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "guidance_scale": (1, 1.0),
    "penalty_alpha": (0, 0.0),
    "dola_layers": (),
    "token_healing": (False,),
    "constraints": (),
    "force_words_ids": (),
    "max_time": (),
}


def honouring(
    settings: GenerationSettings, config: GenerationConfig | None, source: str, tells_text: bool = False
) -> GenerationSettings:
    """The settings with what a generation config asks for beside the flags.

    Args:
        settings: of the flags, with the end tokens.
        config: the model's; None asks for nothing.
        source: of the config, for messages.
        tells_text: whether the engine has a tokenizer, which the config's stop strings need.

    Raises:
        ValueError: a field that decoding cannot honour, or a value that its processor does not take.
    """
    if config is None:
        return settings
    refuse(config, source, handled=("stop_strings",) if tells_text else ())
    constraints = constraints_of(config, source)
    stops = () if config.stop_strings is None else _strings(config.stop_strings)
    together = tuple(dict.fromkeys((*settings.stop_strings, *stops)))
    return replace(settings, constraints=constraints, stop_strings=together)


def for_target(settings: GenerationSettings, target: Target, tells_text: bool = False) -> GenerationSettings:
    """:func:`honouring` for a loaded target."""
    return honouring(settings, target.model.generation_config, target.name, tells_text)


def refuse(config: GenerationConfig, source: str, handled: Collection[str] = ()) -> None:
    """Name what decoding cannot honour; fields that Transformers does not have itself, and so never reads, are named in a warning.

    Args:
        config: read or prepared by Transformers.
        source: of the config.
        handled: refused fields that the caller honours itself.

    Raises:
        ValueError: one of these is asked for.
    """
    known = OF_FLAGS | WITHOUT_EFFECT | set(_READERS)
    refused = {**REFUSED, "stop_strings": ()}
    own = vars(GenerationConfig())
    given = {name: value for name, value in vars(config).items() if value is not None and not name.startswith("_")}
    for name, value in given.items():
        if name in known or name in handled or any(value == neutral for neutral in refused.get(name, ())):
            continue
        if name in own or name in refused:
            raise ValueError(
                f"the generation config of {source} sets {name} to {value!r}, which decoding here cannot honour; take it out of "
                "generation_config.json, or ignore that file with --generation_config none"
            )
        warnings.warn(
            f"the generation config of {source} has a field {name!r} that Transformers does not know; it has no effect",
            stacklevel=2,
        )


def constraints_of(config: GenerationConfig, source: str) -> Constraints | None:
    """The settings that processors honour, or None where none is asked for.

    Raises:
        ValueError: a value of a wrong type or out of range, with its field.
    """
    fields = {}
    for name, read in _READERS.items():
        value = getattr(config, name, None)
        if value is None:
            continue
        try:
            fields[name] = read(value)
            _try_out(Constraints(**{name: fields[name]}))
        except (TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"the generation config of {source} sets {name} to {value!r}, which is no value for it ({error}); correct it there, or "
                "ignore that file with --generation_config none"
            ) from error
    constraints = Constraints(**fields)
    return constraints if constraints.asked() else None


def _try_out(constraints: Constraints) -> None:
    """Lets the processors look at their values."""
    settings = GenerationSettings(temperature=1.0, eos_token_ids=(0,), constraints=constraints)
    processors_of(settings, [0], 1, vocab_size=1, device=torch.device("cpu"))


def _whole(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError("it takes a whole number from 0 on")
    return value


def _number(value: Any) -> float:
    if type(value) not in (int, float):
        raise ValueError("it takes a number")
    return float(value)


def _flag(value: Any) -> bool:
    if type(value) is not bool:
        raise ValueError("it takes true or false")
    return value


def _ids(value: Any) -> tuple[int, ...]:
    """One token id or several."""
    several = [value] if isinstance(value, int) else value
    if not isinstance(several, list | tuple):
        raise ValueError("it takes token ids")
    return tuple(_whole(token) for token in several)


def _words(value: Any) -> tuple[tuple[int, ...], ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(word, list | tuple) and word for word in value):
        raise ValueError("it takes a list of lists of token ids")
    return tuple(_ids(word) for word in value)


def _biases(value: Any) -> tuple[tuple[tuple[int, ...], float], ...]:
    pairs: Sequence[Any] = list(value.items()) if isinstance(value, dict) else value
    return tuple((_ids(ids), _number(bias)) for ids, bias in pairs)


def _decay(value: Any) -> tuple[int, float]:
    start, factor = value
    return _whole(start), _number(factor)


def _watermark(value: Any) -> tuple[tuple[str, Any], ...]:
    if not isinstance(value, WatermarkingConfig):
        raise ValueError("of the watermarks only the one of green lists goes by each text alone")
    return tuple(sorted(value.to_dict().items()))


def _strings(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


_READERS: dict[str, Callable[[Any], Any]] = {
    "sequence_bias": _biases,
    "encoder_repetition_penalty": _number,
    "no_repeat_ngram_size": _whole,
    "encoder_no_repeat_ngram_size": _whole,
    "bad_words_ids": _words,
    "min_length": _whole,
    "min_new_tokens": _whole,
    "forced_bos_token_id": _whole,
    "forced_eos_token_id": _ids,
    "remove_invalid_values": _flag,
    "exponential_decay_length_penalty": _decay,
    "suppress_tokens": _ids,
    "begin_suppress_tokens": _ids,
    "top_h": _number,
    "typical_p": _number,
    "epsilon_cutoff": _number,
    "eta_cutoff": _number,
    "watermarking_config": _watermark,
}

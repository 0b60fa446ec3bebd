"""What a call of ``model.generate`` asks for, as the engine takes it, and what it may not ask for.

Owns the translation of Transformers' arguments, configs, processors and criteria, and the refusal of those that decoding here cannot
keep. Shipped with :mod:`draftsmith.decode.hugging_face.hf_generate`, so it must do with torch and transformers. Knows no drafter.

Shape legend: B rows, T prompt tokens, padding included.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import (
    EosTokenCriteria,
    GenerationMode,
    MaxLengthCriteria,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from draftsmith.decode.model_settings import constraints_of
from draftsmith.decode.processors import OF_CONSTRAINTS
from draftsmith.decode.sampling import GenerationSettings

_REFUSED = (
    "assistant_model",
    "inputs_embeds",
    "logits_processor",
    "negative_prompt_attention_mask",
    "negative_prompt_ids",
    "position_ids",
    "prefix_allowed_tokens_fn",
    "synced_gpus",
)
# What Transformers prepares for the model's own forward, which is not called with it here.
_UNUSED = {"cache_position", "logits_to_keep", "past_key_values", "position_ids", "use_cache"}
# Fields of a generation config that ask for more than tokens.
_OUTPUTS = ("output_attentions", "output_hidden_states", "output_logits", "output_scores")


def refuse_arguments(arguments: Mapping[str, Any]) -> None:
    """Refuse arguments that decoding here would drop.

    Raises:
        ValueError: with their names.
    """
    given = [name for name in _REFUSED if _is_given(arguments.get(name))]
    # An empty cache counts: whoever gives one wants it filled.
    given += ["past_key_values"] if arguments.get("past_key_values") is not None else []
    if given:
        raise ValueError(
            f"{', '.join(given)}: not supported with this drafter; leave it out, or decode without custom_generate"
        )


def refuse_cache(config: GenerationConfig | None, arguments: Mapping[str, Any]) -> None:
    """Refuse a cache that changes tokens (quantised) or saves memory (offloaded): Transformers would make it, and nothing would use it.

    Raises:
        ValueError: with both settings.
    """
    kind = arguments.get("cache_implementation") or getattr(config, "cache_implementation", None) or ""
    settings = arguments.get("cache_config") or getattr(config, "cache_config", None)
    if settings is not None or "quantized" in kind or "offloaded" in kind:
        raise ValueError(
            f"cache_implementation is {kind!r} and cache_config {settings!r}, but this drafter keeps a cache of its own, whole and on the "
            "model's device; leave them out, or decode without custom_generate"
        )


def take_stop_strings(
    model: PreTrainedModel, config: GenerationConfig | None, arguments: dict[str, Any]
) -> tuple[GenerationConfig | None, StoppingCriteriaList]:
    """The config without stop strings, and the criteria with one for them; takes `stop_strings` and `tokenizer` out of the arguments.

    Transformers makes that criterion itself, but drops the tokenizer of a call with a decoding function of its own.

    Raises:
        ValueError: stop strings without a tokenizer.
    """
    tokenizer, strings = arguments.pop("tokenizer", None), arguments.pop("stop_strings", None)
    for asked in (config, model.generation_config):
        strings = strings or (None if asked is None else asked.stop_strings)
    criteria = StoppingCriteriaList(arguments.pop("stopping_criteria", None) or [])
    if strings and tokenizer is None:
        raise ValueError(f"stop_strings are {strings!r}, which need the text of tokens; add tokenizer=")
    if strings:
        criteria.append(StopStringCriteria(tokenizer, strings))
    if config is not None and config.stop_strings:
        config = copy.deepcopy(config)
        config.stop_strings = None
    return config, criteria


@contextmanager
def without_stop_strings(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the model's own settings have no stop strings: the criterion for them is there already."""
    stop_strings = None if model.generation_config is None else model.generation_config.stop_strings
    if not stop_strings:
        yield
        return
    model.generation_config.stop_strings = None
    try:
        yield
    finally:
        model.generation_config.stop_strings = stop_strings


def refuse_config(config: GenerationConfig, prepared: Mapping[str, Any]) -> None:
    """Refuse what Transformers prepared, but decoding here would drop.

    Raises:
        ValueError: beams and other modes, outputs besides token ids, or inputs of a model that reads more than text.
    """
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise ValueError(f"generation mode {mode.value!r} is not greedy_search or sample, which drafters work with")
    outputs = [name for name in _OUTPUTS if getattr(config, name, None)]
    if outputs:
        raise ValueError(f"{', '.join(outputs)}: only token ids are returned with this drafter; leave it out")
    unused = [name for name, value in prepared.items() if name not in {*_UNUSED, "attention_mask"} and _is_given(value)]
    if unused:
        raise ValueError(f"inputs {', '.join(unused)} are not supported with this drafter, which decodes text alone")


def _is_given(value: object) -> bool:
    return value is not None and value is not False and not (isinstance(value, Sized) and len(value) == 0)


def split_criteria(criteria: Iterable[StoppingCriteria]) -> tuple[list[StoppingCriteria], list[StoppingCriteria]]:
    """Those that the engine has itself (the length, the end-of-sequence tokens), and the others, which are asked for every token."""
    known: list[StoppingCriteria] = []
    others: list[StoppingCriteria] = []
    for criterion in criteria:
        (known if type(criterion) in (MaxLengthCriteria, EosTokenCriteria) else others).append(criterion)
    return known, others


def until_of(criteria: list[StoppingCriteria], input_ids: Tensor) -> Callable[[int, list[int]], bool]:
    """Whether any criterion ends a row with the last token of its reply; each sees [1, T + tokens so far] and no scores.

    No scores (None) is what Transformers hands on where nobody asks for them. A criterion may answer with one truth or a tensor.
    """

    def ends(row: int, reply: list[int]) -> bool:
        tokens = torch.tensor([reply], dtype=input_ids.dtype, device=input_ids.device)
        text = torch.cat([input_ids[row : row + 1], tokens], dim=1)
        return any(bool(torch.as_tensor(criterion(text, None)).any()) for criterion in criteria)

    return ends


def request_settings(
    config: GenerationConfig, processors: Iterable[object], criteria: Iterable[StoppingCriteria], prompt_length: int
) -> GenerationSettings:
    """What Transformers prepared, as the engine takes it.

    Args:
        config: of the call.
        processors: that Transformers made of it.
        criteria: those of length and end-of-sequence tokens.
        prompt_length: T.

    Raises:
        ValueError: a processor that the engine does not have.
    """
    fields: dict[str, Any] = {"temperature": 1.0 if config.do_sample else 0.0}
    for processor in processors:
        match processor:
            case RepetitionPenaltyLogitsProcessor():
                fields["repetition_penalty"] = processor.penalty
            case TemperatureLogitsWarper():
                fields["temperature"] = processor.temperature
            case TopKLogitsWarper():
                fields["top_k"] = processor.top_k
            case TopPLogitsWarper():
                fields["top_p"] = processor.top_p
            case MinPLogitsWarper():
                fields["min_p"] = processor.min_p
            case _ if isinstance(processor, OF_CONSTRAINTS):
                pass  # made anew for each row's own text
            case _:
                raise _not_supported(processor)
    for criterion in criteria:
        match criterion:
            case MaxLengthCriteria():
                fields["max_new_tokens"] = criterion.max_length - prompt_length
            case EosTokenCriteria():
                fields["eos_token_ids"] = tuple(criterion.eos_token_id.tolist())
    fields["constraints"] = constraints_of(_without_padding(config, prompt_length), "this call")
    if config.do_sample:
        fields["seed"] = int(torch.randint(2**62, ()))
    return GenerationSettings(**fields)


def _without_padding(config: GenerationConfig, prompt_length: int) -> GenerationConfig:
    """The config with its least length, which counts padding, as a least number of new tokens: padding is not read here."""
    padless = copy.deepcopy(config)
    padless.min_new_tokens = max(padless.min_new_tokens or 0, (padless.min_length or 0) - prompt_length)
    padless.min_length = None
    return padless


def _not_supported(part: object) -> ValueError:
    return ValueError(
        f"{type(part).__name__} is not supported with this drafter; leave its setting out, or decode without custom_generate"
    )

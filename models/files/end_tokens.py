"""Which tokens end a reply: the only module that reads `eos_token_id`.

Owns the order of the places that name them: the generation config, else the model's config, else the tokenizer. Every command that
masks, draws, counts or exports asks here. Does not know who asks.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from draftsmith.models.files.loading import holds_tokenizer, load_tokenizer
from draftsmith.models.files.model_folder import resolve_model
from draftsmith.models.files.pretrained import read_config, read_generation_config


def end_tokens(
    generation: GenerationConfig | None = None,
    config: PreTrainedConfig | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> tuple[int, ...]:
    """The ids of the first of the three that names any; empty where none does.

    Ids outside the config's vocabulary end nothing: they are dropped with a warning, and where none is left the next place counts.

    Args:
        generation: the model's generation config.
        config: the model's config.
        tokenizer: the model's.

    Returns:
        Token ids, each once.

    Raises:
        ValueError: a place names something other than an id or a list of ids.
    """
    text_config = None if config is None else config.get_text_config()
    vocab_size = getattr(text_config, "vocab_size", None)
    for place, source in (
        ("the generation config", generation),
        ("the model's config", config),
        ("the model's text config", text_config),
        ("the tokenizer", tokenizer),
    ):
        ids = _ids(getattr(source, "eos_token_id", None), place)
        known = tuple(token for token in ids if token >= 0 and (vocab_size is None or token < vocab_size))
        if len(known) < len(ids):
            strange = sorted(set(ids) - set(known))
            warnings.warn(
                f"{place} names the end tokens {strange}, which are outside the vocabulary of {vocab_size} tokens and end no reply; "
                "correct eos_token_id there",
                stacklevel=2,
            )
        if known:
            return known
    return ()


def read_end_tokens(
    target: str,
    revision: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    trust_remote_code: bool = False,
) -> tuple[int, ...]:
    """The end tokens of the model at a path or hub id; its weights are not loaded.

    Args:
        target: directory or hub id.
        revision: the hub's revision.
        tokenizer: the model's, where it is loaded already; else it is read, but only when no config names an end token.
        trust_remote_code: whether Python files that come with the model may run.

    Returns:
        Token ids, each once; empty where nothing names one.

    Raises:
        ValueError: as :func:`end_tokens`, and for a path without a model.
    """
    folder = resolve_model(target, revision)
    config = read_config(folder, trust_remote_code)
    ids = end_tokens(read_generation_config(folder), config)
    if ids:
        return ids
    if tokenizer is None and holds_tokenizer(folder):
        tokenizer = load_tokenizer(target, revision, trust_remote_code)
    return end_tokens(config=config, tokenizer=tokenizer)


def _ids(named: object, place: str) -> tuple[int, ...]:
    """One id, a list of ids or nothing, as a tuple without repetitions."""
    several = () if named is None else named if isinstance(named, Sequence) and not isinstance(named, str) else (named,)
    if not all(type(token) is int for token in several):
        raise ValueError(
            f"{place} has eos_token_id {named!r}; it is a token id or a list of token ids: correct it there"
        )
    return tuple(dict.fromkeys(several))

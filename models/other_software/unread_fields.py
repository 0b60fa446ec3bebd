"""Fields of a config that nobody here reads: a reader says so, since one of them may change what the drafter computes.

Owns which fields say nothing of a computation, whoever wrote them. What a layout reads is the business of its module.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig

from draftsmith.models.files.checkpoint_files import CONFIG
from draftsmith.models.other_software.named_kinds import NESTED

# What software writes of training, of texts and of itself, and older Transformers of every model. Apple's `num_lookback_tokens` is a
# setting of its decoder.
_OF_NO_COMPUTATION = frozenset(
    {
        *(
            "_attn_implementation",
            "attention_dropout",
            "attn_implementation",
            "auto_map",
            "bos_token_id",
            "eos_token_id",
        ),
        *("has_no_defaults_at_init", "initializer_range", "pad_token_id", "pretraining_tp", "tie_word_embeddings"),
        *("base_model_name_or_path", "speculators_config", "speculators_model_type", "speculators_version"),
        *("target_model_type", "torch_dtype", "use_cache"),
        *(
            "is_decoder",
            "num_lookback_tokens",
            "num_return_sequences",
            "prefix",
            "sep_token_id",
            "tokenizer_class",
            "use_return_dict",
        ),
    }
)


def warn_of_unread(fields: Mapping[str, Any], understood: Collection[str], where: str) -> None:
    """Warn of fields that ask for something and that nobody reads. Those that are null, false, zero or empty ask for nothing.

    Args:
        fields: of a config.
        understood: the names of fields that the reader knows, wherever they stand.
        where: what the warning calls the folder.
    """
    known = {*understood, *_OF_NO_COMPUTATION, *PreTrainedConfig().to_dict(), *GenerationConfig().to_dict()}
    unread = [(name, value) for name, value in _named(fields) if value and name.rpartition(".")[2] not in known]
    if unread:
        shown = ", ".join(f"{name} {value!r:.60}" for name, value in unread)
        warnings.warn(
            f"{where}: {CONFIG} has {shown}, which draftsmith does not read. If that changes what the drafter computes, it drafts worse "
            "here; replies stay the target's own",
            stacklevel=2,
        )


def _named(fields: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Fields with their values, those of the nested parts behind the part's name."""
    for name, value in fields.items():
        if name in NESTED and isinstance(value, dict):
            yield from ((f"{name}.{inner}", within) for inner, within in value.items())
        else:
            yield name, value

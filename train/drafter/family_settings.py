"""Which drafter a training run makes: the settings of every family by class name, and how a draft vocabulary is chosen.

The settings themselves are in each family's file. Here they answer to ``draftsmith.train.drafter.family_settings.NAME``, as YAML files name
them. Does not know: training.
"""

from __future__ import annotations

import torch
from torch import Tensor

from draftsmith.models.drafters.family import DrafterFamily
from draftsmith.models.drafters.registry import all_families

__all__ = ["DrafterFamily", "most_frequent", "settings_classes"]


def settings_classes() -> dict[str, type[DrafterFamily]]:
    """The settings class of every family by its name."""
    return {family.settings.__name__: family.settings for family in all_families()}


def __getattr__(name: str) -> type[DrafterFamily]:
    """Settings classes as names of this module."""
    if not name.endswith("Family") or name not in (known := settings_classes()):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return known[name]


def most_frequent(token_counts: Tensor, draft_vocab_size: int) -> Tensor:
    """The draft vocabulary: the most frequent tokens. Among equally frequent ones, the smaller ids.

    Args:
        token_counts: int64 [V], how often each token is labelled.
        draft_vocab_size: Vd.

    Returns:
        int64 [Vd], token ids, increasing.

    Raises:
        ValueError: draft_vocab_size is below 1, or not below V.
    """
    if not 1 <= draft_vocab_size < len(token_counts):
        raise ValueError(
            f"draft_vocab_size is {draft_vocab_size}; it must be at least 1 and below the target's vocabulary of "
            f"{len(token_counts)}, or null for the full vocabulary"
        )
    order = torch.sort(token_counts, descending=True, stable=True).indices
    return order[:draft_vocab_size].sort().values

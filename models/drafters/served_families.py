"""The class of a drafter by the ``model_type`` of its config.

A ``custom_generate`` folder has another module in place of this one, which knows the one family of its drafter and no registry.
"""

from __future__ import annotations

from draftsmith.models.drafters.drafter import Drafter
from draftsmith.models.drafters.registry import missing_families, registry


def drafter_class(model_type: str) -> type[Drafter]:
    """Look up the class of a family's drafters.

    Args:
        model_type: of a drafter's config.

    Returns:
        The class.

    Raises:
        ValueError: no family has this type.
    """
    family = registry().get(model_type)
    if family is None:
        raise ValueError(f"no drafter family has the model_type {model_type!r:.80}{missing_families()}")
    return family.drafter

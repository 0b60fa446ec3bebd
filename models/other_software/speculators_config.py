"""What the config of a ``speculators`` folder says beside the layer: the algorithm, the target, the length of a draft.

Owns these fields, in which only the right kind of value counts: somebody else wrote them. Knows no layer and no tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from draftsmith.models.files.field_rules import is_whole

SPECULATORS_KEY = "speculators_model_type"  # only configs of the speculators package have it


def algorithm_of(fields: Mapping[str, Any]) -> str:
    """What the package calls the kind of drafter.

    Args:
        fields: of the config.

    Returns:
        Its name there; empty where the config is not the package's, or holds something else there.
    """
    name = fields.get(SPECULATORS_KEY)
    return name if isinstance(name, str) else ""


def proposed_tokens(fields: Mapping[str, Any]) -> int | None:
    """The tokens that the package would draft in a chain.

    Args:
        fields: of the config.

    Returns:
        How many; None where the config does not say.
    """
    methods = _mapping(fields.get("speculators_config")).get("proposal_methods")
    first = _mapping(methods[0]) if isinstance(methods, list) and methods else {}
    proposed = first.get("speculative_tokens")
    return proposed if is_whole(proposed, 1) else None


def verifier_name(fields: Mapping[str, Any]) -> str:
    """The target that a config names.

    Args:
        fields: of the config.

    Returns:
        A hub id or somebody's path; empty where it names none.
    """
    name = _mapping(_mapping(fields.get("speculators_config")).get("verifier")).get("name_or_path")
    return name if isinstance(name, str) else ""


def _mapping(value: object) -> Mapping[str, Any]:
    """A part of a config, empty where it holds something else there."""
    return value if isinstance(value, dict) else {}

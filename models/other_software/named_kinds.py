"""Kinds of drafters by the config of their publishers: folders that look alike are told apart, and an error can name what nothing decodes.

Owns how each is recognised. Which of them a family reads is the business of its layouts. Knows no tensor.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from draftsmith.models.other_software.speculators_config import SPECULATORS_KEY


@dataclass(frozen=True)
class NamedKind:
    """A kind of drafter.

    Attributes:
        title: its name.
        architectures: classes that configs name.
        speculators: what the speculators package calls it.
        model_types: of configs.
        fields: of the config, one of which is enough.
        tensors: one of which is enough.
    """

    title: str
    architectures: tuple[str, ...] = ()
    speculators: tuple[str, ...] = ()
    model_types: tuple[str, ...] = ()
    fields: tuple[str, ...] = ()
    tensors: tuple[str, ...] = ()

    def is_in(self, fields: Mapping[str, Any], tensors: Collection[str]) -> bool:
        """Whether a folder holds this kind.

        Args:
            fields: of its config.
            tensors: the names of its tensors.

        Returns:
            True where one of the signs is there.
        """
        named = fields.get("architectures")
        return (
            (isinstance(named, list) and any(name in self.architectures for name in named))
            or fields.get(SPECULATORS_KEY) in self.speculators
            or fields.get("model_type") in self.model_types
            or any(name in fields for name in self.fields)
            or any(name in tensors for name in self.tensors)
        )


# The first that fits counts: an XPress, a DSpark and a DFlash 2 have the fields of a DFlash, too.
KINDS = (
    NamedKind("XPress", speculators=("xpress",)),
    NamedKind("DFlash 2", ("DFlash2DraftModel",), ("dflash2",)),
    NamedKind("DSpark", ("Qwen3DSparkModel", "DSparkDraftModel"), ("dspark",)),
    NamedKind("DFlash", ("DFlashDraftModel",), ("dflash",), fields=("dflash_config",)),
    NamedKind(
        "P-EAGLE",
        ("PEagleDraftModel", "PeagleLlamaForCausalLM", "PeagleQwen3ForCausalLM"),
        ("peagle",),
        tensors=("mask_hidden",),
    ),
    NamedKind("multi-token prediction head (MTP)", speculators=("mtp",)),
    NamedKind("Medusa", ("MedusaModel",), model_types=("medusa",), fields=("medusa_num_heads",)),
    NamedKind("MLP speculator", ("MLPSpeculatorPreTrainedModel",), ("mlp",), model_types=("mlp_speculator",)),
)

NESTED = ("transformer_layer_config", "eagle_config", "dflash_config")
"""Parts of a config whose fields count as its own."""

_EAGLE = re.compile(r"ForCausalLMEagle|Eagle3?\w*(?:ForCausalLM|Speculator|DraftModel)|EagleModel")


def claims_known_head(fields: Mapping[str, Any]) -> bool:
    """Whether a config's classes are an EAGLE's. Its tensors then lie in a layout of one, or the folder is broken.

    Args:
        fields: of its config.

    Returns:
        True where one is.
    """
    named = fields.get("architectures")
    return isinstance(named, list) and any(isinstance(name, str) and _EAGLE.search(name) for name in named)


def broken_claim(fields: Mapping[str, Any], tensors: Collection[str]) -> str:
    """Say what a folder calls itself, and which of its tensors do not fit.

    Args:
        fields: of its config; `claims_known_head` holds for it.
        tensors: the names of its tensors.

    Returns:
        A part of a sentence.
    """
    names = sorted(tensors)
    shown = f"{', '.join(names[:3])}{f' and {len(names) - 3} others' if names[3:] else ''}"
    lacks = "" if "fc.weight" in tensors else "lacks fc.weight and "
    return (
        f"an EAGLE by its config.json (architectures {fields['architectures']!s:.80}), but {lacks}holds the tensors {shown}, "
        "which no EAGLE layout has"
    )


def named_kind(fields: Mapping[str, Any], tensors: Collection[str] = ()) -> str:
    """Name the kind of drafter in a folder of other software.

    Args:
        fields: of its config.
        tensors: the names of its tensors.

    Returns:
        Its name, such as ``DFlash``; empty where it is none of the known kinds.
    """
    return next((kind.title for kind in KINDS if kind.is_in(fields, tensors)), "")

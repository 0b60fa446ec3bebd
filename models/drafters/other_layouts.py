"""Drafters in the layouts of other software, bound to a target: a folder of their own, or a layer inside the target's checkpoint.

Owns which layout a folder is in, what is wrong with a folder that is in none, and the bond to a target, which such a folder does not name.
Knows no layout: the registry's records name the modules that read them.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from draftsmith import provenance
from draftsmith.models.drafters.drafter import Drafter
from draftsmith.models.drafters.family import Family
from draftsmith.models.drafters.registry import all_families, missing_families
from draftsmith.models.files.checkpoint_files import CONFIG, StoredTensors, read_fields, read_tensors, weight_files
from draftsmith.models.files.fingerprint import checkpoint_fingerprint
from draftsmith.models.other_software.layout_reader import LayoutReader
from draftsmith.models.other_software.named_kinds import broken_claim, claims_known_head, named_kind
from draftsmith.models.other_software.speculators_config import SPECULATORS_KEY
from draftsmith.models.other_software.unread_fields import warn_of_unread
from draftsmith.models.target.ends import TargetEnds

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class TargetBond:
    """The target that a drafter of other software is for, since its folder names none.

    Attributes:
        ends: the target's.
        tokenizer_fingerprint: of the target's tokenizer; empty means unknown.
    """

    ends: TargetEnds
    tokenizer_fingerprint: str = ""


def is_other_software(folder: Path) -> bool:
    """Whether a folder holds a drafter of other software: of a layout that is read, or of a kind that is known by name.

    Args:
        folder: that holds no drafter in draftsmith's layout.

    Returns:
        True for a drafter, False for a whole model.

    Raises:
        ValueError: its weights are pickled, or a file is broken.
    """
    if not (folder / CONFIG).is_file():
        return False
    fields = read_fields(folder)
    if SPECULATORS_KEY in fields or named_kind(fields) or claims_known_head(fields):
        return True
    if not weight_files(folder) and any(folder.glob("*.safetensors")):
        return False
    return layout_of(fields, read_tensors(folder)) is not None


def layout_of(fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[Family, LayoutReader] | None:
    """Find the layout of other software that a folder is in.

    Args:
        fields: of its config.
        tensors: by name.

    Returns:
        The family of its drafter, and how it is read; None where no family reads it.
    """
    return next((pair for pair in _layout_readers() if pair[1].holds(fields, tensors)), None)


def _layout_readers() -> Iterator[tuple[Family, LayoutReader]]:
    """Every layout of other software that one of the families reads, with that family."""
    for family in all_families():
        for module in map(importlib.import_module, family.layouts):
            yield from ((family, layout.reader) for layout in module.LAYOUTS if layout.reader is not None)


def read_other_software(folder: Path, target: TargetBond | None) -> Drafter:
    """Read a drafter in the layout of other software, or the one inside the target's own checkpoint, and bind it to its target.

    Args:
        folder: with ``config.json`` and weights as safetensors.
        target: what it is for.

    Returns:
        The drafter in evaluation mode, attached to the target.

    Raises:
        ValueError: no layout that is known here, no ``target``, a drafter that is not whole, one that the families cannot express, or one
            of another target.
    """
    if target is not None and (part := part_of_target(folder, target.ends)):
        return _bound(part, StoredTensors(folder), folder, target)
    fields, tensors = read_fields(folder), read_tensors(folder)
    match = layout_of(fields, tensors)
    if match is None:
        raise ValueError(unknown_layout(folder, fields, tensors))
    layout = match[1]
    if target is None:
        raise ValueError(
            f"{folder} is in {layout.software} layout, which names no target; say which one it is for with --target"
        )
    _check_bond(folder, target.ends)
    return _bound(layout, tensors, folder, target)


def part_in(names: Collection[str]) -> tuple[Family, LayoutReader] | None:
    """Find a drafter that lies inside a target's checkpoint.

    Args:
        names: of the checkpoint's tensors.

    Returns:
        Its family, and how it is read; None where there is none.
    """
    return next(
        (pair for pair in _layout_readers() if pair[1].in_target is not None and pair[1].in_target(names)), None
    )


def part_of_target(folder: Path, ends: TargetEnds) -> LayoutReader | None:
    """Find the drafter inside a target's checkpoint, and warn where a folder holds one for another model.

    Args:
        folder: of a whole model, or of anything else.
        ends: the target's.

    Returns:
        How the drafter is read; None where there is none, or the folder is not the target's own.
    """
    if not (folder / CONFIG).is_file():
        return None
    part = part_in(StoredTensors(folder).keys())
    if part is None or checkpoint_fingerprint(folder) == ends.fingerprint:
        return None if part is None else part[1]
    _LOG.warning(
        "%s holds an %s for its own model, and the target is not that model: it has another checkpoint, another revision or an adapter. So "
        "the whole folder drafts as a draft LM. To draft with the layer, give the folder of the target's own revision, and no adapter",
        folder,
        part[0].about.title,
    )
    return None


def _bound(layout: LayoutReader, tensors: Mapping[str, Tensor], folder: Path, target: TargetBond) -> Drafter:
    """Read a drafter, and bind it to its target."""
    ends, fields = target.ends, read_fields(folder)
    drafter = layout.read(fields, tensors, ends, str(folder))
    if layout.understood is not None:
        warn_of_unread(fields, layout.understood, str(folder))
    drafter.config.target_name, drafter.config.target_fingerprint = ends.name, ends.fingerprint
    drafter.config.tokenizer_fingerprint = target.tokenizer_fingerprint
    drafter.loaded_from = folder
    return drafter.attach(ends)


def unknown_layout(folder: Path, fields: Mapping[str, Any], tensors: Collection[str]) -> str:
    """Say what is wrong with a folder that no layout holds.

    Args:
        folder: where it lies.
        fields: of its config.
        tensors: the names of its tensors.

    Returns:
        The message of an error.
    """
    software = " or in ".join(dict.fromkeys(layout.software for _, layout in _layout_readers()))
    readable = f"give a folder in draftsmith's layout or in {software}{missing_families()}"
    kind, package = named_kind(fields, tensors), fields.get(SPECULATORS_KEY)
    if package is not None:
        known = f" ({kind})" if kind else ""
        return f"{folder} is a {package!r:.80} of the speculators package{known}, which draftsmith does not decode yet; {readable}"
    if kind:
        return f"{folder} holds a drafter of the kind {kind}, which draftsmith does not decode yet; {readable}"
    if claims_known_head(fields):
        remedy = f"take names without a prefix such as model., and the whole file. Otherwise {readable}"
        return f"{folder} is {broken_claim(fields, tensors)}; {remedy}"
    return f"{folder} holds no drafter that is known here (model_type {fields.get('model_type')!r:.80}); {readable}"


def _check_bond(folder: Path, ends: TargetEnds) -> None:
    """Other layouts name no target, but a folder that this package wrote tells it in its provenance."""
    if not (folder / provenance.FILE_NAME).is_file():
        return
    config = provenance.read(folder).get("config", {})
    bond = config.get("target_fingerprint", "")
    if bond and bond != ends.fingerprint:
        raise ValueError(
            f"{folder} was exported for target {config.get('target_name')!r} (fingerprint {bond[:12]}), not for "
            f"{ends.name!r} ({ends.fingerprint[:12]}); name that target"
        )

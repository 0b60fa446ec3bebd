"""Every layout by name: who writes it, whose drafters it can hold, and which of them a folder is in.

Owns that choice and the bond of what is read to one target. Every family's record names the modules of its foreign layouts. Does not know
the layouts' tables.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from draftsmith import provenance
from draftsmith.export.layouts import custom_generate
from draftsmith.export.layouts import own_layout as own
from draftsmith.export.layouts.layout import Foreign, Layout
from draftsmith.models.drafters.drafter import Drafter
from draftsmith.models.drafters.family import Family
from draftsmith.models.drafters.registry import all_families, family_of, missing_families
from draftsmith.models.files.checkpoint_files import read_fields, read_tensors
from draftsmith.models.target.ends import TargetEnds


def foreign_layouts(family: Family) -> tuple[Layout, ...]:
    """The layouts of other software that can hold a family's drafters."""
    modules = [importlib.import_module(name) for name in family.layouts]
    return tuple(layout for module in modules for layout in module.LAYOUTS)


def layouts_of(family: Family) -> tuple[Layout, ...]:
    """Every layout that can hold a family's drafters."""
    return (own.LAYOUT, *foreign_layouts(family), custom_generate.LAYOUT)


def layout_for(family: Family, name: str) -> Layout:
    """A layout by name that can hold a family's drafters.

    Raises:
        ValueError: there is no such layout, or it is for another family.
    """
    fitting = {layout.name: layout for layout in layouts_of(family)}
    if name in fitting:
        return fitting[name]
    owners = [
        other.about.title for other in all_families() if name in (layout.name for layout in foreign_layouts(other))
    ]
    problem = f"is for {' and '.join(owners)}" if owners else "is not known"
    raise ValueError(f"layout {name!r} {problem}, this drafter is {family.about.title}; use {' or '.join(fitting)}")


def write(drafter: Drafter, folder: Path, layout: str, ends: TargetEnds | None = None) -> tuple[str, ...]:
    """Write a drafter into an existing folder, read it back, and compare tensors and logits.

    Args:
        drafter: of any family.
        folder: existing and empty.
        layout: one that is for this family.
        ends: the target's, where at hand; some layouts need them.

    Returns:
        what a user must know of the result, sentence by sentence.

    Raises:
        ValueError: a layout of another family, or one that cannot express this drafter.
    """
    return layout_for(family_of(drafter), layout).write(drafter, folder, ends)


def load_any(folder: Path, ends: TargetEnds | None = None, tokenizer_fingerprint: str = "") -> Drafter:
    """A drafter from a folder in any layout: our own, or that of other software which one of the families knows.

    Args:
        folder: with ``config.json`` and ``model.safetensors``.
        ends: the target's. Only our own layout names its target; for every other they are needed.
        tokenizer_fingerprint: of the target's tokenizer. Our layout is checked against it, another takes it over.

    Returns:
        in evaluation mode, attached where ``ends`` are given.

    Raises:
        ValueError: no drafter that is known here, one that is not whole, one that our families cannot express, or one of another target.
    """
    fields = read_fields(folder)
    if own.is_ours(fields):
        drafter = own.read(fields, read_tensors(folder), str(folder))
        if ends is not None:
            drafter.attach(ends)
            drafter.check_tokenizer(tokenizer_fingerprint)
        return drafter
    tensors = read_tensors(folder)
    layout = _foreign(fields, tensors, folder)
    if ends is None:
        raise ValueError(
            f"{folder} is in {layout.software} layout, which names no target; say which one it is for with --target"
        )
    _check_bond(folder, ends)
    drafter = layout.read(fields, tensors, ends, str(folder))
    drafter.config.target_name, drafter.config.target_fingerprint = ends.name, ends.fingerprint
    drafter.config.tokenizer_fingerprint = tokenizer_fingerprint
    return drafter.attach(ends)


def _foreign(fields: Mapping[str, Any], tensors: Mapping[str, Tensor], folder: Path) -> Foreign:
    """How a folder is read that is not in our layout."""
    known = [
        layout.foreign for family in all_families() for layout in foreign_layouts(family) if layout.foreign is not None
    ]
    for layout in known:
        if layout.holds(fields, tensors):
            return layout
    raise ValueError(
        f"{folder} holds no drafter that is known here (model_type {fields.get('model_type')!r:.80}); give a folder in draftsmith's layout "
        f"or in {' or '.join(dict.fromkeys(layout.software for layout in known))}{missing_families()}"
    )


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

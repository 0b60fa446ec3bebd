"""Every layout by name: who writes it, and whose drafters it can hold.

Owns that choice. The one loader of drafters reads folders of other software. Every family's record names the modules of its
layouts for other software. Does not know the layouts' tables.
"""

from __future__ import annotations

import importlib
from pathlib import Path

from draftsmith.export.layouts import custom_generate
from draftsmith.export.layouts import own_layout as own
from draftsmith.export.layouts.layout import Layout
from draftsmith.models.drafters.drafter import Drafter
from draftsmith.models.drafters.family import Family
from draftsmith.models.drafters.other_layouts import TargetBond, read_other_software
from draftsmith.models.drafters.registry import all_families, family_of
from draftsmith.models.files.checkpoint_files import read_fields, read_tensors
from draftsmith.models.target.ends import TargetEnds


def other_software_layouts(family: Family) -> tuple[Layout, ...]:
    """The layouts of other software that can hold a family's drafters."""
    modules = [importlib.import_module(name) for name in family.layouts]
    return tuple(layout for module in modules for layout in module.LAYOUTS)


def layouts_of(family: Family) -> tuple[Layout, ...]:
    """Every layout that can hold a family's drafters."""
    return (own.LAYOUT, *other_software_layouts(family), custom_generate.LAYOUT)


def layout_for(family: Family, name: str) -> Layout:
    """A layout by name that can hold a family's drafters.

    Raises:
        ValueError: there is no such layout, or it is for another family.
    """
    fitting = {layout.name: layout for layout in layouts_of(family)}
    if name in fitting:
        return fitting[name]
    owners = [
        other.about.title
        for other in all_families()
        if name in (layout.name for layout in other_software_layouts(other))
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
    return read_other_software(folder, None if ends is None else TargetBond(ends, tokenizer_fingerprint))

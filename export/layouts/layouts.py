"""Every layout by name: who writes it, whose drafters it can hold, and which of them a folder is in.

Owns that choice and the bond of what is read to one target. Does not know the layouts' tables.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from draftsmith import provenance
from draftsmith.export.layouts import apple as redrafter
from draftsmith.export.layouts import custom_generate, eagle, eagle3, speculators
from draftsmith.export.layouts import own_layout as own
from draftsmith.models.drafters.drafter import Drafter
from draftsmith.models.drafters.redrafter import ReDrafterConfig
from draftsmith.models.files.checkpoint_files import read_fields, read_tensors
from draftsmith.models.target.ends import TargetEnds

LayoutName = Literal["draftsmith", "apple", "eagle", "eagle3", "tensorrt-llm", "speculators", "custom_generate"]
Reader = Callable[[Mapping[str, Any], Mapping[str, Tensor], TargetEnds | None, str], Drafter]


@dataclass(frozen=True)
class Layout:
    """One layout: its writer, which gives notes for the card, and the one family it is for (empty: any)."""

    write: Callable[[Any, Path, TargetEnds | None], tuple[str, ...]]
    family: str = ""


LAYOUTS: dict[LayoutName, Layout] = {
    "draftsmith": Layout(own.write),
    "apple": Layout(redrafter.write_apple, redrafter.WHAT),
    "eagle": Layout(eagle.write, eagle.WHAT),
    "eagle3": Layout(eagle3.write, eagle3.WHAT),
    "tensorrt-llm": Layout(eagle3.write_tensorrt, eagle3.WHAT),
    "speculators": Layout(speculators.write, eagle3.WHAT),
    "custom_generate": Layout(custom_generate.write),
}


def write(drafter: Drafter, folder: Path, layout: LayoutName, ends: TargetEnds | None = None) -> tuple[str, ...]:
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
    family = own.family_of(drafter).name
    fitting = [name for name, one in LAYOUTS.items() if one.family in ("", family)]
    if layout not in fitting:
        raise ValueError(
            f"layout {layout!r} is for {LAYOUTS[layout].family}, this drafter is {family}; use {' or '.join(fitting)}"
        )
    return LAYOUTS[layout].write(drafter, folder, ends)


def load_any(folder: Path, ends: TargetEnds | None = None, tokenizer_fingerprint: str = "") -> Drafter:
    """A drafter from a folder in any layout: ours, Apple's, the official EAGLE code's, vLLM's and SGLang's, TensorRT-LLM's, speculators'.

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
    reader, whose = _foreign(fields, tensors, folder)
    if ends is None:
        raise ValueError(f"{folder} is in {whose} layout, which names no target; say which one it is for with --target")
    _check_bond(folder, ends)
    drafter = reader(fields, tensors, ends, str(folder))
    drafter.config.target_name, drafter.config.target_fingerprint = ends.name, ends.fingerprint
    drafter.config.tokenizer_fingerprint = tokenizer_fingerprint
    return drafter.attach(ends)


def _foreign(fields: Mapping[str, Any], tensors: Mapping[str, Tensor], folder: Path) -> tuple[Reader, str]:
    """Who reads a folder that is not in our layout. Engines' configs of EAGLE-1 and EAGLE-3 look alike; their tensors do not."""
    if fields.get("model_type") == ReDrafterConfig.model_type:
        return redrafter.read_apple, "Apple's"
    if speculators.TYPE_KEY in fields:
        return speculators.read, "the speculators package's"
    if "fc.weight" in tensors and any(name.startswith(("norm.", f"{eagle3.LAYER}.")) for name in tensors):
        return eagle3.read, "the common EAGLE-3"
    if "fc.weight" in tensors:
        return eagle.read, "the common EAGLE-1"
    raise ValueError(
        f"{folder} holds no drafter that is known here (model_type {fields.get('model_type')!r}, no tensor fc.weight); give a folder of "
        "draftsmith, ml-recurrent-drafter, speculators, or an EAGLE head as the official code, vLLM or SGLang read it"
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

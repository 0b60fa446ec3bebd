"""Our own layout, for every family: the module's tensors under its own names, and its config with the bond to one target.

Owns how that layout is written. It is read by the one reader of drafters (`models/drafters/drafter_reader.py`). Knows nothing of cards and
commands.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from draftsmith.export.layouts import apple as redrafter
from draftsmith.export.layouts import eagle, eagle3
from draftsmith.export.layouts.readback import refuse_difference, tensors_of
from draftsmith.models.drafters.drafter import Drafter
from draftsmith.models.drafters.drafter_reader import build_drafter, module_table
from draftsmith.models.drafters.eagle import Eagle, Eagle3
from draftsmith.models.drafters.redrafter import ReDrafter
from draftsmith.models.files.checkpoint_files import read_fields, read_tensors, write_files
from draftsmith.models.target.ends import TargetEnds


@dataclass(frozen=True)
class Family:
    """What this layout needs to know of a drafter family."""

    name: str
    drafter: type[Drafter]


FAMILIES = (
    Family(redrafter.WHAT, ReDrafter),
    Family(eagle.WHAT, Eagle),
    Family(eagle3.WHAT, Eagle3),
)


def family_of(drafter: Drafter) -> Family:
    """The family of a drafter in memory.

    Raises:
        ValueError: one that cannot be exported.
    """
    for family in FAMILIES:
        if type(drafter) is family.drafter:
            return family
    raise ValueError(f"a {type(drafter).__name__} cannot be exported; {' and '.join(one.name for one in FAMILIES)} can")


def is_ours(fields: Mapping[str, Any]) -> bool:
    """Whether a config is in this layout: it tells the target it is bound to."""
    kinds = [family.drafter.config_class.model_type for family in FAMILIES]
    return fields.get("model_type") in kinds and "target_fingerprint" in fields


def write(drafter: Drafter, folder: Path, ends: TargetEnds | None = None) -> tuple[str, ...]:
    """Write the drafter into an existing folder, read it back, and compare every byte of every tensor and the logits.

    Returns:
        what a user must know of the result: nothing.

    Raises:
        ValueError: the drafter is not whole (NaN after a diverged training, for one).
    """
    tensors = tensors_of(drafter)
    module_table(family_of(drafter).drafter, drafter.config).check(tensors, "the drafter in memory")
    drafter.config.architectures = [type(drafter).__name__]
    drafter.config.dtype = str(drafter.dtype).removeprefix("torch.")
    write_files(folder, drafter.config.to_json_string(), tensors)
    refuse_difference(drafter, read(read_fields(folder), read_tensors(folder), str(folder)), folder)
    return ()


def read(fields: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> Drafter:
    """A drafter from this layout, dtype as stored, attached to no target yet.

    Raises:
        ValueError: the config breaks a rule, or the tensors are not the family's.
    """
    [family] = [one for one in FAMILIES if one.drafter.config_class.model_type == fields["model_type"]]
    return build_drafter(family.drafter, fields, tensors, where)

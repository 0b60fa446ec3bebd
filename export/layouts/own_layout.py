"""Our own layout, for every family: the module's tensors under its own names, and its config with the bond to one target.

Owns how that layout is written. It is read by the one reader of drafters (`models/drafters/drafter_reader.py`). Knows nothing of cards and
commands.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from draftsmith.export.layouts.layout import Layout
from draftsmith.export.layouts.readback import refuse_difference, tensors_of
from draftsmith.models.drafters.drafter import Drafter
from draftsmith.models.drafters.drafter_reader import build_drafter, module_table
from draftsmith.models.drafters.registry import family_of, registry
from draftsmith.models.files.checkpoint_files import read_fields, read_tensors, write_files
from draftsmith.models.target.ends import TargetEnds


def is_ours(fields: Mapping[str, Any]) -> bool:
    """Whether a config is in this layout: it tells the target it is bound to."""
    model_type = fields.get("model_type")
    return isinstance(model_type, str) and "target_fingerprint" in fields and registry().get(model_type) is not None


def write(drafter: Drafter, folder: Path, ends: TargetEnds | None = None) -> tuple[str, ...]:
    """Write the drafter into an existing folder, read it back, and compare every byte of every tensor and the logits.

    Returns:
        what a user must know of the result: nothing.

    Raises:
        ValueError: the drafter is not whole (NaN after a diverged training, for one).
    """
    kind, tensors = family_of(drafter).drafter, tensors_of(drafter)
    module_table(kind, drafter.config).check(tensors, "the drafter in memory")
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
    family = registry().get(fields["model_type"])
    assert family is not None, "the caller asks is_ours first"
    return build_drafter(family.drafter, fields, tensors, where)


LAYOUT = Layout(
    "draftsmith",
    write,
    "draftsmith's layout: `config.json` names the target, `model.safetensors` the tensors",
    holds_shapes=True,
)

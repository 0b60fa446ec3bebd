"""``shapes_by_rows.json``: the shapes that ``draftsmith tune`` keeps in a drafter's folder.

Owns the file's format, its checks, and whether it fits where a drafter now runs. Knows no drafter, and nothing of how shapes are measured.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from draftsmith.files import atomic_addition
from draftsmith.json_text import parse_json_object
from draftsmith.models.files.field_rules import LIST, TEXT, Rule, check_fields, is_whole
from draftsmith.models.tree.limits import DraftLimits
from draftsmith.models.tree.shapes import parse_shape, shape_text
from draftsmith.models.tree.shapes_by_rows import ShapesByRows

SHAPES_FILE = "shapes_by_rows.json"
VERSION = 1
_REMEDY = "run `draftsmith tune` again, or delete the file"
_MOST_NODES = 4096
_RULES: dict[str, Rule] = {
    "version": (lambda value: value == VERSION, f"{VERSION}, the only version that is known here"),
    "target": TEXT,
    "target_fingerprint": TEXT,
    "drafter_fingerprint": TEXT,
    "device": (lambda value: isinstance(value, str) and value != "", "a kind of device such as cpu or cuda"),
    "device_name": TEXT,
    "dtype": TEXT,
    "measured_rows": (
        lambda value: LIST[0](value) and bool(value) and all(is_whole(rows, 1) for rows in value),
        "a list of whole numbers of at least 1",
    ),
    "shapes": (
        lambda value: LIST[0](value) and bool(value) and all(isinstance(step, dict) for step in value),
        'a list of objects such as {"up_to_rows": 4, "shape": "1x4"}',
    ),
}
_STEP_RULES: dict[str, Rule] = {
    "up_to_rows": (lambda value: is_whole(value, 1), "a whole number of at least 1"),
    "shape": (
        lambda value: value is None or (isinstance(value, str) and not value.strip().startswith("tree:")),
        "a shape such as 1x4, with the paths of a static tree written out, or null for no draft",
    ),
}
_OPTIONAL = ("drafter_fingerprint",)
"""Fields that a file may lack, as those of earlier versions and those written by hand do."""
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class KeptShapes:
    """What the file holds.

    Attributes:
        shapes: the fastest one for every number of rows.
        measured_rows: the numbers of rows that were timed.
        target: name of the target.
        target_fingerprint: of its weights; empty where unknown.
        device: kind of device, such as ``cpu``.
        device_name: what the maker calls it.
        dtype: of the target.
        drafter_fingerprint: of what a drafter without weights drafts from, such as a shared pool; empty for any other drafter, and where
            unknown.
    """

    shapes: ShapesByRows
    measured_rows: tuple[int, ...]
    target: str
    target_fingerprint: str
    device: str
    device_name: str
    dtype: str
    drafter_fingerprint: str = ""

    def write(self, folder: Path) -> Path:
        """Write the file, whole or not at all.

        Args:
            folder: of the drafter.

        Returns:
            Its path.

        Raises:
            OSError: the folder cannot be written.
        """
        fields: dict[str, Any] = {"version": VERSION, **vars(self), "measured_rows": list(self.measured_rows)}
        fields["shapes"] = [
            {"up_to_rows": most, "shape": None if shape is None else shape_text(shape)}
            for most, shape in self.shapes.steps
        ]
        path = folder / SHAPES_FILE
        atomic_addition(path, json.dumps(fields, indent=2) + "\n")
        return path

    def misfit(self, device: str, target_fingerprint: str, drafter_fingerprint: str = "") -> str:
        """Why the shapes say nothing here; empty where they do.

        Args:
            device: kind of device where the target runs.
            target_fingerprint: of its weights; empty where unknown.
            drafter_fingerprint: of what a drafter without weights drafts from; empty for any other drafter.
        """
        if self.device != device:
            return f"it was measured on {self.device} ({self.device_name}), and the target runs on {device}"
        if self.target_fingerprint and target_fingerprint and self.target_fingerprint != target_fingerprint:
            return f"it was measured with another target, {self.target!r}"
        if drafter_fingerprint and self.drafter_fingerprint and self.drafter_fingerprint != drafter_fingerprint:
            return "it was measured with another config of this drafter, or another content of a folder that the config names"
        return ""


def read_kept_shapes(folder: Path) -> KeptShapes | None:
    """Read the shapes that were kept in a drafter's folder.

    Args:
        folder: of the drafter.

    Returns:
        What the file holds; None where there is none.

    Raises:
        ValueError: the file is no JSON object, is of another version, or a field breaks its rule.
    """
    path = folder / SHAPES_FILE
    if not path.is_file():
        return None
    fields = parse_json_object(path.read_bytes(), str(path), _REMEDY)
    check_fields(fields, _RULES, str(path), _REMEDY, required=[name for name in _RULES if name not in _OPTIONAL])
    steps = tuple(_step(step, f"{path}: shapes[{place}]") for place, step in enumerate(fields["shapes"]))
    try:
        shapes = ShapesByRows(steps)
    except ValueError as error:
        raise ValueError(f"{path}: shapes cannot be used: {error}; {_REMEDY}") from error
    names = ("target", "target_fingerprint", "device", "device_name", "dtype", *_OPTIONAL)
    given = {name: fields[name] for name in names if name in fields}
    return KeptShapes(shapes, tuple(fields["measured_rows"]), **given)


def fitting_shapes(
    folder: Path, device: str, target_fingerprint: str, drafter_fingerprint: Callable[[], str] = str
) -> ShapesByRows | None:
    """The shapes to draft by, where nobody asks for others. A log line says which; a warning says why a file is not used.

    Args:
        folder: of the drafter.
        device: kind of device where the target runs.
        target_fingerprint: of its weights; empty where unknown.
        drafter_fingerprint: gives that of what a drafter without weights drafts from, empty for any other drafter. It is asked where
            there are shapes.

    Returns:
        The shapes; None where tune kept none there, or they do not fit.

    Raises:
        ValueError: as :func:`read_kept_shapes`.
    """
    kept = read_kept_shapes(folder)
    if kept is None:
        return None
    reason = kept.misfit(device, target_fingerprint, drafter_fingerprint())
    if reason:
        warnings.warn(
            f"{folder / SHAPES_FILE} is not used: {reason}; run `draftsmith tune` here, or give a shape", stacklevel=3
        )
        return None
    _LOG.info("drafts the shapes that tune kept in %s: %s", folder, kept.shapes)
    return kept.shapes


def _step(fields: dict[str, Any], place: str) -> tuple[int, DraftLimits | None]:
    """One entry of the file's list.

    Raises:
        ValueError: a field breaks its rule.
    """
    check_fields(fields, _STEP_RULES, place, _REMEDY, required=_STEP_RULES)
    text = fields["shape"]
    if text is None:
        return fields["up_to_rows"], None
    try:
        shape = parse_shape(text)
    except ValueError as error:
        raise ValueError(f"{place}: shape is {text!r:.80}, which cannot be used: {error}; {_REMEDY}") from error
    if shape.sampled is not None or max(shape.max_nodes, shape.max_fed) > _MOST_NODES:
        raise ValueError(
            f"{place}: shape is {text!r:.80}, it must be no sampled tree and have at most {_MOST_NODES} nodes; {_REMEDY}"
        )
    return fields["up_to_rows"], shape

"""Which shape is fastest for how many rows, and whether it is kept beside the drafter.

Owns the choice for each number of rows, the numbers of rows between, and the words about the file. Knows neither how cycles are timed nor
how a record was made.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch

from draftsmith.evaluate.tune.costs import Costs
from draftsmith.evaluate.tune.recording import Recorded
from draftsmith.evaluate.tune.tune import Outcome, weigh
from draftsmith.models.target.target import Target
from draftsmith.models.tree.kept_shapes import KeptShapes
from draftsmith.models.tree.limits import DraftLimits
from draftsmith.models.tree.shapes import parse_shape
from draftsmith.models.tree.shapes_by_rows import ShapesByRows
from draftsmith.provenance import machine

CostsOf = Callable[[int, tuple[DraftLimits, ...]], Costs]


@dataclass(frozen=True)
class RowsOutcome:
    """What is fastest for one number of rows.

    Attributes:
        rows: decoded together.
        best: the fastest shape, whether it pays or not.
        no_draft: speed of cycles without a draft, in which the drafter only keeps up, over plain decoding; at most about 1.
    """

    rows: int
    best: Outcome
    no_draft: float

    @property
    def drafts(self) -> bool:
        """Whether the best shape is faster than no draft."""
        return self.best.speedup > self.no_draft

    @property
    def shape(self) -> DraftLimits | None:
        """What is drafted for so many rows; None for no draft."""
        return parse_shape(self.best.shape) if self.drafts else None


def fastest_by_rows(
    rows: Sequence[int],
    replies: Sequence[Recorded],
    dynamic: Sequence[DraftLimits],
    static: Sequence[DraftLimits],
    costs_of: CostsOf,
) -> list[RowsOutcome]:
    """The fastest shape for each number of rows, from the fewest to the most.

    More rows make every node dearer. So for more rows no shape is timed that has more nodes than the best one for fewer rows, and none at
    all where no draft was best.

    Args:
        rows: numbers of rows.
        replies: the record.
        dynamic: chains and dynamic trees.
        static: static trees.
        costs_of: times shapes with so many rows.

    Returns:
        One for each number of rows that was timed.
    """
    outcomes: list[RowsOutcome] = []
    for count in sorted(set(rows)):
        if outcomes and not outcomes[-1].drafts:
            break
        most = outcomes[-1].best.nodes if outcomes else math.inf
        small = [shape for shape in dynamic if shape.max_nodes - 1 <= most]
        small_static = [shape for shape in static if shape.max_nodes - 1 <= most]
        costs = costs_of(count, (*small, *small_static))
        outcomes.append(RowsOutcome(count, weigh(replies, small, small_static, costs)[0], costs.plain / costs.follow))
    return outcomes


def shapes_by_rows(outcomes: Sequence[RowsOutcome]) -> ShapesByRows:
    """A shape for every number of rows. Between two that were timed, their geometric mean is the border.

    Example: shapes for 1, 4 and 16 rows serve up to 2, up to 8, and more rows.

    Args:
        outcomes: from the fewest rows to the most.
    """
    rows = [outcome.rows for outcome in outcomes]
    ends = [*(math.isqrt(fewer * more) for fewer, more in pairwise(rows)), rows[-1]]
    steps: list[tuple[int, DraftLimits | None]] = []
    for end, outcome in zip(ends, outcomes, strict=True):
        if steps and steps[-1][1] == outcome.shape:
            steps.pop()
        steps.append((end, outcome.shape))
    return ShapesByRows(tuple(steps))


def keep(
    outcomes: Sequence[RowsOutcome], target: Target, folder: Path, is_own: bool, drafter_fingerprint: str = ""
) -> str:
    """Write the shapes beside the drafter, as far as its folder can be written.

    Args:
        outcomes: of the rows that were timed.
        target: on the device where they were timed.
        folder: of the drafter.
        is_own: whether the folder is the caller's own, not the package's or the hub's cache.
        drafter_fingerprint: see :class:`KeptShapes`.

    Returns:
        What became of it, in words.
    """
    if not is_own:
        return f"not kept: {folder} belongs to this package or to the hub's cache; copy the drafter to a folder of your own, and tune there"
    shapes = shapes_by_rows(outcomes)
    kept = KeptShapes(
        shapes=shapes,
        measured_rows=tuple(outcome.rows for outcome in outcomes),
        target=target.name,
        target_fingerprint=target.fingerprint,
        device=target.device.type,
        device_name=device_name(target.device),
        dtype=str(target.dtype).removeprefix("torch."),
        drafter_fingerprint=drafter_fingerprint,
    )
    try:
        path = kept.write(folder)
    except OSError as error:
        return f"not kept: {folder} cannot be written ({error}); make it writable, or copy the drafter, and run the command again"
    return f"kept in {path}: {shapes}"


def device_name(device: torch.device) -> str:
    """What the maker calls a device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(machine()["cpu"])

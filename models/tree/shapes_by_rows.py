"""Which shape of draft is fastest for how many rows: more rows make each verified node dearer, until no draft pays.

Owns the choice by the number of rows that decode. Knows neither who measured the shapes nor who drafts them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from draftsmith.models.tree.limits import DraftLimits
from draftsmith.models.tree.shapes import shape_text, short_shape


@dataclass(frozen=True)
class ShapesByRows:
    """A shape for every number of rows.

    Attributes:
        steps: (up to how many rows, the shape for them), rows rising; None drafts nothing. The last shape also serves more rows.

    Raises:
        ValueError: no step, rows that do not rise, or several shapes of which one is sampled or stops early.
    """

    steps: tuple[tuple[int, DraftLimits | None], ...]

    def __post_init__(self) -> None:
        rows = [most for most, _ in self.steps]
        if not rows or rows[0] < 1 or any(after <= before for before, after in pairwise(rows)):
            raise ValueError(
                f"the numbers of rows are {rows}; give at least one, each at least 1 and above the one before it"
            )
        for shape in self.drafted if len(self.shapes) > 1 else ():
            if shape.sampled is not None or shape.early_stop is not None:
                raise ValueError(
                    f"shape {shape_text(shape)} is one of several: sampled trees are verified by rules of their own, and the threshold of "
                    "an early stop belongs to one shape; choose among beams, dynamic and static trees, or give this shape alone"
                )

    @classmethod
    def always(cls, shape: DraftLimits | None) -> ShapesByRows:
        """One shape for every number of rows."""
        return cls(((1, shape),))

    def at(self, num_rows: int) -> DraftLimits | None:
        """Look up a shape.

        Args:
            num_rows: how many rows decode.

        Returns:
            The shape to draft for them; None for no draft.
        """
        return next((shape for most, shape in self.steps if num_rows <= most), self.steps[-1][1])

    @cached_property
    def shapes(self) -> tuple[DraftLimits | None, ...]:
        """Each once."""
        return tuple(dict.fromkeys(shape for _, shape in self.steps))

    @property
    def drafted(self) -> tuple[DraftLimits, ...]:
        """The shapes that draft."""
        return tuple(shape for shape in self.shapes if shape is not None)

    @cached_property
    def most(self) -> DraftLimits:
        """Limits with room for each of the shapes: none is deeper, verifies more nodes, or feeds the drafter more."""
        if len(self.drafted) <= 1:
            return next(iter(self.drafted), DraftLimits(draft_length=1))
        length = max(shape.draft_length for shape in self.drafted)
        num_drafted = max(shape.max_nodes - 1 for shape in self.drafted)
        num_fed = max(shape.max_fed for shape in self.drafted)
        return DraftLimits(max(-(-num_drafted // length), -(-num_fed // max(1, length - 1))), length)

    def __str__(self) -> str:
        """In words, as in "1x4 up to 2 rows, none for more"."""
        if len(self.steps) == 1:
            return _words(self.steps[0][1])
        parts = [f"{_words(shape)} up to {_rows(most)}" for most, shape in self.steps[:-1]]
        return ", ".join([*parts, f"{_words(self.steps[-1][1])} for more"])


def as_shapes(limits: DraftLimits | ShapesByRows) -> ShapesByRows:
    """The shapes themselves; limits serve every number of rows."""
    return limits if isinstance(limits, ShapesByRows) else ShapesByRows.always(limits)


def limits_text(limits: DraftLimits | ShapesByRows) -> str:
    """What a report calls limits: a shape as it is typed, several with their numbers of rows."""
    return f"by rows: {limits}" if isinstance(limits, ShapesByRows) else shape_text(limits)


def _words(shape: DraftLimits | None) -> str:
    return "no draft" if shape is None else short_shape(shape_text(shape))


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count} rows"

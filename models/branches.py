"""Which drafts a target can follow: one branch only, where it keeps a recurrent state.

Owns the check of shapes that somebody asked for, and the chain in place of a tree that nobody asked for. Knows no family and no search.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import replace

from draftsmith.models.target.target import Target
from draftsmith.models.tree.limits import DraftLimits
from draftsmith.models.tree.shapes import shape_text, short_shape


def check_branches(target: Target, shapes: Iterable[DraftLimits]) -> None:
    """Check that a target can follow the branches of drafts.

    Args:
        target: the model.
        shapes: what is drafted.

    Raises:
        ValueError: a tree, where the target keeps a recurrent state.
    """
    for shape in shapes:
        if target.keeps_state and not shape.is_chain:
            raise ValueError(
                f"the shape {shape_text(shape)} is a tree, but {target.name} keeps a recurrent state, which follows one branch only; draft "
                f"a chain such as 1x{shape.draft_length}, which is beam_width 1 and draft_length {shape.draft_length}"
            )


def followed(target: Target, limits: DraftLimits) -> DraftLimits:
    """What a target can follow of a draft that nobody asked for.

    Args:
        target: the model.
        limits: a default.

    Returns:
        The same limits; where they are a tree and the target keeps a recurrent state, a chain of their length.
    """
    if not target.keeps_state or limits.is_chain:
        return limits
    return replace(limits, beam_width=1, node_budget=None, paths=None, sampled=None)


def default_for(target: Target, limits: DraftLimits) -> DraftLimits:
    """Take a drafter's default for a target, as far as the target can follow it. A warning names the tree that a chain replaces.

    Args:
        target: the model.
        limits: the default of the drafter.

    Returns:
        The limits; see :func:`followed`.
    """
    own = followed(target, limits)
    if own != limits:
        warnings.warn(
            f"{target.name} keeps a recurrent state, which follows one branch only: the draft is the chain {shape_text(own)}, not the tree "
            f"{short_shape(shape_text(limits))} that is this drafter's default",
            stacklevel=2,
        )
    return own

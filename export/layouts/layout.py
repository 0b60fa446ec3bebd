"""What a layout of drafters on disk is: its writer, its reader, and the words about it.

Owns that record. A module of a family's layouts for other software offers a tuple of them as ``LAYOUTS``. Knows no single layout.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from draftsmith.models.other_software.layout_reader import LayoutReader
from draftsmith.models.target.ends import TargetEnds

__all__ = ["Layout", "LayoutReader", "Writer"]

Writer = Callable[[Any, Path, TargetEnds | None], tuple[str, ...]]


@dataclass(frozen=True)
class Layout:
    """One layout.

    Attributes:
        name: what ``draftsmith export --layout`` calls it.
        write: drafter, existing empty folder and the target's ends -> what a user must know of the result.
        what: the layout in words, for the card; continues "This is".
        reader: how it is read where it is other software's; None for our own, and for variants that another one reads.
        commands: the target's name and the tokens of a chain -> how engines serve the folder, in Markdown.
        holds_shapes: whether the shapes that tune kept are copied into the folder; serving engines draft shapes of their own.
        whole_vocabulary: engines score the whole vocabulary with it, whatever the drafter's draft vocabulary.
    """

    name: str
    write: Writer
    what: str
    reader: LayoutReader | None = None
    commands: Callable[[str, int], str] | None = None
    holds_shapes: bool = False
    whole_vocabulary: bool = False

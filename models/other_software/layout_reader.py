"""How a drafter's folder of other software is recognised and read.

Owns that record. A family's layouts offer it, and whatever loads drafters asks for it. Knows no single layout.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from draftsmith.models.drafters.drafter import Drafter
    from draftsmith.models.target.ends import TargetEnds

Reader = Callable[[Mapping[str, Any], Mapping[str, Tensor], "TargetEnds | None", str], "Drafter"]


@dataclass(frozen=True)
class LayoutReader:
    """How a layout of other software is recognised and read.

    Attributes:
        software: whose it is, for messages, such as ``Apple's``.
        holds: whether a config and tensors are in this layout; no two layouts say so of one folder.
        read: config, tensors, the target's ends and what errors call the folder -> a drafter attached to nothing.
        in_target: whether a target's own checkpoint holds the drafter beside its weights, by the names of its tensors. Then the target
            itself can be named as the drafter.
        understood: the fields of a config that ``read`` knows; others are named in a warning. None says nothing of any.
    """

    software: str
    holds: Callable[[Mapping[str, Any], Mapping[str, Tensor]], bool]
    read: Reader
    in_target: Callable[[Collection[str]], bool] | None = None
    understood: Collection[str] | None = None

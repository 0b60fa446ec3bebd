"""What reads text: the call that targets and their trunks share, and the positions that a model can take.

Owns the interface that readers of prompts and drafts are written against. Knows no cache layout and no family.

Shape legend: B batch rows, N new tokens, S cache slots.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor
from transformers.cache_utils import Cache

from draftsmith.models.trunk.riders import Carried
from draftsmith.models.trunk.trunk import TargetOutput


class Reader(Protocol):
    """What is read with: a target, or its trunk alone."""

    @property
    def max_positions(self) -> int | None:
        """The longest context in tokens."""

    @property
    def window(self) -> int | None:
        """How many tokens a layer with a sliding window sees."""

    @property
    def rereads_past(self) -> int | None:
        """The text length past which a whole text is read again."""

    def __call__(
        self,
        input_ids: Tensor,
        *,
        cache: Cache,
        positions: Tensor,
        mask: Tensor | None,
        key_positions: Tensor | None = None,
        layers: tuple[str, ...] = (),
        text_lengths: Tensor | None = None,
        ends: Tensor | None = None,
        riders: Carried | None = None,
    ) -> TargetOutput:
        """As :meth:`draftsmith.models.target.target.Target.forward`."""


def within_context(target: Reader, positions: Tensor) -> Tensor:
    """Clamp positions past the model's context to its last one. What is guessed there is never emitted, but must not fail.

    Args:
        target: the model.
        positions: int64, any shape.

    Returns:
        int64, the same shape.
    """
    return positions if target.max_positions is None else positions.clamp(max=target.max_positions - 1)

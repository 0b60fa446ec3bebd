"""Drafters that are made for a target from the fields of their config alone.

Owns how such a drafter is made. Knows no architecture.

Shape legend: Vd draft vocabulary.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from torch import Tensor

from draftsmith.models.drafters.drafter import Drafter
from draftsmith.models.target.target import TargetEnds


class FromFields(Drafter):
    """A drafter that needs no more than its fields and the target's ends to begin.

    Attributes:
        usual_draft_steps: K where nothing else is asked for.
    """

    usual_draft_steps: ClassVar[int] = 4

    @classmethod
    def for_target(
        cls,
        ends: TargetEnds,
        *,
        draft_token_ids: Tensor | None = None,
        num_draft_steps: int | None = None,
        tokenizer_fingerprint: str = "",
        **chosen: Any,
    ) -> Self:
        """Make a fresh drafter for one target, attached to it.

        Args:
            ends: the target's frozen ends.
            draft_token_ids: int64 [Vd], increasing; None keeps the full vocabulary.
            num_draft_steps: K, the deepest draft; None takes ``usual_draft_steps``.
            tokenizer_fingerprint: stored, and checked by those who decode with text.
            chosen: further fields of the config.

        Returns:
            The drafter.

        Raises:
            ValueError: a field that the config does not have, or fields that do not go together.
        """
        kind = cls.config_class
        if unknown := sorted(chosen.keys() - kind.rules.keys()):
            raise ValueError(f"{kind.__name__} has no {', '.join(unknown)}; its fields are {', '.join(kind.rules)}")
        num_draft_steps = cls.usual_draft_steps if num_draft_steps is None else num_draft_steps
        fields = cls.fields_for(ends, num_draft_steps, chosen)
        drafter = cls(kind.for_target(ends, draft_token_ids, num_draft_steps, tokenizer_fingerprint, **fields))
        drafter.adopt_target(ends, draft_token_ids)
        drafter.begin_fresh()
        return drafter

    @classmethod
    def fields_for(cls, ends: TargetEnds, num_draft_steps: int, chosen: Mapping[str, Any]) -> dict[str, Any]:
        """Add the fields that follow from the target to those that were chosen. By default there are none.

        Args:
            ends: the target's.
            num_draft_steps: K.
            chosen: fields by name.

        Returns:
            All fields beside those that every config has.
        """
        return dict(chosen)

    @abstractmethod
    def begin_fresh(self) -> None:
        """Give a drafter that is attached to its target the weights that training begins with."""

"""A trained module that belongs to one frozen target: it checks the target, and borrows its ends.

Owns that bond, and views that share a module's weights under bonds of their own. Knows no drafter, no judge and no file.
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar, Self

from transformers import PreTrainedModel

from draftsmith.models.target.ends import TargetEnds


class BoundModule(PreTrainedModel):
    """A module that borrows a target's frozen ends (embedding, final norm, head) and never saves them.

    Args:
        config: with ``hidden_size``, ``target_name``, ``target_fingerprint`` and ``tokenizer_fingerprint``; an empty string means unknown.
    """

    base_model_prefix = ""
    called: ClassVar[str]
    """What messages call it."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        # In a list, so that the target's ends are neither parameters of this module nor saved with it.
        self._borrowed: list[TargetEnds] = []
        self._any_target = False

    @property
    def is_attached(self) -> bool:
        """Whether a target's ends are borrowed."""
        return bool(self._borrowed)

    @property
    def ends(self) -> TargetEnds:
        """The target's frozen ends.

        Raises:
            ValueError: it is attached to no target.
        """
        if not self.is_attached:
            raise ValueError(
                f"this {self.called} is attached to no target; call {self.called}.attach(target.ends) first"
            )
        return self._borrowed[0]

    def for_any_target(self) -> Self:
        """Make a view, attached to nothing, that may be attached to every target of its sizes, whatever its weights: for a diagnosis.

        Returns:
            The view.
        """
        view = self.view()
        view._any_target = True
        return view

    def view(self) -> Self:
        """Make a shallow copy that shares all weights and buffers, attached to nothing.

        Attributes set on one of the two are not seen by the other.

        Returns:
            The copy.
        """
        view = copy.copy(self)
        view._modules = dict(self._modules)
        view._borrowed = []
        return view

    def borrow(self, ends: TargetEnds) -> None:
        """Borrow a target's ends, whatever target it is.

        Args:
            ends: the target's.
        """
        self._borrowed[:] = [ends]

    def check_target(self, ends: TargetEnds) -> None:
        """Check that a target is the one of training.

        Args:
            ends: the target's.

        Raises:
            ValueError: its weights or its sizes are others.
        """
        name = self.called
        trained_for = "" if self._any_target else self.config.target_fingerprint
        if trained_for and ends.fingerprint and trained_for != ends.fingerprint:
            raise ValueError(
                f"this {name} was trained for target {self.config.target_name!r} (fingerprint {trained_for[:12]}), not for {ends.name!r} "
                f"({ends.fingerprint[:12]}); use that target, or train a {name} for this one{self._origin()}"
            )
        own, given = self.sizes_of(self.config), self.sizes_of(ends)
        if own != given:
            raise ValueError(
                f"this {name} expects {_in_words(own)}, the target {ends.name!r} has {_in_words(given)}; use the target it was trained for"
                f"{self._origin()}"
            )

    def _origin(self) -> str:
        """The end of a message that says where this module lies; empty for one that was made in memory."""
        folder = getattr(self, "loaded_from", None)
        return "" if folder is None else f" (it lies in {folder})"

    def sizes_of(self, owner: Any) -> dict[str, int]:
        """The sizes in which module and target must agree, by their names.

        Args:
            owner: a config of this kind, or the ends of a target.
        """
        return {"hidden size": owner.hidden_size}

    def check_tokenizer(self, fingerprint: str) -> None:
        """Check that a tokenizer is the one of training.

        Args:
            fingerprint: of the tokenizer; empty if unknown.

        Raises:
            ValueError: both fingerprints are known and differ.
        """
        name, trained_with = self.called, self.config.tokenizer_fingerprint
        if trained_with and fingerprint and trained_with != fingerprint:
            raise ValueError(
                f"this {name} was trained with another tokenizer ({trained_with[:12]}) than this one ({fingerprint[:12]}); token ids would "
                f"not mean the same; use the tokenizer of the {name}'s target"
            )


def _in_words(sizes: dict[str, int]) -> str:
    return " and ".join(f"{name} {size}" for name, size in sizes.items())

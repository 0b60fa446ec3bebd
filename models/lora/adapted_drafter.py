"""Drafters with an adapter: which of a drafter's parts one was trained on, and both merged into one drafter.

Owns the search for that part, and what the folder of an adapter alone stands for. Knows no family, no training and no decoding.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from draftsmith.models.drafters.draft_lm import LMDrafter
from draftsmith.models.drafters.drafter import Drafter
from draftsmith.models.files.fingerprint import module_fingerprint
from draftsmith.models.lora.lora_adapter import load_adapter, merge_adapter, read_bond


def trained_parts(drafter: Drafter) -> list[Drafter]:
    """List the drafters with weights that a drafter is made of.

    Args:
        drafter: of any family, or one that is made of others.

    Returns:
        The drafter itself where it has weights; those below it, from the head on, where it is made of others.
    """
    if drafter.parts is None:
        return [drafter]
    return [part for below in drafter.parts for part in trained_parts(below)]


class AdaptableParts:
    """The parts of a drafter, and which of them an adapter was trained on. It is made before any adapter comes to them.

    Draft LMs are none: they are whole models, which training with ``lora`` does not take.

    Args:
        drafter: of any family, or one that is made of others.
    """

    def __init__(self, drafter: Drafter) -> None:
        self._kind = type(drafter).__name__
        parts = [part for part in trained_parts(drafter) if not isinstance(part, LMDrafter)]
        self._parts = {module_fingerprint(part): part for part in reversed(parts)}

    def of_adapter(self, folder: Path) -> tuple[Drafter, str]:
        """The part that an adapter was trained on, and its fingerprint; where no part fits, the head, for an error that names it.

        Args:
            folder: what training wrote.

        Raises:
            ValueError: no adapter of a drafter, or a drafter that takes none.
        """
        wanted = read_bond(folder).drafter_fingerprint
        if not self._parts:
            raise ValueError(
                f"{folder} is an adapter, and this {self._kind} has no trained head that takes one; leave the adapter out, or give the "
                "drafter that it was trained on"
            )
        fingerprint = wanted if wanted in self._parts else next(reversed(self._parts))
        return self._parts[fingerprint], fingerprint


def adapted(drafter: Drafter, adapter: Path) -> Drafter:
    """Merge a trained adapter into a drafter, in place, and bind it to the adapter's target.

    Args:
        drafter: the one that the adapter was trained on, or one that is made of it.
        adapter: its folder.

    Returns:
        The same drafter.

    Raises:
        ValueError: the adapter is of another drafter, or not whole.
    """
    part, fingerprint = AdaptableParts(drafter).of_adapter(adapter)
    load_adapter(part, adapter, "merged", fingerprint).bind(part)
    merge_adapter(part, "merged")
    # The shapes that were kept for the drafter alone are not those of both together, nor those of a drafter that is made of both.
    drafter.loaded_from = adapter if part is drafter else None
    return drafter


def from_folder(adapter: Path, load: Callable[[str], Drafter]) -> Drafter:
    """Make the drafter that the folder of an adapter stands for: the one below it with the adapter merged.

    Args:
        adapter: its folder.
        load: gives a drafter by the name in the bond.

    Returns:
        The drafter.

    Raises:
        ValueError: the drafter below cannot be had, or the adapter is not whole.
    """
    below = read_bond(adapter).drafter
    try:
        drafter = load(below)
    except ValueError as error:
        raise ValueError(
            f"{adapter} is an adapter of the drafter {below!r}, which cannot be had; give that drafter and the adapter apart with "
            f"--drafter-adapter to `draftsmith decode`, or to `draftsmith export`, which makes one drafter of both ({error})"
        ) from error
    return adapted(drafter, adapter)

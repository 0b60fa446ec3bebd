"""How a training run starts from a trained drafter: its bond to the run's target, and LoRA on it.

Owns the choice between all weights and an adapter's alone, what of an adapter a checkpoint must agree on, and what such a run saves.
Does not know: losses, batches, how an adapter's folder is laid out.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from draftsmith.models.drafters.drafter import Drafter
from draftsmith.models.drafters.drafter_folder import drafter_folder, load_drafter
from draftsmith.models.drafters.family import DrafterFamily
from draftsmith.models.drafters.other_layouts import TargetBond
from draftsmith.models.files.fingerprint import module_fingerprint
from draftsmith.models.lora.lora_adapter import AdapterBond, LoraSettings, add_adapter, save_adapter
from draftsmith.models.target.target import TargetEnds

__all__ = ["LoraSettings", "StartingDrafter"]

_LOG = logging.getLogger(__name__)
ADAPTER = "lora"  # what the adapter in training is called in memory


@dataclass(frozen=True)
class StartingDrafter:
    """The trained drafter that a run starts from, and what of it is trained.

    Args:
        folder: of the drafter; None starts with new weights.
        lora: train a low-rank adapter of it alone; None trains all weights.
        other_target: it may belong to another target of the same sizes and tokenizer. The trained drafter belongs to the run's.

    Raises:
        ValueError: LoRA or another target without a drafter to start from.
    """

    folder: Path | None
    lora: LoraSettings | None = None
    other_target: bool = False

    def __post_init__(self) -> None:
        if self.folder is not None:
            return
        if self.lora is not None:
            raise ValueError("lora adapts a trained drafter, and init_from names none; give its folder as init_from")
        if self.other_target:
            raise ValueError(
                "allow_other_target is about the drafter of init_from, which is null; name one, or drop it"
            )

    def settings(self) -> dict[str, Any]:
        """For provenance."""
        return {
            "init_from": None if self.folder is None else str(self.folder),
            "lora": None if self.lora is None else vars(self.lora),
            "allow_other_target": self.other_target,
        }

    def adopt(self, family: DrafterFamily, ends: TargetEnds, tokenizer: str) -> tuple[Drafter, str]:
        """Loads the drafter and attaches it to ends.

        Args:
            family: the run's.
            ends: the target's.
            tokenizer: fingerprint of the target's tokenizer.

        Returns:
            the drafter as training starts, and with LoRA the fingerprint of its weights below the adapter.

        Raises:
            ValueError: a folder without a whole drafter; one of another family, tokenizer, or target without ``other_target``; layers that
                it does not have.
        """
        assert self.folder is not None
        drafter = adopt(self.folder, family, ends, tokenizer, self.other_target)
        if self.lora is None:
            return drafter, ""
        fingerprint = module_fingerprint(drafter)
        add_adapter(drafter, self.lora, ADAPTER)
        return drafter, fingerprint

    def needed(self) -> list[Path]:
        """The folders that must still be there when the run is over: an adapter is nothing without the drafter below it."""
        return [] if self.lora is None or self.folder is None else [drafter_folder(str(self.folder))]

    def save(self, drafter: Drafter, fingerprint: str, folder: Path) -> None:
        """Writes what this run trained into an existing folder: the whole drafter, or its adapter.

        Args:
            drafter: as trained so far.
            fingerprint: what :meth:`adopt` gave.
            folder: existing and empty.
        """
        if self.lora is None:
            drafter.save_pretrained(folder)
            return
        assert self.folder is not None
        place = drafter_folder(str(self.folder)).resolve()
        base = str(place) if Path(self.folder).is_dir() else str(self.folder)
        save_adapter(drafter, folder, ADAPTER, AdapterBond.of(drafter, base, fingerprint))

    def trains(self, fingerprint: str) -> str:
        """What is trained, in words that a resumed run must agree with.

        Args:
            fingerprint: from :meth:`adopt`.
        """
        if self.lora is None:
            return "all weights"
        return f"an adapter (rank {self.lora.rank}, alpha {self.lora.alpha:g}) of the drafter {fingerprint}"

    def check_resumed(self, fingerprint: str, saved: str) -> None:
        """Checks that a checkpoint trained the same.

        Args:
            fingerprint: from :meth:`adopt`.
            saved: what :meth:`trains` gave for the checkpoint.

        Raises:
            ValueError: it trained something else.
        """
        own = self.trains(fingerprint)
        if saved != own:
            raise ValueError(
                f"the checkpoint trained {saved}, this run trains {own}; resume with the init_from and lora of that run"
            )


def check_mask(drafter: Drafter, ends: TargetEnds) -> Drafter:
    """Checks that a fresh drafter can draft the end of a reply: its mask stands for an empty slot and is never drafted.

    Args:
        drafter: fresh.
        ends: the target's.

    Returns:
        The same drafter.

    Raises:
        ValueError: the mask is an end token.
    """
    if drafter.mask_token is not None and drafter.mask_token in ends.eos_token_ids:
        raise ValueError(
            f"mask_token_id {drafter.mask_token} ends the target's replies ({list(ends.eos_token_ids)}), and a mask is never drafted; "
            "name a token that no text has"
        )
    return drafter


def adopt(folder: Path, family: DrafterFamily, ends: TargetEnds, tokenizer: str, other_target: bool = False) -> Drafter:
    """A drafter of the run's family from a folder, in training mode and attached to ends; its shape and draft vocabulary stay its own.

    Args:
        folder: of the trained drafter.
        family: the run's.
        ends: the target's.
        tokenizer: fingerprint of the target's tokenizer.
        other_target: it may belong to another target, and belongs to this one from then on.

    Raises:
        ValueError: a folder without a whole drafter, or one of another family, target or tokenizer.
    """
    # In float32: exports may be narrower than what is trained.
    drafter = load_drafter(folder, target=TargetBond(ends, tokenizer)).float()
    if not isinstance(drafter, family.kind):
        raise ValueError(
            f"init_from {str(folder)!r} holds a {type(drafter).__name__}, the run's family makes a {family.kind.__name__}; "
            "name the family that fits"
        )
    if other_target:
        drafter.config.target_name, drafter.config.target_fingerprint = ends.name, ends.fingerprint
    drafter.attach(ends)
    drafter.check_tokenizer(tokenizer)
    family.configure(drafter)
    _say_what_stays(drafter, family, folder)
    return drafter.train()


def _say_what_stays(drafter: Drafter, family: DrafterFamily, folder: Path) -> None:
    """Say which settings of the run's family the loaded drafter has otherwise: its shape stays."""
    own = drafter.config.to_dict()
    asked = {name: getattr(family, name, None) for name in own}
    differing = [name for name, value in asked.items() if value is not None and not _same(value, own[name])]
    if differing:
        stays = ", ".join(f"{name} {own[name]!r:.80} (the run says {asked[name]!r:.80})" for name in sorted(differing))
        _LOG.warning(
            "init_from %s keeps its own shape, and these settings of the run's family are not used: %s", folder, stays
        )


def _same(asked: Any, own: Any) -> bool:
    """Whether a config has what a setting asks for; a part that is switched on has a config of its own there."""
    if isinstance(asked, bool):
        return asked == bool(own)
    return bool(asked == own) or (isinstance(asked, tuple) and list(asked) == own)

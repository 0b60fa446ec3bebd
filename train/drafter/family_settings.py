"""Which drafter a training run makes: one small settings class per family, named by class_path in a run's YAML.

Owns: how a family's settings become a fresh drafter, and how its draft vocabulary is chosen. Does not know: training.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from draftsmith.models.drafters.drafter import Drafter
from draftsmith.models.drafters.drafter_folder import load_drafter
from draftsmith.models.drafters.eagle import Eagle, Eagle3
from draftsmith.models.drafters.redrafter import ReDrafter
from draftsmith.models.target.target import TargetEnds


class DrafterFamily(ABC):
    """Makes fresh drafters of one family for any target, or goes on with one that was trained before."""

    draft_vocab_size: int | None
    kind: type[Drafter]

    @abstractmethod
    def build(
        self, ends: TargetEnds, draft_token_ids: Tensor | None, num_steps: int, tokenizer_fingerprint: str
    ) -> Drafter:
        """A new drafter attached to ends; draft_token_ids int64 [Vd] increasing, or None for the full vocabulary."""

    def adopt(self, folder: Path, ends: TargetEnds, tokenizer_fingerprint: str) -> Drafter:
        """A drafter of this family from a folder, attached to ends; its shape and draft vocabulary stay its own.

        Raises ValueError for a folder that holds no whole drafter, one of another family, of another target or
        tokenizer.
        """
        drafter = load_drafter(folder).float()  # exports may be narrower than what is trained
        if not isinstance(drafter, self.kind):
            raise ValueError(
                f"init_from {str(folder)!r} holds a {type(drafter).__name__}, the run's family makes a {self.kind.__name__}; "
                "name the family that fits"
            )
        drafter.attach(ends)
        drafter.check_tokenizer(tokenizer_fingerprint)
        self.configure(drafter)
        return drafter.train()

    def configure(self, drafter: Drafter) -> None:  # noqa: B027  (families without such settings leave it)
        """Set what concerns training only; nothing in most families."""

    @abstractmethod
    def settings(self) -> dict[str, object]:
        """Every setting by name, for provenance."""


class ReDrafterFamily(DrafterFamily):
    """ReDrafter's recurrent head (arXiv 2403.09919).

    Args:
        exit_dim: width of the residual blocks and of the head's input; null takes the target's hidden size, Apple's
            checkpoints have twice that.
        num_draft_layers: residual blocks before the head.
        rnn: the gated recurrence; false sums embeddings instead.
        draft_vocab_size: keep this many tokens, the most frequent labelled ones of the training samples; null keeps
            all.
        head_init: start the output head from the target's own head, or at random.
        freeze_head: leave the output head as it starts.
    """

    kind = ReDrafter

    def __init__(
        self,
        exit_dim: int | None = None,
        num_draft_layers: int = 2,
        rnn: bool = True,
        draft_vocab_size: int | None = None,
        head_init: Literal["random", "target"] = "target",
        freeze_head: bool = False,
    ) -> None:
        self.exit_dim = exit_dim
        self.num_draft_layers = num_draft_layers
        self.rnn = rnn
        self.draft_vocab_size = draft_vocab_size
        self.head_init = head_init
        self.freeze_head = freeze_head

    def build(
        self, ends: TargetEnds, draft_token_ids: Tensor | None, num_steps: int, tokenizer_fingerprint: str
    ) -> ReDrafter:
        """See DrafterFamily.build. Raises ValueError for sizes that do not fit the target."""
        return ReDrafter.for_target(
            ends,
            exit_dim=self.exit_dim,
            num_draft_layers=self.num_draft_layers,
            rnn=self.rnn,
            draft_token_ids=draft_token_ids,
            head_init=self.head_init,
            freeze_head=self.freeze_head,
            num_draft_steps=num_steps,
            tokenizer_fingerprint=tokenizer_fingerprint,
        )

    def settings(self) -> dict[str, object]:
        """See DrafterFamily.settings."""
        return {"family": "redrafter", **vars(self)}


class EagleFamily(DrafterFamily):
    """EAGLE-1's feature predictor (arXiv 2401.15077), which EAGLE-2 decodes with and HASS trains over several steps.

    Args:
        draft_vocab_size: score only this many tokens, the most frequent labelled ones of the training samples, with
            their rows of the target's head; null scores all.
        feature_noise: uniform noise added to the target's states in training, times 512 / length; EAGLE-1 uses 0.1.
        detach_steps: no gradient flows from a draft step into those before it (HASS); matters with several steps.
    """

    kind = Eagle

    def __init__(
        self, draft_vocab_size: int | None = None, feature_noise: float = 0.0, detach_steps: bool = True
    ) -> None:
        if feature_noise < 0.0:
            raise ValueError(f"feature_noise is {feature_noise}; it must be at least 0")
        self.draft_vocab_size, self.feature_noise, self.detach_steps = draft_vocab_size, feature_noise, detach_steps

    def build(
        self, ends: TargetEnds, draft_token_ids: Tensor | None, num_steps: int, tokenizer_fingerprint: str
    ) -> Eagle:
        """See DrafterFamily.build."""
        drafter = Eagle.for_target(
            ends,
            draft_token_ids=draft_token_ids,
            num_draft_steps=num_steps,
            tokenizer_fingerprint=tokenizer_fingerprint,
        )
        self.configure(drafter)
        return drafter

    def configure(self, drafter: Drafter) -> None:
        """See DrafterFamily.configure."""
        assert isinstance(drafter, Eagle)
        drafter.feature_noise, drafter.detach_steps = self.feature_noise, self.detach_steps

    def settings(self) -> dict[str, object]:
        """See DrafterFamily.settings."""
        return {"family": "eagle", **vars(self)}


class Eagle3Family(DrafterFamily):
    """EAGLE-3's drafter over fused layers (arXiv 2503.01840).

    Args:
        layers: names of the target's layers to fuse, low to high; null takes those that serving engines expect.
        draft_vocab_size: keep this many tokens, the most frequent labelled ones of the training samples; null keeps
            all.
        detach_steps: no gradient flows from a draft step into those before it.
    """

    kind = Eagle3

    def __init__(
        self, layers: list[str] | None = None, draft_vocab_size: int | None = None, detach_steps: bool = False
    ) -> None:
        self.layers, self.draft_vocab_size, self.detach_steps = layers, draft_vocab_size, detach_steps

    def build(
        self, ends: TargetEnds, draft_token_ids: Tensor | None, num_steps: int, tokenizer_fingerprint: str
    ) -> Eagle3:
        """See DrafterFamily.build. Raises ValueError for a target of fewer than three layers."""
        drafter = Eagle3.for_target(
            ends,
            layers=self.layers,
            draft_token_ids=draft_token_ids,
            num_draft_steps=num_steps,
            tokenizer_fingerprint=tokenizer_fingerprint,
        )
        self.configure(drafter)
        return drafter

    def configure(self, drafter: Drafter) -> None:
        """See DrafterFamily.configure."""
        assert isinstance(drafter, Eagle3)
        drafter.detach_steps = self.detach_steps

    def settings(self) -> dict[str, object]:
        """See DrafterFamily.settings."""
        return {"family": "eagle3", **vars(self)}


def most_frequent(token_counts: Tensor, draft_vocab_size: int) -> Tensor:
    """The draft vocabulary: token_counts int64 [V] -> int64 [Vd] increasing, the most frequent tokens, ties to small
    ids.

    Raises ValueError when draft_vocab_size is below 1 or not below V.
    """
    if not 1 <= draft_vocab_size < len(token_counts):
        raise ValueError(
            f"draft_vocab_size is {draft_vocab_size}; it must be at least 1 and below the target's vocabulary of "
            f"{len(token_counts)}, or null for the full vocabulary"
        )
    order = torch.sort(token_counts, descending=True, stable=True).indices
    return order[:draft_vocab_size].sort().values

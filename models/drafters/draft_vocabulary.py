"""The tokens that a drafter can draft: all of the target's, or a few of them with ids of their own.

Owns the table from draft ids to target ids, and the token that is never drafted. Knows no head and no draft.

Shape legend: Vd draft vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from draftsmith.models.drafters.drafter_config import DrafterConfig
from draftsmith.models.target.bound_module import BoundModule


class DraftVocabulary(BoundModule):
    """The draft vocabulary of a drafter.

    Args:
        config: of the drafter.

    Attributes:
        d2t: int64 [Vd], what is added to each draft id to get its target id; None where all tokens of the target are drafted.
    """

    config: DrafterConfig

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__(config)
        if config.draft_vocab_size is not None and config.draft_vocab_size < config.vocab_size:
            self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.int64))
        else:
            self.d2t: Tensor | None = None

    @property
    def num_draft_tokens(self) -> int:
        """Vd: how many tokens it can draft."""
        return self.config.num_draft_tokens

    def draft_ids(self) -> Tensor:
        """Give the target token id of each draft token id.

        Returns:
            int64 [Vd].
        """
        size = self.config.vocab_size if self.d2t is None else self.d2t.shape[0]
        ids = torch.arange(size, device=self.device)
        return ids if self.d2t is None else ids + self.d2t

    def to_target_ids(self, draft_token_ids: Tensor) -> Tensor:
        """Map draft ids to target ids.

        Args:
            draft_token_ids: int64, any shape.

        Returns:
            int64, the same shape.
        """
        return draft_token_ids if self.d2t is None else draft_token_ids + self.d2t[draft_token_ids]

    def set_draft_ids(self, target_ids: Tensor) -> None:
        """Choose the draft vocabulary.

        Args:
            target_ids: int64 [Vd], strictly increasing.

        Raises:
            ValueError: the ids are not increasing, out of range, or of another number than ``config.draft_vocab_size``.
        """
        if self.d2t is None:
            raise ValueError("this drafter has the full vocabulary; set draft_vocab_size in its config first")
        if target_ids.shape != self.d2t.shape:
            raise ValueError(f"{tuple(target_ids.shape)} draft ids given, draft_vocab_size is {self.d2t.shape[0]}")
        if (
            bool((target_ids.diff() <= 0).any())
            or int(target_ids[0]) < 0
            or int(target_ids[-1]) >= self.config.vocab_size
        ):
            raise ValueError(f"draft ids must be strictly increasing and within [0, {self.config.vocab_size})")
        self.d2t.copy_(target_ids.to(self.d2t.device) - torch.arange(target_ids.shape[0], device=self.d2t.device))

    @property
    def mask_token(self) -> int | None:
        """The token of the target that stands for an empty slot, which is never drafted; None in most families."""
        return None

    def without_mask(self, logits: Tensor) -> Tensor:
        """Take the :attr:`mask_token` out of what can be drafted.

        The loss of training scores it like any other token, since no text has it.

        Args:
            logits: [..., Vd].

        Returns:
            The same, with minus infinity for that token.
        """
        if self.mask_token is None:
            return logits
        return logits.masked_fill(self.draft_ids() == self.mask_token, -torch.inf)

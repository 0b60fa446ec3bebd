"""The tokens that a drafter can draft, all of the target's or a few of them with ids of their own, and how it scores them.

Owns the table from draft ids to target ids, the token that is never drafted, and what output heads make of their inputs. Knows no family,
and no draft.

Shape legend: K draft steps, A anchors, E head inputs, Vd draft vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from draftsmith.models.drafters.drafter_config import DrafterConfig
from draftsmith.models.target.bound_module import BoundModule
from draftsmith.models.tree.shortlist import likeliest_alone


class ScoringModule(BoundModule):
    """A module that is bound to a target and scores draft tokens: the draft vocabulary and the output heads of a drafter.

    Args:
        config: of the drafter.

    Attributes:
        d2t: int64 [Vd], what is added to each draft id to get its target id; None where all tokens of the target are drafted.
    """

    config: DrafterConfig
    borrows_head: bool = False
    """Whether its output head is the target's own, which is no weight of the drafter."""

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

    @property
    def head_weight(self) -> Tensor:
        """[Vd, E]: the output head, where one serves every draft step. Such a family overrides this.

        Raises:
            ValueError: this family has a head for each step, or names no head at all.
        """
        name = type(self).__name__
        if self.has_one_head:
            raise ValueError(
                f"{name} overrides neither head_weight nor step_weight(step); override the one that fits its heads"
            )
        raise ValueError(f"{name} has a head for each step, so it has no head_weight; call step_weight(step)")

    def step_weight(self, step: int) -> Tensor:
        """The output head of one draft step. A family whose head differs from step to step overrides this.

        Args:
            step: counted from 0.

        Returns:
            [Vd, E].

        Raises:
            ValueError: a family with a head for each step does not override this.
        """
        return self.head_weight

    @property
    def has_one_head(self) -> bool:
        """Whether one output head serves every draft step."""
        return type(self).step_weight is ScoringModule.step_weight

    @property
    def correction_weight(self) -> Tensor | None:
        """[Vd, r]: a matrix beside the output head; None in most families.

        Where there is one, a head's inputs are [..., E + r], and its logits ``inputs[..., :E] @ head.T + inputs[..., E:] @ correction.T``.
        """
        return None

    @property
    def num_candidates(self) -> int | None:
        """How many tokens of each step can be drafted: the likeliest without the :attr:`correction_weight`. None in most families: all."""
        return None

    @property
    def has_confidence(self) -> bool:
        """Whether :meth:`confidence` says how likely a token will be accepted."""
        return False

    def confidence(self, head_inputs: Tensor, tokens: Tensor) -> Tensor:
        """Say how likely the target will accept what is drawn from a step, before it is drawn.

        Args:
            head_inputs: [..., E], as :meth:`Drafter.teacher_forced` gives them.
            tokens: int64 [...], target ids fed at these steps.

        Returns:
            [...], logits of the chances.

        Raises:
            ValueError: this family has no such head.
        """
        raise ValueError(f"{type(self).__name__} has no confidence head; ask has_confidence first")

    def logits(self, head_inputs: Tensor, step: int) -> Tensor:
        """Score one draft step.

        Args:
            head_inputs: [..., E], or [..., E + r] with a :attr:`correction_weight`.
            step: counted from 0.

        Returns:
            Draft logits [..., Vd].
        """
        weight, correction = self.step_weight(step), self.correction_weight
        if correction is None:
            return self.without_mask(F.linear(head_inputs.to(weight.dtype), weight))
        width = weight.shape[1]
        corrected = F.linear(head_inputs[..., width:].to(correction.dtype), correction)
        logits = self.without_mask(F.linear(head_inputs[..., :width].to(weight.dtype), weight))
        return corrected + (logits if self.num_candidates is None else likeliest_alone(logits, self.num_candidates))

    def rollout_logits(self, head_inputs_KAE: Tensor) -> Tensor:
        """Score all steps of a rollout.

        Args:
            head_inputs_KAE: what :meth:`Drafter.teacher_forced` gave.

        Returns:
            Draft logits [K, A, Vd].
        """
        if self.has_one_head:
            return self.logits(head_inputs_KAE, 0)
        return torch.stack([self.logits(inputs_AE, step) for step, inputs_AE in enumerate(head_inputs_KAE)])

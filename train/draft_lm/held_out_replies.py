"""The target's replies to held-out prompts, made once in a run.

Owns: which prompts still need a reply, the exchange between processes, and what a checkpoint keeps. Does not know: how the target answers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytorch_lightning as pl
import torch

from draftsmith.train.draft_lm.texts import DistilText
from draftsmith.train.run.collectives import sum_over_ranks, world_size


class HeldOutReplies:
    """Replies of the target by the number of their row.

    Attributes:
        by_row: token ids of each reply.
    """

    def __init__(self) -> None:
        self.by_row: dict[int, list[int]] = {}
        self._num_shared = 0

    def complete(
        self,
        texts: list[DistilText],
        answer: Callable[[list[list[int]]], list[list[int]]],
        answered: Callable[[DistilText, Sequence[int]], DistilText],
    ) -> list[DistilText]:
        """The texts, each with a reply.

        Args:
            texts: rows with or without a reply.
            answer: gives the target's replies to prompts; called once for each prompt of a run.
            answered: makes a row of a prompt and its reply.
        """
        missing = [text for text in texts if not text.has_reply and text.number not in self.by_row]
        if missing:
            replies = answer([text.ids for text in missing])
            self.by_row |= {text.number: reply for text, reply in zip(missing, replies, strict=True)}
        return [text if text.has_reply else answered(text, self.by_row[text.number]) for text in texts]

    def share(self, module: pl.LightningModule) -> None:
        """Gives every process the replies of all, if there are new ones: the first process writes the checkpoint. Collective."""
        num_new = torch.tensor(len(self.by_row) - self._num_shared, device=module.device)
        if world_size(module) > 1 and sum_over_ranks(module, num_new):
            gathered: list[dict[int, list[int]]] = [{} for _ in range(world_size(module))]
            torch.distributed.all_gather_object(gathered, self.by_row)
            self.by_row = {number: reply for replies in gathered for number, reply in replies.items()}
        self._num_shared = len(self.by_row)

    def saved(self, made_by: dict[str, Any]) -> dict[str, Any]:
        """What a checkpoint keeps.

        Args:
            made_by: what the replies depend on besides the prompts.
        """
        return {"made_by": made_by, "replies": dict(self.by_row)}

    def restore(self, saved: dict[str, Any], made_by: dict[str, Any]) -> None:
        """Takes a checkpoint's replies, if the target would give the same ones now.

        Args:
            saved: from `saved`; empty in checkpoints of earlier versions.
            made_by: what replies of this run depend on.
        """
        if saved.get("made_by") == made_by:
            self.by_row = dict(saved["replies"])
            self._num_shared = len(self.by_row)

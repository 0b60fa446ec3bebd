"""Validation by decoding held-out prompts, for draft heads and for draft LMs.

Owns: the rounds of batches, and what a checkpoint keeps of them. Does not know: which drafter decodes, metrics, the clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.utilities.rank_zero import rank_zero_info

from draftsmith.decode.batch import Generation
from draftsmith.decode.engine import Engine
from draftsmith.decode.sampling import GenerationSettings
from draftsmith.train.drafter_callbacks.decode_budget import DecodeBudget


class DecodeValidation(pl.Callback):
    """What validations of draft heads and of draft LMs share: how many prompts they decode, and for how long.

    Args:
        num_prompts: at most so many prompts.
        batch_size: prompts decoded together.
        time_share: see DecodeBudget.

    Raises:
        ValueError: a number out of range.
    """

    def __init__(self, num_prompts: int, batch_size: int, time_share: float | None) -> None:
        if min(num_prompts, batch_size) < 1:
            raise ValueError(f"num_prompts is {num_prompts} and batch_size {batch_size}; both must be at least 1")
        self.num_prompts, self.batch_size = num_prompts, batch_size
        self.budget = DecodeBudget(time_share)

    def state_dict(self) -> dict[str, Any]:
        """How many batches of prompts a validation decodes, once that is known: a resumed run decodes the same."""
        return {"rounds": self.budget.rounds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See state_dict. Checkpoints of earlier versions may hold nothing."""
        self.budget.rounds = state_dict.get("rounds")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Training time counts from here."""
        self.budget.start_training()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Training time counts to here."""
        self.budget.stop_training()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Training time counts from here to the next validation."""
        self.budget.start_training()

    def decode(
        self,
        trainer: pl.Trainer,
        engine: Engine,
        prompts: Sequence[list[int]],
        own: Sequence[int],
        settings: GenerationSettings,
    ) -> list[Generation]:
        """Replies to this process's prompts, until all are there or the time is up. Collective.

        Where the time decides, prompts are decoded batch after batch. Later validations know how many there will be: a prompt that waits
        takes the row of one that has ended.

        Args:
            trainer: of the run.
            engine: decodes.
            prompts: token ids of all prompts.
            own: the numbers of this process's prompts; each also chooses the noise that its prompt draws.
            settings: of each reply.
        """
        self.budget.start_decoding()
        generations: list[Generation] = []
        # All processes go through the same number of rounds: the first has the most prompts.
        rounds = trainer.strategy.broadcast(-(-len(own) // self.batch_size))
        known = self.budget.known_rounds(trainer, rounds)
        if known is not None:
            chosen = list(own[: known * self.batch_size])
            return engine.generate(
                [prompts[place] for place in chosen], settings, request_ids=chosen, num_rows=self.batch_size
            )
        for number in range(rounds):
            batch = own[number * self.batch_size : (number + 1) * self.batch_size]
            if batch:
                generations += engine.generate([prompts[place] for place in batch], settings, request_ids=list(batch))
            if self.budget.is_used_up(trainer):
                break
        self.budget.rounds = number + 1
        if number + 1 < rounds:
            rank_zero_info(
                f"each validation decodes {(number + 1) * self.batch_size} of {len(own)} prompts a process; more would take over "
                f"{100 * (self.budget.share or 0.0):g} % of the training time (time_share of {type(self).__name__})"
            )
        return generations

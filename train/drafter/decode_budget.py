"""Validation by decoding held-out prompts: as many as its share of the training time allows.

Owns: the clock, the decision, the rounds of batches, what a checkpoint keeps of them. Does not know: which drafter decodes, metrics.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.utilities.rank_zero import rank_zero_info

from draftsmith.decode.batch import Generation
from draftsmith.decode.engine import Engine
from draftsmith.decode.sampling import GenerationSettings


class DecodeBudget:
    """Lets the first validation decode round after round until its time is up; later ones decode as many rounds.

    The same prompts every time: only so can validations be compared with each other. A resumed run keeps the number too.

    Args:
        share: decoding seconds per training second since the last validation; None for no limit.

    Raises:
        ValueError: a share that is not above 0 and at most 1.
    """

    def __init__(self, share: float | None) -> None:
        if share is not None and not 0.0 < share <= 1.0:
            raise ValueError(f"time_share is {share}; it must be above 0 and at most 1, or null for no limit")
        self.share = share
        self.rounds: int | None = None
        self._training_since = self._trained = self._deadline = 0.0

    def start_training(self) -> None:
        """The clock of the training time starts: at the start of a fit, and at the end of each validation."""
        self._training_since = time.perf_counter()

    def stop_training(self) -> None:
        """Validation begins: how much has been trained says how long it may decode."""
        self._trained = time.perf_counter() - self._training_since

    def start_decoding(self) -> None:
        """The clock of the decoding time starts."""
        self._deadline = time.perf_counter() + (self.share or 0.0) * self._trained

    def is_used_up(self, trainer: pl.Trainer, rounds: int) -> bool:
        """Whether decoding ends after so many rounds. The first process decides for all. Collective."""
        if not self._limits(trainer):
            return False
        if self.rounds is not None:
            return rounds >= self.rounds
        return trainer.strategy.broadcast(time.perf_counter() >= self._deadline)

    def settle(self, trainer: pl.Trainer, rounds: int) -> bool:
        """Keeps the number of rounds for all later validations; whether it was open until now."""
        is_open = self.rounds is None and self._limits(trainer)
        if is_open:
            self.rounds = rounds
        return is_open

    def _limits(self, trainer: pl.Trainer) -> bool:
        return self.share is not None and trainer.state.fn == "fit" and not trainer.sanity_checking


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
        """Replies to this process's prompts, batch after batch, until all are there or the time is up. Collective.

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
        for number in range(rounds):
            batch = own[number * self.batch_size : (number + 1) * self.batch_size]
            if batch:
                generations += engine.generate([prompts[place] for place in batch], settings, request_ids=list(batch))
            if self.budget.is_used_up(trainer, number + 1):
                break
        if self.budget.settle(trainer, number + 1) and number + 1 < rounds:
            rank_zero_info(
                f"each validation decodes {(number + 1) * self.batch_size} of {len(own)} prompts a process; more would take over "
                f"{100 * (self.budget.share or 0.0):g} % of the training time (time_share of {type(self).__name__})"
            )
        return generations

"""How many prompts a validation may decode: as many as its share of the training time allows.

Owns: the clock and the decision. Does not know: decoding, prompts, metrics.
"""

from __future__ import annotations

import time

import pytorch_lightning as pl


class DecodeBudget:
    """Lets the first validation decode round after round until its time is up; later ones decode as many rounds.

    Every validation decodes the same prompts, so that their results can be compared. A resumed run keeps the number too.

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
        """Called when a validation begins. The training time so far decides how long it may decode."""
        self._trained = time.perf_counter() - self._training_since

    def start_decoding(self) -> None:
        """The clock of the decoding time starts."""
        self._deadline = time.perf_counter() + (self.share or 0.0) * self._trained

    def known_rounds(self, trainer: pl.Trainer, most: int) -> int | None:
        """How many rounds this validation decodes, where that is known before it begins.

        Args:
            trainer: of the run.
            most: rounds that there are.

        Returns:
            The number; None where the time decides.
        """
        if not self._limits(trainer):
            return most
        return None if self.rounds is None else min(self.rounds, most)

    def is_used_up(self, trainer: pl.Trainer) -> bool:
        """Whether the time is up. The first process decides for all. Collective.

        Args:
            trainer: of the run.
        """
        return trainer.strategy.broadcast(time.perf_counter() >= self._deadline)

    def _limits(self, trainer: pl.Trainer) -> bool:
        return self.share is not None and trainer.state.fn == "fit" and not trainer.sanity_checking

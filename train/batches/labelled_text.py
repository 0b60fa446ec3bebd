"""What a run learns from, in a few lines: labelled tokens, how many of them are distinct, what a draft vocabulary would save.

Owns: the words. Does not know: where the tokens are, what learns from them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

COUNTED_SAMPLES = 4096
"""Labelled tokens are counted in at most so many samples: enough to tell their distribution, and seconds to read."""
COVERED = 0.99
"""A draft vocabulary is proposed that has this share of the labelled tokens."""


@dataclass(frozen=True)
class LabelledText:
    """The labelled tokens of a run's training split.

    Attributes:
        counts_V: how often each token of the vocabulary is labelled, int64.
        num_samples: samples to train on, over all processes.
        num_counted: how many of them `counts_V` is about.
        samples_are: what a sample is called, in the plural.
        draft_vocabulary: how large the draft vocabulary is; the target's own size where it can still be chosen; None where there is none to
            choose.
        remarks: more lines.
        validation_share: tokens that validation reads, over those that training reads before it; None where batches tell.
    """

    counts_V: Tensor
    num_samples: int
    num_counted: int
    samples_are: str = "samples"
    draft_vocabulary: int | None = None
    remarks: tuple[str, ...] = ()
    validation_share: float | None = None

    def lines(self) -> list[str]:
        """What a run prints of it at its start."""
        labelled, distinct = int(self.counts_V.sum()), int((self.counts_V > 0).sum())
        part = "" if self.num_counted == self.num_samples else f"; counted in {self.num_counted} of them"
        text = (
            f"it trains on {self.num_samples} {self.samples_are} with {labelled} labelled tokens, {distinct} distinct of a vocabulary of "
            f"{len(self.counts_V)}{part}"
        )
        whole_head = self.draft_vocabulary == len(self.counts_V)
        return [text, *(_draft_vocabulary(self.counts_V) if whole_head and labelled else []), *self.remarks]


@runtime_checkable
class HasLabelledText(Protocol):
    """A training module that can say what it learns from."""

    def labelled_text(self) -> LabelledText:
        """Called at the start of a fit, by the first process."""
        ...


def _draft_vocabulary(counts_V: Tensor) -> list[str]:
    """The power of two that covers enough of the labelled tokens, where it halves the head at least. counts_V: int64."""
    covered_V = counts_V.sort(descending=True).values.cumsum(0) / counts_V.sum()
    least = int((covered_V < COVERED).sum()) + 1
    size = 1 << (least - 1).bit_length()
    if 2 * size > len(counts_V):
        return [
            f"a draft vocabulary would save little: {least} tokens are needed for {100 * COVERED:g} % of the labelled ones"
        ]
    return [
        f"draft_vocab_size {size} would make the drafter's head {len(counts_V) / size:.1f} times smaller and hold "
        f"{100 * float(covered_V[size - 1]):.1f} % of the labelled tokens"
    ]

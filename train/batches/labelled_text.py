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

COVERED_HELD_OUT = 0.95
"""A draft vocabulary that is chosen by coverage holds this share of the held-out tokens at least."""


@dataclass(frozen=True)
class VocabularyRule:
    """From which size on a vocabulary is large, and how many of its tokens are then enough (FR-Spec, arXiv:2502.14856).

    Attributes:
        above: larger vocabularies get a proposal.
        size: of the draft vocabulary.
    """

    above: int = 65_536
    size: int = 32_768

    def size_for(self, vocab_size: int) -> int | None:
        """How large a draft vocabulary should be; None keeps the whole one.

        Args:
            vocab_size: V, the target's.
        """
        return self.size if vocab_size > self.above and self.size < vocab_size else None


LARGE = VocabularyRule()


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
        held_out_V: as counts_V, of the held-out samples; None where nothing is held out.
        rule: which vocabularies are large.
    """

    counts_V: Tensor
    num_samples: int
    num_counted: int
    samples_are: str = "samples"
    draft_vocabulary: int | None = None
    remarks: tuple[str, ...] = ()
    validation_share: float | None = None
    held_out_V: Tensor | None = None
    rule: VocabularyRule = LARGE

    def lines(self) -> list[str]:
        """What a run prints of it at its start."""
        labelled, distinct = int(self.counts_V.sum()), int((self.counts_V > 0).sum())
        part = "" if self.num_counted == self.num_samples else f"; counted in {self.num_counted} of them"
        text = (
            f"it trains on {self.num_samples} {self.samples_are} with {labelled} labelled tokens, {distinct} distinct of a vocabulary of "
            f"{len(self.counts_V)}{part}"
        )
        whole_head = self.draft_vocabulary == len(self.counts_V)
        return [text, *(self._proposal() if whole_head and labelled else []), *self.remarks]

    def _proposal(self) -> list[str]:
        """For a drafter that scores the whole vocabulary: a smaller one, and how to say yes."""
        size = self.rule.size_for(len(self.counts_V))
        if size is None:
            return _draft_vocabulary(self.counts_V)
        held = coverage(self.counts_V, self.held_out_V, size)
        return [
            f"this drafter scores all {len(self.counts_V)} tokens of the target; the {size} that are labelled most often {held}, and would "
            f"make its head {len(self.counts_V) / size:.1f} times smaller; to take them, set model.init_args.draft_vocabulary to auto"
        ]


@runtime_checkable
class HasLabelledText(Protocol):
    """A training module that can say what it learns from."""

    def labelled_text(self) -> LabelledText:
        """Called at the start of a fit, by the first process."""
        ...


def covering_size(counts_V: Tensor, held_out_V: Tensor, share: float) -> int | None:
    """The smallest power of two, of the most frequent tokens of the training text, that holds a share of the held-out text.

    Little text has few distinct tokens, and covers itself with any draft vocabulary. So held-out text decides.

    Args:
        counts_V: how often each token is labelled in the training text, int64.
        held_out_V: the same in the held-out text, int64.
        share: at least so much of it must be held, as 0.95.

    Returns:
        The size; None where half the vocabulary is not enough, so the whole one it must be.
    """
    order = counts_V.sort(descending=True, stable=True).indices
    held = held_out_V[order].cumsum(0).double() / max(1, int(held_out_V.sum()))
    size = 1
    while size <= len(counts_V) // 2:
        if float(held[size - 1]) >= share:
            return size
        size *= 2
    return None


def coverage(counts_V: Tensor, held_out_V: Tensor | None, size: int) -> str:
    """What a draft vocabulary holds. Example: `hold 99.1 % of the labelled tokens and 98.7 % of the held-out ones`.

    Args:
        counts_V: how often each token is labelled in the training text, int64.
        held_out_V: the same in the held-out text, int64; None where there is none.
        size: of the draft vocabulary, the most frequent tokens of the training text.
    """
    kept = counts_V.sort(descending=True, stable=True).indices[:size]
    own = f"hold {_share(counts_V, kept)} of the labelled tokens"
    if held_out_V is None or not int(held_out_V.sum()):
        return own
    return f"{own} and {_share(held_out_V, kept)} of the held-out ones"


def _share(counts_V: Tensor, kept: Tensor) -> str:
    # In whole numbers: a share of 99.96 % must not read as all.
    tenths = int(1000 * counts_V[kept].sum() // max(1, int(counts_V.sum())))
    return f"{tenths / 10:.1f} %"


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

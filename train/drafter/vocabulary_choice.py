"""Which tokens a fresh drafter can draft, and what a run says of that at its start.

Owns: the ways to choose a draft vocabulary from the labelled tokens. Does not know: how tokens are counted, drafters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from draftsmith.train.batches.data_module import CacheDataModule
from draftsmith.train.batches.labelled_text import (
    COUNTED_SAMPLES,
    COVERED_HELD_OUT,
    LARGE,
    LabelledText,
    VocabularyRule,
    coverage,
    covering_size,
)
from draftsmith.train.drafter.family_settings import most_frequent


@dataclass(frozen=True)
class VocabularyChoice:
    """How a run's draft vocabulary is chosen.

    Attributes:
        way: `auto` or `covering`, see `DraftModule`; None takes ``size``.
        size: that the drafter's settings name; None for the whole vocabulary.
        rule: which vocabularies are large.
    """

    way: Literal["auto", "covering"] | None
    size: int | None
    rule: VocabularyRule = LARGE

    def check(self, init_from: Path | None) -> None:
        """Check that one setting alone names a draft vocabulary.

        Args:
            init_from: of the run; the drafter there has a vocabulary already.

        Raises:
            ValueError: two do.
        """
        if self.way is None or (init_from is None and self.size is None):
            return
        other = f"draft_vocab_size {self.size}" if init_from is None else f"init_from {init_from}"
        raise ValueError(f"draft_vocabulary is {self.way!r}, and {other} says it too; leave one of the two null")

    def token_ids(self, data: CacheDataModule, vocab_size: int) -> Tensor | None:
        """The tokens of the draft vocabulary.

        Args:
            data: of the run.
            vocab_size: V, the target's.

        Returns:
            int64 [Vd], increasing; None for all tokens.

        Raises:
            ValueError: a size out of range, or nothing held out that a vocabulary could cover.
        """
        size = self.size
        if self.way == "auto":
            size = self.rule.size_for(vocab_size)
        elif self.way == "covering":
            size = _covering(data, vocab_size)
        return None if size is None else most_frequent(data.token_counts(vocab_size), size)

    def labelled_text(
        self, data: CacheDataModule, vocab_size: int, size: int, is_new: bool, remarks: Sequence[str]
    ) -> LabelledText:
        """What the run learns from, counted in a part of a large cache.

        Args:
            data: of the run.
            vocab_size: V, the target's.
            size: Vd, the drafter's.
            is_new: the drafter begins with this run.
            remarks: more lines.
        """
        counts, counted, samples = data.sampled_token_counts(vocab_size, COUNTED_SAMPLES)
        held_out = data.held_out_token_counts(vocab_size, COUNTED_SAMPLES)
        chosen = []
        if self.way is not None and size < vocab_size:
            chosen = [
                f"its draft vocabulary is chosen: the {size} most frequent tokens {coverage(counts, held_out, size)}"
            ]
        elif self.way is not None:
            chosen = [f"its draft vocabulary is whole: {self._why_whole(vocab_size)}"]
        return LabelledText(
            counts,
            samples,
            counted,
            draft_vocabulary=size if is_new and self.way is None else None,
            remarks=(*chosen, *remarks),
            held_out_V=held_out,
            rule=self.rule,
        )

    def _why_whole(self, vocab_size: int) -> str:
        if self.way == "covering":
            return f"no half of its {vocab_size} tokens holds {100 * COVERED_HELD_OUT:g} % of the held-out ones"
        return f"{vocab_size} tokens are not above {self.rule.above}"


def _covering(data: CacheDataModule, vocab_size: int) -> int | None:
    """How many tokens hold enough of the held-out text; None for all."""
    held_out_V = data.held_out_token_counts(vocab_size, COUNTED_SAMPLES)
    if held_out_V is None or not bool(held_out_V.any()):
        raise ValueError(
            "draft_vocabulary is 'covering', which counts the tokens of held-out samples, and none is held out; give val_cache or a "
            "val_fraction above 0"
        )
    return covering_size(data.sampled_token_counts(vocab_size, COUNTED_SAMPLES)[0], held_out_V, COVERED_HELD_OUT)

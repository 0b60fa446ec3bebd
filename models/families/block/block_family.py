"""Block drafters as a family: the settings that a training run names, and the record.

Owns both. The drafter is in `block_drafter.py`.
"""

from __future__ import annotations

import logging
from typing import Literal

from torch import Tensor

from draftsmith.models.drafters.drafter import Drafter
from draftsmith.models.drafters.family import About, DrafterFamily, Family
from draftsmith.models.families.block.block_config import CANDIDATES, CORRECTION_RANK, CORRECTION_STATE, BlockConfig
from draftsmith.models.families.block.block_correction import CorrectionKind
from draftsmith.models.families.block.block_drafter import BlockDrafter
from draftsmith.models.target.target import TargetEnds

_LOG = logging.getLogger(__name__)


class BlockFamily(DrafterFamily):
    """A block drafter: all tokens of a draft in one pass of a few layers (DFlash, arXiv 2602.06036). `num_steps` sets its block.

    Args:
        num_draft_layers: decoder layers of the drafter.
        layers: names of the target's layers to read, low to high; null takes as many as the drafter has layers, spread evenly.
        mask: which slots of its block a slot sees: all, or with `causal` those before it.
        sample_from_anchor: the slot of the root predicts the first drafted token, as in DSpark; false leaves it out, as in DFlash.
        mask_token_id: an unused token whose embedding fills the slots behind the root, which serving engines ask for; null
            learns a vector.
        correction: how a drafted token changes the logits of the next slot: not at all; by a bigram (`vanilla`), one that the
            slot weighs (`gated`) or a recurrent state (`recurrent`), as in DSpark; by a GRU over all drafted tokens
            (`gru`), as in Domino; or among a slot's likeliest tokens (`selector`), as in DFlash 2. `lookaround` reads no drafted
            token: a slot looks at what its neighbours would say.
        correction_rank: of the correction's matrices; small targets need less.
        correction_state: size of the GRU's state.
        confidence: a head learns how likely each token will be accepted, as in DSpark. Shapes such as `1x7e0.5s0` end drafts where
            it is below that number. The cache must hold last.pre_norm.
        confidence_with_markov: that head reads the token before the slot, where the correction is a Markov head; false leaves it out.
        draft_vocab_size: score only this many tokens, the most frequent labelled ones of the training samples, with
            their rows of the target's head; null scores all.
        recompute: compute each layer's activations again in the backward pass: less memory, more time.
        convolution: each layer has DFlash 2's convolution over the slots around its attention and its MLP.
        candidates: with `selector`, how many tokens of a slot can be drafted.
        sliding_window: every layer sees only so many of the last tokens, which keeps long texts cheap; null for all.
        window_from_root: the window is so many tokens before the root, and the block, as in the speculators package; false counts
            from each slot, as engines do.
    """

    kind = BlockDrafter

    def __init__(
        self,
        num_draft_layers: int = 1,
        layers: list[str] | None = None,
        mask: Literal["bidirectional", "causal"] = "bidirectional",
        sample_from_anchor: bool = False,
        mask_token_id: int | None = None,
        correction: CorrectionKind = "none",
        correction_rank: int = CORRECTION_RANK,
        correction_state: int = CORRECTION_STATE,
        draft_vocab_size: int | None = None,
        recompute: bool = False,
        confidence: bool = False,
        convolution: bool = False,
        candidates: int = CANDIDATES,
        sliding_window: int | None = None,
        confidence_with_markov: bool = True,
        window_from_root: bool = False,
    ) -> None:
        self.confidence_with_markov = confidence_with_markov
        self.sliding_window, self.window_from_root = sliding_window, window_from_root
        self.convolution, self.candidates = convolution, candidates
        self.num_draft_layers, self.layers, self.mask = num_draft_layers, layers, mask
        self.sample_from_anchor, self.mask_token_id = sample_from_anchor, mask_token_id
        self.correction, self.correction_rank, self.correction_state = correction, correction_rank, correction_state
        self.draft_vocab_size, self.recompute, self.confidence = draft_vocab_size, recompute, confidence

    def build(
        self, ends: TargetEnds, draft_token_ids: Tensor | None, num_steps: int, tokenizer_fingerprint: str
    ) -> BlockDrafter:
        """See DrafterFamily.build.

        Raises:
            ValueError: sizes that do not fit the target.
        """
        self._say_what_is_unused()
        drafter = BlockDrafter.for_target(
            ends,
            layers=self.layers,
            num_draft_layers=self.num_draft_layers,
            causal=self.causal,
            sample_from_anchor=self.sample_from_anchor,
            mask_token_id=self.mask_token_id,
            correction=self.correction,
            correction_rank=self.correction_rank,
            correction_state=self.correction_state,
            confidence=self.confidence,
            confidence_with_markov=self.confidence_with_markov,
            convolution=self.convolution,
            candidates=self.candidates,
            sliding_window=self.sliding_window,
            sliding_layers=[] if self.sliding_window is None else list(range(self.num_draft_layers)),
            window_from_root=self.window_from_root,
            draft_token_ids=draft_token_ids,
            num_draft_steps=num_steps,
            tokenizer_fingerprint=tokenizer_fingerprint,
        )
        self.configure(drafter)
        return drafter

    @property
    def causal(self) -> bool:
        """Whether a slot sees only those before it."""
        return self.mask == "causal"

    def _say_what_is_unused(self) -> None:
        """Say which sizes of a correction belong to another kind of it."""
        unused = []
        if self.correction == "none" and self.correction_rank != CORRECTION_RANK:
            unused.append(f"correction_rank {self.correction_rank}")
        if self.correction != "gru" and self.correction_state != CORRECTION_STATE:
            unused.append(f"correction_state {self.correction_state}")
        if unused:
            _LOG.warning("%s: not used, for correction %r has no such size", " and ".join(unused), self.correction)

    def configure(self, drafter: Drafter) -> None:
        """See DrafterFamily.configure."""
        assert isinstance(drafter, BlockDrafter)
        drafter.recompute = self.recompute


FAMILY = Family(
    name="blockdrafter",
    drafter=BlockDrafter,
    config=BlockConfig,
    settings=BlockFamily,
    about=About(
        title="Block drafter",
        what="A few decoder layers that draft all tokens in one pass ([DFlash](https://arxiv.org/abs/2602.06036))",
        reads="hidden states of several layers",
    ),
    layouts=("draftsmith.export.layouts.block.dflash", "draftsmith.export.layouts.block.speculators"),
)

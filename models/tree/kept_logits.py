"""What a drafter said while a chain was drafted, kept beside the chain.

Owns the recording. Verification that compares the two distributions reads it; lossless verification never does.

Shape legend: B batch rows, M nodes continued at once (1 in a chain), L drafted tokens, V target vocabulary.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from draftsmith.models.tree.sampled_search import over_target
from draftsmith.models.tree.search import ConfidentExpander, Expander
from draftsmith.models.tree.tree import DraftTree


class KeptLogits:
    """An expander that passes every call to another one and keeps its logits.

    Args:
        inner: the expander that continues the nodes.

    Attributes:
        logits: float [B, M, Vd] of each layer so far.
    """

    def __init__(self, inner: Expander) -> None:
        self.inner = inner
        self.logits: list[Tensor] = []

    @property
    def root_B(self) -> Tensor:
        """See :class:`Expander`."""
        return self.inner.root_B

    def begin(self) -> Tensor:
        """See :class:`Expander`."""
        return self._kept(self.inner.begin())

    def extend(self, tokens_BM: Tensor, above_BM: Tensor) -> Tensor:
        """See :class:`Expander`."""
        return self._kept(self.inner.extend(tokens_BM, above_BM))

    def target_ids(self, draft_ids: Tensor) -> Tensor:
        """See :class:`Expander`."""
        return self.inner.target_ids(draft_ids)

    def acceptance(self) -> Tensor | None:
        """See :class:`ConfidentExpander`."""
        return self.inner.acceptance() if isinstance(self.inner, ConfidentExpander) else None

    def onto(self, chain: DraftTree, vocab_size: int) -> DraftTree:
        """Add the recorded distributions to a chain.

        Args:
            chain: the chain that was drafted.
            vocab_size: V, of the target.

        Returns:
            The chain with ``draft_probs_BMV`` float32 [B, L, V]; entry l is the distribution of the token behind node l.
        """
        probs_BLV = over_target(self.inner, torch.cat(self.logits, dim=1).float().softmax(-1), vocab_size)
        return replace(chain, draft_probs_BMV=probs_BLV[:, : chain.num_nodes - 1])

    def _kept(self, logits_BMV: Tensor) -> Tensor:
        self.logits.append(logits_BMV)
        return logits_BMV

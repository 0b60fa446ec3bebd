"""Phrases: what the target said behind drafted tokens that it rejected, kept a while, and where phrases may hang on a draft.

Owns the ring of such phrases (Ouroboros, arXiv:2402.13720), the tokens before a drafted node, and which leaves are the best. The lookup
is in :mod:`draftsmith.models.composed.suffixes`. Knows no drafter and no vocabulary.

Shape legend: B batch rows, N tree nodes, M leaves, T text slots, W compared tokens, R slots of a ring, S slots of a phrase.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from draftsmith.models.composed.suffixes import GAP
from draftsmith.models.slots.constants import counting
from draftsmith.models.slots.slot_cache import KeptRows
from draftsmith.models.tree.tree import DraftTree


@dataclass(frozen=True)
class PhraseRing:
    """The latest phrases of each row, one behind the other with a gap between; new ones take the place of the oldest.

    Attributes:
        tokens_BR: int64.
        ends_B: int64, the slot that the next token goes to.
    """

    tokens_BR: Tensor
    ends_B: Tensor

    @classmethod
    def empty(cls, num_rows: int, size: int, device: torch.device) -> PhraseRing:
        """Rings without a phrase.

        Args:
            num_rows: B.
            size: R.
            device: where they lie.
        """
        return cls(
            torch.full((num_rows, size), GAP, dtype=torch.int64, device=device),
            torch.zeros(num_rows, dtype=torch.int64, device=device),
        )

    def select_rows(self, kept: KeptRows) -> PhraseRing:
        """Keep some batch rows only.

        Args:
            kept: which rows, and where they go.

        Returns:
            The rings of these rows.
        """
        return PhraseRing(self.tokens_BR[kept.index], self.ends_B[kept.index])

    def with_phrases(self, phrases_BNS: Tensor) -> PhraseRing:
        """Add phrases.

        Args:
            phrases_BNS: int64, filled up with :data:`GAP`; those that begin with it are none.

        Returns:
            The rings with the phrases and a gap behind each. Of more tokens than a ring has slots, the first ones are added.
        """
        size = self.tokens_BR.shape[1]
        tokens_BNS = F.pad(phrases_BNS, (0, 1), value=GAP)
        is_token_BNS = tokens_BNS >= 0
        # A gap belongs to a phrase where a token is before it.
        is_written_BNS = is_token_BNS | F.pad(is_token_BNS[..., :-1], (1, 0))
        is_written_BX = is_written_BNS.flatten(1)
        place_BX = is_written_BX.long().cumsum(1) - 1
        is_written_BX = is_written_BX & (place_BX < size)
        slot_BX = torch.where(is_written_BX, (self.ends_B[:, None] + place_BX) % size, size)
        tokens_BR = F.pad(self.tokens_BR, (0, 1)).scatter(1, slot_BX, tokens_BNS.flatten(1))[:, :size]
        return PhraseRing(tokens_BR, (self.ends_B + is_written_BX.sum(1)) % size)


def rejected_phrases(tree: DraftTree, choices_BN: Tensor, num_slots: int) -> Tensor:
    """What the target said behind rejected tokens of a draft, as far as the draft held its next token in turn.

    A phrase begins at a drafted token that the target did not choose, and follows the target's own choices from there. It ends with the
    first choice that the draft does not hold. One that holds nothing but the rejected token and one choice is left out.

    Args:
        tree: a verified draft.
        choices_BN: int64, the target's choice behind each node.
        num_slots: S.

    Returns:
        int64 [B, N, S], the phrase that begins at each node, filled up with :data:`GAP`.

    Example:
        root, children 5 and 7 of it, 8 below 7; the target chose 5 at the root, 8 behind 7 and 9 behind 8: the phrase 7 8 9.
    """
    N, device = tree.num_nodes, tree.tokens_BN.device
    is_drafted_BN = tree.valid_BN & (tree.depths_BN > 0)
    parent_BN = tree.parents_BN.clamp(min=0)
    agrees_BN = is_drafted_BN & (tree.tokens_BN == choices_BN.gather(1, parent_BN))
    # Siblings differ, so that at most one child of a node agrees. Column N takes those that do not; it follows itself.
    columns_BN = torch.where(agrees_BN, parent_BN, N)
    none_BX = torch.full_like(F.pad(parent_BN, (0, 1)), N)
    next_BX = none_BX.scatter(1, columns_BN, torch.where(agrees_BN, counting(N, device), N))
    choices_BX = F.pad(choices_BN, (0, 1), value=GAP)
    begins_BN = is_drafted_BN & ~agrees_BN & (next_BX[:, :N] < N)
    at_BN = torch.where(begins_BN, counting(N, device), N)
    parts = [torch.where(begins_BN, tree.tokens_BN, GAP)]
    for _ in range(num_slots - 1):
        parts.append(choices_BX.gather(1, at_BN))
        at_BN = next_BX.gather(1, at_BN)
    return torch.stack(parts, dim=-1)


def best_leaves(tree: DraftTree, count: int) -> tuple[Tensor, Tensor]:
    """The leaves with the best scores.

    Args:
        tree: with scores.
        count: M, of at most the tree's nodes.

    Returns:
        int64 [B, M], nodes; float [B, M], their scores, minus infinity where a row has fewer leaves.
    """
    assert tree.scores_BN is not None
    is_child_BN = (tree.valid_BN & (tree.depths_BN > 0)).int()
    children_BN = torch.zeros_like(is_child_BN).scatter_add(1, tree.parents_BN.clamp(min=0), is_child_BN)
    scores_BN = tree.scores_BN.masked_fill(~tree.valid_BN | (children_BN > 0), -torch.inf)
    scores_BM, leaf_BM = scores_BN.topk(count, dim=1)
    return leaf_BM, scores_BM


def tails_of(tree: DraftTree, nodes_BM: Tensor, text_BT: Tensor, roots_B: Tensor, count: int) -> Tensor:
    """The tokens that end at some nodes: those of the draft, and before them those of the text.

    Args:
        tree: the draft.
        nodes_BM: int64, which nodes.
        text_BT: int64, the text that the draft hangs on.
        roots_B: int64, the slot of the root in the text.
        count: W.

    Returns:
        int64 [B, M, W], the node's own token first; negative before the beginning of the text.
    """
    padded_BX = F.pad(text_BT, (count, 0), value=GAP)
    depth_BM, at_BM, parts = tree.depths_BN.gather(1, nodes_BM), nodes_BM, []
    for back in range(count):
        slot_BM = (roots_B[:, None] + depth_BM - back + count).clamp(min=0, max=padded_BX.shape[1] - 1)
        of_draft_BM = tree.tokens_BN.gather(1, at_BM)
        parts.append(torch.where(depth_BM >= back, of_draft_BM, padded_BX.gather(1, slot_BM)))
        at_BM = tree.parents_BN.gather(1, at_BM).clamp(min=0)
    return torch.stack(parts, dim=-1)

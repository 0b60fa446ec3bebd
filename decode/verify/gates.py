"""Gates: several drafted tokens in a row stand together, or none of them by a lossy rule.

Owns which stretches stand. A rejection in the middle of text in a foreign wording leaves a mixture of two
wordings, in which small targets err. A gate avoids mixtures: a line, or the rest of the reply, is taken over whole or is
verified losslessly. Knows no rule.

Shape legend: B batch rows, N nodes of a chain, S stretches (N at most), K tokens that end a line.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from draftsmith.models.tree.tree import DraftTree


@dataclass(frozen=True)
class Gate:
    """Allowed tokens of a stretch stand only where the whole stretch stands and ends within the draft.

    Attributes:
        line_ends_K: int64, the tokens that end a line, with which each stretch ends; None for one stretch that ends with the reply.
        veto: whether the target's own tokens must be allowed by the rule too, or else the stretch falls.
    """

    line_ends_K: Tensor | None
    veto: bool

    def kept(
        self,
        tree: DraftTree,
        matches_BN: Tensor,
        allowed_BN: Tensor,
        approved_BN: Tensor,
        eos_token_ids: Sequence[int],
    ) -> Tensor:
        """Which allowed tokens stand.

        Args:
            tree: a chain.
            matches_BN: bool, tokens that the target would choose.
            allowed_BN: bool, tokens that may stand although the target would choose others.
            approved_BN: bool, what the rule says of every token; asked only with a veto.
            eos_token_ids: tokens that end a reply. No rule speaks of them.

        Returns:
            bool [B, N]; nobody reads the root's entry.

        Example:
            the chain 5 6 NEWLINE 7 8 with 6 and 7 allowed and the others the target's own: with a gate of lines 6 stands. 7 does not,
            because its line does not end within the draft.
        """
        ends_BN = torch.zeros_like(matches_BN)
        for token in eos_token_ids:
            ends_BN = ends_BN | (tree.tokens_BN == token)
        approved_BN = approved_BN | ends_BN
        own_BN = matches_BN & approved_BN if self.veto else matches_BN
        stands_BN = (own_BN | allowed_BN) & tree.valid_BN
        closes_BN = ends_BN
        if self.line_ends_K is not None:
            closes_BN = closes_BN | (tree.tokens_BN[..., None] == self.line_ends_K).any(-1)
        # The root stands already, and whatever it ends has ended.
        falls_BN, closes_BN = (~stands_BN).long(), (closes_BN & tree.valid_BN).long()
        falls_BN[:, 0] = closes_BN[:, 0] = 0
        stretch_BN = closes_BN.cumsum(1) - closes_BN
        zeros_BN = torch.zeros_like(stretch_BN)
        falls_BS = zeros_BN.scatter_add(1, stretch_BN, falls_BN)
        closed_BS = zeros_BN.scatter_add(1, stretch_BN, closes_BN)
        whole_BS = (falls_BS == 0) & (closed_BS > 0)
        return allowed_BN & whole_BS.gather(1, stretch_BN)

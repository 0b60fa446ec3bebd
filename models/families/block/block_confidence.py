"""How sure a block drafter is of its next token: the chance that the target accepts what will be drawn at a slot (arXiv:2607.05147).

    c_k = sigmoid(w [h_k ; W1[x_{k-1}]] + b)        h_k: the slot's state; W1: the tokens' rows of a Markov correction, where there is one

Some heads leave W1 out and read the slot's state alone. No c_k reads the token that will be drawn at its slot. So a draft may end where it
is small: whether a token is drawn then never depends on that token, and the output stays the target's own.

Owns the head and its weights. Knows nothing of losses, of thresholds, of how a draft ends.

Shape legend: D hidden, r rank of the correction; "..." are any leading dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from draftsmith.models.families.block.block_correction import Correction, LookAround, MarkovCorrection


class ConfidenceHead(nn.Module):
    """A linear layer over a slot's state and the token before it.

    Args:
        hidden_size: D.
        correction: of the drafter, whose rows of tokens are read where it has any.
        with_markov: read them; False reads the slot's state alone.
    """

    def __init__(self, hidden_size: int, correction: Correction | LookAround | None, with_markov: bool = True) -> None:
        super().__init__()
        self.with_markov = with_markov
        rank = correction.tokens.embedding_dim if with_markov and isinstance(correction, MarkovCorrection) else 0
        self.proj = nn.Linear(hidden_size + rank, 1)

    def forward(self, hidden: Tensor, tokens: Tensor, correction: Correction | LookAround | None) -> Tensor:
        """Score slots.

        Args:
            hidden: [..., D], their states.
            tokens: int64 [...], target ids before them.
            correction: of the drafter.

        Returns:
            [...], logits of the chances.
        """
        parts = [hidden]
        if self.with_markov and isinstance(correction, MarkovCorrection):
            parts.append(correction.tokens(tokens).to(hidden.dtype))
        scores: Tensor = self.proj(torch.cat(parts, dim=-1))
        return scores.squeeze(-1)

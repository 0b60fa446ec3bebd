"""What a drafted token changes in the logits of the next slot of a block.

The slots of a block do not read the tokens drafted before them. A correction does: it adds Z U^T to a slot's logits. Z [.., r] depends on
the token before the slot, U [Vd, r] is one matrix for all slots. U starts at zero, so that a drafter begins as its block alone.

- ``vanilla``, ``gated``, ``recurrent``: the Markov heads of DSpark (arXiv:2607.05147).
- ``gru``: the recurrent head of Domino (arXiv:2605.29707), which leaves the first slot as it is.
- ``selector``: the candidate selector of DFlash 2, whose drafter drafts the few likeliest tokens of a slot alone.

- ``lookaround`` reads no drafted token: a slot looks at what its neighbours would say, before anything is drafted.

Owns their weights and one step of each, in training as in decoding. Knows nothing of blocks, trees or losses.

Shape legend: D hidden, r rank, S size of the state, V target vocabulary, Vd draft vocabulary; any leading dimensions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CorrectionKind = Literal["none", "vanilla", "gated", "recurrent", "gru", "selector", "lookaround"]


class Correction(nn.Module, ABC):
    """One step after another: from the token before a slot, the slot's state and what the steps before have left.

    Args:
        rank: r.
        num_draft_tokens: Vd.
        state_size: S; 0 where nothing passes from step to step.
    """

    def __init__(self, rank: int, num_draft_tokens: int, state_size: int = 0) -> None:
        super().__init__()
        self.state_size = state_size
        self.output = nn.Linear(rank, num_draft_tokens, bias=False)

    def begin(self, hidden: Tensor) -> Tensor:
        """The state before the first step: zeros [..., S] for slots [..., D]."""
        return hidden.new_zeros(*hidden.shape[:-1], self.state_size)

    @abstractmethod
    def step(
        self, tokens: Tensor, embedded: Tensor, hidden: Tensor, state: Tensor, depth: int
    ) -> tuple[Tensor, Tensor]:
        """Make Z of one slot.

        Args:
            tokens: int64 [...], target ids before the slot: the root, or what was drafted.
            embedded: [..., D], the target's embeddings of them.
            hidden: [..., D], the slot's state.
            state: [..., S].
            depth: of the slot, counted from 0.

        Returns:
            Z [..., r], and the state after the step [..., S].
        """


class LookAround(nn.Module):
    """A slot re-reads the soft embeddings of its neighbours: one attention of a few slots, and the root's embedding before the first.

        a_k = sum over j of softmax_j(Q h_k . K e_j / sqrt(r) + b_(j-k)) V e_j,    Z_k = SiLU(M [h_k; a_k])

    e_j is the mean embedding of slot j's likeliest tokens by their chances (vocabulary attention), e_(-1) that of the root. j is within
    :attr:`WINDOW` slots of k, and below k where slots see no later one. No Z depends on a drafted token, so drafts cost no more passes.

    Args:
        hidden_size: D.
        num_draft_tokens: Vd.
        rank: r.
    """

    WINDOW: ClassVar[int] = 2
    NUM_LIKELIEST: ClassVar[int] = 16

    def __init__(self, hidden_size: int, num_draft_tokens: int, rank: int) -> None:
        super().__init__()
        self.query = nn.Linear(hidden_size, rank, bias=False)
        self.key = nn.Linear(hidden_size, rank, bias=False)
        self.value = nn.Linear(hidden_size, rank, bias=False)
        self.offsets = nn.Parameter(torch.zeros(2 * self.WINDOW + 1))
        self.mix = nn.Linear(hidden_size + rank, rank)
        self.output = nn.Linear(rank, num_draft_tokens, bias=False)

    def forward(self, hidden_NKD: Tensor, soft_NKD: Tensor, root_ND: Tensor, causal: bool) -> Tensor:
        """Make Z of all slots.

        Args:
            hidden_NKD: the slots' states.
            soft_NKD: their soft embeddings.
            root_ND: the root's embedding.
            causal: slots see no later one.

        Returns:
            [N, K, r].
        """
        K, device = hidden_NKD.shape[1], hidden_NKD.device
        around_NJD = torch.cat([root_ND[:, None], soft_NKD], dim=1)
        offset_KJ = torch.arange(-1, K, device=device) - torch.arange(K, device=device)[:, None]
        seen_KJ = (offset_KJ.abs() <= self.WINDOW) & ((offset_KJ < 0) | (not causal))
        scores_NKJ = self.query(hidden_NKD) @ self.key(around_NJD).mT / self.query.out_features**0.5
        scores_NKJ = scores_NKJ + self.offsets[offset_KJ.clamp(-self.WINDOW, self.WINDOW) + self.WINDOW]
        shares_NKJ = scores_NKJ.masked_fill(~seen_KJ, -torch.inf).softmax(-1)
        return F.silu(self.mix(torch.cat([hidden_NKD, shares_NKJ @ self.value(around_NJD)], dim=-1)))


class MarkovCorrection(Correction):
    """Z = W1[x]: a bigram of rank r."""

    def __init__(
        self, hidden_size: int, vocab_size: int, num_draft_tokens: int, rank: int, state_size: int = 0
    ) -> None:
        super().__init__(rank, num_draft_tokens, state_size)
        self.tokens = nn.Embedding(vocab_size, rank)

    def step(
        self, tokens: Tensor, embedded: Tensor, hidden: Tensor, state: Tensor, depth: int
    ) -> tuple[Tensor, Tensor]:
        """See :meth:`Correction.step`."""
        return self.tokens(tokens), state


class GatedCorrection(MarkovCorrection):
    """Z = sigmoid(G [h; W1[x]] + g) * W1[x]: the slot decides how much of the bigram it takes."""

    def __init__(self, hidden_size: int, vocab_size: int, num_draft_tokens: int, rank: int) -> None:
        super().__init__(hidden_size, vocab_size, num_draft_tokens, rank)
        self.gate_proj = nn.Linear(hidden_size + rank, rank)

    def step(
        self, tokens: Tensor, embedded: Tensor, hidden: Tensor, state: Tensor, depth: int
    ) -> tuple[Tensor, Tensor]:
        """See :meth:`Correction.step`."""
        of_token = self.tokens(tokens)
        return torch.sigmoid(self.gate_proj(torch.cat([hidden, of_token], dim=-1))) * of_token, state


class SelectorCorrection(MarkovCorrection):
    """Z = W1[x] * (H h): how well each candidate fits the token before it, as the slot sees it."""

    def __init__(self, hidden_size: int, vocab_size: int, num_draft_tokens: int, rank: int) -> None:
        super().__init__(hidden_size, vocab_size, num_draft_tokens, rank)
        self.hidden_projection = nn.Linear(hidden_size, rank, bias=False)

    def step(
        self, tokens: Tensor, embedded: Tensor, hidden: Tensor, state: Tensor, depth: int
    ) -> tuple[Tensor, Tensor]:
        """See :meth:`Correction.step`."""
        return self.tokens(tokens) * self.hidden_projection(hidden), state


class RecurrentCorrection(MarkovCorrection):
    """[g; c; o] = J [s; W1[x]; h] + j, s' = sigmoid(g) s + (1 - sigmoid(g)) tanh(c), Z = tanh(o)."""

    def __init__(self, hidden_size: int, vocab_size: int, num_draft_tokens: int, rank: int) -> None:
        super().__init__(hidden_size, vocab_size, num_draft_tokens, rank, state_size=rank)
        self.joint_proj = nn.Linear(2 * rank + hidden_size, 3 * rank)

    def step(
        self, tokens: Tensor, embedded: Tensor, hidden: Tensor, state: Tensor, depth: int
    ) -> tuple[Tensor, Tensor]:
        """See :meth:`Correction.step`."""
        joined = torch.cat([state, self.tokens(tokens), hidden], dim=-1)
        gate, candidate, output = self.joint_proj(joined).chunk(3, dim=-1)
        kept = torch.sigmoid(gate)
        return torch.tanh(output), kept * state + (1.0 - kept) * torch.tanh(candidate)


class GruCorrection(Correction):
    """s' = GRU(e(x), s), Z = SiLU(W [h; s']), and Z = 0 for the first slot."""

    def __init__(self, hidden_size: int, num_draft_tokens: int, rank: int, state_size: int) -> None:
        super().__init__(rank, num_draft_tokens, state_size)
        self.gru = nn.GRUCell(hidden_size, state_size, bias=False)
        self.input = nn.Linear(hidden_size + state_size, rank, bias=False)

    def step(
        self, tokens: Tensor, embedded: Tensor, hidden: Tensor, state: Tensor, depth: int
    ) -> tuple[Tensor, Tensor]:
        """See :meth:`Correction.step`."""
        shape = state.shape
        state = self.gru(embedded.reshape(-1, embedded.shape[-1]), state.reshape(-1, shape[-1])).reshape(shape)
        correction = F.silu(self.input(torch.cat([hidden, state], dim=-1)))
        return correction * (0.0 if depth == 0 else 1.0), state


def correction_of(
    kind: CorrectionKind, hidden_size: int, vocab_size: int, num_draft_tokens: int, rank: int, state_size: int
) -> Correction | LookAround | None:
    """Make the module that corrects the logits of a slot by its neighbours.

    Args:
        kind: which; ``none`` makes none.
        hidden_size: D.
        vocab_size: V.
        num_draft_tokens: Vd.
        rank: r.
        state_size: S, of the GRU.

    Returns:
        The module, or None.
    """
    if kind == "none":
        return None
    if kind == "gru":
        return GruCorrection(hidden_size, num_draft_tokens, rank, state_size)
    if kind == "lookaround":
        return LookAround(hidden_size, num_draft_tokens, rank)
    made = {
        "vanilla": MarkovCorrection,
        "gated": GatedCorrection,
        "recurrent": RecurrentCorrection,
        "selector": SelectorCorrection,
    }[kind]
    return made(hidden_size, vocab_size, num_draft_tokens, rank)

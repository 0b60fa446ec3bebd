"""The few likeliest continuations of each slot of a draft, so that a wide tree never scores the whole vocabulary at each of its nodes.

A drafter that computes all slots of a draft at once scores the vocabulary once a slot. What its nodes hold changes the scores of a slot by
a sum at the most. So a search needs the C likeliest tokens of each slot, and what each node adds to them: [B, M, C] instead of [B, M, Vd].

Without such a sum the tree is the same as over the whole vocabulary. With it, only the C tokens that are likeliest before the sum can be
drafted; the mass of the others stays as it is in the normaliser. Verification is exact for any tree, so it may hold any tokens.

Owns the record, the protocol, and the continuations that a search ranks. Knows no drafter, and not what a tree is.

Shape legend: B batch rows, S slots of a draft (depths), M nodes of a layer, C candidates, R ranks, Vd draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch import Tensor

from draftsmith.models.slots.constants import counting
from draftsmith.models.tree.noise import SharedNoise

if TYPE_CHECKING:
    from draftsmith.models.tree.search import Expander


@dataclass(frozen=True)
class Shortlist:
    """Candidates of each slot, before anything that drafted tokens add.

    Attributes:
        log_probs_BSC: float32, best first; minus infinity where a slot has fewer candidates.
        draft_BSC: int64, their draft ids.
        tail_BS: float32, the logarithm of the mass of all other tokens; minus infinity where no other is ever drafted.
        entropy_BS: float32, of each slot at temperature 1, over everything that may be drafted there.
    """

    log_probs_BSC: Tensor
    draft_BSC: Tensor
    tail_BS: Tensor
    entropy_BS: Tensor


@runtime_checkable
class ShortlistExpander(Protocol):
    """An expander that may know all slots of its draft at once."""

    def shortlist(self, count: int, scale: float, noise: SharedNoise | None) -> Shortlist | None:
        """Begin the draft, in place of ``begin``.

        Args:
            count: R, so many continuations of a node will be asked for.
            scale: draft logits are multiplied by it.
            noise: is added to them before that, with each slot's own depth; or None.

        Returns:
            At least ``count`` candidates of each slot, or the whole draft vocabulary where that is smaller. None where this expander
            scores the whole vocabulary at each node; then the draft has not begun.
        """
        ...

    def rescore(self, tokens_BM: Tensor, above_BM: Tensor) -> Tensor | None:
        """Say what new nodes add to the logits of the slot behind them. Called first for the root, then in place of ``extend``.

        Args:
            tokens_BM: int64, target ids.
            above_BM: int64, which node of the last call each one continues.

        Returns:
            float [B, M, C], for the candidates of that slot; None where nodes add nothing.
        """
        ...


def shortlist_of(
    logits_BSV: Tensor,
    count: int,
    scale: float,
    num_drafted: int | None = None,
    noise: Callable[[Tensor], Tensor] | None = None,
) -> Shortlist:
    """Make the shortlist of some slots.

    Args:
        logits_BSV: float [B, S, Vd], before anything that drafted tokens add.
        count: C.
        scale: multiplies the logits.
        num_drafted: only so many tokens of a slot, the likeliest, are ever drafted; None for all.
        noise: adds the noise of each slot to the logits.

    Returns:
        The shortlist, of at most Vd candidates a slot.
    """
    if num_drafted is not None:
        logits_BSV = likeliest_alone(logits_BSV, num_drafted)
    log_probs_BSV = logits_BSV.float().log_softmax(-1)
    entropy_BS = torch.special.entr(log_probs_BSV.exp()).sum(-1)
    if noise is not None:
        logits_BSV = noise(logits_BSV)
    if noise is not None or scale != 1.0:
        log_probs_BSV = (logits_BSV.float() * scale).log_softmax(-1)
    log_probs_BSC, draft_BSC = log_probs_BSV.topk(min(count, logits_BSV.shape[-1]), dim=-1)
    # Rounding leaves a share of about 1e-7 where the candidates have all of the mass.
    tail_BS = (1.0 - log_probs_BSC.exp().sum(-1)).clamp(min=0.0).log()
    if num_drafted is not None and num_drafted <= count:
        tail_BS = torch.full_like(tail_BS, -torch.inf)
    return Shortlist(log_probs_BSC, draft_BSC, tail_BS, entropy_BS)


def likeliest_alone(logits: Tensor, count: int) -> Tensor:
    """Logits [..., Vd] with minus infinity at all but the ``count`` highest."""
    if count >= logits.shape[-1]:
        return logits
    kept, ids = logits.topk(count, dim=-1)
    return torch.full_like(logits, -torch.inf).scatter(-1, ids, kept)


class WholeVocabulary:
    """The continuations of nodes, scored over the draft vocabulary at each of them.

    Args:
        expander: continues the nodes.
        scale: draft logits are multiplied by it.
        noise: is added to them before that, or None.
    """

    def __init__(self, expander: Expander, scale: float, noise: SharedNoise | None) -> None:
        self._expander, self._scale, self._noise = expander, scale, noise
        self._logits_BMV, self._depth = expander.begin(), 0

    def extend(self, tokens_BM: Tensor, above_BM: Tensor) -> None:
        """Move to new nodes; see ``Expander.extend``."""
        self._logits_BMV, self._depth = self._expander.extend(tokens_BM, above_BM), self._depth + 1

    def entropy(self) -> Tensor:
        """Of what follows each node, at temperature 1: float32 [B, M]."""
        return torch.special.entr(self._logits_BMV.float().softmax(-1)).sum(-1)

    def best(self, count: int) -> tuple[Tensor, Tensor]:
        """The likeliest continuations of each node.

        Args:
            count: R.

        Returns:
            Log-probabilities float32 [B, M, R], best first, and draft ids int64 [B, M, R].

        Raises:
            ValueError: the draft vocabulary has fewer tokens than ``count``.
        """
        _check_count(count, self._logits_BMV.shape[-1])
        logits_BMV = self._logits_BMV.float()
        if self._noise is not None:
            logits_BMV = self._noise.onto(logits_BMV, self._depth, every_target_id(self._expander, logits_BMV))
        scaled_BMV = logits_BMV if self._scale == 1.0 else logits_BMV * self._scale
        best: tuple[Tensor, Tensor] = scaled_BMV.log_softmax(-1).topk(count, dim=-1)
        return best


class Shortlisted:
    """The continuations of nodes, taken from the shortlist of their slot.

    Args:
        expander: that gave the shortlist.
        shortlist: of all slots.
        scale: as the shortlist was made with.
    """

    def __init__(self, expander: ShortlistExpander, shortlist: Shortlist, scale: float, root_B: Tensor) -> None:
        self._expander, self._shortlist, self._scale = expander, shortlist, scale
        self._slot, self._num_nodes = 0, 1
        self._added_BMC = expander.rescore(root_B[:, None], torch.zeros_like(root_B)[:, None])

    def extend(self, tokens_BM: Tensor, above_BM: Tensor) -> None:
        """See :meth:`WholeVocabulary.extend`."""
        self._slot, self._num_nodes = self._slot + 1, tokens_BM.shape[1]
        self._added_BMC = self._expander.rescore(tokens_BM, above_BM)

    def entropy(self) -> Tensor:
        """See :meth:`WholeVocabulary.entropy`: of the slot, before what a node adds."""
        return self._shortlist.entropy_BS[:, self._slot, None].expand(-1, self._num_nodes)

    def best(self, count: int) -> tuple[Tensor, Tensor]:
        """See :meth:`WholeVocabulary.best`.

        Raises:
            ValueError: as there.
        """
        short, slot = self._shortlist, self._slot
        log_probs_B1C, draft_B1C = short.log_probs_BSC[:, slot, None], short.draft_BSC[:, slot, None]
        _check_count(count, draft_B1C.shape[-1])
        if self._added_BMC is None:
            shape = (-1, self._num_nodes, -1)
            return log_probs_B1C[..., :count].expand(shape), draft_B1C[..., :count].expand(shape)
        scores_BMC = log_probs_B1C + self._added_BMC.float() * self._scale
        tail_BM1 = short.tail_BS[:, slot, None, None].expand(-1, self._num_nodes, -1)
        total_BM1 = torch.cat([scores_BMC, tail_BM1], dim=-1).logsumexp(-1, keepdim=True)
        best_BMR, place_BMR = (scores_BMC - total_BM1).topk(count, dim=-1)
        return best_BMR, draft_B1C.expand(-1, self._num_nodes, -1).gather(-1, place_BMR)


Continuations = WholeVocabulary | Shortlisted


def every_target_id(expander: Expander, logits: Tensor) -> Tensor:
    """The target id of each token of the draft vocabulary, int64 [Vd].

    Args:
        expander: knows them.
        logits: float [..., Vd].
    """
    return expander.target_ids(counting(logits.shape[-1], logits.device))


def continuations(expander: Expander, count: int, scale: float, noise: SharedNoise | None = None) -> Continuations:
    """Begin a draft, over shortlists where the expander has them.

    Args:
        expander: continues nodes.
        count: so many continuations of a node will be asked for.
        scale: draft logits are multiplied by it.
        noise: is added to them before that, or None.

    Returns:
        The continuations of the root.
    """
    shortlist = expander.shortlist(count, scale, noise) if isinstance(expander, ShortlistExpander) else None
    if shortlist is None:
        return WholeVocabulary(expander, scale, noise)
    assert isinstance(expander, ShortlistExpander)
    return Shortlisted(expander, shortlist, scale, expander.root_B)


def _check_count(count: int, num_tokens: int) -> None:
    """Check that a node has so many continuations.

    Raises:
        ValueError: it has fewer.
    """
    if count > num_tokens:
        raise ValueError(
            f"{count} continuations of a node are asked for, the draft vocabulary has {num_tokens} tokens; narrow the draft"
        )

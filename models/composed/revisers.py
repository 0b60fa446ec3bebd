"""Second opinions on drafted tokens: of an n-gram table, or of a small LM with the target's tokenizer.

Owns what gives them, and what each keeps of the text between cycles. How a head's scores and an opinion become one is in
:mod:`draftsmith.models.composed.refined_drafter`. Knows no head.

Shape legend: B batch rows, E fresh tokens, M nodes continued at once, C candidates of a node, K tokens of a context.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from draftsmith.models.drafters.draft_lm import LMDrafter
from draftsmith.models.drafters.draft_records import Cycle, DraftState, Emitted, Opening
from draftsmith.models.ngrams.table import NgramTable
from draftsmith.models.slots.constants import counting
from draftsmith.models.slots.slot_cache import KeptRows
from draftsmith.models.tree.limits import DraftLimits
from draftsmith.models.tree.search import Expander

_TENSORS = ("keys_G", "log_probs_G", "backoffs_C", "links_C", "orders_C")


class Opinion(Protocol):
    """A second opinion in the middle of one draft, which follows the head from node to node."""

    def begin(self) -> None:
        """Begin at the root."""

    def extend(self, tokens_BM: Tensor, above_BM: Tensor) -> None:
        """Continue nodes; see :meth:`Expander.extend`."""

    def log_probs(self, ids_BMC: Tensor) -> Tensor:
        """Score tokens behind the current nodes: target ids int64 [B, M, C] -> float32 [B, M, C]."""


class Reviser(Protocol):
    """What gives second opinions, and keeps a state of its own between cycles."""

    def start(self, opening: Opening) -> DraftState:
        """See :meth:`Drafter.start`."""

    def advance(self, state: Any, emitted: Emitted) -> DraftState:
        """See :meth:`Drafter.advance`."""

    def follow(self, state: Any, cycle: Cycle, limits: DraftLimits) -> DraftState:
        """See :meth:`Drafter.follow`."""

    def opinion(self, state: Any, cycle: Cycle, limits: DraftLimits) -> Opinion:
        """The opinion on one draft."""


@dataclass(frozen=True)
class TailState:
    """The last tokens of each row, int64 [B, K]; -1 before the first."""

    tokens_BK: Tensor

    def select_rows(self, kept: KeptRows) -> TailState:
        """Keep some batch rows only.

        Args:
            kept: which rows, and where they go.

        Returns:
            The state of these rows.
        """
        return TailState(self.tokens_BK[kept.index])


class NgramReviser(nn.Module):
    """Opinions of an n-gram table.

    Args:
        table: of the target's tokens.
    """

    def __init__(self, table: NgramTable) -> None:
        super().__init__()
        self._table = table
        for name in _TENSORS:
            self.register_buffer(name, getattr(table, name), persistent=False)

    @property
    def table(self) -> NgramTable:
        """The table, where this module lies."""
        return replace(self._table, **{name: getattr(self, name) for name in _TENSORS})

    @property
    def num_kept(self) -> int:
        """K: tokens that a context can have, at least 1."""
        return max(1, self._table.order - 1)

    def start(self, opening: Opening) -> TailState:
        """Keep the ends of the prompts."""
        whole_BT = torch.cat([opening.first_B[:, None], opening.prompt.tokens_BE], dim=1)
        return TailState(
            _tail(F.pad(whole_BT, (self.num_kept, 0), value=-1), opening.prompt.counts_B + 1, self.num_kept)
        )

    def advance(self, state: TailState, emitted: Emitted) -> TailState:
        """Keep the ends of what was emitted."""
        text_BT = torch.cat([state.tokens_BK, emitted.tokens_BE], dim=1)
        return TailState(_tail(text_BT, emitted.counts_B, self.num_kept))

    def follow(self, state: TailState, cycle: Cycle, limits: DraftLimits) -> TailState:
        """Nothing is pending."""
        return state

    def opinion(self, state: TailState, cycle: Cycle, limits: DraftLimits) -> Opinion:
        """See :class:`NgramOpinion`."""
        return NgramOpinion(self.table, state.tokens_BK)


def _tail(text_BT: Tensor, counts_B: Tensor, num_kept: int) -> Tensor:
    """int64 [B, K]: the last tokens of texts that begin with K others and have ``counts_B`` more."""
    return text_BT.gather(1, counts_B[:, None] + counting(num_kept, text_BT.device))


class NgramOpinion:
    """An n-gram table along one draft.

    Args:
        table: of the target's tokens.
        tail_BK: int64, the last tokens of each row, the root among them.
    """

    def __init__(self, table: NgramTable, tail_BK: Tensor) -> None:
        self._table = table
        self._context_BM = tail_BK[:, -1:]
        self._tail_BK = tail_BK

    def begin(self) -> None:
        """See :class:`Opinion`."""
        self._context_BM = self._table.context_of(self._tail_BK)[:, None]

    def extend(self, tokens_BM: Tensor, above_BM: Tensor) -> None:
        """See :class:`Opinion`."""
        self._context_BM = self._table.follow(self._context_BM.gather(1, above_BM), tokens_BM)

    def log_probs(self, ids_BMC: Tensor) -> Tensor:
        """See :class:`Opinion`."""
        return self._table.log_prob(self._context_BM[..., None], ids_BMC)


class LMReviser(nn.Module):
    """Opinions of a causal LM with the target's tokenizer.

    Args:
        lm: as a drafter, which follows the text by itself.
    """

    def __init__(self, lm: LMDrafter) -> None:
        super().__init__()
        self.lm = lm

    def start(self, opening: Opening) -> DraftState:
        """Read the prompts."""
        return self.lm.start(opening)

    def advance(self, state: Any, emitted: Emitted) -> DraftState:
        """What was emitted is pending."""
        return self.lm.advance(state, emitted)

    def follow(self, state: Any, cycle: Cycle, limits: DraftLimits) -> DraftState:
        """Read what is pending."""
        return self.lm.follow(state, cycle, limits)

    def opinion(self, state: Any, cycle: Cycle, limits: DraftLimits) -> Opinion:
        """See :class:`LMOpinion`."""
        return LMOpinion(self.lm.expander(state, cycle, limits))


class LMOpinion:
    """A causal LM along one draft.

    Args:
        expander: its own.
    """

    def __init__(self, expander: Expander) -> None:
        self._expander = expander
        self._log_probs_BMV = torch.zeros(0)

    def begin(self) -> None:
        """See :class:`Opinion`."""
        self._log_probs_BMV = self._expander.begin().float().log_softmax(-1)

    def extend(self, tokens_BM: Tensor, above_BM: Tensor) -> None:
        """See :class:`Opinion`."""
        self._log_probs_BMV = self._expander.extend(tokens_BM, above_BM).float().log_softmax(-1)

    def log_probs(self, ids_BMC: Tensor) -> Tensor:
        """See :class:`Opinion`. A token that the LM has not counts as its last one."""
        return self._log_probs_BMV.gather(-1, ids_BMC.clamp(max=self._log_probs_BMV.shape[-1] - 1))

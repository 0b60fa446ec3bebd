"""A drafter that knows what the target will say, wrong at known places: how fast and how exact accepted drafts are, with random weights.

Shape legend: B batch rows, T tokens of a text, M paths, L drafted depth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from draftsmith.models.drafters.draft_records import Cycle, DraftState, Emitted, Opening
from draftsmith.models.drafters.drafter import Drafter
from draftsmith.models.drafters.drafter_config import DrafterConfig
from draftsmith.models.drafters.rollout import PackedBatch, Rollout
from draftsmith.models.slots.slot_cache import KeptRows
from draftsmith.models.target.ends import TargetEnds
from draftsmith.models.tree.limits import DraftLimits
from draftsmith.models.tree.search import Expander
from draftsmith.models.tree.tree import DraftTree, tree_from_paths


@dataclass(frozen=True)
class OracleState:
    """The last emitted token of each row, and which text the row has; int64 [B] each."""

    root_B: Tensor
    text_B: Tensor

    def select_rows(self, kept: KeptRows) -> OracleState:
        """The state of some rows only."""
        return OracleState(self.root_B[kept.index], self.text_B[kept.index])


class Oracle(Drafter):
    """Proposes paths without a common prefix, of which the first follows the row's known text.

    With text position p cached, that path is right for p modulo L + 1 tokens, so cycles accept 0 to L tokens in turn. All other paths are
    wrong from their first token on: every node is distinct, and the tree has 1 + M x L nodes.

    Args:
        ends: of the target.
        texts: token ids of each row: its prompt and what plain decoding replies. All rows must decode at once.
    """

    def __init__(self, ends: TargetEnds, texts: Sequence[Sequence[int]]) -> None:
        super().__init__(DrafterConfig(hidden_size=ends.hidden_size, vocab_size=ends.vocab_size))
        longest = max(map(len, texts))
        padded = [[*text, *[0] * (longest - len(text))] for text in texts]
        self._text_BT = torch.tensor(padded, device=ends.device)
        self.attach(ends)

    @property
    def features(self) -> tuple[str, ...]:
        """None."""
        return ()

    def attach(self, ends: TargetEnds) -> Drafter:
        """Any target will do."""
        self.borrow(ends)
        return self

    def teacher_forced(self, batch: PackedBatch, rollout: Rollout) -> Tensor:
        """It cannot be trained."""
        raise NotImplementedError("an oracle is not trained")

    def expander(self, state: DraftState, cycle: Cycle, limits: DraftLimits) -> Expander:
        """It proposes whole trees: see `propose`."""
        raise NotImplementedError("an oracle proposes whole trees")

    def start(self, opening: Opening) -> OracleState:
        """Row b has text b."""
        root_B = opening.prompt.tokens_BE.gather(1, opening.prompt.counts_B[:, None] - 1).squeeze(1)
        return OracleState(root_B, torch.arange(len(root_B), device=root_B.device))

    def advance(self, state: DraftState, emitted: Emitted) -> OracleState:
        """Only the root moves."""
        assert isinstance(state, OracleState)
        root_B = emitted.tokens_BE.gather(1, emitted.counts_B[:, None] - 1).squeeze(1)
        return OracleState(root_B, state.text_B)

    def propose(self, state: DraftState, cycle: Cycle, limits: DraftLimits) -> DraftTree:
        """`limits.beam_width` paths of `limits.draft_length` tokens."""
        assert isinstance(state, OracleState)
        M, L = limits.beam_width, limits.draft_length
        device, V = state.root_B.device, self.config.vocab_size
        column_L = torch.arange(L, device=device)
        place_BL = (cycle.lengths_B[:, None] + 1 + column_L).clamp(max=self._text_BT.shape[1] - 1)
        next_BL = self._text_BT[state.text_B].gather(1, place_BL)
        is_right_BL = column_L < (cycle.lengths_B % (L + 1))[:, None]
        first_BL = torch.where(is_right_BL, next_BL, (next_BL + 1) % V)
        shift_M = torch.arange(2, M + 1, device=device)
        others_BML = (next_BL[:, None] + shift_M[None, :, None]) % V
        paths_BML = torch.cat([first_BL[:, None], others_BML], dim=1)
        return tree_from_paths(state.root_B, paths_BML, cut=False if cycle.fixed_shapes else None)

"""One draft of a block drafter: its block, computed once, and what drafted tokens add to the slots behind them.

Owns the run of the layers over the slots of a batch. Knows no training.

Shape legend: B batch rows, E fresh pairs, M nodes of a layer, S slots of a block, K draft steps, D hidden, V draft vocabulary, r rank.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from draftsmith.models.drafters.draft_records import CacheState, Cycle
from draftsmith.models.drafters.draft_slots import DraftSlots
from draftsmith.models.drafters.parallel_draft import ParallelDraft
from draftsmith.models.families.block.block_correction import Correction, LookAround
from draftsmith.models.families.block.block_layer import BlockLayer
from draftsmith.models.families.eagle_layer import rms_norm
from draftsmith.models.slots.attention import attend

if TYPE_CHECKING:
    from draftsmith.models.families.block.block_drafter import BlockDrafter


class BlockDraft(ParallelDraft):
    """One draft: the block is computed once. Nodes of one depth have the same continuations, but for what a correction adds."""

    def __init__(self, drafter: BlockDrafter, state: CacheState, cycle: Cycle, draft_length: int) -> None:
        pending = state.pending
        corrected = isinstance(drafter.correction, Correction)
        super().__init__(drafter, pending.root_B, drafter.num_candidates, corrected)
        self._block, self._pending, self._draft_length = drafter, pending, draft_length
        self._slots = DraftSlots(state.cache, cycle, pending.tokens_BE.shape[1])
        self._tokens_BM = self.root_B[:, None]
        self._hidden_BKD = self._state_BMS = torch.empty(0)  # until the block has run

    def slot_logits(self) -> Tensor:
        """See :meth:`ParallelDraft.slot_logits`."""
        drafter, first = self._block, self._block.config.first_slot
        hidden_BKD = rms_norm(drafter.norm, self._run()[:, first:])
        self._hidden_BKD = hidden_BKD[:, : self._draft_length]
        head = drafter.head_weight
        logits_BKV = F.linear(self._hidden_BKD.to(head.dtype), head)
        if isinstance(drafter.correction, LookAround):
            part_BKr = drafter.looked_around(drafter.correction, hidden_BKD, self.root_B)[:, : self._draft_length]
            return logits_BKV + drafter.correction.output(part_BKr)
        if drafter.correction is not None:
            self._state_BMS = drafter.correction.begin(self._hidden_BKD[:, :1])
        return logits_BKV

    def correction(self, tokens_BM: Tensor, above_BM: Tensor | None) -> Tensor | None:
        """See :meth:`ParallelDraft.correction`."""
        self._tokens_BM = tokens_BM
        drafter, num_nodes = self._block, tokens_BM.shape[1]
        if not isinstance(drafter.correction, Correction):
            return None
        state_BMS = self._state_BMS
        if above_BM is not None and state_BMS.shape[-1] and state_BMS.shape[1] > 1:
            state_BMS = state_BMS.gather(1, above_BM[..., None].expand(-1, -1, state_BMS.shape[-1]))
        part_BMr, self._state_BMS = drafter.correction.step(
            tokens_BM,
            drafter.embed(tokens_BM),
            self._hidden_at_depth(num_nodes),
            state_BMS.expand(-1, num_nodes, -1),
            self.depth,
        )
        return part_BMr

    def acceptance(self) -> Tensor | None:
        """See :class:`ConfidentExpander`."""
        if not self._block.has_confidence:
            return None
        hidden_BMD = self._hidden_at_depth(self._tokens_BM.shape[1])
        return self._block.confidence(hidden_BMD, self._tokens_BM).float().sigmoid()

    def _hidden_at_depth(self, num_nodes: int) -> Tensor:
        """[B, M, D]: the state of the slot behind the nodes of the last call."""
        return self._hidden_BKD[:, self.depth : self.depth + 1].expand(-1, num_nodes, -1)

    def _run(self) -> Tensor:
        """States of the slots behind the last layer, [B, S, D]; without later slots that nobody sees."""
        drafter, slots, config = self._block, self._slots, self._block.config
        num_slots = config.first_slot + self._draft_length if config.hides_later else config.block_size
        fresh = self._pending.slots(0, slots.num_fresh)
        fresh_BE, slots_BS = slots.aim_block(self._pending.counts_B, num_slots)
        views = [config.view(number) for number in range(config.num_draft_layers)]
        masks = {view: slots.block_mask(slots_BS, *view, config.window_from_root) for view in dict.fromkeys(views)}
        context_BED = drafter.context(fresh.features)
        states_BSD = drafter.slots(self.root_B, num_slots)
        of_context, of_slots = drafter.rotation(fresh_BE, context_BED), drafter.rotation(slots_BS, states_BSD)
        for number, layer in enumerate(drafter.layers):
            assert isinstance(layer, BlockLayer)
            inputs_BSD = layer.inputs(states_BSD)
            pairs = zip(
                layer.keys_values(context_BED, of_context), layer.keys_values(inputs_BSD, of_slots), strict=True
            )
            keys, values = (torch.cat(pair, dim=1).transpose(1, 2) for pair in pairs)
            seen = slots.cache.update(keys, values, number)
            attended = attend(layer.queries(inputs_BSD, of_slots).transpose(1, 2), *seen, masks[views[number]])
            states_BSD = layer.finish(states_BSD, attended.transpose(1, 2))
        return states_BSD

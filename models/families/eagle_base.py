"""What EAGLE drafters share: one decoder layer, its run in training and the step of its draft.

Knows nothing of losses, trees or verification.

Both feed the token x_{t+1} and what is known of position t. Where the target has read the text, that is the target's own state; below the
root it is the layer's own output. The layer's keys at accepted positions are always made from the target's states, in training as in
decoding.

Shape legend: B batch rows, E fresh tokens, M drafted nodes, T packed tokens, A anchors, K draft steps, D hidden.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from draftsmith.models.drafters.draft_slots import DraftSlots
from draftsmith.models.drafters.drafter import Cycle, Drafter, Emitted, Opening
from draftsmith.models.drafters.rollout import PackedBatch, Rollout
from draftsmith.models.drafters.rollout_attention import Pair, RolloutAttention
from draftsmith.models.families.eagle_config import EagleConfig
from draftsmith.models.families.eagle_layer import DraftLayer, Rotation
from draftsmith.models.tree.limits import DraftLimits
from draftsmith.models.tree.slot_cache import KeptRows, SlotCache


@dataclass(frozen=True)
class EagleState:
    """What an EAGLE drafter carries between cycles.

    Attributes:
        cache: keys and values of its layer at accepted positions, up to the pairs that are pending.
        pending: what was emitted since the last draft, with the target's states.
    """

    cache: SlotCache
    pending: Emitted

    def select_rows(self, kept: KeptRows) -> EagleState:
        """Keep some batch rows only.

        Args:
            kept: which rows, and where they go.

        Returns:
            The state of these rows.
        """
        self.cache.shrink(kept)
        return EagleState(self.cache, self.pending.select_rows(kept.index))


class EagleBase(Drafter):
    """What both architectures share: one layer, run over anchors in training and over tree nodes in decoding.

    Attributes:
        detach_steps: no gradient flows from a step into those before it (HASS; EAGLE-3 lets it flow).
        feature_noise: in training, uniform noise of this size times 512 / length is added to the target's states (EAGLE-1 uses 0.1).
    """

    config: EagleConfig
    wide: ClassVar[bool]

    def __init__(self, config: EagleConfig) -> None:
        super().__init__(config)
        self.detach_steps = False
        self.feature_noise = 0.0
        self.rotation = Rotation(config.llama())

    def needs_host(self) -> str:
        """See :meth:`Drafter.needs_host`."""
        return "the rotary factors of the draft layer follow the length" if self.rotation.follows_length else ""

    @property
    @abstractmethod
    def layer(self) -> DraftLayer:
        """The one decoder layer."""

    @abstractmethod
    def read(self, features: Mapping[str, Tensor]) -> Tensor:
        """What a drafter knows of a position that the target has read.

        Args:
            features: layer name -> [..., D], the target's states.

        Returns:
            [..., D].
        """

    @abstractmethod
    def join(self, embedded: Tensor, known: Tensor) -> Tensor:
        """Make the layer's residual input.

        Args:
            embedded: [..., D], the embedding of x_{t+1}.
            known: [..., D], what is known of position t.

        Returns:
            [..., D].
        """

    @abstractmethod
    def head_inputs(self, output: Tensor) -> Tensor:
        """What the output head is applied to.

        Args:
            output: [..., D], of the layer.

        Returns:
            [..., D].
        """

    def embed(self, tokens: Tensor) -> Tensor:
        """Look up the target's embeddings.

        Args:
            tokens: int64 [...], target ids.

        Returns:
            [..., D] in this drafter's dtype.
        """
        return self.ends.embed(tokens).to(self.dtype)

    def teacher_forced(self, batch: PackedBatch, rollout: Rollout) -> Tensor:
        """See :meth:`Drafter.teacher_forced`; step k >= 1 is fed its own output of step k - 1.

        Only keys and values are made at positions that are no anchors: nothing else of them is ever seen.

        Args:
            batch: packed samples with the target's states.
            rollout: along the batch's own text.

        Returns:
            [K, A, D]: the head's inputs at every step of every anchor.

        Raises:
            ValueError: a rollout away from the text, whose states nobody has.
        """
        if not rollout.on_text:
            raise ValueError(
                "an EAGLE drafter follows the text that the target's states belong to, which distillation 'local' leaves; "
                "use 'path' or 'none'"
            )
        anchors, layer = rollout.anchors, self.layer
        embedded = self.embed(batch.input_ids.roll(-1))
        state = self.join(embedded, self._noisy(self.read(batch.hidden).to(embedded.dtype), batch))
        inputs = layer.inputs(embedded, state)
        rotation = self.rotation(batch.positions, embedded)
        attention = RolloutAttention(batch.document_ids, batch.positions, anchors, *layer.keys_values(inputs, rotation))
        state, inputs = state[anchors], inputs[anchors]
        rotation = (rotation[0][anchors], rotation[1][anchors])
        further: list[Pair] = []
        outputs = [layer.finish(state, attention(layer.queries(inputs, rotation), further))]
        for step in range(1, rollout.tokens.shape[1]):
            embedded = self.embed(rollout.tokens[:, step])
            state = self.join(embedded, outputs[-1].detach() if self.detach_steps else outputs[-1])
            inputs = layer.inputs(embedded, state)
            rotation = self.rotation(batch.positions[anchors] + step, embedded)
            further = [*further, layer.keys_values(inputs, rotation)]
            outputs.append(layer.finish(state, attention(layer.queries(inputs, rotation), further)))
        return self.head_inputs(torch.stack(outputs))

    def _noisy(self, known: Tensor, batch: PackedBatch) -> Tensor:
        if not self.training or self.feature_noise == 0.0:
            return known
        lengths = torch.bincount(batch.document_ids)[batch.document_ids]
        noise = (torch.rand_like(known) * 2.0 - 1.0) * self.feature_noise
        return known + noise * (512.0 / lengths)[:, None].to(known.dtype)

    def start(self, opening: Opening) -> EagleState:
        """Read the pairs of the prompts, in chunks; the last one, which the first draft hangs on, stays pending."""
        spare = max(opening.limits.max_fed, opening.limits.draft_length + 1)
        cache, prompt = SlotCache(opening.room + spare, num_layers=1), opening.prompt
        B, T = prompt.tokens_BE.shape
        # Behind the pairs of shorter prompts, padding is written, which the drafts write over.
        for begin in range(0, T, opening.chunk):
            pairs = prompt.slots(begin, min(begin + opening.chunk, T))
            positions_BE = torch.arange(begin, begin + pairs.tokens_BE.shape[1], device=self.device).expand(B, -1)
            cache.aim(positions_BE, cache.capacity, begin)
            inputs = self.pair_inputs(pairs)[1]
            _write(cache, self.layer, inputs, self.rotation(positions_BE, inputs))
        return EagleState(cache, prompt.last_only(opening.num_pending))

    def pair_inputs(self, pairs: Emitted) -> tuple[Tensor, Tensor]:
        """The layer's residual input [B, E, D] at pairs of the text, and what its attention reads [B, E, I]."""
        embedded = self.embed(pairs.tokens_BE)
        state = self.join(embedded, self.read(pairs.features).to(embedded.dtype))
        return state, self.layer.inputs(embedded, state)

    def advance(self, state: EagleState, emitted: Emitted) -> EagleState:  # type: ignore[override]
        """What was emitted is pending until the next draft."""
        return EagleState(state.cache, emitted)

    def expander(self, state: EagleState, cycle: Cycle, limits: DraftLimits) -> FeatureDraft:  # type: ignore[override]
        """See :class:`FeatureDraft`."""
        return FeatureDraft(self, state, cycle)


class FeatureDraft:
    """One draft of an EAGLE drafter: the accepted pairs with the target's states first, then nodes with the layer's own output."""

    def __init__(self, drafter: EagleBase, state: EagleState, cycle: Cycle) -> None:
        self.target_ids = drafter.to_target_ids
        self._drafter, self._layer = drafter, drafter.layer
        self._pending = state.pending
        self._slots = DraftSlots(state.cache, cycle, state.pending.tokens_BE.shape[1])
        self._last_B1 = state.pending.counts_B[:, None] - 1
        self.root_B = state.pending.tokens_BE.gather(1, self._last_B1).squeeze(1)
        self._depth = 0
        self._output_BMD = torch.empty(0)

    def begin(self) -> Tensor:
        """See :class:`Expander`: keys and values of all fresh pairs, and the layer's output at the last."""
        drafter, slots = self._drafter, self._slots
        state, inputs = drafter.pair_inputs(self._pending.slots(0, slots.num_fresh))
        positions_BE = slots.aim_fresh(self._pending.counts_B)
        rotation = drafter.rotation(positions_BE, inputs)
        keys, values = _write(self._slots.cache, self._layer, inputs, rotation)
        at_last = self._last_B1[..., None]
        state, inputs = (part.gather(1, at_last.expand(-1, -1, part.shape[-1])) for part in (state, inputs))
        rotation_last = (_at(rotation[0], at_last), _at(rotation[1], at_last))
        mask = slots.text_mask(positions_BE.gather(1, self._last_B1))
        return self._attend(state, inputs, rotation_last, keys, values, mask)

    def extend(self, tokens_BM: Tensor, above_BM: Tensor) -> Tensor:
        """See :class:`Expander`: the layer's output at new nodes, which are fed their parents'."""
        drafter = self._drafter
        known = self._output_BMD
        if known.shape[1] > 1:
            known = known.gather(1, above_BM[..., None].expand(-1, -1, known.shape[-1]))
        embedded = drafter.embed(tokens_BM)
        state = drafter.join(embedded, known.expand(*tokens_BM.shape, -1))
        inputs = self._layer.inputs(embedded, state)
        positions_B1 = self._slots.lengths_B[:, None] + self._depth
        self._depth += 1
        rotation = drafter.rotation(positions_B1, embedded)  # a layer's nodes stand at one position
        mask = self._slots.aim_nodes(above_BM)
        keys, values = _write(self._slots.cache, self._layer, inputs, rotation)
        return self._attend(state, inputs, rotation, keys, values, mask)

    def _attend(
        self,
        state: Tensor,
        inputs: Tensor,
        rotation: tuple[Tensor, Tensor],
        keys: Tensor,
        values: Tensor,
        mask: Tensor | None,
    ) -> Tensor:
        queries = self._layer.queries(inputs, rotation).transpose(1, 2)
        attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, enable_gqa=True)
        self._output_BMD = self._layer.finish(state, attended.transpose(1, 2))
        return self._drafter.logits(self._drafter.head_inputs(self._output_BMD), self._depth)


def _write(
    cache: SlotCache, layer: DraftLayer, inputs: Tensor, rotation: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Write keys and values of [B, E, I] where the cache is aimed at; those of its visible slots."""
    keys, values = layer.keys_values(inputs, rotation)
    return cache.update(keys.transpose(1, 2), values.transpose(1, 2), 0)


def _at(part_BEHD: Tensor, at_last_B11: Tensor) -> Tensor:
    """[B, E, 1, Dh] -> [B, 1, 1, Dh] at each row's last fresh token."""
    return part_BEHD.gather(1, at_last_B11[..., None].expand(-1, -1, *part_BEHD.shape[2:]))

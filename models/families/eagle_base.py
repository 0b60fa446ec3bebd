"""What EAGLE drafters share: their decoder layers, their run in training and the step of their draft.

Knows nothing of losses, trees or verification.

Both feed the token x_{t+1} and what is known of position t. Where the target has read the text, that is the target's own state; below the
root it is the output of their own last layer. Keys at accepted positions are always made from the target's states, in training as in
decoding. Most have one layer. Where there are more, each reads the output of the one below it at all positions.

Shape legend: B batch rows, E fresh tokens, M drafted nodes, N new tokens of either kind, T packed tokens, A anchors, K draft steps.
D hidden or head size, I attention's input, H heads, G key/value heads, S cache slots. Tensors with any leading dimensions have no suffix.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from draftsmith.models.drafters.draft_records import CacheState, Cycle, Emitted, Opening
from draftsmith.models.drafters.draft_slots import DraftSlots, read_prompt, seen_text
from draftsmith.models.drafters.drafter import Drafter
from draftsmith.models.drafters.rollout import PackedBatch, Rollout
from draftsmith.models.families.eagle_config import EagleConfig, check_window
from draftsmith.models.families.eagle_layer import DraftLayer, Rotation
from draftsmith.models.slots.attention import attend
from draftsmith.models.slots.constants import counting
from draftsmith.models.slots.rollout_attention import Pair, RolloutAttention
from draftsmith.models.slots.slot_cache import SlotCache
from draftsmith.models.target.key_values import KeyValues
from draftsmith.models.tree.limits import DraftLimits
from draftsmith.models.tree.steps import result_of


class EagleBase(Drafter):
    """What both architectures share: layers, run over anchors in training and over tree nodes in decoding.

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

    def key_values(self) -> tuple[KeyValues, ...]:
        """See :meth:`Drafter.key_values`: those of each layer."""
        numbers = 2 * self.config.num_key_value_heads * self.config.head_dim
        return (KeyValues(numbers * self.dtype.itemsize, self.config.sliding_window),) * len(self.stack)

    @property
    def max_draft_steps(self) -> int | None:
        """See :attr:`Drafter.max_draft_steps`: within the sliding window, a node sees all nodes above it."""
        return self.config.sliding_window

    def check_depth(self, limits: DraftLimits) -> None:
        """See :meth:`Drafter.check_depth`; a draft lies within the sliding window."""
        check_window(self.config.sliding_window, limits.draft_length, "draft_length")

    @property
    @abstractmethod
    def layer(self) -> DraftLayer:
        """The first decoder layer, which reads the token and what is known of the position before it."""

    @property
    def stack(self) -> tuple[DraftLayer, ...]:
        """All decoder layers, from low to high."""
        return (self.layer,)

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
            output: [..., D], of the last layer.

        Returns:
            [..., D].
        """

    def fed_back(self, output: Tensor) -> Tensor:
        """What a draft step knows of the position before it, where the target has not read the text.

        Args:
            output: [..., D], of the last layer at that position.

        Returns:
            [..., D].
        """
        return output

    def embed_text(self, batch: PackedBatch) -> Tensor:
        """What stands for the token x_{t+1} of every packed position: [T, D]."""
        return self.embed(batch.input_ids.roll(-1))

    def embed_fed(self, batch: PackedBatch, rollout: Rollout, step: int) -> Tensor:
        """What stands for the tokens that all anchors are fed at a step behind the first: [A, D]."""
        return self.embed(rollout.tokens[:, step])

    def embed_pairs(self, pairs: Emitted) -> Tensor:
        """What stands for the tokens of pairs in decoding: [B, E, D]."""
        return self.embed(pairs.tokens_BE)

    def teacher_forced(self, batch: PackedBatch, rollout: Rollout) -> Tensor:
        """See :meth:`Drafter.teacher_forced`; step k >= 1 is fed its own output of step k - 1.

        At positions that are no anchors, the last layer only makes keys and values: nothing else of them is ever seen.

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
        anchors_A = rollout.anchors
        output_AD, attentions = self.over_text(batch, anchors_A)
        further: list[list[Pair]] = [[] for _ in self.stack]
        outputs = [output_AD]
        for step in range(1, rollout.tokens.shape[1]):
            before_AD = outputs[-1].detach() if self.detach_steps else outputs[-1]
            embedded_AD, known_AD = self.embed_fed(batch, rollout, step), self.fed_back(before_AD)
            state_AD = self.join(embedded_AD, known_AD)
            rotation = self.rotation(batch.positions[anchors_A] + step, embedded_AD)
            outputs.append(self.further_step(embedded_AD, state_AD, rotation, attentions, further))
        return self.head_inputs(torch.stack(outputs))

    def further_step(
        self,
        embedded: Tensor,
        state: Tensor,
        rotation: tuple[Tensor, Tensor],
        attentions: Sequence[RolloutAttention],
        further: Sequence[list[Pair]],
    ) -> Tensor:
        """Run the layers over one token of each anchor, behind the text.

        Args:
            embedded: [A, D], of the tokens.
            state: [A, D], the first layer's residual input.
            rotation: at their positions.
            attentions: of each layer.
            further: each layer's keys and values of the steps before; those of this one are added.

        Returns:
            [A, D], the last layer's output.
        """
        for layer, attention, pairs in zip(self.stack, attentions, further, strict=True):
            inputs = layer.inputs(embedded, state)
            pairs.append(layer.keys_values(inputs, rotation))
            state = layer.finish(state, attention(layer.queries(inputs, rotation), pairs))
        return state

    def over_text(self, batch: PackedBatch, anchors_A: Tensor) -> tuple[Tensor, list[RolloutAttention]]:
        """Run the layers over the text, as the first step of every anchor does.

        Args:
            batch: packed samples with the target's states.
            anchors_A: int64, rising.

        Returns:
            The last layer's output at the anchors, [A, D], and what their further steps see in each layer.
        """
        embedded_TD = self.embed_text(batch)
        state_TD = self.join(embedded_TD, self._noisy(self.read(batch.hidden).to(embedded_TD.dtype), batch))
        rotation = self.rotation(batch.positions, embedded_TD)
        *lower, last = self.stack
        attentions = []
        for layer in lower:  # the layer above reads every position
            inputs_TI = layer.inputs(embedded_TD, state_TD)
            attentions.append(self._attention(batch, anchors_A, layer, inputs_TI, rotation))
            everywhere = attentions[-1].from_anchors(torch.arange(len(inputs_TI), device=inputs_TI.device))
            state_TD = layer.finish(state_TD, everywhere(layer.queries(inputs_TI, rotation), []))
        inputs_TI = last.inputs(embedded_TD, state_TD)
        attentions.append(self._attention(batch, anchors_A, last, inputs_TI, rotation))
        rotation = (rotation[0][anchors_A], rotation[1][anchors_A])
        attended = attentions[-1](last.queries(inputs_TI[anchors_A], rotation), [])
        return last.finish(state_TD[anchors_A], attended), attentions

    def _attention(
        self,
        batch: PackedBatch,
        anchors_A: Tensor,
        layer: DraftLayer,
        inputs_TI: Tensor,
        rotation: tuple[Tensor, Tensor],
    ) -> RolloutAttention:
        """What the anchors see of the text in one layer."""
        text = layer.keys_values(inputs_TI, rotation)
        return RolloutAttention(
            batch.document_ids, batch.positions, anchors_A, *text, sliding_window=self.config.sliding_window
        )

    def _noisy(self, known_TD: Tensor, batch: PackedBatch) -> Tensor:
        if not self.training or self.feature_noise == 0.0:
            return known_TD
        lengths_T = torch.bincount(batch.document_ids)[batch.document_ids]
        noise_TD = (torch.rand_like(known_TD) * 2.0 - 1.0) * self.feature_noise
        return known_TD + noise_TD * (512.0 / lengths_T)[:, None].to(known_TD.dtype)

    def start(self, opening: Opening) -> CacheState:
        """Read the pairs of the prompts, in chunks; the last one, which the first draft hangs on, stays pending."""
        return result_of(self.start_in_steps(opening))

    def start_in_steps(self, opening: Opening) -> Generator[None, None, CacheState]:
        """See :meth:`Drafter.start_in_steps`."""
        spare = max(opening.limits.max_fed, opening.limits.draft_length + 1)
        cache = SlotCache(opening.room + spare, num_layers=len(self.stack))

        def write(pairs: Emitted, positions_BE: Tensor) -> None:
            several = len(self.stack) > 1
            mask = seen_text(cache.window, positions_BE, self.config.sliding_window) if several else None
            self.write_pairs(cache, pairs, positions_BE, mask)

        return (yield from read_prompt(opening, cache, write))

    def write_pairs(self, cache: SlotCache, pairs: Emitted, positions_BE: Tensor, mask: Tensor | None) -> FreshPairs:
        """Read pairs of the text: write every layer's keys and values of them.

        Args:
            cache: aimed at them.
            pairs: the pairs.
            positions_BE: int64.
            mask: which slots they see, bool [B, 1, E, S], or None for all; only layers below the last attend.

        Returns:
            What the last layer makes of them, up to its attention.
        """
        embedded_BED, state_BED = self.pair_inputs(pairs)
        rotation = self.rotation(positions_BE, embedded_BED)
        state_BED = self.run(len(self.stack) - 1, cache, embedded_BED, state_BED, rotation, mask)
        inputs_BEI = self.stack[-1].inputs(embedded_BED, state_BED)
        seen = self.write_last(cache, inputs_BEI, rotation)
        return FreshPairs(state_BED, inputs_BEI, positions_BE, rotation, *seen)

    def pair_inputs(self, pairs: Emitted) -> tuple[Tensor, Tensor]:
        """The embeddings [B, E, D] at pairs of the text, and the first layer's residual input [B, E, D]."""
        embedded_BED = self.embed_pairs(pairs)
        return embedded_BED, self.join(embedded_BED, self.read(pairs.features).to(embedded_BED.dtype))

    def run(
        self,
        num_layers: int,
        cache: SlotCache,
        embedded_BND: Tensor,
        state_BND: Tensor,
        rotation: tuple[Tensor, Tensor],
        mask: Tensor | None,
    ) -> Tensor:
        """Run the lowest layers in decoding.

        Args:
            num_layers: how many.
            cache: aimed at the tokens.
            embedded_BND: of the tokens that are fed.
            state_BND: the first layer's residual input.
            rotation: at the tokens' positions.
            mask: which slots they see, bool [B, 1, N, S] or broadcastable, or None for all.

        Returns:
            The output of the highest of these layers, [B, N, D].
        """
        for index, layer in enumerate(self.stack[:num_layers]):
            inputs_BNI = layer.inputs(embedded_BND, state_BND)
            queries_BNHD, keys_BNGD, values_BNGD = layer.queries_keys_values(inputs_BNI, rotation)
            keys_BGSD, values_BGSD = cache.update(keys_BNGD.transpose(1, 2), values_BNGD.transpose(1, 2), index)
            attended_BHND = attend(queries_BNHD.transpose(1, 2), keys_BGSD, values_BGSD, mask)
            state_BND = layer.finish(state_BND, attended_BHND.transpose(1, 2))
        return state_BND

    def write_last(
        self, cache: SlotCache, inputs_BEI: Tensor, rotation: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Write the last layer's keys and values where the cache is aimed at; those of its visible slots, [B, G, S, D] each."""
        keys_BEGD, values_BEGD = self.stack[-1].keys_values(inputs_BEI, rotation)
        return cache.update(keys_BEGD.transpose(1, 2), values_BEGD.transpose(1, 2), len(self.stack) - 1)

    def advance(self, state: CacheState, emitted: Emitted) -> CacheState:  # type: ignore[override]
        """What was emitted is pending until the next draft."""
        return CacheState(state.cache, emitted)

    def expander(self, state: CacheState, cycle: Cycle, limits: DraftLimits) -> FeatureDraft:  # type: ignore[override]
        """See :class:`FeatureDraft`."""
        return FeatureDraft(self, state, cycle, limits.draft_length)

    def follow(self, state: CacheState, cycle: Cycle, limits: DraftLimits) -> CacheState:  # type: ignore[override]
        """See :meth:`Drafter.follow`: keys and values of the pending pairs only."""
        FeatureDraft(self, state, cycle, limits.draft_length).read_pending()
        return state


@dataclass(frozen=True)
class FreshPairs:
    """Pairs of the text that the last layer has just read.

    Attributes:
        state_BED: its residual input.
        inputs_BEI: what its attention reads.
        positions_BE: int64.
        rotation: cosines and sines at the positions.
        keys_BGSD: of the visible slots, the pairs' own among them.
        values_BGSD: of the same.
    """

    state_BED: Tensor
    inputs_BEI: Tensor
    positions_BE: Tensor
    rotation: tuple[Tensor, Tensor]
    keys_BGSD: Tensor
    values_BGSD: Tensor


class FeatureDraft:
    """One draft of an EAGLE drafter: the accepted pairs with the target's states first, then nodes with the layer's own output."""

    def __init__(self, drafter: EagleBase, state: CacheState, cycle: Cycle, depth: int) -> None:
        self.target_ids = drafter.to_target_ids
        self._drafter, self._layer = drafter, drafter.stack[-1]
        self._pending = state.pending
        self._slots = DraftSlots(
            state.cache, cycle, state.pending.tokens_BE.shape[1], sliding_window=drafter.config.sliding_window
        )
        self._last_B1 = state.pending.counts_B[:, None] - 1
        self.root_B = state.pending.tokens_BE.gather(1, self._last_B1).squeeze(1)
        self._depth = 0
        self._rotations = _NodeRotations(drafter.rotation, self._slots.lengths_B, depth)
        self._output_BMD = self._last_B1  # until the layers have run

    def begin(self) -> Tensor:
        """See :class:`Expander`: keys and values of all fresh pairs, and the last layer's output at the last."""
        pairs = self.read_pending()
        last_B11 = self._last_B1[..., None]
        state_B1D = pairs.state_BED.gather(1, last_B11.expand(-1, -1, pairs.state_BED.shape[-1]))
        inputs_B1I = pairs.inputs_BEI.gather(1, last_B11.expand(-1, -1, pairs.inputs_BEI.shape[-1]))
        rotation_last = (_at(pairs.rotation[0], last_B11), _at(pairs.rotation[1], last_B11))
        mask_B11S = self._slots.text_mask(pairs.positions_BE.gather(1, self._last_B1))
        queries_BH1D = self._layer.queries(inputs_B1I, rotation_last).transpose(1, 2)
        attended_BH1D = attend(queries_BH1D, pairs.keys_BGSD, pairs.values_BGSD, mask_B11S)
        return self._logits(self._layer.finish(state_B1D, attended_BH1D.transpose(1, 2)))

    def read_pending(self) -> FreshPairs:
        """Write keys and values of all fresh pairs."""
        drafter, slots = self._drafter, self._slots
        positions_BE = slots.aim_fresh(self._pending.counts_B)
        mask = slots.text_mask(positions_BE) if len(drafter.stack) > 1 else None
        return drafter.write_pairs(slots.cache, self._pending.slots(0, slots.num_fresh), positions_BE, mask)

    def extend(self, tokens_BM: Tensor, above_BM: Tensor) -> Tensor:
        """See :class:`Expander`: the last layer's output at new nodes, which are fed their parents'."""
        drafter = self._drafter
        known_BMD = drafter.fed_back(self._output_BMD)
        if known_BMD.shape[1] > 1:
            known_BMD = known_BMD.gather(1, above_BM[..., None].expand(-1, -1, known_BMD.shape[-1]))
        embedded_BMD = self.embed_nodes(tokens_BM, above_BM)
        state_BMD = drafter.join(embedded_BMD, known_BMD.expand(*tokens_BM.shape, -1))
        rotation = self._rotations.at(self._depth, embedded_BMD)
        self._depth += 1
        mask_B1MS = self._slots.aim_nodes(above_BM)
        return self._logits(
            drafter.run(len(drafter.stack), self._slots.cache, embedded_BMD, state_BMD, rotation, mask_B1MS)
        )

    def embed_nodes(self, tokens_BM: Tensor, above_BM: Tensor) -> Tensor:
        """What stands for the tokens of new nodes: [B, M, D]. It is called once for each layer of nodes, in order."""
        return self._drafter.embed(tokens_BM)

    def _logits(self, output_BMD: Tensor) -> Tensor:
        self._output_BMD = output_BMD
        return self._drafter.logits(self._drafter.head_inputs(output_BMD), self._depth)


class _NodeRotations:
    """Angles of the nodes of a draft; the nodes of a layer have one position.

    Args:
        rotation: makes them.
        lengths_B: int64, the position of the first layer of each row.
        depth: how many layers there can be.
    """

    def __init__(self, rotation: Rotation, lengths_B: Tensor, depth: int) -> None:
        self._rotation, self._lengths_B, self._depth = rotation, lengths_B, depth
        self._all: tuple[Tensor, Tensor] | None = None

    def at(self, layer: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [B, 1, 1, Dh] of a layer, counted from 0, in the dtype of ``like``."""
        if self._rotation.follows_length:
            return self._rotation(self._lengths_B[:, None] + layer, like)
        if self._all is None:
            self._all = self._rotation(self._lengths_B[:, None] + counting(self._depth, like.device), like)
        cosines_BL1D, sines_BL1D = self._all
        return cosines_BL1D[:, layer : layer + 1], sines_BL1D[:, layer : layer + 1]


def _at(part_BE1D: Tensor, last_B11: Tensor) -> Tensor:
    """[B, E, 1, D] -> [B, 1, 1, D] at each row's last fresh token."""
    return part_BE1D.gather(1, last_B11[..., None].expand(-1, -1, *part_BE1D.shape[2:]))

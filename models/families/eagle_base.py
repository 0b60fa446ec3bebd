"""What EAGLE drafters share: one decoder layer, its run in training and the step of its draft.

Knows nothing of losses, trees or verification.

Both feed the token x_{t+1} and what is known of position t. Where the target has read the text, that is the target's own state; below the
root it is the layer's own output. The layer's keys at accepted positions are always made from the target's states, in training as in
decoding.

Shape legend: B batch rows, E fresh tokens, M drafted nodes, N new tokens of either kind, T packed tokens, A anchors, K draft steps.
D hidden or head size, I attention's input, H heads, G key/value heads, S cache slots. Tensors with any leading dimensions have no suffix.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from draftsmith.models.drafters.draft_records import Cycle, Emitted, Opening
from draftsmith.models.drafters.draft_slots import DraftSlots, PairState, read_prompt
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

EagleState = PairState


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

    def key_values(self) -> tuple[KeyValues, ...]:
        """See :meth:`Drafter.key_values`: one layer's."""
        numbers = 2 * self.config.num_key_value_heads * self.config.head_dim
        return (KeyValues(numbers * self.dtype.itemsize, self.config.sliding_window),)

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

    def fed_back(self, output: Tensor) -> Tensor:
        """What a draft step knows of the position before it, where the target has not read the text.

        Args:
            output: [..., D], of the layer at that position.

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
        anchors_A, layer = rollout.anchors, self.layer
        output_AD, attention = self.over_text(batch, anchors_A)
        further: list[Pair] = []
        outputs = [output_AD]
        for step in range(1, rollout.tokens.shape[1]):
            before_AD = outputs[-1].detach() if self.detach_steps else outputs[-1]
            embedded_AD, known_AD = self.embed_fed(batch, rollout, step), self.fed_back(before_AD)
            state_AD = self.join(embedded_AD, known_AD)
            inputs_AI = layer.inputs(embedded_AD, state_AD)
            rotation = self.rotation(batch.positions[anchors_A] + step, embedded_AD)
            further = [*further, layer.keys_values(inputs_AI, rotation)]
            outputs.append(layer.finish(state_AD, attention(layer.queries(inputs_AI, rotation), further)))
        return self.head_inputs(torch.stack(outputs))

    def over_text(self, batch: PackedBatch, anchors_A: Tensor) -> tuple[Tensor, RolloutAttention]:
        """Run the layer over the text, as the first step of every anchor does.

        Args:
            batch: packed samples with the target's states.
            anchors_A: int64, rising.

        Returns:
            The layer's output at the anchors, [A, D], and what their further steps see.
        """
        layer = self.layer
        embedded_TD = self.embed_text(batch)
        state_TD = self.join(embedded_TD, self._noisy(self.read(batch.hidden).to(embedded_TD.dtype), batch))
        inputs_TI = layer.inputs(embedded_TD, state_TD)
        rotation = self.rotation(batch.positions, embedded_TD)
        text = layer.keys_values(inputs_TI, rotation)
        attention = RolloutAttention(
            batch.document_ids, batch.positions, anchors_A, *text, sliding_window=self.config.sliding_window
        )
        rotation = (rotation[0][anchors_A], rotation[1][anchors_A])
        attended = attention(layer.queries(inputs_TI[anchors_A], rotation), [])
        return layer.finish(state_TD[anchors_A], attended), attention

    def _noisy(self, known_TD: Tensor, batch: PackedBatch) -> Tensor:
        if not self.training or self.feature_noise == 0.0:
            return known_TD
        lengths_T = torch.bincount(batch.document_ids)[batch.document_ids]
        noise_TD = (torch.rand_like(known_TD) * 2.0 - 1.0) * self.feature_noise
        return known_TD + noise_TD * (512.0 / lengths_T)[:, None].to(known_TD.dtype)

    def start(self, opening: Opening) -> EagleState:
        """Read the pairs of the prompts, in chunks; the last one, which the first draft hangs on, stays pending."""
        return result_of(self.start_in_steps(opening))

    def start_in_steps(self, opening: Opening) -> Generator[None, None, EagleState]:
        """See :meth:`Drafter.start_in_steps`."""
        spare = max(opening.limits.max_fed, opening.limits.draft_length + 1)
        cache = SlotCache(opening.room + spare, num_layers=1)

        def write(pairs: Emitted, positions_BE: Tensor) -> None:
            inputs_BEI = self.pair_inputs(pairs)[1]
            _write(cache, self.layer, inputs_BEI, self.rotation(positions_BE, inputs_BEI))

        return (yield from read_prompt(opening, cache, write))

    def pair_inputs(self, pairs: Emitted) -> tuple[Tensor, Tensor]:
        """The layer's residual input [B, E, D] at pairs of the text, and what its attention reads [B, E, I]."""
        embedded_BED = self.embed_pairs(pairs)
        state_BED = self.join(embedded_BED, self.read(pairs.features).to(embedded_BED.dtype))
        return state_BED, self.layer.inputs(embedded_BED, state_BED)

    def advance(self, state: EagleState, emitted: Emitted) -> EagleState:  # type: ignore[override]
        """What was emitted is pending until the next draft."""
        return EagleState(state.cache, emitted)

    def expander(self, state: EagleState, cycle: Cycle, limits: DraftLimits) -> FeatureDraft:  # type: ignore[override]
        """See :class:`FeatureDraft`."""
        return FeatureDraft(self, state, cycle, limits.draft_length)

    def follow(self, state: EagleState, cycle: Cycle, limits: DraftLimits) -> EagleState:  # type: ignore[override]
        """See :meth:`Drafter.follow`: keys and values of the pending pairs only."""
        FeatureDraft(self, state, cycle, limits.draft_length).read_pending()
        return state


@dataclass(frozen=True)
class _FreshPairs:
    """Pairs of the text that the layer has just read.

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

    def __init__(self, drafter: EagleBase, state: EagleState, cycle: Cycle, depth: int) -> None:
        self.target_ids = drafter.to_target_ids
        self._drafter, self._layer = drafter, drafter.layer
        self._pending = state.pending
        self._slots = DraftSlots(
            state.cache, cycle, state.pending.tokens_BE.shape[1], sliding_window=drafter.config.sliding_window
        )
        self._last_B1 = state.pending.counts_B[:, None] - 1
        self.root_B = state.pending.tokens_BE.gather(1, self._last_B1).squeeze(1)
        self._depth = 0
        self._rotations = _NodeRotations(drafter.rotation, self._slots.lengths_B, depth)
        self._output_BMD = self._last_B1  # until the layer has run

    def begin(self) -> Tensor:
        """See :class:`Expander`: keys and values of all fresh pairs, and the layer's output at the last."""
        pairs = self.read_pending()
        last_B11 = self._last_B1[..., None]
        state_B1D = pairs.state_BED.gather(1, last_B11.expand(-1, -1, pairs.state_BED.shape[-1]))
        inputs_B1I = pairs.inputs_BEI.gather(1, last_B11.expand(-1, -1, pairs.inputs_BEI.shape[-1]))
        rotation_last = (_at(pairs.rotation[0], last_B11), _at(pairs.rotation[1], last_B11))
        mask_B11S = self._slots.text_mask(pairs.positions_BE.gather(1, self._last_B1))
        queries_B1HD = self._layer.queries(inputs_B1I, rotation_last)
        return self._attend(state_B1D, queries_B1HD, pairs.keys_BGSD, pairs.values_BGSD, mask_B11S)

    def read_pending(self) -> _FreshPairs:
        """Write keys and values of all fresh pairs."""
        drafter, slots = self._drafter, self._slots
        state_BED, inputs_BEI = drafter.pair_inputs(self._pending.slots(0, slots.num_fresh))
        positions_BE = slots.aim_fresh(self._pending.counts_B)
        rotation = drafter.rotation(positions_BE, inputs_BEI)
        keys_BGSD, values_BGSD = _write(slots.cache, self._layer, inputs_BEI, rotation)
        return _FreshPairs(state_BED, inputs_BEI, positions_BE, rotation, keys_BGSD, values_BGSD)

    def extend(self, tokens_BM: Tensor, above_BM: Tensor) -> Tensor:
        """See :class:`Expander`: the layer's output at new nodes, which are fed their parents'."""
        drafter = self._drafter
        known_BMD = drafter.fed_back(self._output_BMD)
        if known_BMD.shape[1] > 1:
            known_BMD = known_BMD.gather(1, above_BM[..., None].expand(-1, -1, known_BMD.shape[-1]))
        embedded_BMD = self.embed_nodes(tokens_BM, above_BM)
        state_BMD = drafter.join(embedded_BMD, known_BMD.expand(*tokens_BM.shape, -1))
        inputs_BMI = self._layer.inputs(embedded_BMD, state_BMD)
        rotation = self._rotations.at(self._depth, embedded_BMD)
        self._depth += 1
        mask_B1MS = self._slots.aim_nodes(above_BM)
        queries_BMHD, keys_BMGD, values_BMGD = self._layer.queries_keys_values(inputs_BMI, rotation)
        keys_BGSD, values_BGSD = self._slots.cache.update(keys_BMGD.transpose(1, 2), values_BMGD.transpose(1, 2), 0)
        return self._attend(state_BMD, queries_BMHD, keys_BGSD, values_BGSD, mask_B1MS)

    def embed_nodes(self, tokens_BM: Tensor, above_BM: Tensor) -> Tensor:
        """What stands for the tokens of new nodes: [B, M, D]. It is called once for each layer of nodes, in order."""
        return self._drafter.embed(tokens_BM)

    def _attend(
        self,
        state_BMD: Tensor,
        queries_BMHD: Tensor,
        keys_BGSD: Tensor,
        values_BGSD: Tensor,
        mask_B1MS: Tensor | None,
    ) -> Tensor:
        attended_BHMD = attend(queries_BMHD.transpose(1, 2), keys_BGSD, values_BGSD, mask_B1MS)
        self._output_BMD = self._layer.finish(state_BMD, attended_BHMD.transpose(1, 2))
        return self._drafter.logits(self._drafter.head_inputs(self._output_BMD), self._depth)


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


def _write(
    cache: SlotCache, layer: DraftLayer, inputs_BEI: Tensor, rotation: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Write keys and values where the cache is aimed at; those of its visible slots, [B, G, S, D] each."""
    keys_BEGD, values_BEGD = layer.keys_values(inputs_BEI, rotation)
    return cache.update(keys_BEGD.transpose(1, 2), values_BEGD.transpose(1, 2), 0)


def _at(part_BE1D: Tensor, last_B11: Tensor) -> Tensor:
    """[B, E, 1, D] -> [B, 1, 1, D] at each row's last fresh token."""
    return part_BE1D.gather(1, last_B11[..., None].expand(-1, -1, *part_BE1D.shape[2:]))

"""EAGLE: a feature predictor of one decoder layer, in its two architectures.

Owns EAGLE-1 (arXiv:2401.15077; EAGLE-2, arXiv:2406.16858, is the same weights with dynamic trees; HASS, arXiv:2408.15766, the same
architecture trained over several steps) and EAGLE-3 (arXiv:2503.01840), their runs in training and the step of their draft. Knows
nothing of losses, trees or verification.

Both feed the token x_{t+1} and what is known of position t: the target's own states where it has read the text, the layer's own output
below the root. The layer's keys at accepted positions are always made from the target's states, in training as in decoding.

Shape legend: B batch rows, E fresh tokens, M drafted nodes, T packed tokens, A anchors, K draft steps, D hidden, Vd draft vocabulary.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from draftsmith.models.drafters.draft_slots import DraftSlots
from draftsmith.models.drafters.drafter import Cycle, Drafter, Emitted, Opening
from draftsmith.models.drafters.eagle_config import Eagle3Config, EagleConfig, default_layers, layer_fields
from draftsmith.models.drafters.eagle_layer import DraftLayer, Rotation
from draftsmith.models.drafters.rollout import PackedBatch, Rollout
from draftsmith.models.drafters.rollout_attention import Pair, RolloutAttention
from draftsmith.models.target.target import PRE_NORM, TargetEnds
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
        """The state of some batch rows only."""
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

    @property
    @abstractmethod
    def layer(self) -> DraftLayer:
        """The one decoder layer."""

    @abstractmethod
    def read(self, features: Mapping[str, Tensor]) -> Tensor:
        """The target's states by name, [..., D] each -> what stands for a position that the target has read, [..., D]."""

    @abstractmethod
    def join(self, embedded: Tensor, known: Tensor) -> Tensor:
        """Embedding of x_{t+1} and what is known of position t, [..., D] each -> the layer's residual input [..., D]."""

    @abstractmethod
    def head_inputs(self, output: Tensor) -> Tensor:
        """The layer's output [..., D] -> what the output head is applied to [..., D]."""

    def embed(self, tokens: Tensor) -> Tensor:
        """Target ids int64 [...] -> the target's embeddings [..., D] in this drafter's dtype."""
        return self.ends.embed(tokens).to(self.dtype)

    def logits(self, output: Tensor) -> Tensor:
        """The layer's output [..., D] -> draft logits [..., Vd]."""
        weight = self.head_weight
        return F.linear(self.head_inputs(output).to(weight.dtype), weight)

    def teacher_forced(self, batch: PackedBatch, rollout: Rollout) -> Tensor:
        """[K, A, D]: the head's inputs at every step of every anchor; step k >= 1 is fed its own output of step k - 1.

        Only keys and values are made at positions that are no anchors: nothing else of them is ever seen.

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
        """Everything of the prompt is pending."""
        spare = max(opening.limits.max_fed, opening.limits.draft_length + 1)
        return EagleState(SlotCache(opening.room + spare, num_layers=1), opening.prompt)

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
        self._slots = DraftSlots(state.cache, cycle)
        self._last_B1 = state.pending.counts_B[:, None] - 1
        self.root_B = state.pending.tokens_BE.gather(1, self._last_B1).squeeze(1)
        self._depth = 0
        self._output_BMD = torch.empty(0)

    def begin(self) -> Tensor:
        """[B, 1, Vd]: keys and values of all fresh pairs, and the layer's output at the last."""
        drafter, slots, pending = self._drafter, self._slots, self._pending
        embedded = drafter.embed(pending.tokens_BE[:, : slots.num_fresh])
        known = drafter.read({name: states[:, : slots.num_fresh] for name, states in pending.features.items()})
        state = drafter.join(embedded, known.to(embedded.dtype))
        inputs = self._layer.inputs(embedded, state)
        positions_BE = slots.aim_fresh(pending.counts_B)
        rotation = drafter.rotation(positions_BE, embedded)
        keys, values = self._write(inputs, rotation)
        at_last = self._last_B1[..., None]
        state, inputs = (part.gather(1, at_last.expand(-1, -1, part.shape[-1])) for part in (state, inputs))
        rotation_last = (_at(rotation[0], at_last), _at(rotation[1], at_last))
        mask = slots.text_mask(positions_BE.gather(1, self._last_B1))
        return self._attend(state, inputs, rotation_last, keys, values, mask)

    def extend(self, tokens_BM: Tensor, above_BM: Tensor) -> Tensor:
        """[B, M, Vd]: the layer's output at new nodes, which are fed their parents'."""
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
        keys, values = self._write(inputs, rotation)
        return self._attend(state, inputs, rotation, keys, values, mask)

    def _write(self, inputs: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        keys, values = self._layer.keys_values(inputs, rotation)
        return self._slots.cache.update(keys.transpose(1, 2), values.transpose(1, 2), 0)

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
        return self._drafter.logits(self._output_BMD)


def _at(part_BEHD: Tensor, at_last_B11: Tensor) -> Tensor:
    """[B, E, 1, Dh] -> [B, 1, 1, Dh] at each row's last fresh token."""
    return part_BEHD.gather(1, at_last_B11[..., None].expand(-1, -1, *part_BEHD.shape[2:]))


class Eagle(EagleBase):
    """EAGLE-1: f^_{t+1} = layer(fc([E(x_{t+1}); f_t])), scored by the target's own head (arXiv:2401.15077, section 4).

    f is the target's state after its final norm. ``fc`` has a bias only where the config asks for it.
    """

    config_class = EagleConfig
    wide = False
    predicts_features = True

    def __init__(self, config: EagleConfig) -> None:
        super().__init__(config)
        self.fc = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=config.bias)
        self.layers = nn.ModuleList([DraftLayer(config.llama(), wide=False)])
        self._rows: Tensor | None = None
        self.post_init()

    @classmethod
    def for_target(
        cls,
        ends: TargetEnds,
        *,
        draft_token_ids: Tensor | None = None,
        num_draft_steps: int = 1,
        tokenizer_fingerprint: str = "",
    ) -> Eagle:
        """A fresh drafter for one target, attached to it.

        Args:
            ends: the target's frozen ends.
            draft_token_ids: int64 [Vd], increasing: only these rows of the target's head are scored; None scores all.
            num_draft_steps: steps it will be trained for, stored in its config.
            tokenizer_fingerprint: stored, and checked by those who decode with text.
        """
        drafter = cls(
            EagleConfig(
                **layer_fields(ends),
                draft_vocab_size=None if draft_token_ids is None else len(draft_token_ids),
                num_draft_steps=num_draft_steps,
                tokenizer_fingerprint=tokenizer_fingerprint,
            )
        )
        if draft_token_ids is not None and drafter.d2t is not None:
            drafter.set_draft_ids(draft_token_ids)
        with torch.no_grad():  # begins by handing the feature on: what follows is a correction of it
            D = ends.hidden_size
            drafter.fc.weight[:, D:].copy_(torch.eye(D))
        drafter.attach(ends)
        return drafter

    @property
    def layer(self) -> DraftLayer:
        """The one decoder layer, without a norm of its input."""
        layer = self.layers[0]
        assert isinstance(layer, DraftLayer)
        return layer

    @property
    def head_weight(self) -> Tensor:
        """[Vd, D], frozen: the target's head, or its rows of the draft vocabulary."""
        weight, scale = self.ends.head_weight, self.ends.logit_scale
        if self.d2t is None and scale == 1.0:
            return weight
        if self._rows is None or self._rows.device != weight.device or self._rows.dtype != weight.dtype:
            self._rows = weight.detach()[self.draft_ids().to(weight.device)] * scale
        return self._rows

    def read(self, features: Mapping[str, Tensor]) -> Tensor:
        """The state after the final norm."""
        return self.ends.final_norm(features[PRE_NORM])

    def join(self, embedded: Tensor, known: Tensor) -> Tensor:
        """fc([embedding; feature])."""
        return self.fc(torch.cat([embedded, known], dim=-1))

    def head_inputs(self, output: Tensor) -> Tensor:
        """The predicted feature as it is."""
        return output

    def set_draft_ids(self, target_ids: Tensor) -> None:
        """See :meth:`Drafter.set_draft_ids`."""
        super().set_draft_ids(target_ids)
        self._rows = None

    def attach(self, ends: TargetEnds) -> Drafter:
        """See :meth:`Drafter.attach`."""
        self._rows = None
        return super().attach(ends)


class Eagle3(EagleBase):
    """EAGLE-3: fused low, middle and high states, own norm and head, no guess of the feature (arXiv:2503.01840, section 3.1)."""

    config_class = Eagle3Config
    config: Eagle3Config
    wide = True

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__(config)
        D = config.hidden_size
        size = config.vocab_size if config.draft_vocab_size is None else min(config.draft_vocab_size, config.vocab_size)
        self.fc = nn.Linear(len(config.layers) * D, D, bias=False)
        self.midlayer = DraftLayer(config.llama(), wide=True)
        self.norm = LlamaRMSNorm(D, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(D, size, bias=False)
        self.post_init()

    @classmethod
    def for_target(
        cls,
        ends: TargetEnds,
        *,
        layers: Sequence[str] | None = None,
        draft_token_ids: Tensor | None = None,
        num_draft_steps: int = 7,
        tokenizer_fingerprint: str = "",
    ) -> Eagle3:
        """A fresh drafter for one target, attached to it, its head started from the target's.

        Args:
            ends: the target's frozen ends.
            layers: names of the layers to fuse, low to high; None takes :func:`default_layers`.
            draft_token_ids: int64 [Vd], increasing; None keeps the full vocabulary.
            num_draft_steps: steps it will be trained for, stored in its config.
            tokenizer_fingerprint: stored, and checked by those who decode with text.
        """
        drafter = cls(
            Eagle3Config(
                **layer_fields(ends),
                layers=default_layers(ends.config.num_hidden_layers) if layers is None else layers,
                draft_vocab_size=None if draft_token_ids is None else len(draft_token_ids),
                num_draft_steps=num_draft_steps,
                tokenizer_fingerprint=tokenizer_fingerprint,
            )
        )
        if draft_token_ids is not None and drafter.d2t is not None:
            drafter.set_draft_ids(draft_token_ids)
        with torch.no_grad():
            rows = ends.head_weight[drafter.draft_ids().to(ends.device)]
            drafter.lm_head.weight.copy_(rows * ends.logit_scale)
        drafter.attach(ends)
        return drafter

    @property
    def features(self) -> tuple[str, ...]:
        """The layers that are fused."""
        return tuple(self.config.layers)

    @property
    def layer(self) -> DraftLayer:
        """The one decoder layer, which reads [norm(embedding); norm(state)]."""
        return self.midlayer

    @property
    def head_weight(self) -> Tensor:
        """[Vd, D]."""
        return self.lm_head.weight

    def read(self, features: Mapping[str, Tensor]) -> Tensor:
        """fc over the fused layers."""
        fused = torch.cat([features[name] for name in self.config.layers], dim=-1)
        return self.fc(fused.to(self.fc.weight.dtype))

    def join(self, embedded: Tensor, known: Tensor) -> Tensor:
        """The state as it is: the embedding enters through the layer's input."""
        return known

    def head_inputs(self, output: Tensor) -> Tensor:
        """The output after this drafter's own norm."""
        return self.norm(output)


for _config, _model in ((EagleConfig, Eagle), (Eagle3Config, Eagle3)):
    AutoConfig.register(_config.model_type, _config)
    AutoModel.register(_config, _model)

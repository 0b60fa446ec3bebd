"""EAGLE-3: a decoder layer, or several, over fused states of several of the target's layers, with a head of its own (arXiv:2503.01840).

Four switches are those of EAGLE-3.1 (arXiv:2605.09992), which public heads use: where the fused states, the residual and the state that is
fed back are normalised. Ours begin with all of them off, as the paper has it. With ``parallel`` it is a P-EAGLE (arXiv:2602.01469): the
steps behind the first read a mask in place of the drafted token and of the layer's own output, so that one pass drafts all tokens.

Owns the drafter, which layers it reads by default, its settings and its record. Knows nothing of losses, trees or verification.

Shape legend: B batch rows, E fresh pairs, M nodes of a layer, K draft steps, n fused layers, D hidden, Vd draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from draftsmith.models.drafters.draft_records import CacheState, Cycle
from draftsmith.models.drafters.draft_slots import DraftSlots
from draftsmith.models.drafters.drafter import Drafter
from draftsmith.models.drafters.family import About, DrafterFamily, Family
from draftsmith.models.drafters.parallel_draft import ParallelDraft
from draftsmith.models.drafters.rollout import PackedBatch, Rollout
from draftsmith.models.families.eagle_base import EagleBase, FeatureDraft
from draftsmith.models.families.eagle_config import NO_LAYERS, EagleConfig, block_outputs, check_window, layer_fields
from draftsmith.models.families.eagle_layer import DeeperLayer, DraftLayer, rms_norm
from draftsmith.models.files.field_rules import FLAG, NAMES, PARTS, TOKEN_OR_NULL, Rule
from draftsmith.models.slots.attention import attend
from draftsmith.models.slots.rollout_attention import Pair
from draftsmith.models.target.target import TargetEnds
from draftsmith.models.tree.limits import DraftLimits

SWITCHES = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
"""Fields of the config, named as engines and the speculators package name them."""


class Eagle3Config(EagleConfig):
    """EAGLE-3's fields.

    Attributes:
        layers: names of the target's layers that are fused, from low to high.
        norm_before_residual: the layer's residual is the state after ``hidden_norm``, not the state itself.
        norm_before_fc: one norm over the fused states together, before ``fc``.
        fc_norm: one norm for each fused layer, before ``fc``; excludes ``norm_before_fc``.
        norm_output: what a draft step feeds to the next is the output after the final norm.
        parallel: no step reads what was drafted before it; the steps behind the first are fed a mask.
        mask_token_id: with ``parallel``, an unused token of the target whose embedding these steps are fed.
        attention_bias: the four projections of attention have biases, as some public heads do.
        head_norms: attention is Qwen3's, which normalises each head of queries and keys; False makes it Llama's.
        num_draft_layers: decoder layers of the drafter; those above the first are Llama's or Qwen3's own.
        own_embedding: the drafter has an embedding of its own, as many published P-EAGLEs have; else it borrows the target's.
    """

    model_type = "draftsmith_eagle3"
    rules: ClassVar[Mapping[str, Rule]] = {
        **EagleConfig.rules,
        "layers": NAMES,
        **dict.fromkeys((*SWITCHES, "parallel", "attention_bias", "head_norms", "own_embedding"), FLAG),
        "mask_token_id": TOKEN_OR_NULL,
        "num_draft_layers": PARTS,
    }

    def __init__(
        self,
        layers: Sequence[str] = (),
        norm_before_residual: bool = False,
        norm_before_fc: bool = False,
        fc_norm: bool = False,
        norm_output: bool = False,
        parallel: bool = False,
        mask_token_id: int | None = None,
        attention_bias: bool = False,
        num_draft_layers: int = 1,
        own_embedding: bool = False,
        head_norms: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.layers = list(layers)
        self.norm_before_residual, self.norm_before_fc = norm_before_residual, norm_before_fc
        self.fc_norm, self.norm_output = fc_norm, norm_output
        self.parallel, self.mask_token_id = parallel, mask_token_id
        self.attention_bias, self.num_draft_layers = attention_bias, num_draft_layers
        self.own_embedding, self.head_norms = own_embedding, head_norms

    def fault(self) -> str:
        """See :meth:`DrafterConfig.fault`."""
        if not self.layers:
            return NO_LAYERS
        if self.norm_before_fc and self.fc_norm:
            return "norm_before_fc and fc_norm, of which a drafter has one at the most"
        if self.parallel != (self.mask_token_id is not None):
            return f"parallel {self.parallel} and mask_token_id {self.mask_token_id}, of which a drafter has both or neither"
        if self.mask_token_id is not None and self.mask_token_id >= self.vocab_size:
            return (
                f"mask_token_id {self.mask_token_id}, which is not below the target's vocabulary of {self.vocab_size}"
            )
        return super().fault()

    def llama(self) -> LlamaConfig:
        """See :meth:`LayerConfig.llama`."""
        layer = super().llama()
        layer.attention_bias = self.attention_bias
        return layer

    @property
    def switches(self) -> dict[str, bool]:
        """The four switches by name."""
        return {name: getattr(self, name) for name in SWITCHES}


class Eagle3(EagleBase):
    """EAGLE-3: fused low, middle and high states, own norm and head, no guess of the feature (arXiv:2503.01840, section 3.1)."""

    config_class = Eagle3Config
    config: Eagle3Config
    wide = True

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__(config)
        D, n = config.hidden_size, len(config.layers)
        self.input_norm = LlamaRMSNorm(n * D, eps=config.rms_norm_eps) if config.norm_before_fc else None
        norms = [LlamaRMSNorm(D, eps=config.rms_norm_eps) for _ in range(n)] if config.fc_norm else None
        self.fc_norm = None if norms is None else nn.ModuleList(norms)
        self.fc = nn.Linear(n * D, D, bias=False)
        layer, norms_state = config.llama(), not config.norm_before_residual
        self.midlayer = DraftLayer(layer, wide=True, norms_state=norms_state, head_norms=config.head_norms)
        # Named as engines name them, which count the first as layer 0.
        above = range(1, config.num_draft_layers)
        self.layers = nn.ModuleDict({str(number): DeeperLayer(layer, config.head_norms) for number in above})
        self.norm = LlamaRMSNorm(D, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(D, config.num_draft_tokens, bias=False)
        self.embed_tokens = nn.Embedding(config.vocab_size, D) if config.own_embedding else None
        self.mask_hidden = nn.Parameter(0.02 * torch.randn(1, 1, n * D)) if config.parallel else None
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
        sliding_window: int | None = None,
        mask_token_id: int | None = None,
        num_draft_layers: int = 1,
        head_norms: bool = False,
    ) -> Eagle3:
        """Make a fresh drafter for one target, attached to it, its head started from the target's.

        Args:
            ends: the target's frozen ends.
            layers: names of the layers to fuse, low to high; None takes :func:`default_layers`.
            draft_token_ids: int64 [Vd], increasing; None keeps the full vocabulary.
            num_draft_steps: steps it will be trained for, stored in its config.
            tokenizer_fingerprint: stored, and checked by those who decode with text.
            sliding_window: see :class:`EagleConfig`.
            mask_token_id: of a P-EAGLE; None makes an ordinary EAGLE-3.
            num_draft_layers: of the drafter.
            head_norms: see :class:`Eagle3Config`.

        Returns:
            The drafter.

        Raises:
            ValueError: ``layers`` is None and the target has fewer than three layers.
        """
        drafter = cls(
            Eagle3Config(
                **layer_fields(ends),
                layers=default_layers(ends.config.num_hidden_layers) if layers is None else layers,
                draft_vocab_size=None if draft_token_ids is None else len(draft_token_ids),
                num_draft_steps=num_draft_steps,
                tokenizer_fingerprint=tokenizer_fingerprint,
                sliding_window=sliding_window,
                parallel=mask_token_id is not None,
                mask_token_id=mask_token_id,
                num_draft_layers=num_draft_layers,
                head_norms=head_norms,
            )
        )
        drafter.adopt_target(ends, draft_token_ids)
        with torch.no_grad():
            rows = ends.head_weight[drafter.draft_ids().to(ends.device)]
            drafter.lm_head.weight.copy_(rows * ends.logit_scale)
        return drafter

    @property
    def features(self) -> tuple[str, ...]:
        """The layers that are fused."""
        return tuple(self.config.layers)

    @property
    def mask_token(self) -> int | None:
        """See :attr:`Drafter.mask_token`."""
        return self.config.mask_token_id

    @property
    def layer(self) -> DraftLayer:
        """The first decoder layer, which reads [norm(embedding); norm(state)]."""
        return self.midlayer

    @property
    def stack(self) -> tuple[DraftLayer, ...]:
        """See :attr:`EagleBase.stack`."""
        return (self.midlayer, *self.layers.values())  # type: ignore[arg-type]

    def embed(self, tokens: Tensor) -> Tensor:
        """See :meth:`Drafter.embed`; with ``own_embedding`` the drafter's."""
        return super().embed(tokens) if self.embed_tokens is None else self.embed_tokens(tokens)

    @property
    def head_weight(self) -> Tensor:
        """[Vd, D]."""
        return self.lm_head.weight

    def weights_read_once(self) -> tuple[Tensor, ...]:
        """See :meth:`Drafter.weights_read_once`: fc, which reads the states of emitted tokens only."""
        return () if self.config.parallel else (self.fc.weight,)

    def passes(self, draft_length: int) -> int:
        """See :meth:`Drafter.passes`: one where all steps are drafted at once."""
        return 1 if self.config.parallel else draft_length

    def read(self, features: Mapping[str, Tensor]) -> Tensor:
        """fc over the fused layers, normalised before it where the config says so.

        Args:
            features: layer name -> [..., D].

        Returns:
            [..., D].
        """
        states = [features[name].to(self.fc.weight.dtype) for name in self.config.layers]
        if self.fc_norm is not None:
            states = [norm(state) for norm, state in zip(self.fc_norm, states, strict=True)]
        fused = torch.cat(states, dim=-1)
        return self.fc(fused if self.input_norm is None else rms_norm(self.input_norm, fused))

    def join(self, embedded: Tensor, known: Tensor) -> Tensor:
        """The state as it is, [..., D], or with ``norm_before_residual`` after the layer's norm of it.

        The embedding enters through the layer's input.
        """
        return rms_norm(self.midlayer.hidden_norm, known) if self.config.norm_before_residual else known

    def fed_back(self, output: Tensor) -> Tensor:
        """The output, [..., D], after this drafter's own norm with ``norm_output``."""
        return rms_norm(self.norm, output) if self.config.norm_output else output

    @property
    def reads_drafted(self) -> bool:
        """See :attr:`Drafter.reads_drafted`: not with ``parallel``."""
        return not self.config.parallel

    @property
    def skips_steps(self) -> bool:
        """See :attr:`Drafter.skips_steps`: with ``parallel``."""
        return self.config.parallel

    def teacher_forced(self, batch: PackedBatch, rollout: Rollout) -> Tensor:
        """See :meth:`EagleBase.teacher_forced`. With ``parallel``, only steps that are valid are computed; the others are zeros.

        Raises:
            ValueError: as there.
        """
        if not self.config.parallel or not rollout.on_text:
            return super().teacher_forced(batch, rollout)
        output_AD, attentions = self.over_text(batch, rollout.anchors)
        embedded_D, known_D = self.mask()
        state_D = self.join(embedded_D, known_D)
        outputs = [output_AD + 0.0 * state_D.sum()]  # which keeps the mask in the graph where no further step is valid
        rows = torch.arange(len(rollout.anchors), device=output_AD.device)
        further: list[list[Pair]] = [[] for _ in self.stack]
        for step in range(1, rollout.tokens.shape[1]):
            kept = torch.nonzero(rollout.valid[rows, step]).squeeze(1)
            rows, further = rows[kept], [[(keys[kept], values[kept]) for keys, values in pairs] for pairs in further]
            embedded_ND, state_ND = embedded_D.expand(len(rows), -1), state_D.expand(len(rows), -1)
            rotation = self.rotation(batch.positions[rollout.anchors[rows]] + step, embedded_ND)
            seen = [attention.at(rows) for attention in attentions]
            output_ND = self.further_step(embedded_ND, state_ND, rotation, seen, further)
            outputs.append(torch.zeros_like(output_AD).index_copy(0, rows, output_ND))
        return self.head_inputs(torch.stack(outputs))

    def mask(self) -> tuple[Tensor, Tensor]:
        """What a P-EAGLE's steps behind the first are fed: the embedding of the mask token [D], and fc of the learned state [D]."""
        assert self.mask_hidden is not None
        assert self.config.mask_token_id is not None
        parts = self.mask_hidden.flatten().chunk(len(self.config.layers))
        embedded_D = self.embed(torch.full((), self.config.mask_token_id, device=self.mask_hidden.device))
        # As at pairs of the text: under autocast, fc gives a narrower dtype.
        return embedded_D, self.read(dict(zip(self.config.layers, parts, strict=True))).to(embedded_D.dtype)

    def expander(self, state: CacheState, cycle: Cycle, limits: DraftLimits) -> FeatureDraft | MaskedDraft:  # type: ignore[override]
        """See :class:`FeatureDraft`, and with ``parallel`` :class:`MaskedDraft`."""
        if self.config.parallel:
            return MaskedDraft(self, state, cycle, limits.draft_length)
        return super().expander(state, cycle, limits)

    def head_inputs(self, output: Tensor) -> Tensor:
        """The output after this drafter's own norm, [..., D]."""
        return rms_norm(self.norm, output)


class MaskedDraft(ParallelDraft):
    """One draft of a P-EAGLE: the last pair of the text and K - 1 masks behind it, in one pass.

    Nodes of one depth have the same continuations.

    Args:
        drafter: with ``parallel``.
        state: of the drafter.
        cycle: what the decoder knows of the rows.
        depth: K.
    """

    def __init__(self, drafter: Eagle3, state: CacheState, cycle: Cycle, depth: int) -> None:
        last_B1 = state.pending.counts_B[:, None] - 1
        root_B = state.pending.tokens_BE.gather(1, last_B1).squeeze(1)
        super().__init__(drafter, root_B)
        self._eagle, self._pending, self._length, self._last_B1 = drafter, state.pending, depth, last_B1
        self._slots = DraftSlots(
            state.cache, cycle, state.pending.tokens_BE.shape[1], sliding_window=drafter.config.sliding_window
        )

    def slot_logits(self) -> Tensor:
        """See :meth:`ParallelDraft.slot_logits`: those of all steps."""
        drafter, slots, stack = self._eagle, self._slots, self._eagle.stack
        embedded, state = drafter.pair_inputs(self._pending.slots(0, slots.num_fresh))
        fresh_BE, masks_BS = slots.aim_block(self._pending.counts_B, self._length - 1)
        embedded_D, known_D = drafter.mask()
        shape = (*masks_BS.shape, -1)
        embedded = torch.cat([embedded, embedded_D.expand(shape)], dim=1)
        state = torch.cat([state, drafter.join(embedded_D, known_D).expand(shape)], dim=1)
        positions = torch.cat([fresh_BE, masks_BS], dim=1)
        rotation = drafter.rotation(positions, embedded)
        mask = slots.text_mask(positions) if len(stack) > 1 else None
        state = drafter.run(len(stack) - 1, slots.cache, embedded, state, rotation, mask)
        inputs = stack[-1].inputs(embedded, state)
        seen = drafter.write_last(slots.cache, inputs, rotation)
        positions_BK = torch.cat([fresh_BE.gather(1, self._last_B1), masks_BS], dim=1)
        queries = stack[-1].queries(self._of_steps(inputs), drafter.rotation(positions_BK, embedded))
        attended = attend(queries.transpose(1, 2), *seen, slots.text_mask(positions_BK))
        outputs_BKD = stack[-1].finish(self._of_steps(state), attended.transpose(1, 2))
        return drafter.logits(drafter.head_inputs(outputs_BKD), 0)

    def _of_steps(self, part: Tensor) -> Tensor:
        """[B, E + K - 1, I] of the fresh pairs and the masks -> [B, K, I]: each row's last fresh pair, and the masks."""
        num_fresh = self._slots.num_fresh
        last = part.gather(1, self._last_B1[..., None].expand(-1, -1, part.shape[-1]))
        return torch.cat([last, part[:, num_fresh:]], dim=1)


def default_layers(num_layers: int) -> tuple[str, ...]:
    """The three layers that EAGLE-3 fuses: outputs of layers 2, L/2 and L - 3 counted from 1, as every engine has it by default.

    Targets so shallow that these coincide take the first, the middle and the last but one instead.

    Args:
        num_layers: L, of the target.

    Returns:
        Names of three layers, from low to high.

    Raises:
        ValueError: fewer than three layers.
    """
    if num_layers < 3:
        raise ValueError(f"EAGLE-3 fuses three layers, the target has {num_layers}; use EAGLE-1 or ReDrafter for it")
    counts = (2, num_layers // 2, num_layers - 3)
    if not counts[0] < counts[1] < counts[2]:
        counts = (1, (num_layers + 1) // 2, num_layers - 1 if num_layers > 3 else num_layers)
    return block_outputs([count - 1 for count in counts], num_layers)


class Eagle3Family(DrafterFamily):
    """EAGLE-3's drafter over fused layers (arXiv 2503.01840).

    Args:
        layers: names of the target's layers to fuse, low to high; null takes those that serving engines expect.
        draft_vocab_size: keep this many tokens, the most frequent labelled ones of the training samples; null keeps
            all.
        detach_steps: no gradient flows from a draft step into those before it. Not for a P-EAGLE, whose steps read none of them.
        sliding_window: the layers see only so many of the last tokens, which keeps long texts cheap; null for all. It is written into no
            engine's layout.
        mask_token_id: an unused token of the target; it makes a P-EAGLE (arXiv 2602.01469), which drafts all tokens in one pass.
        num_draft_layers: decoder layers of the drafter. The method has one; published P-EAGLEs have several.
        head_norms: attention is Qwen3's, which normalises each head of queries and keys; false makes it Llama's, which every engine reads.
    """

    kind = Eagle3

    def __init__(
        self,
        layers: list[str] | None = None,
        draft_vocab_size: int | None = None,
        detach_steps: bool = False,
        sliding_window: int | None = None,
        mask_token_id: int | None = None,
        num_draft_layers: int = 1,
        head_norms: bool = False,
    ) -> None:
        self.sliding_window, self.mask_token_id = sliding_window, mask_token_id
        self.num_draft_layers, self.head_norms = num_draft_layers, head_norms
        self.layers, self.draft_vocab_size, self.detach_steps = layers, draft_vocab_size, detach_steps

    def build(
        self, ends: TargetEnds, draft_token_ids: Tensor | None, num_steps: int, tokenizer_fingerprint: str
    ) -> Eagle3:
        """See DrafterFamily.build.

        Raises:
            ValueError: the target has fewer than three layers, the sliding window is shorter than the steps, or settings that do not go
                together.
        """
        check_window(self.sliding_window, num_steps)
        drafter = Eagle3.for_target(
            ends,
            layers=self.layers,
            draft_token_ids=draft_token_ids,
            num_draft_steps=num_steps,
            tokenizer_fingerprint=tokenizer_fingerprint,
            sliding_window=self.sliding_window,
            mask_token_id=self.mask_token_id,
            num_draft_layers=self.num_draft_layers,
            head_norms=self.head_norms,
        )
        self.configure(drafter)
        return drafter

    def configure(self, drafter: Drafter) -> None:
        """See DrafterFamily.configure.

        Raises:
            ValueError: ``detach_steps`` for a P-EAGLE.
        """
        assert isinstance(drafter, Eagle3)
        if self.detach_steps and drafter.config.parallel:
            raise ValueError(
                "detach_steps is true, and no step of a P-EAGLE (mask_token_id) reads the output of the one before; set it to false"
            )
        drafter.detach_steps = self.detach_steps


FAMILY = Family(
    name="eagle3",
    drafter=Eagle3,
    config=Eagle3Config,
    settings=Eagle3Family,
    about=About(
        title="EAGLE-3",
        what="A draft head of one decoder layer over fused states ([EAGLE-3](https://arxiv.org/abs/2503.01840))",
        reads="hidden states of several layers",
    ),
    layouts=("draftsmith.export.layouts.eagle3", "draftsmith.export.layouts.speculators"),
)

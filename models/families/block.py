"""Block drafters: all slots of a draft in one pass of a few decoder layers over the target's states.

DFlash (arXiv:2602.06036) fills a block behind the root: slot 0 holds the root and predicts nothing, slot k >= 1 holds a mask and predicts
the k-th token behind the root. Every slot sees the others. JetSpec (arXiv:2606.18394) hides later slots (``causal``). DSpark's backbone
(arXiv:2607.05147) lets slot 0 predict too (``sample_from_anchor``). A correction lets a slot read the tokens drafted before it. DFlash 2's
layers have a convolution over the slots, and it corrects the few likeliest tokens of a slot.

Owns the drafter, which layers it reads by default, its settings and its record. Knows nothing of losses, trees or verification.

Shape legend: B batch rows, E fresh pairs, T packed tokens, A anchors, S slots of a block, K draft steps, D hidden, Vd draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from draftsmith.models.drafters.draft_records import Cycle, Emitted, Opening
from draftsmith.models.drafters.draft_slots import DraftSlots, PairState, read_prompt
from draftsmith.models.drafters.drafter import Drafter
from draftsmith.models.drafters.family import About, DrafterFamily, Family
from draftsmith.models.drafters.parallel_draft import ParallelDraft
from draftsmith.models.drafters.rollout import PackedBatch, Rollout
from draftsmith.models.families.block_confidence import ConfidenceHead
from draftsmith.models.families.block_correction import Correction, CorrectionKind, LookAround, correction_of
from draftsmith.models.families.block_layer import GROUP, BlockAttention, BlockConvolution, BlockLayer
from draftsmith.models.families.eagle_config import NO_LAYERS, LayerConfig, block_outputs, layer_fields
from draftsmith.models.families.eagle_layer import Rotation, rms_norm
from draftsmith.models.families.target_head import TargetHead
from draftsmith.models.files.field_rules import COUNT, FLAG, NAMES, TOKEN_OR_NULL, Rule
from draftsmith.models.slots.attention import attend
from draftsmith.models.slots.rollout_attention import Pair
from draftsmith.models.slots.slot_cache import SlotCache
from draftsmith.models.target.key_values import KeyValues
from draftsmith.models.target.target import TargetEnds
from draftsmith.models.tree.limits import DraftLimits
from draftsmith.models.tree.steps import result_of

_MOST_LOGITS = 2**25  # at once, of the slots whose soft embeddings are made
CANDIDATES = 16
"""Tokens of a slot that DFlash 2's selector chooses among, as public drafters have it."""


class BlockConfig(LayerConfig):
    """The fields of a block drafter.

    Attributes:
        layers: names of the target's layers that are read, from low to high.
        num_draft_layers: decoder layers of the drafter.
        block_size: S, slots of a block, the root's included.
        causal: a slot sees no later slot of its block.
        sample_from_anchor: slot 0, which holds the root, predicts the first drafted token; otherwise slot 1 does.
        mask_token_id: an unused token of the target whose embedding fills the slots behind the root; None learns a vector for them.
        correction: how a drafted token changes the logits of the next slot: ``none``, ``vanilla``, ``gated``, ``recurrent``, ``gru``,
            ``selector`` or ``lookaround``.
        correction_rank: r.
        correction_state: size of the GRU's state.
        confidence: a head says how likely each token will be accepted, before it is drawn.
        convolution: each layer has DFlash 2's convolution over the slots around its attention and its MLP.
        candidates: with the correction ``selector``, how many tokens of a slot can be drafted.
    """

    model_type = "draftsmith_block_drafter"
    rules: ClassVar[Mapping[str, Rule]] = {
        **LayerConfig.rules,
        "layers": NAMES,
        "num_draft_layers": COUNT,
        "block_size": COUNT,
        "causal": FLAG,
        "sample_from_anchor": FLAG,
        "mask_token_id": TOKEN_OR_NULL,
        "correction": (
            lambda value: value in get_args(CorrectionKind),
            f"one of {', '.join(get_args(CorrectionKind))}",
        ),
        "correction_rank": COUNT,
        "correction_state": COUNT,
        "confidence": FLAG,
        "convolution": FLAG,
        "candidates": COUNT,
    }

    def __init__(
        self,
        layers: Sequence[str] = (),
        num_draft_layers: int = 1,
        block_size: int = 8,
        causal: bool = False,
        sample_from_anchor: bool = False,
        mask_token_id: int | None = None,
        correction: CorrectionKind = "none",
        correction_rank: int = 256,
        correction_state: int = 1024,
        confidence: bool = False,
        convolution: bool = False,
        candidates: int = CANDIDATES,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.layers = list(layers)
        self.num_draft_layers, self.block_size = num_draft_layers, block_size
        self.causal, self.sample_from_anchor = causal, sample_from_anchor
        self.mask_token_id = mask_token_id
        self.correction, self.correction_rank, self.correction_state = correction, correction_rank, correction_state
        self.confidence, self.convolution, self.candidates = confidence, convolution, candidates

    @property
    def first_slot(self) -> int:
        """The slot that predicts the first drafted token."""
        return 0 if self.sample_from_anchor else 1

    def fault(self) -> str:
        """See :meth:`DrafterConfig.fault`."""
        if not self.layers:
            return NO_LAYERS
        if self.block_size <= self.first_slot:
            return f"block_size {self.block_size}, of which no slot predicts a token without sample_from_anchor"
        if self.convolution and self.hidden_size % GROUP:
            return f"convolution and hidden size {self.hidden_size}, which is no multiple of the {GROUP} channels of a group"
        if self.correction == "selector" and self.confidence:
            return "correction 'selector' and confidence, which judges drafts over the whole vocabulary: use one of the two"
        if self.correction != "selector" and self.candidates != CANDIDATES:
            return f"candidates {self.candidates} and correction {self.correction!r}, but only 'selector' has candidates: use {CANDIDATES}"
        if self.mask_token_id is not None and self.mask_token_id >= self.vocab_size:
            return (
                f"mask_token_id {self.mask_token_id}, which is not below the target's vocabulary of {self.vocab_size}"
            )
        return super().fault()


class BlockDrafter(TargetHead):
    """Decoder layers over [root, mask, mask, ..], which also see one context vector a position of the text (arXiv:2602.06036).

    Attributes:
        recompute: in training, each layer's activations are computed again in the backward pass.
    """

    config_class = BlockConfig
    config: BlockConfig

    def __init__(self, config: BlockConfig) -> None:
        super().__init__(config)
        D, epsilon = config.hidden_size, config.rms_norm_eps
        self.recompute = False
        self.fc = nn.Linear(len(config.layers) * D, D, bias=False)
        self.hidden_norm = LlamaRMSNorm(D, eps=epsilon)
        self.layers = nn.ModuleList(
            BlockLayer(config.llama(), config.convolution) for _ in range(config.num_draft_layers)
        )
        self.norm = LlamaRMSNorm(D, eps=epsilon)
        self.mask_embedding = nn.Parameter(torch.zeros(D)) if config.mask_token_id is None else None
        self.rotation = Rotation(config.llama())
        sizes = (D, config.vocab_size, config.num_draft_tokens, config.correction_rank, config.correction_state)
        self.correction = correction_of(config.correction, *sizes)
        self.confidence_head = ConfidenceHead(D, self.correction) if config.confidence else None
        self.post_init()

    @classmethod
    def for_target(
        cls,
        ends: TargetEnds,
        *,
        layers: Sequence[str] | None = None,
        num_draft_layers: int = 1,
        causal: bool = False,
        sample_from_anchor: bool = False,
        mask_token_id: int | None = None,
        correction: CorrectionKind = "none",
        correction_rank: int = 256,
        correction_state: int = 1024,
        confidence: bool = False,
        convolution: bool = False,
        candidates: int = CANDIDATES,
        draft_token_ids: Tensor | None = None,
        num_draft_steps: int = 7,
        tokenizer_fingerprint: str = "",
    ) -> BlockDrafter:
        """Make a fresh drafter for one target, attached to it.

        Args:
            ends: the target's frozen ends.
            layers: names of the layers to read, low to high; None takes :func:`default_layers`.
            num_draft_layers: decoder layers of the drafter.
            causal: see the config.
            sample_from_anchor: see the config.
            mask_token_id: see the config.
            correction, correction_rank, correction_state, confidence, convolution, candidates: see the config.
            draft_token_ids: int64 [Vd], increasing; None keeps the full vocabulary.
            num_draft_steps: K, the tokens of a draft; the block has as many slots as that takes.
            tokenizer_fingerprint: stored, and checked by those who decode with text.

        Returns:
            The drafter.
        """
        config = BlockConfig(
            **layer_fields(ends),
            layers=default_layers(ends.config.num_hidden_layers, num_draft_layers) if layers is None else layers,
            num_draft_layers=num_draft_layers,
            block_size=num_draft_steps + (0 if sample_from_anchor else 1),
            causal=causal,
            sample_from_anchor=sample_from_anchor,
            mask_token_id=mask_token_id,
            correction=correction,
            correction_rank=correction_rank,
            correction_state=correction_state,
            confidence=confidence,
            convolution=convolution,
            candidates=candidates,
            draft_vocab_size=None if draft_token_ids is None else len(draft_token_ids),
            num_draft_steps=num_draft_steps,
            tokenizer_fingerprint=tokenizer_fingerprint,
        )
        drafter = cls(config)
        drafter.adopt_target(ends, draft_token_ids)
        drafter._initialise()
        return drafter

    @torch.no_grad()
    def _initialise(self) -> None:
        """The vector of the masks, as large as an embedding; a correction and convolutions that change nothing yet."""
        for module in self.modules():
            if isinstance(module, BlockConvolution):
                module.reset()
        if self.mask_embedding is not None:
            some = self.embed(torch.arange(min(self.config.vocab_size, 1024), device=self.ends.device))
            self.mask_embedding.normal_(std=float(some.std()))
        if self.correction is not None:
            self.correction.output.weight.zero_()

    @property
    def features(self) -> tuple[str, ...]:
        """The layers that are read."""
        return tuple(self.config.layers)

    @property
    def max_draft_steps(self) -> int:
        """As many tokens as slots of a block predict."""
        return self.config.block_size - self.config.first_slot

    @property
    def mask_token(self) -> int | None:
        """See :attr:`Drafter.mask_token`."""
        return self.config.mask_token_id

    @property
    def correction_weight(self) -> Tensor | None:
        """See :attr:`Drafter.correction_weight`."""
        return None if self.correction is None else self.correction.output.weight

    @property
    def has_confidence(self) -> bool:
        """See :attr:`Drafter.has_confidence`."""
        return self.confidence_head is not None

    def confidence(self, head_inputs: Tensor, tokens: Tensor) -> Tensor:
        """See :meth:`Drafter.confidence`."""
        assert self.confidence_head is not None
        hidden = head_inputs[..., : self.config.hidden_size]
        return self.confidence_head(hidden, tokens, self.correction)

    @property
    def num_candidates(self) -> int | None:
        """See :attr:`Drafter.num_candidates`."""
        return self.config.candidates if self.config.correction == "selector" else None

    @property
    def reads_drafted(self) -> bool:
        """See :attr:`Drafter.reads_drafted`."""
        return isinstance(self.correction, Correction)

    def passes(self, draft_length: int) -> int:
        """See :meth:`Drafter.passes`: one for the whole block."""
        return 1

    def needs_host(self) -> str:
        """See :meth:`Drafter.needs_host`."""
        return "the rotary factors of the draft layers follow the length" if self.rotation.follows_length else ""

    def key_values(self) -> tuple[KeyValues, ...]:
        """See :meth:`Drafter.key_values`: those of every layer."""
        numbers = 2 * self.config.num_key_value_heads * self.config.head_dim
        return (KeyValues(numbers * self.dtype.itemsize),) * self.config.num_draft_layers

    def context(self, features: Mapping[str, Tensor]) -> Tensor:
        """Make the context vectors, which are the same for all draft layers.

        Args:
            features: layer name -> [..., D], the target's states.

        Returns:
            [..., D].
        """
        states = [features[name].to(self.fc.weight.dtype) for name in self.config.layers]
        return rms_norm(self.hidden_norm, self.fc(torch.cat(states, dim=-1)))

    def slots(self, roots: Tensor, num_slots: int) -> Tensor:
        """What the slots of a block hold before the first layer.

        Args:
            roots: int64 [N], target ids.
            num_slots: how many slots, the root's included.

        Returns:
            [N, num_slots, D].
        """
        root_N1D = self.embed(roots)[:, None]
        if self.mask_embedding is None:
            mask_id = self.config.mask_token_id
            assert mask_id is not None
            mask_D = self.embed(torch.full((), mask_id, device=roots.device))
        else:
            mask_D = self.mask_embedding.to(root_N1D.dtype)
        return torch.cat([root_N1D, mask_D.expand(len(roots), num_slots - 1, -1)], dim=1)

    def teacher_forced(self, batch: PackedBatch, rollout: Rollout) -> Tensor:
        """See :meth:`Drafter.teacher_forced`: whole blocks, whatever the number of steps, since slots see the others."""
        S, anchors_A = self.config.block_size, rollout.anchors
        context_TD = self.context(batch.hidden)
        positions_AS = batch.positions[anchors_A, None] + 1 + torch.arange(S, device=anchors_A.device)
        states_ASD = self.slots(rollout.tokens[:, 0], S)
        of_text, of_slots = (self.rotation(each, states_ASD) for each in (batch.positions, positions_AS.flatten()))
        attention = None
        for layer in self.layers:
            assert isinstance(layer, BlockLayer)
            text = layer.keys_values(context_TD, of_text)
            if attention is None:
                attention = BlockAttention(batch, anchors_A, S, self.config.causal, text)
            given = (layer, states_ASD, attention.over(text), of_slots)
            if self.recompute and torch.is_grad_enabled():
                states_ASD = checkpoint(_run_layer, *given, use_reentrant=False, preserve_rng_state=False)
            else:
                states_ASD = _run_layer(*given)
        first, num_steps = self.config.first_slot, rollout.tokens.shape[1]
        outputs_ASD = rms_norm(self.norm, states_ASD)
        outputs_KAD = outputs_ASD[:, first : first + num_steps].transpose(0, 1)
        if self.correction is None:
            return outputs_KAD
        if isinstance(self.correction, LookAround):
            parts_AKr = self.looked_around(self.correction, outputs_ASD[:, first:], rollout.tokens[:, 0])
            return torch.cat([outputs_KAD, parts_AKr[:, :num_steps].transpose(0, 1).to(outputs_KAD.dtype)], dim=-1)
        return self._corrected(self.correction, outputs_KAD, rollout)

    def looked_around(self, correction: LookAround, hidden_NKD: Tensor, roots_N: Tensor) -> Tensor:
        """What the slots' neighbours add to them.

        Args:
            correction: this drafter's.
            hidden_NKD: states of all slots that predict; where slots see no later one, those that are drafted will do.
            roots_N: int64, the roots.

        Returns:
            [N, K, r].
        """
        return correction(hidden_NKD, self._soft(hidden_NKD), self.embed(roots_N), self.config.causal)

    @torch.no_grad()
    def _soft(self, hidden_NKD: Tensor) -> Tensor:
        """[N, K, D]: the mean embedding of each slot's likeliest tokens, a constant to training; the whole head is applied in parts."""
        head, parts = self.head_weight, []
        num_likeliest = min(LookAround.NUM_LIKELIEST, head.shape[0])
        for rows_MKD in hidden_NKD.split(max(1, _MOST_LOGITS // (hidden_NKD.shape[1] * head.shape[0]))):
            logits_MKV = self.without_mask(F.linear(rows_MKD.to(head.dtype), head))
            top_MKC, draft_MKC = logits_MKV.float().topk(num_likeliest, dim=-1)
            embedded_MKCD = self.embed(self.to_target_ids(draft_MKC))
            parts.append((top_MKC.softmax(-1).to(embedded_MKCD.dtype)[..., None, :] @ embedded_MKCD).squeeze(-2))
        return torch.cat(parts)

    def _corrected(self, correction: Correction, outputs_KAD: Tensor, rollout: Rollout) -> Tensor:
        """The slots' states, and behind them what the correction adds for the tokens of the rollout: [K, A, D + r]."""
        state_AS, parts = correction.begin(outputs_KAD[0]), []
        for step, hidden_AD in enumerate(outputs_KAD):
            tokens_A = rollout.tokens[:, step]
            part_Ar, state_AS = correction.step(tokens_A, self.embed(tokens_A), hidden_AD, state_AS, step)
            parts.append(part_Ar)
        return torch.cat([outputs_KAD, torch.stack(parts).to(outputs_KAD.dtype)], dim=-1)

    def start(self, opening: Opening) -> PairState:
        """Read the context of the prompts, in chunks."""
        return result_of(self.start_in_steps(opening))

    def start_in_steps(self, opening: Opening) -> Generator[None, None, PairState]:
        """See :meth:`Drafter.start_in_steps`."""
        # Behind the block is one more slot; see DraftSlots.aim_block.
        cache = SlotCache(opening.room + self.config.block_size + 1, num_layers=len(self.layers))

        def write(pairs: Emitted, positions_BE: Tensor) -> None:
            self.write_context(cache, pairs, positions_BE)

        return (yield from read_prompt(opening, cache, write))

    def write_context(self, cache: SlotCache, pairs: Emitted, positions_BE: Tensor) -> None:
        """Write keys and values of every layer where the cache is aimed at.

        Args:
            cache: of the layers.
            pairs: [B, E], of which only the features are read.
            positions_BE: int64.
        """
        context_BED = self.context(pairs.features)
        rotation = self.rotation(positions_BE, context_BED)
        for number, layer in enumerate(self.layers):
            assert isinstance(layer, BlockLayer)
            keys, values = layer.keys_values(context_BED, rotation)
            cache.update(keys.transpose(1, 2), values.transpose(1, 2), number)

    def advance(self, state: PairState, emitted: Emitted) -> PairState:  # type: ignore[override]
        """What was emitted is pending until the next draft."""
        return PairState(state.cache, emitted)

    def expander(self, state: PairState, cycle: Cycle, limits: DraftLimits) -> BlockDraft:  # type: ignore[override]
        """See :class:`BlockDraft`."""
        return BlockDraft(self, state, cycle, limits.draft_length)

    def follow(self, state: PairState, cycle: Cycle, limits: DraftLimits) -> PairState:  # type: ignore[override]
        """See :meth:`Drafter.follow`: keys and values of the pending pairs only."""
        slots = DraftSlots(state.cache, cycle, state.pending.tokens_BE.shape[1])
        positions_BE = slots.aim_fresh(state.pending.counts_B)
        self.write_context(state.cache, state.pending.slots(0, slots.num_fresh), positions_BE)
        return state


def _run_layer(layer: BlockLayer, states_ASD: Tensor, attention: BlockAttention, rotation: Pair) -> Tensor:
    """One layer over the slots of all blocks: [A, S, D] -> [A, S, D]."""
    inputs_QD = layer.inputs(states_ASD).flatten(0, 1)
    own = layer.keys_values(inputs_QD, rotation)
    attended_QHD = attention(layer.queries(inputs_QD, rotation), [own])
    return layer.finish(states_ASD, attended_QHD.unflatten(0, states_ASD.shape[:2]))


class BlockDraft(ParallelDraft):
    """One draft: the block is computed once. Nodes of one depth have the same continuations, but for what a correction adds."""

    def __init__(self, drafter: BlockDrafter, state: PairState, cycle: Cycle, draft_length: int) -> None:
        pending = state.pending
        root_B = pending.tokens_BE.gather(1, pending.counts_B[:, None] - 1).squeeze(1)
        corrected = isinstance(drafter.correction, Correction)
        super().__init__(drafter, root_B, drafter.num_candidates, corrected)
        self._block, self._pending, self._draft_length = drafter, pending, draft_length
        self._slots = DraftSlots(state.cache, cycle, pending.tokens_BE.shape[1])
        self._tokens_BM = root_B[:, None]
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
        num_slots = config.first_slot + self._draft_length if config.causal else config.block_size
        fresh = self._pending.slots(0, slots.num_fresh)
        fresh_BE, slots_BS = slots.aim_block(self._pending.counts_B, num_slots)
        mask = slots.text_mask(slots_BS if config.causal else slots_BS[:, -1:])
        if mask is not None:
            mask = mask.expand(-1, -1, num_slots, -1)
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
            attended = attend(layer.queries(inputs_BSD, of_slots).transpose(1, 2), *seen, mask)
            states_BSD = layer.finish(states_BSD, attended.transpose(1, 2))
        return states_BSD


def default_layers(num_layers: int, count: int) -> tuple[str, ...]:
    """The layers that public block drafters read: ``count`` of them, evenly from the second block to the third from the end.

    Targets too shallow for that take theirs evenly from the first block to the last, each once.

    Example: 36 blocks and 5 layers -> the outputs of blocks 1, 9, 17, 25 and 33, counted from 0.

    Args:
        num_layers: blocks of the target.
        count: how many layers to read; one reads the middle block.

    Returns:
        Their names, from low to high.
    """
    first, last = (1, num_layers - 3) if num_layers - 3 >= count else (0, num_layers - 1)
    blocks = {round(first + place * (last - first) / max(count - 1, 1)) for place in range(count)}
    return block_outputs(sorted(blocks) if count > 1 else [num_layers // 2], num_layers)


class BlockFamily(DrafterFamily):
    """A block drafter: all tokens of a draft in one pass of a few layers (DFlash, arXiv 2602.06036). `num_steps` sets its block.

    Args:
        num_draft_layers: decoder layers of the drafter.
        layers: names of the target's layers to read, low to high; null takes as many as the drafter has layers, spread evenly.
        mask: which slots of its block a slot sees: all, or with `causal` those before it.
        sample_from_anchor: the slot of the root predicts the first drafted token, as in DSpark; false leaves it out, as in DFlash.
        mask_token_id: an unused token whose embedding fills the slots behind the root, which serving engines ask for; null
            learns a vector.
        correction: how a drafted token changes the logits of the next slot: not at all; by a bigram (`vanilla`), one that the
            slot weighs (`gated`) or a recurrent state (`recurrent`), as in DSpark; by a GRU over all drafted tokens
            (`gru`), as in Domino; or among a slot's likeliest tokens (`selector`), as in DFlash 2. `lookaround` reads no drafted
            token: a slot looks at what its neighbours would say.
        correction_rank: of the correction's matrices; small targets need less.
        correction_state: size of the GRU's state.
        confidence: a head learns how likely each token will be accepted, as in DSpark. Shapes such as `1x7e0.5s0` end drafts where
            it is below that number. The cache must hold last.pre_norm.
        draft_vocab_size: score only this many tokens, the most frequent labelled ones of the training samples, with
            their rows of the target's head; null scores all.
        recompute: compute each layer's activations again in the backward pass: less memory, more time.
        convolution: each layer has DFlash 2's convolution over the slots around its attention and its MLP.
        candidates: with `selector`, how many tokens of a slot can be drafted.
    """

    kind = BlockDrafter

    def __init__(
        self,
        num_draft_layers: int = 1,
        layers: list[str] | None = None,
        mask: Literal["bidirectional", "causal"] = "bidirectional",
        sample_from_anchor: bool = False,
        mask_token_id: int | None = None,
        correction: CorrectionKind = "none",
        correction_rank: int = 256,
        correction_state: int = 1024,
        draft_vocab_size: int | None = None,
        recompute: bool = False,
        confidence: bool = False,
        convolution: bool = False,
        candidates: int = CANDIDATES,
    ) -> None:
        self.convolution, self.candidates = convolution, candidates
        self.num_draft_layers, self.layers, self.mask = num_draft_layers, layers, mask
        self.sample_from_anchor, self.mask_token_id = sample_from_anchor, mask_token_id
        self.correction, self.correction_rank, self.correction_state = correction, correction_rank, correction_state
        self.draft_vocab_size, self.recompute, self.confidence = draft_vocab_size, recompute, confidence

    def build(
        self, ends: TargetEnds, draft_token_ids: Tensor | None, num_steps: int, tokenizer_fingerprint: str
    ) -> BlockDrafter:
        """See DrafterFamily.build.

        Raises:
            ValueError: sizes that do not fit the target.
        """
        drafter = BlockDrafter.for_target(
            ends,
            layers=self.layers,
            num_draft_layers=self.num_draft_layers,
            causal=self.mask == "causal",
            sample_from_anchor=self.sample_from_anchor,
            mask_token_id=self.mask_token_id,
            correction=self.correction,
            correction_rank=self.correction_rank,
            correction_state=self.correction_state,
            confidence=self.confidence,
            convolution=self.convolution,
            candidates=self.candidates,
            draft_token_ids=draft_token_ids,
            num_draft_steps=num_steps,
            tokenizer_fingerprint=tokenizer_fingerprint,
        )
        self.configure(drafter)
        return drafter

    def configure(self, drafter: Drafter) -> None:
        """See DrafterFamily.configure."""
        assert isinstance(drafter, BlockDrafter)
        drafter.recompute = self.recompute


FAMILY = Family(
    name="blockdrafter",
    drafter=BlockDrafter,
    config=BlockConfig,
    settings=BlockFamily,
    about=About(
        title="Block drafter",
        what="A few decoder layers that draft all tokens in one pass ([DFlash](https://arxiv.org/abs/2602.06036))",
        reads="hidden states of several layers",
    ),
    layouts=("draftsmith.export.layouts.block.dflash", "draftsmith.export.layouts.block.speculators"),
)

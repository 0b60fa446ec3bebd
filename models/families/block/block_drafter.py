"""Block drafters: all slots of a draft in one pass of a few decoder layers over the target's states.

DFlash (arXiv:2602.06036) fills a block behind the root: slot 0 holds the root and predicts nothing, slot k >= 1 holds a mask and predicts
the k-th token behind the root. Every slot sees the others. JetSpec (arXiv:2606.18394) hides later slots (``causal``). DSpark's backbone
(arXiv:2607.05147) lets slot 0 predict too (``sample_from_anchor``). A correction lets a slot read the tokens drafted before it. DFlash 2's
layers have a convolution over the slots, and it corrects the few likeliest tokens of a slot.

Owns the drafter: its weights, its run in training, and how a draft starts. Knows nothing of losses, trees or verification.

Shape legend: B batch rows, E fresh pairs, T packed tokens, A anchors, S slots of a block, K draft steps, D hidden, Vd draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from draftsmith.models.drafters.draft_records import CacheState, Cycle, Emitted, Opening
from draftsmith.models.drafters.draft_slots import DraftSlots, read_prompt
from draftsmith.models.drafters.rollout import PackedBatch, Rollout
from draftsmith.models.families.block.block_confidence import ConfidenceHead
from draftsmith.models.families.block.block_config import BlockConfig, default_layers
from draftsmith.models.families.block.block_correction import Correction, LookAround, correction_of
from draftsmith.models.families.block.block_draft import BlockDraft
from draftsmith.models.families.block.block_layer import BlockAttention, BlockConvolution, BlockLayer
from draftsmith.models.families.eagle_config import layer_sizes
from draftsmith.models.families.eagle_layer import Rotation, rms_norm
from draftsmith.models.families.from_fields import FromFields
from draftsmith.models.families.target_head import TargetHead
from draftsmith.models.slots.rollout_attention import Pair
from draftsmith.models.slots.slot_cache import SlotCache
from draftsmith.models.target.key_values import KeyValues
from draftsmith.models.target.target import TargetEnds
from draftsmith.models.tree.limits import DraftLimits
from draftsmith.models.tree.steps import result_of

_MOST_LOGITS = 2**25  # at once, of the slots whose soft embeddings are made


class BlockDrafter(TargetHead, FromFields):
    """Decoder layers over [root, mask, mask, ..], which also see one context vector a position of the text (arXiv:2602.06036).

    Attributes:
        recompute: in training, each layer's activations are computed again in the backward pass.
    """

    config_class = BlockConfig
    config: BlockConfig
    usual_draft_steps = 7

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
        with_markov = config.confidence_with_markov
        self.confidence_head = ConfidenceHead(D, self.correction, with_markov) if config.confidence else None
        self.post_init()

    @classmethod
    def fields_for(cls, ends: TargetEnds, num_draft_steps: int, chosen: Mapping[str, Any]) -> dict[str, Any]:
        """See :meth:`FromFields.fields_for`: the layers' sizes, which layers are read, and a block of as many slots as drafts take.

        Raises:
            ValueError: ``block_size`` is among the chosen.
        """
        if "block_size" in chosen:
            raise ValueError(
                f"block_size is {chosen['block_size']}, but a block has as many slots as drafts take; give num_draft_steps instead"
            )
        fields = {**layer_sizes(ends), **chosen}
        if fields.get("layers") is None:
            fields["layers"] = default_layers(ends.config.num_hidden_layers, fields.get("num_draft_layers", 1))
        fields["block_size"] = num_draft_steps + (0 if fields.get("sample_from_anchor") else 1)
        return fields

    @torch.no_grad()
    def begin_fresh(self) -> None:
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
        token_bytes, config = numbers * self.dtype.itemsize, self.config
        return tuple(KeyValues(token_bytes, config.view(layer)[0]) for layer in range(config.num_draft_layers))

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
        attentions: dict[tuple[int | None, bool], BlockAttention] = {}
        for number, layer in enumerate(self.layers):
            assert isinstance(layer, BlockLayer)
            text = layer.keys_values(context_TD, of_text)
            window, causal = view = self.config.view(number)
            if view not in attentions:
                places, from_root = (batch, anchors_A, S, causal), self.config.window_from_root
                attentions[view] = BlockAttention(*places, text, sliding_window=window, from_root=from_root)
            given = (layer, states_ASD, attentions[view].over(text), of_slots)
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
        return correction(hidden_NKD, self._soft(hidden_NKD), self.embed(roots_N), self.config.hides_later)

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

    def start(self, opening: Opening) -> CacheState:
        """Read the context of the prompts, in chunks."""
        return result_of(self.start_in_steps(opening))

    def start_in_steps(self, opening: Opening) -> Generator[None, None, CacheState]:
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

    def advance(self, state: CacheState, emitted: Emitted) -> CacheState:  # type: ignore[override]
        """What was emitted is pending until the next draft."""
        return CacheState(state.cache, emitted)

    def expander(self, state: CacheState, cycle: Cycle, limits: DraftLimits) -> BlockDraft:  # type: ignore[override]
        """See :class:`BlockDraft`."""
        return BlockDraft(self, state, cycle, limits.draft_length)

    def follow(self, state: CacheState, cycle: Cycle, limits: DraftLimits) -> CacheState:  # type: ignore[override]
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

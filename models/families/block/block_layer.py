"""The decoder layer of block drafters, and its attention in training.

A block is the root and the slots behind it, which are drafted in one pass. Its queries see the text's context vectors up to the anchor and
the slots of their own block. Context and slots go through the same projections. Per-head norms of queries and keys are Qwen3's.

Owns the layer's weights and the mask of training. Knows nothing of caches, trees or losses.

Shape legend: T packed tokens, A anchors, S slots of a block, D hidden, H heads, G key/value heads, Dh head size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from draftsmith.models.drafters.rollout import PackedBatch
from draftsmith.models.families.eagle_layer import NormedAttention, rms_norm, rotated
from draftsmith.models.slots.rollout_attention import Pair, RolloutAttention

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


GROUP = 16
"""Channels that share what a slot adds to the taps of a convolution; as public drafters have it."""


class BlockConvolution(nn.Module):
    """DFlash 2's two-tap convolution over the slots of a block, before and after a sublayer.

        y_s = k_s,0 * x_s + k_s,1 * x_(s-1)        k_s = base + what a projection of slot s's normed state gives each group of channels

    Slot 0 has none before it.

    Args:
        size: D, a multiple of :data:`GROUP`.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.base_kernel = nn.Parameter(torch.zeros(2, 2, size))  # side (before, after), tap, channel
        self.kernel_projection = nn.Linear(size, 4 * (size // GROUP), bias=False)

    @torch.no_grad()
    def reset(self) -> None:
        """Make both sides the identity, as training begins with."""
        self.base_kernel.zero_()
        self.base_kernel[:, 0].fill_(1.0)
        self.kernel_projection.weight.zero_()

    def before(self, normed: Tensor) -> Tensor:
        """What the sublayer reads: [..., S, D], from the normed states of the same shape."""
        return self._convolved(normed, normed, 0)

    def after(self, normed: Tensor, outputs: Tensor) -> Tensor:
        """What the sublayer adds: [..., S, D], from the normed states before it and its outputs."""
        return self._convolved(normed, outputs, 1)

    def _convolved(self, normed: Tensor, x: Tensor, side: int) -> Tensor:
        rows = self.kernel_projection.weight.chunk(2)[side]
        own = F.linear(normed, rows).unflatten(-1, (2, -1)).repeat_interleave(GROUP, dim=-1)
        kernels = self.base_kernel[side] + own
        return kernels[..., 0, :] * x + kernels[..., 1, :] * F.pad(x[..., :-1, :], (0, 0, 1, 0))


class BlockLayer(nn.Module):
    """One decoder layer in three parts: keys and values of the context, queries and keys of the block, and what follows attention.

    Args:
        config: sizes, norm epsilon; those of the target, as far as it has them.
        convolution: DFlash 2's, around attention and MLP.
    """

    def __init__(self, config: LlamaConfig, convolution: bool = False) -> None:
        super().__init__()
        self.attention_conv = BlockConvolution(config.hidden_size) if convolution else None
        self.mlp_conv = BlockConvolution(config.hidden_size) if convolution else None
        D, epsilon = config.hidden_size, config.rms_norm_eps
        self.self_attn = NormedAttention(config, D)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(D, eps=epsilon)
        self.post_attention_layernorm = LlamaRMSNorm(D, eps=epsilon)

    def keys_values(self, inputs: Tensor, rotation: Pair) -> Pair:
        """Project keys and values, and rotate the keys. Context vectors come as they are, states of slots after the layer's norm.

        Args:
            inputs: [..., D].
            rotation: cosines and sines [..., 1, Dh].

        Returns:
            Keys and values, [..., G, Dh] each.
        """
        return rotated(self.self_attn.key_heads(inputs), rotation), self.self_attn.value_heads(inputs)

    def queries(self, inputs: Tensor, rotation: Pair) -> Tensor:
        """Project and rotate the queries.

        Args:
            inputs: [..., D], states of slots after the layer's norm.
            rotation: cosines and sines [..., 1, Dh].

        Returns:
            [..., H, Dh].
        """
        return rotated(self.self_attn.query_heads(inputs), rotation)

    def inputs(self, states: Tensor) -> Tensor:
        """What attention reads of the slots of whole blocks: [..., S, D] -> [..., S, D]."""
        normed = rms_norm(self.input_layernorm, states)
        return normed if self.attention_conv is None else self.attention_conv.before(normed)

    def finish(self, states: Tensor, attended: Tensor) -> Tensor:
        """Finish the layer behind attention: its output projection, and the MLP.

        Args:
            states: [..., S, D], of the slots of whole blocks, before the layer.
            attended: [..., S, H, Dh], attention's output.

        Returns:
            [..., S, D].
        """
        outputs = self.self_attn.o_proj(attended.flatten(-2))
        if self.attention_conv is not None:
            outputs = self.attention_conv.after(rms_norm(self.input_layernorm, states), outputs)
        states = states + outputs
        normed = rms_norm(self.post_attention_layernorm, states)
        if self.mlp_conv is None:
            return states + self.mlp(normed)
        return states + self.mlp_conv.after(normed, self.mlp(self.mlp_conv.before(normed)))


class BlockAttention(RolloutAttention):
    """Attention of every anchor's block over one packed batch: the text up to the anchor, and the block itself.

    The queries are the slots of all blocks, flat: slot k of block a is query a * S + k. Its only further step holds the same slots.

    Args:
        batch: packed samples.
        anchors_A: int64, packed positions t, rising. The root of a block is at t + 1, so t is the last position that it sees.
        num_slots: S.
        causal: a slot sees no later slot of its block.
        text: keys and values of the context vectors, [T, G, Dh] each.
        flexible: see :class:`RolloutAttention`.
        sliding_window: a slot sees only so many of the last positions, its own among them; None for all. No block is longer.
        from_root: the window is that many tokens before the root instead, and the block.
    """

    def __init__(
        self,
        batch: PackedBatch,
        anchors_A: Tensor,
        num_slots: int,
        causal: bool,
        text: Pair,
        flexible: bool | None = None,
        sliding_window: int | None = None,
        from_root: bool = False,
    ) -> None:
        anchors, places = anchors_A.repeat_interleave(num_slots), (batch.document_ids, batch.positions)
        super().__init__(*places, anchors, *text, flexible=flexible, sliding_window=sliding_window)
        self.num_slots, self.causal, self.from_root = num_slots, causal, from_root

    def over(self, text: Pair) -> BlockAttention:
        """The same attention over the keys and values of another layer, [T, G, Dh] each; the mask is made once."""
        _ = self._mask if self.flexible else self._runs
        other = copy.copy(self)
        other.keys, other.values = text
        return other

    def _first_seen(self, num_further: int) -> Tensor:
        """int64 [A S]: the first packed position that each slot sees. Slot k is at the anchor + 1 + k.

        Example: a window of 4 behind anchor 9 -> slot 0, at 10, sees 7 to 9; slot 2, at 12, sees 9 alone. From the root, all see 6 to 9.
        """
        starts_Q = self.anchors - self.positions[self.anchors]
        if self.sliding_window is None:
            return starts_Q
        if self.from_root:
            return torch.maximum(starts_Q, self.anchors + 1 - self.sliding_window)
        slot_Q = torch.arange(len(self.anchors), device=self.anchors.device) % self.num_slots
        return torch.maximum(starts_Q, self.anchors + slot_Q + 2 - self.sliding_window)

    def _own_steps(self, further: list[Pair]) -> Pair:
        """Keys and values [A S, S, G, Dh]: every slot has those of its whole block."""
        S = self.num_slots
        (keys, values), shape = further[0], (-1, S, S, *further[0][0].shape[1:])
        blocks = (part.unflatten(0, (-1, S))[:, None].expand(shape).flatten(0, 1) for part in (keys, values))
        return next(blocks), next(blocks)

    def _own_hidden(self, queries: Tensor, further: list[Pair]) -> Tensor:
        S, device = self.num_slots, queries.device
        hidden_SS = torch.zeros(S, S, dtype=torch.bool, device=device)
        if self.causal:
            hidden_SS = torch.ones(S, S, dtype=torch.bool, device=device).triu(1)
        return hidden_SS.repeat(len(queries) // S, 1)

    def _own_keys(self, begin_Q: Tensor, end_Q: Tensor, step: int) -> Pair:
        S, before = self.num_slots, len(self.keys)
        return before + begin_Q // S * S, before + (end_Q + (S - 1)) // S * S

    def sees(self) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """See :meth:`RolloutAttention.sees`. Keys are the text's T first, and then the slots of all blocks."""
        num_tokens, num_slots, causal = len(self.keys), self.num_slots, self.causal
        document_ids, anchors = self.document_ids, self.anchors

        def sees(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            at, slot = key.clamp(max=num_tokens - 1), key - num_tokens
            of_text = (slot < 0) & (at <= anchors[query]) & (document_ids[at] == document_ids[anchors[query]])
            of_block = (slot >= 0) & (slot // num_slots == query // num_slots)
            return of_text | (of_block & (slot <= query) if causal else of_block)

        return sees

    def block_mask(self, num_further: int) -> BlockMask:
        """See :meth:`RolloutAttention.block_mask`; the same for all layers."""
        return self._mask

    @cached_property
    def _mask(self) -> BlockMask:
        return super().block_mask(1)

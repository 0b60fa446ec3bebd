"""The decoder layers of EAGLE drafters: Llama layers, or Qwen3's, whose attention is left to the caller.

Owns their weights and what happens before and after attention, for both widths. EAGLE-1's layer reads its input as it is; EAGLE-3's
reads [norm(embedding); norm(state)] side by side. Qwen3's attention normalises each head of queries and keys before it is rotated.
Knows nothing of caches, trees or training.

Shape legend: D hidden, I attention's input (D or 2 D), H heads, G key/value heads, Dh head size; any leading dimensions.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding, rotate_half


class DraftAttention(nn.Module):
    """The four projections, named as Llama names them.

    Args:
        config: heads and sizes, and whether the projections have biases.
        width: I.
    """

    def __init__(self, config: LlamaConfig, width: int) -> None:
        super().__init__()
        heads, groups = config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads
        size = config.head_dim or config.hidden_size // heads
        self.head_dim = size
        self.num_groups = groups
        has_bias = bool(config.attention_bias)
        self.q_proj = nn.Linear(width, heads * size, bias=has_bias)
        self.k_proj = nn.Linear(width, groups * size, bias=has_bias)
        self.v_proj = nn.Linear(width, groups * size, bias=has_bias)
        self.o_proj = nn.Linear(heads * size, config.hidden_size, bias=has_bias)

    def query_heads(self, inputs: Tensor) -> Tensor:
        """Queries before they are rotated: [..., I] -> [..., H, Dh]."""
        return self._heads(self.q_proj(inputs))

    def key_heads(self, inputs: Tensor) -> Tensor:
        """Keys before they are rotated: [..., I] -> [..., G, Dh]."""
        return self._heads(self.k_proj(inputs))

    def value_heads(self, inputs: Tensor) -> Tensor:
        """Values: [..., I] -> [..., G, Dh]."""
        return self._heads(self.v_proj(inputs))

    def _heads(self, projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (-1, self.head_dim))


class NormedAttention(DraftAttention):
    """The four projections, and Qwen3's norms of the heads of queries and keys.

    Args:
        config: see :class:`DraftAttention`; with the norms' epsilon.
        width: I.
    """

    def __init__(self, config: LlamaConfig, width: int) -> None:
        super().__init__(config, width)
        self.q_norm = LlamaRMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.k_norm = LlamaRMSNorm(self.head_dim, eps=config.rms_norm_eps)

    def query_heads(self, inputs: Tensor) -> Tensor:
        """See :meth:`DraftAttention.query_heads`."""
        return rms_norm(self.q_norm, super().query_heads(inputs))

    def key_heads(self, inputs: Tensor) -> Tensor:
        """See :meth:`DraftAttention.key_heads`."""
        return rms_norm(self.k_norm, super().key_heads(inputs))


class DraftLayer(nn.Module):
    """One decoder layer in three parts: what attention reads, its queries and keys, and what follows it.

    Args:
        config: sizes, norm epsilon, rotary settings; those of the target, as far as it has them.
        wide: EAGLE-3's layer, with norms of its own for embedding and state.
        norms_state: the wide layer applies ``hidden_norm`` to the state that it is given; False where whoever calls it has done so.
        head_norms: attention is Qwen3's, with norms of its heads; False makes it Llama's.
    """

    def __init__(self, config: LlamaConfig, wide: bool, norms_state: bool = True, head_norms: bool = False) -> None:
        super().__init__()
        D, epsilon = config.hidden_size, config.rms_norm_eps
        self.wide, self.norms_state = wide, norms_state
        self.self_attn = (NormedAttention if head_norms else DraftAttention)(config, 2 * D if wide else D)
        self.mlp = LlamaMLP(config)
        if wide:
            self.hidden_norm = LlamaRMSNorm(D, eps=epsilon)
            self.input_layernorm = LlamaRMSNorm(D, eps=epsilon)
        self.post_attention_layernorm = LlamaRMSNorm(D, eps=epsilon)

    def inputs(self, embedded: Tensor, state: Tensor) -> Tensor:
        """Make what attention reads.

        Args:
            embedded: [..., D], of the token that is fed.
            state: [..., D], the residual input.

        Returns:
            [..., I].
        """
        if not self.wide:
            return state
        if self.norms_state:
            state = rms_norm(self.hidden_norm, state)
        return torch.cat([rms_norm(self.input_layernorm, embedded), state], dim=-1)

    def queries(self, inputs: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        """Project and rotate the queries.

        Args:
            inputs: [..., I].
            rotation: cosines and sines [..., 1, Dh].

        Returns:
            [..., H, Dh].
        """
        return rotated(self.self_attn.query_heads(inputs), rotation)

    def keys_values(self, inputs: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Project the keys and values, and rotate the keys.

        Args:
            inputs: [..., I].
            rotation: cosines and sines [..., 1, Dh].

        Returns:
            Keys and values, [..., G, Dh] each.
        """
        return rotated(self.self_attn.key_heads(inputs), rotation), self.self_attn.value_heads(inputs)

    def queries_keys_values(self, inputs: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of the same tokens; one rotation turns both.

        Args:
            inputs: [..., I].
            rotation: cosines and sines [..., 1, Dh].

        Returns:
            Queries [..., H, Dh]; keys and values, [..., G, Dh] each.
        """
        attention = self.self_attn
        turned = rotated(torch.cat([attention.query_heads(inputs), attention.key_heads(inputs)], dim=-2), rotation)
        num_queries = turned.shape[-2] - attention.num_groups
        return turned[..., :num_queries, :], turned[..., num_queries:, :], attention.value_heads(inputs)

    def finish(self, state: Tensor, attended: Tensor) -> Tensor:
        """Finish the layer behind attention: its output projection, and the MLP.

        Args:
            state: [..., D], the residual input.
            attended: [..., H, Dh], attention's output.

        Returns:
            [..., D].
        """
        state = state + self.self_attn.o_proj(attended.flatten(-2))
        return state + self.mlp(rms_norm(self.post_attention_layernorm, state))


class DeeperLayer(DraftLayer):
    """A layer above the first: Llama's own or Qwen3's, whose attention reads the norm of its residual input.

    Args:
        config, head_norms: as of :class:`DraftLayer`.
    """

    def __init__(self, config: LlamaConfig, head_norms: bool = False) -> None:
        super().__init__(config, wide=False, head_norms=head_norms)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def inputs(self, embedded: Tensor, state: Tensor) -> Tensor:
        """See :meth:`DraftLayer.inputs`; the token entered below."""
        return rms_norm(self.input_layernorm, state)


class Rotation(nn.Module):
    """Rotary angles at given positions, with the scaling (linear, llama3, yarn ...) that the config names.

    Args:
        config: its rotary settings and head size.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.embedding = LlamaRotaryEmbedding(config)
        # These two change their frequencies with the length of the text; all others are a plain product.
        self.follows_length = self.embedding.rope_type in ("dynamic", "longrope")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Rotation:
        """Frequencies move to other devices, never to narrower dtypes: rounding them would turn every angle."""
        exact = self.embedding.inv_freq
        super()._apply(fn, recurse)
        if self.embedding.inv_freq.dtype != exact.dtype:
            self.embedding.register_buffer("inv_freq", exact.to(self.embedding.inv_freq.device), persistent=False)
        return self

    def forward(self, positions: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Give the angles of positions.

        Args:
            positions: int64 [...].
            like: a tensor of the dtype that is wanted.

        Returns:
            Cosines and sines, [..., 1, Dh] each.
        """
        if self.follows_length:
            cosines, sines = self.embedding(like, positions.reshape(1, -1))
            shape = (*positions.shape, 1, cosines.shape[-1])
            return cosines.reshape(shape), sines.reshape(shape)
        half = positions[..., None, None] * self.embedding.inv_freq
        angles, scale = torch.cat([half, half], dim=-1), self.embedding.attention_scaling
        cosines, sines = angles.cos(), angles.sin()
        if scale != 1.0:
            cosines, sines = cosines * scale, sines * scale
        return cosines.to(like.dtype), sines.to(like.dtype)


def rms_norm(norm: LlamaRMSNorm, states: Tensor) -> Tensor:
    """Apply a norm of Llama as one operation, where states and weights have one dtype.

    Args:
        norm: the norm.
        states: [..., D].

    Returns:
        [..., D], the norm's own numbers.
    """
    if states.dtype != norm.weight.dtype:  # under autocast
        return norm(states)
    return F.rms_norm(states, norm.weight.shape, norm.weight, norm.variance_epsilon)


def rotated(heads: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Turn queries or keys by their angles.

    Args:
        heads: [..., H, Dh].
        rotation: cosines and sines [..., 1, Dh].

    Returns:
        [..., H, Dh], in the dtype of ``heads``.
    """
    cosines, sines = rotation
    # Back to the projection's dtype: under autocast the angles are wider than it is.
    return torch.addcmul(heads * cosines, rotate_half(heads), sines).to(heads.dtype)

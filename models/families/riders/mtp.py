"""MTP heads: the multi-token prediction layer that some targets are trained with (DeepSeek-V3's report, arXiv:2412.19437, section 2.2).

    h'_t = eh_proj([enorm(E(x_{t+1})); hnorm(h_t)])      equation 21; the state comes first in the report, and in some checkpoints
    o_t  = layer(h'_1 .. h'_t)                           equation 22; a dense decoder layer with norms of its own
    P    = head(norm(o_t))                               equation 23; the target's own head

A draft step is fed the output of the step before it as its h. The checkpoints of targets differ in the switches of :class:`MtpConfig`.
Their tensors are read by name (`export/layouts/heads/mtp.py`).

Owns the drafter, its layer, its settings and its record. Knows nothing of losses, trees or verification.

Shape legend: D hidden, H heads, G key/value heads, Dh head size, R rotated part of a head, Vd draft vocabulary; any leading dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig

from draftsmith.models.drafters.family import About, DrafterFamily, Family
from draftsmith.models.families.eagle_base import EagleBase
from draftsmith.models.families.eagle_config import EagleConfig, check_window, layer_sizes
from draftsmith.models.families.eagle_layer import DraftAttention, DraftLayer, Rotation, rotated
from draftsmith.models.families.from_fields import FromFields
from draftsmith.models.families.target_head import TargetHead
from draftsmith.models.files.field_rules import COUNT_OR_NULL, FLAG, Rule
from draftsmith.models.target.target import PRE_NORM, TargetEnds

SWITCHES = (
    "state_first",
    "reads_normed",
    "feeds_normed",
    "zero_centred_norms",
    "attention_bias",
    "head_norms",
    "gated_attention",
)


class MtpConfig(EagleConfig):
    """What differs between the MTP layers of targets.

    Attributes:
        state_first: ``eh_proj`` reads [state; embedding] instead of [embedding; state].
        reads_normed: h is the target's state after the target's final norm; False before it, as MiMo's layer reads it.
        feeds_normed: the next draft step reads this step's output after ``norm`` instead of before it.
        zero_centred_norms: norms multiply by 1 + weight, as Qwen3-Next's do.
        attention_bias: the projections of queries, keys and values have one.
        head_norms: queries and keys are normalised head by head.
        gated_attention: what attention gives is multiplied by the sigmoid of a projection of its input.
        rotary_dim: R, the first numbers of a head that are rotated; None for all.
    """

    model_type = "draftsmith_mtp"
    rules: ClassVar[Mapping[str, Rule]] = {
        **EagleConfig.rules,
        **dict.fromkeys(SWITCHES, FLAG),
        "rotary_dim": COUNT_OR_NULL,
    }

    def __init__(
        self,
        state_first: bool = False,
        feeds_normed: bool = False,
        zero_centred_norms: bool = False,
        attention_bias: bool = False,
        head_norms: bool = False,
        gated_attention: bool = False,
        rotary_dim: int | None = None,
        reads_normed: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.state_first, self.reads_normed, self.feeds_normed = state_first, reads_normed, feeds_normed
        self.zero_centred_norms, self.attention_bias = zero_centred_norms, attention_bias
        self.head_norms, self.gated_attention = head_norms, gated_attention
        self.rotary_dim = rotary_dim

    def fault(self) -> str:
        """See :meth:`DrafterConfig.fault`."""
        if self.rotary_dim is not None and (self.rotary_dim % 2 or self.rotary_dim > self.head_dim):
            return f"rotary_dim {self.rotary_dim}, which is no even number up to head_dim {self.head_dim}"
        return super().fault()

    def rotary(self) -> LlamaConfig:
        """The settings of the rotary angles: a Llama whose heads are as wide as what is rotated."""
        narrow = self.llama()
        narrow.head_dim = self.head_dim if self.rotary_dim is None else self.rotary_dim
        return narrow


class MtpNorm(nn.Module):
    """RMS norm, in float32.

    Args:
        size: of what is normalised.
        epsilon: of the mean square.
        offset: added to the weight; 1 where norms are zero-centred.
    """

    def __init__(self, size: int, epsilon: float, offset: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((size,), 1.0 - offset))
        self.epsilon, self.offset = epsilon, offset

    def forward(self, states: Tensor) -> Tensor:
        """Normalise the last dimension; shape and dtype stay."""
        weight = self.weight.float() + self.offset
        return F.rms_norm(states.float(), weight.shape, weight, self.epsilon).to(states.dtype)


class MtpAttention(DraftAttention):
    """The projections of attention, with what the switches add to them.

    Args:
        config: of the drafter.
    """

    def __init__(self, config: MtpConfig) -> None:
        D, Dh = config.hidden_size, config.head_dim
        super().__init__(config.llama(), D)
        queries, pairs = config.num_attention_heads * Dh, config.num_key_value_heads * Dh
        if config.attention_bias:
            self.q_proj, self.k_proj, self.v_proj = nn.Linear(D, queries), nn.Linear(D, pairs), nn.Linear(D, pairs)
        offset = float(config.zero_centred_norms)
        self.q_norm = MtpNorm(Dh, config.rms_norm_eps, offset) if config.head_norms else None
        self.k_norm = MtpNorm(Dh, config.rms_norm_eps, offset) if config.head_norms else None
        self.gate_proj = nn.Linear(D, queries, bias=False) if config.gated_attention else None

    def query_heads(self, inputs: Tensor) -> Tensor:
        """See :meth:`DraftAttention.query_heads`."""
        heads: Tensor = super().query_heads(inputs)
        if self.q_norm is not None:
            heads = self.q_norm(heads)
        return heads

    def key_heads(self, inputs: Tensor) -> Tensor:
        """See :meth:`DraftAttention.key_heads`."""
        heads: Tensor = super().key_heads(inputs)
        if self.k_norm is not None:
            heads = self.k_norm(heads)
        return heads


class MtpLayer(DraftLayer):
    """A dense decoder layer with a norm before attention and one before the MLP.

    Args:
        config: of the drafter.
    """

    self_attn: MtpAttention

    def __init__(self, config: MtpConfig) -> None:
        super().__init__(config.llama(), wide=False)
        offset = float(config.zero_centred_norms)
        self.self_attn = MtpAttention(config)
        self.input_layernorm = MtpNorm(config.hidden_size, config.rms_norm_eps, offset)  # type: ignore[assignment]
        self.post_attention_layernorm = MtpNorm(config.hidden_size, config.rms_norm_eps, offset)  # type: ignore[assignment]

    def inputs(self, embedded: Tensor, state: Tensor) -> Tensor:
        """See :meth:`DraftLayer.inputs`: the normalised state, [..., D]."""
        normed: Tensor = self.input_layernorm(state)
        return normed

    def queries(self, inputs: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        """See :meth:`DraftLayer.queries`."""
        return self._turned(self.self_attn.query_heads(inputs), rotation)

    def keys_values(self, inputs: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """See :meth:`DraftLayer.keys_values`."""
        return self._turned(self.self_attn.key_heads(inputs), rotation), self.self_attn.value_heads(inputs)

    def queries_keys_values(self, inputs: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """See :meth:`DraftLayer.queries_keys_values`."""
        return self.queries(inputs, rotation), *self.keys_values(inputs, rotation)

    def finish(self, state: Tensor, attended: Tensor) -> Tensor:
        """See :meth:`DraftLayer.finish`."""
        mixed = attended.flatten(-2)
        if self.self_attn.gate_proj is not None:
            mixed = mixed * torch.sigmoid(self.self_attn.gate_proj(self.input_layernorm(state)))
        state = state + self.self_attn.o_proj(mixed)
        return state + self.mlp(self.post_attention_layernorm(state))

    def _turned(self, heads: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        """Heads [..., H, Dh], turned in their first R numbers."""
        R = rotation[0].shape[-1]
        if heads.shape[-1] == R:
            return rotated(heads, rotation)
        return torch.cat([rotated(heads[..., :R], rotation), heads[..., R:]], dim=-1)


class MtpHead(TargetHead, EagleBase, FromFields):
    """One MTP layer between the target's states and its own head.

    Args:
        config: sizes and switches.
    """

    config: MtpConfig
    config_class = MtpConfig
    wide = False

    def __init__(self, config: MtpConfig) -> None:
        super().__init__(config)
        D, epsilon, offset = config.hidden_size, config.rms_norm_eps, float(config.zero_centred_norms)
        self.rotation = Rotation(config.rotary())
        self.enorm, self.hnorm = MtpNorm(D, epsilon, offset), MtpNorm(D, epsilon, offset)
        self.eh_proj = nn.Linear(2 * D, D, bias=config.bias)
        self.layers = nn.ModuleList([MtpLayer(config)])
        self.norm = MtpNorm(D, epsilon, offset)
        self.post_init()

    @classmethod
    def fields_for(cls, ends: TargetEnds, num_draft_steps: int, chosen: Mapping[str, Any]) -> dict[str, Any]:
        """See :meth:`FromFields.fields_for`: the sizes of the target's layers."""
        return {**layer_sizes(ends), **chosen}

    @torch.no_grad()
    def begin_fresh(self) -> None:
        """Begin by handing the target's state on to its head: what is learned is a correction of it.

        The embedding's half of ``eh_proj`` and what attention and MLP add begin as zeros: at the sizes of real targets, random ones
        would drown the state.
        """
        D = self.config.hidden_size
        place = 0 if self.config.state_first else D
        self.eh_proj.weight.zero_()
        self.eh_proj.weight[:, place : place + D].copy_(torch.eye(D))
        for added in (self.layer.self_attn.o_proj, self.layer.mlp.down_proj):
            added.weight.zero_()
        few = torch.arange(min(self.config.vocab_size, 1024), device=self.ends.device)
        sizes = self.ends.final_norm(self.ends.embed(few)).float().pow(2).mean().sqrt()
        self.norm.weight.fill_(float(sizes) - self.norm.offset)

    @property
    def layer(self) -> MtpLayer:
        """The one decoder layer."""
        layer = self.layers[0]
        assert isinstance(layer, MtpLayer)
        return layer

    def read(self, features: Mapping[str, Tensor]) -> Tensor:
        """Read a position by its state after the final norm, or before it, as serving engines do for the layer's publisher.

        Args:
            features: layer name -> [..., D].

        Returns:
            [..., D].
        """
        state = features[PRE_NORM]
        return self.ends.final_norm(state) if self.config.reads_normed else state

    def join(self, embedded: Tensor, known: Tensor) -> Tensor:
        """eh_proj([enorm(embedding); hnorm(state)]), or the two in the other order.

        Args:
            embedded: [..., D], of the token x_{t+1}.
            known: [..., D], the state of position t.

        Returns:
            [..., D].
        """
        parts = [self.enorm(embedded), self.hnorm(known)]
        joined: Tensor = self.eh_proj(torch.cat(parts[::-1] if self.config.state_first else parts, dim=-1))
        return joined

    def fed_back(self, output: Tensor) -> Tensor:
        """See :meth:`EagleBase.fed_back`."""
        return self.head_inputs(output) if self.config.feeds_normed else output

    def head_inputs(self, output: Tensor) -> Tensor:
        """norm(output), [..., D]."""
        normed: Tensor = self.norm(output)
        return normed


class MtpFamily(DrafterFamily):
    """A multi-token prediction layer (arXiv 2412.19437, section 2.2), with the target's embedding and head.

    A target that was trained with such a layer has it in its own folder: name the target as `init_from` to begin with it. The layer then
    keeps its shape, and these settings concern new layers alone.

    Args:
        draft_vocab_size: score only this many tokens, the most frequent labelled ones of the training samples, with
            their rows of the target's head; null scores all.
        state_first: the projection reads [state; embedding], as equation 21 has it, instead of DeepSeek's released [embedding; state].
        sliding_window: the layer sees only so many of the last tokens, which keeps long texts cheap; null for all.
    """

    kind = MtpHead

    def __init__(
        self, draft_vocab_size: int | None = None, state_first: bool = False, sliding_window: int | None = None
    ) -> None:
        self.draft_vocab_size, self.state_first, self.sliding_window = draft_vocab_size, state_first, sliding_window

    def build(
        self, ends: TargetEnds, draft_token_ids: Tensor | None, num_steps: int, tokenizer_fingerprint: str
    ) -> MtpHead:
        """See DrafterFamily.build.

        Raises:
            ValueError: the sliding window is shorter than the steps.
        """
        check_window(self.sliding_window, num_steps)
        return MtpHead.for_target(
            ends,
            draft_token_ids=draft_token_ids,
            num_draft_steps=num_steps,
            tokenizer_fingerprint=tokenizer_fingerprint,
            state_first=self.state_first,
            sliding_window=self.sliding_window,
        )


FAMILY = Family(
    name="mtphead",
    drafter=MtpHead,
    config=MtpConfig,
    settings=MtpFamily,
    about=About(
        title="MTP head",
        what="A multi-token prediction layer over the target's last states "
        "([DeepSeek-V3](https://arxiv.org/abs/2412.19437), section 2.2)",
        reads="the last hidden states",
    ),
    layouts=("draftsmith.export.layouts.heads.mtp",),
)

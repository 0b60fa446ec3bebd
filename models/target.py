"""The target seam: a frozen Hugging Face causal LM behind a few doors that every family opens alike.

Owns the doors (embed, forward, final norm, logits), layer names, masks as each family takes them, and the proof at loading that the
doors give the model's own logits. Knows no drafter, no tree and no cache layout.

Layer names: ``last.pre_norm`` is the last decoder block's output *before* the final norm (Hugging Face's ``hidden_states[-1]`` is
after it); ``layer.{i}.output`` is the output of the 0-based decoder block i.

Shape legend: B batch rows, N new tokens, S cache slots, T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from draftsmith.models.end_tokens import end_tokens, read_end_tokens
from draftsmith.models.ends import TargetEnds
from draftsmith.models.fingerprint import module_fingerprint
from draftsmith.models.finite import refuse_non_finite
from draftsmith.models.loading import as_dtype, load_causal_lm
from draftsmith.models.support import decoder_blocks, final_norm, refuse_unsupported, text_base

__all__ = ["PRE_NORM", "Target", "TargetEnds", "TargetOutput"]

PRE_NORM = "last.pre_norm"


@dataclass(frozen=True)
class TargetOutput:
    """States of one forward.

    Attributes:
        pre_norm: [B, N, D], the last block's output before the final norm.
        normed: [B, N, D], the same after it.
        layers: the other layers asked for, by name, [B, N, D] each.
    """

    pre_norm: Tensor
    normed: Tensor
    layers: dict[str, Tensor] = field(default_factory=dict)

    def feature(self, name: str) -> Tensor:
        """[B, N, D], a layer by name."""
        return self.pre_norm if name == PRE_NORM else self.layers[name]


class Target(nn.Module):
    """The frozen model, whole.

    Raises:
        ValueError: the family cannot decode trees (recurrent state, positional bias in attention, chunked attention, an encoder),
            named in the message.
    """

    def __init__(
        self, model: PreTrainedModel, name: str, fingerprint: str, end_token_ids: tuple[int, ...] = ()
    ) -> None:
        """``end_token_ids`` end a reply where neither config of the model names any: the tokenizer's."""
        super().__init__()
        refuse_unsupported(model, name)
        self._saved_end_tokens = end_token_ids
        self.model = model.eval().requires_grad_(False)
        self.name = name
        self.fingerprint = fingerprint
        self.config = model.config.get_text_config()
        self.ends = TargetEnds(model, name, fingerprint, end_token_ids=end_token_ids)
        self._base = text_base(model)
        self._norm = final_norm(model)
        self._blocks = decoder_blocks(model)
        self._caught: dict[str, Tensor] = {}
        self._additive_mask = getattr(self.config, "_attn_implementation", "sdpa") == "eager"
        kinds = set(getattr(self.config, "layer_types", None) or ())
        window = getattr(self.config, "sliding_window", None)
        self.window: int | None = window if not kinds or "sliding_attention" in kinds else None
        self._mask_kinds: tuple[str, ...] = ()
        self._prove(sorted(kinds))

    @classmethod
    def load(
        cls,
        path: str,
        dtype: str = "float32",
        device: str = "cpu",
        device_map: str | None = None,
        revision: str | None = None,
        adapter: str | None = None,
        quantization: str | None = None,
        trust_remote_code: bool = False,
    ) -> Target:
        """Load a target from a local directory or a hub id.

        Args:
            path: directory or hub id.
            dtype: a torch dtype's name, such as float32 or bfloat16.
            device: where to put it, such as cpu or cuda:0; ignored with ``device_map``.
            device_map: accelerate's placement over several devices, such as auto.
            revision: the hub's revision.
            adapter: a PEFT adapter on top, merged into the weights; it is part of the fingerprint.
            quantization: ``8bit`` or ``4bit`` (bitsandbytes).
            trust_remote_code: whether Python files that come with the target may run.

        Raises:
            ValueError: bad path, dtype or device, an unsupported family, weights that do not fit the config, logits that are not
                finite, or code that may not run.
        """
        model, fingerprint = load_causal_lm(
            path,
            as_dtype(dtype),
            device,
            device_map,
            revision,
            adapter,
            quantization,
            trust_remote_code=trust_remote_code,
        )
        return cls(model, path, fingerprint, read_end_tokens(path, revision, trust_remote_code=trust_remote_code))

    @classmethod
    def from_model(cls, model: PreTrainedModel, name: str = "in-memory") -> Target:
        """Wrap a model that is already in memory; its fingerprint hashes every parameter."""
        return cls(model, name=name, fingerprint=module_fingerprint(model))

    @property
    def device(self) -> torch.device:
        """Where token ids go in."""
        return next(self.ends.embedding.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the states."""
        return self.ends.dtype

    @property
    def max_positions(self) -> int | None:
        """The longest context in tokens, or None where the config names none."""
        longest = getattr(self.config, "max_position_embeddings", None)
        return None if longest is None else int(longest)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The ids that end a reply, as :mod:`draftsmith.models.end_tokens` finds them; empty where nothing names one.

        A model in memory has no tokenizer to ask.
        """
        return end_tokens(self.model.generation_config, self.model.config) or self._saved_end_tokens

    def logits(self, normed: Tensor) -> Tensor:
        """Normed states [..., D] -> logits [..., V]."""
        return self.ends.logits(normed)

    @torch.inference_mode()
    def forward(
        self,
        input_ids: Tensor,
        *,
        cache: Cache,
        positions: Tensor,
        mask: Tensor | None,
        key_positions: Tensor | None = None,
        layers: tuple[str, ...] = (),
    ) -> TargetOutput:
        """One forward over new tokens with a cache and an explicit mask.

        Args:
            input_ids: int64 [B, N].
            cache: where keys and values of the new tokens go, and those of S visible slots come from.
            positions: int64 [B, N].
            mask: bool [B, 1, N, S], True where a new token sees a slot; None for one new token that sees every slot, which attention
                kernels do faster.
            key_positions: int64 [B, S], the position of each slot's token; needed where the target has a sliding window.
            layers: names of further layers to return.
        """
        with self._catching(layers):
            output = self._base(
                input_ids=input_ids,
                position_ids=positions,
                attention_mask=None if mask is None else self._masks(mask, positions, key_positions),
                past_key_values=cache,
                use_cache=True,
            )
        return self._output(output.last_hidden_state, layers, input_ids.device)

    @torch.inference_mode()
    def prefix(self, input_ids: Tensor, layers: tuple[str, ...] = ()) -> TargetOutput:
        """One plain causal forward without a cache. ``input_ids``: int64 [B, T], padded on the right, where padding harms nobody."""
        with self._catching(layers):
            output = self._base(input_ids=input_ids, use_cache=False)
        return self._output(output.last_hidden_state, layers, input_ids.device)

    def check_layer(self, name: str) -> None:
        """Raises ValueError, naming the ones there are, for a layer that the target does not have."""
        if name != PRE_NORM:
            self._block(name)

    def _output(self, normed: Tensor, layers: tuple[str, ...], device: torch.device) -> TargetOutput:
        # Forgotten here, or the last forward's states would stay in memory until the next one.
        caught, self._caught = self._caught, {}
        # Of a target over several devices (device_map), each layer leaves its states on its own.
        states = {name: caught[name].to(device) for name in layers if name != PRE_NORM}
        return TargetOutput(caught[PRE_NORM].to(device), normed.to(device), states)

    def _catch_pre_norm(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._caught[PRE_NORM] = inputs[0]

    @contextmanager
    def _catching(self, layers: tuple[str, ...]) -> Iterator[None]:
        blocks = {name: self._block(name) for name in layers if name != PRE_NORM}
        # Hooked for the forward only: others call the same norm, whose inputs would be kept for nothing.
        handles = [self._norm.register_forward_pre_hook(self._catch_pre_norm)]
        handles += [
            block.register_forward_hook(lambda _module, _inputs, output, name=name: self._keep(name, output))
            for name, block in blocks.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _keep(self, name: str, output: Tensor | tuple[Tensor, ...]) -> None:
        self._caught[name] = output if isinstance(output, Tensor) else output[0]

    def _block(self, name: str) -> nn.Module:
        parts = name.split(".")
        if (
            len(parts) != 3
            or parts[0] != "layer"
            or parts[2] != "output"
            or not parts[1].isdigit()
            or int(parts[1]) >= len(self._blocks)
        ):
            raise ValueError(
                f"unknown layer {name!r}; use {PRE_NORM!r} or 'layer.i.output' with i from 0 to {len(self._blocks) - 1} for {self.name}"
            )
        return self._blocks[int(parts[1])]

    def _masks(self, mask: Tensor, positions: Tensor, key_positions: Tensor | None) -> Tensor | dict[str, Tensor]:
        windowed = mask
        if self.window is not None:
            if key_positions is None:
                raise ValueError("a target with a sliding window needs key_positions")
            near = positions[:, None, :, None] - key_positions[:, None, None, :] < self.window
            windowed = mask & near
        if not self._mask_kinds:
            return self._as_mask(windowed)
        return {kind: self._as_mask(windowed if kind == "sliding_attention" else mask) for kind in self._mask_kinds}

    def _as_mask(self, mask: Tensor) -> Tensor:
        if not self._additive_mask:
            return mask
        return torch.zeros_like(mask, dtype=self.dtype).masked_fill_(~mask, torch.finfo(self.dtype).min)

    @torch.inference_mode()
    def _prove(self, kinds: list[str]) -> None:
        """Check once, by equality, that our doors give the model's own logits; finds how it takes masks on the way."""
        ids = torch.arange(6, device=self.device)[None] % self.ends.vocab_size
        expected = self.model(input_ids=ids, use_cache=False).logits
        refuse_non_finite(expected, self.name)
        expected = expected.float()
        scale = expected.abs().max().clamp(min=1.0)
        tolerance = scale * (1e-3 if self.dtype == torch.float32 else 5e-2)
        choices = [tuple(kinds), ()] if kinds else [()]
        for self._mask_kinds in choices:
            try:
                got = self._probe(ids)
            except (AttributeError, TypeError, KeyError):  # this family takes its masks the other way
                continue
            if torch.allclose(got, expected, rtol=0.0, atol=float(tolerance)):
                return
        raise ValueError(
            f"{self.name}: {type(self.model).__name__} is not supported: run through an explicit tree mask it does not give its own "
            "logits (it may build its attention in a way that tree masks cannot express); please report the model's name"
        )

    def _probe(self, ids: Tensor) -> Tensor:
        """Logits [1, T, V] of a prefill of two tokens and a packed tree of two branches, of which the second is the text."""
        cache, total = DynamicCache(), ids.shape[1]
        positions = torch.arange(total, device=ids.device)[None]
        causal = torch.ones(total, total, dtype=torch.bool, device=ids.device).tril()[None, None]
        first = self.forward(
            ids[:, :2],
            cache=cache,
            positions=positions[:, :2],
            mask=causal[:, :, :2, :2],
            key_positions=positions[:, :2],
        )
        decoy = (ids[:, 2:3] + 1) % self.ends.vocab_size
        tree = torch.cat([decoy, ids[:, 2:]], dim=1)
        tree_positions = torch.cat([positions[:, 2:3], positions[:, 2:]], dim=1)
        tree_mask = torch.zeros(1, 1, total - 1, total + 1, dtype=torch.bool, device=ids.device)
        tree_mask[..., :2] = True
        tree_mask[..., 0, 2] = True
        tree_mask[..., 1:, 3:] = causal[..., 2:, 2:]
        second = self.forward(
            tree,
            cache=cache,
            positions=tree_positions,
            mask=tree_mask,
            key_positions=torch.cat([positions[:, :2], tree_positions], 1),
        )
        return torch.cat([self.logits(first.normed), self.logits(second.normed[:, 1:])], dim=1).float()

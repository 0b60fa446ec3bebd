"""EAGLE heads of random weights for a target of eight layers, and their forward from nothing but a folder's files.

The forward is written against Transformers' own layers of Llama and Qwen3, so that it shares no line with ours.

Shape legend: T text positions, D hidden, Vd draft vocabulary.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from doubles import random_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaConfig, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from draftsmith.models import Eagle, Eagle3, Eagle3Config, PackedBatch, Target, data_rollout
from draftsmith.models.families.eagle_base import EagleBase
from draftsmith.models.target.ends import TargetEnds

ROPE = {
    "rope_type": "llama3",
    "rope_theta": 50000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
DRAFT_IDS = [0, 3, 9, 10, 40, 63]
TEXT = [1, 5, 6, 20, 21, 22, 23, 24, 5, 60]


def deep_config(num_layers: int = 8, rope: dict | None = None) -> LlamaConfig:
    """A target whose heads are of another size than D / heads, and whose rotary settings are not the default."""
    return LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        rope_parameters=dict(ROPE if rope is None else rope),
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )


def deep_target(seed: int = 0, num_layers: int = 8) -> Target:
    """In memory."""
    return Target.from_model(random_model(deep_config(num_layers), seed), name="deep")


def save_deep_target(folder: Path) -> Path:
    """The same on disk."""
    random_model(deep_config()).save_pretrained(folder)
    return folder


def shaken(drafter: EagleBase, seed: int = 1) -> EagleBase:
    """Random weights everywhere, norms and biases included, so that no test passes by zeros or ones."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return drafter.eval()


def eagle(ends: TargetEnds, draft_ids: list[int] | None = None) -> Eagle:
    """An EAGLE-1 of random weights."""
    ids = None if draft_ids is None else torch.tensor(draft_ids)
    drafter = shaken(Eagle.for_target(ends, draft_token_ids=ids))
    assert isinstance(drafter, Eagle)
    return drafter


def eagle3(
    ends: TargetEnds, draft_ids: list[int] | None = None, layers: list[str] | None = None, **switches: bool
) -> Eagle3:
    """An EAGLE-3 of random weights; the switches are those of EAGLE-3.1."""
    ids = None if draft_ids is None else torch.tensor(draft_ids)
    fresh = Eagle3.for_target(ends, draft_token_ids=ids, layers=layers)
    if switches:
        fresh = Eagle3(Eagle3Config.from_dict(fresh.config.to_dict() | switches))
        if ids is not None:
            fresh.set_draft_ids(ids)
        fresh.attach(ends)
    drafter = shaken(fresh)
    assert isinstance(drafter, Eagle3)
    return drafter


def states(target: Target, drafter: EagleBase) -> dict[str, Tensor]:
    """The target's states over TEXT, layer name -> [T, D]."""
    output = target.prefix(torch.tensor([TEXT]), layers=drafter.features)
    return {name: output.feature(name)[0].clone() for name in drafter.features}


@torch.no_grad()
def our_logits(target: Target, drafter: EagleBase, num_steps: int = 1) -> Tensor:
    """[K, T - 1, Vd]: what the module gives behind every position of TEXT but the last."""
    length = len(TEXT)
    batch = PackedBatch(
        input_ids=torch.tensor(TEXT),
        loss_mask=torch.ones(length, dtype=torch.bool),
        document_ids=torch.zeros(length, dtype=torch.int64),
        positions=torch.arange(length),
        hidden=states(target, drafter),
    )
    return drafter.teacher_forced(batch, data_rollout(batch, num_steps)) @ drafter.head_weight.T


class FilesForward:
    """An EAGLE head from config.json and model.safetensors, by the papers' formulas.

    EAGLE-1 (arXiv:2401.15077, section 4): head(layer(fc([e(x_{t+1}); f_t]))). EAGLE-3 (arXiv:2503.01840, section 3.1): g_t = fc of
    three layers' outputs; attention reads [norm(e(x_{t+1})); norm(g_t)], the residual is g_t. The switches of EAGLE-3.1 are those of
    `draftsmith.models.families.eagle3`.
    """

    def __init__(self, folder: Path, target: Target) -> None:
        fields = json.loads((folder / "config.json").read_text())
        self.target, self.tensors, self.fields = target, load_file(folder / "model.safetensors"), fields
        layers = fields.get("transformer_layer_config", fields)
        is_qwen3 = layers["model_type"] == "qwen3"
        config_class: Any = Qwen3Config if is_qwen3 else LlamaConfig
        decoder_layer: Any = Qwen3DecoderLayer if is_qwen3 else LlamaDecoderLayer
        self.config = config_class.from_dict(layers)
        self.config._attn_implementation = "eager"
        prefix = "midlayer." if "midlayer.mlp.up_proj.weight" in self.tensors else "layers.0."
        own = {name.removeprefix(prefix): part for name, part in self.tensors.items() if name.startswith(prefix)}
        self.third = "hidden_norm.weight" in own
        self.layer = decoder_layer(self.config, 0)
        if self.third:
            for part in ("q_proj", "k_proj", "v_proj"):
                shape = reversed(own[f"self_attn.{part}.weight"].shape)
                setattr(self.layer.self_attn, part, nn.Linear(*shape, bias=f"self_attn.{part}.bias" in own))
            self.layer.hidden_norm = LlamaRMSNorm(self.config.hidden_size, eps=self.config.rms_norm_eps)
        else:
            self.layer.input_layernorm = nn.Identity()
        self.layer.load_state_dict(own, strict=True)
        self.deeper = [decoder_layer(self.config, n) for n in range(1, self.config.num_hidden_layers)]
        for number, layer in enumerate(self.deeper, start=1):
            prefix = f"layers.{number}."
            parts = {name.removeprefix(prefix): part for name, part in self.tensors.items() if name.startswith(prefix)}
            layer.load_state_dict(parts, strict=True)

    def normed(self, name: str, states: Tensor) -> Tensor:
        """An RMS norm whose weight is a tensor of the file."""
        weight = self.tensors[f"{name}.weight"]
        norm = LlamaRMSNorm(len(weight), eps=self.config.rms_norm_eps)
        norm.load_state_dict({"weight": weight})
        return norm(states)

    def embedded(self, tokens: list[int]) -> Tensor:
        """[1, T, D]."""
        return self.target.ends.embed(torch.tensor(tokens))[None]

    def known(self, tokens: list[int]) -> Tensor:
        """[1, T, D]: what is known of the positions before the tokens that the target has read."""
        hidden = self.target.model(torch.tensor([tokens]), output_hidden_states=True)
        if not self.third:
            return hidden.hidden_states[-1]
        states = [hidden.hidden_states[k] for k in self.fields.get("eagle_aux_hidden_state_layer_ids", [2, 4, 5])]
        if self.fields.get("fc_norm"):
            states = [self.normed(f"fc_norm.{number}", state) for number, state in enumerate(states)]
        fused = torch.cat(states, dim=-1)
        fused = self.normed("input_norm", fused) if self.fields.get("norm_before_fc") else fused
        return fused @ self.tensors["fc.weight"].T

    def outputs(self, embedded: Tensor, known: Tensor) -> Tensor:
        """[1, T, D]: the last layer's, over pairs in a row."""
        if self.third:
            normed = self.layer.hidden_norm(known)
            residual = normed if self.fields.get("norm_before_residual") else known
            inputs = torch.cat([self.layer.input_layernorm(embedded), normed], dim=-1)
        else:
            bias = self.tensors.get("fc.bias", torch.zeros(()))
            residual = inputs = torch.cat([embedded, known], dim=-1) @ self.tensors["fc.weight"].T + bias
        length = embedded.shape[1]
        mask = torch.full((length, length), -torch.inf).triu(1)[None, None]
        rotation = LlamaRotaryEmbedding(self.config)(residual, torch.arange(length)[None])
        attended, _ = self.layer.self_attn(inputs, position_embeddings=rotation, attention_mask=mask)
        state = residual + attended
        state = state + self.layer.mlp(self.layer.post_attention_layernorm(state))
        for layer in self.deeper:
            state = layer(state, position_embeddings=rotation, attention_mask=mask)
        return state

    def logits(self, outputs: Tensor) -> Tensor:
        """[T, Vd]."""
        if not self.third:
            return self.target.model.lm_head(outputs)[0]
        return (self.normed("norm", outputs) @ self.tensors["lm_head.weight"].T)[0]


@torch.no_grad()
def logits_of_files(folder: Path, target: Target) -> Tensor:
    """[T - 1, Vd]: `our_logits` of one step, from nothing but a folder's files."""
    files = FilesForward(folder, target)
    return files.logits(files.outputs(files.embedded(TEXT[1:]), files.known(TEXT[:-1])))


@torch.no_grad()
def second_step_of_files(folder: Path, target: Target, anchor: int) -> Tensor:
    """[Vd]: `our_logits` of the second step at an anchor, which is fed the first step's output in place of a state."""
    files = FilesForward(folder, target)
    known = files.known(TEXT[: anchor + 1])
    output = files.outputs(files.embedded(TEXT[1 : anchor + 2]), known)[:, -1:]
    fed_back = files.normed("norm", output) if files.fields.get("norm_output") else output
    embedded = files.embedded(TEXT[1 : anchor + 3])
    return files.logits(files.outputs(embedded, torch.cat([known, fed_back], dim=1)))[-1]

"""EAGLE heads of random weights for a target of eight layers, and their forward from nothing but a folder's files.

The forward is written against Transformers' own Llama layer, so that it shares no line with ours.

Shape legend: T text positions, D hidden, Vd draft vocabulary.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from doubles import random_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding

from draftsmith.models import Eagle, Eagle3, PackedBatch, Target, data_rollout
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


def eagle3(ends: TargetEnds, draft_ids: list[int] | None = None, layers: list[str] | None = None) -> Eagle3:
    """An EAGLE-3 of random weights."""
    ids = None if draft_ids is None else torch.tensor(draft_ids)
    drafter = shaken(Eagle3.for_target(ends, draft_token_ids=ids, layers=layers))
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


@torch.no_grad()
def logits_of_files(folder: Path, target: Target) -> Tensor:
    """[T - 1, Vd]: the same of one step, by the papers' formulas from config.json and model.safetensors.

    EAGLE-1 (arXiv:2401.15077, section 4): head(layer(fc([e(x_{t+1}); f_t]))). EAGLE-3 (arXiv:2503.01840, section 3.1): g_t = fc of
    three layers' outputs; attention reads [norm(e(x_{t+1})); norm(g_t)], the residual is g_t.
    """
    fields = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    config = LlamaConfig.from_dict(fields.get("transformer_layer_config", fields))
    config._attn_implementation = "eager"
    prefix = "midlayer." if "midlayer.mlp.up_proj.weight" in tensors else "layers.0."
    own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    third = "hidden_norm.weight" in own
    layer = LlamaDecoderLayer(config, 0)
    if third:
        for part in ("q_proj", "k_proj", "v_proj"):
            setattr(layer.self_attn, part, nn.Linear(*reversed(own[f"self_attn.{part}.weight"].shape), bias=False))
        layer.hidden_norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
    else:
        layer.input_layernorm = nn.Identity()
    layer.load_state_dict(own, strict=True)
    embedded = target.ends.embed(torch.tensor(TEXT[1:]))[None]
    hidden = target.model(torch.tensor([TEXT[:-1]]), output_hidden_states=True)
    if third:
        ids = fields.get("eagle_aux_hidden_state_layer_ids", [2, 4, 5])
        known = torch.cat([hidden.hidden_states[k] for k in ids], dim=-1) @ tensors["fc.weight"].T
        inputs = torch.cat([layer.input_layernorm(embedded), layer.hidden_norm(known)], dim=-1)
    else:
        bias = tensors.get("fc.bias", torch.zeros(()))
        known = torch.cat([embedded, hidden.hidden_states[-1]], dim=-1) @ tensors["fc.weight"].T + bias
        inputs = known
    length = len(TEXT) - 1
    mask = torch.full((length, length), -torch.inf).triu(1)[None, None]
    rotation = LlamaRotaryEmbedding(config)(known, torch.arange(length)[None])
    attended, _ = layer.self_attn(inputs, position_embeddings=rotation, attention_mask=mask)
    state = known + attended
    state = state + layer.mlp(layer.post_attention_layernorm(state))
    if not third:
        return target.model.lm_head(state)[0]
    norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
    norm.load_state_dict({"weight": tensors["norm.weight"]})
    return (norm(state) @ tensors["lm_head.weight"].T)[0]

"""Targets whose folders hold an MTP layer, as their publishers name it, and that layer's forward from the report's equations.

Names are spelled out here, not written by our exporter. The decoder layer is Transformers' own of each line of models, so that the
forward shares no line with ours. All weights are random.

Shape legend: T text positions, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import transformers
from doubles import random_model
from safetensors.torch import load_file, save_file
from tiny import EOS, make_tokenizer
from torch import Tensor, nn
from transformers.models.glm4_moe import modeling_glm4_moe as glm
from transformers.models.qwen2 import modeling_qwen2 as qwen2
from transformers.models.qwen3_5 import modeling_qwen3_5 as qwen3_5

from draftsmith.models import PRE_NORM, Target

_SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 96,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NAMES = ("enorm", "hnorm", "eh_proj", "norm")


@dataclass(frozen=True)
class Line:
    """A line of models.

    Attributes:
        config: makes the target's.
        modules: of Transformers: decoder layer and rotary angles.
        names: theirs of `NAMES`, and what stands before those of the decoder layer.
        layer: see above.
        state_first, reads_normed, feeds_normed: how engines compute the layer.
        offset: of the norms' weights.
    """

    config: Callable[[], transformers.PreTrainedConfig]
    modules: tuple[type[nn.Module], type[nn.Module]]
    names: tuple[str, ...]
    layer: str
    state_first: bool
    reads_normed: bool
    feeds_normed: bool
    offset: float = 0.0


LINES = {
    # GLM-4.5-Air's class with dense layers only.
    "DeepSeek's": Line(
        lambda: transformers.Glm4MoeConfig(
            **_SIZES, num_hidden_layers=2, first_k_dense_replace=99, attention_bias=True, use_qk_norm=True,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        ),
        (glm.Glm4MoeDecoderLayer, glm.Glm4MoeRotaryEmbedding),
        tuple(f"model.layers.2.{name}.weight" for name in ("enorm", "hnorm", "eh_proj", "shared_head.norm")),
        "model.layers.2.",
        state_first=False,
        reads_normed=True,
        feeds_normed=False,
    ),
    "MiMo's": Line(
        lambda: transformers.Qwen2Config(**_SIZES, num_hidden_layers=2),
        (qwen2.Qwen2DecoderLayer, qwen2.Qwen2RotaryEmbedding),
        tuple(
            f"model.mtp_layers.0.{name}.weight"
            for name in ("token_layernorm", "hidden_layernorm", "input_proj", "final_layernorm")
        ),
        "model.mtp_layers.0.",
        state_first=True,
        reads_normed=False,
        feeds_normed=True,
    ),
    "Qwen's": Line(
        lambda: transformers.Qwen3_5TextConfig(
            **_SIZES, num_hidden_layers=2, layer_types=["full_attention"] * 2,
            rope_parameters={
                "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1],
            },
        ),
        (qwen3_5.Qwen3_5DecoderLayer, qwen3_5.Qwen3_5TextRotaryEmbedding),
        tuple(f"mtp.{name}.weight" for name in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "fc", "norm")),
        "mtp.layers.0.",
        state_first=False,
        reads_normed=True,
        feeds_normed=True,
        offset=1.0,
    ),
}  # fmt: skip


@cache
def target_of(line: str) -> Target:
    """In memory, the same at every call. Its final norm has weights of its own, so that states before and behind it differ in direction."""
    model = random_model(LINES[line].config())
    final = model.get_decoder().norm.weight
    with torch.no_grad():
        final.add_(0.3 * torch.randn(final.shape, generator=torch.Generator().manual_seed(7)))
    return Target.from_model(model, name=line)


def mtp_tensors(line: str) -> dict[str, Tensor]:
    """The MTP layer of a line by its publishers' names, random everywhere."""
    own, generator = LINES[line], torch.Generator().manual_seed(5)
    config = own.config()
    D = config.hidden_size
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(own.names, (D,)) | {own.names[2]: (D, 2 * D)}
    for name, tensor in _decoder_layer(own, config).state_dict().items():
        shapes[own.layer + name] = tuple(tensor.shape)
    return {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}


def save_target_with_mtp(folder: Path) -> Path:
    """A Qwen target's folder: a tokenizer, and the tensors of its trunk and of its MTP layer in one file."""
    tokenizer, config = make_tokenizer(), LINES["Qwen's"].config()
    config.vocab_size, config.eos_token_id = len(tokenizer), EOS
    tokenizer.save_pretrained(folder)
    random_model(config).save_pretrained(folder)
    _add(folder, mtp_tensors("Qwen's"))
    return folder


def save_glm_with_mtp(folder: Path) -> Path:
    """The same of GLM-4.5-Air's depth: Transformers skips the layer of that number alone."""
    config = LINES["DeepSeek's"].config()
    config.num_hidden_layers = 46
    random_model(config).save_pretrained(folder)
    _add(folder, {name.replace(".2.", ".46.", 1): tensor for name, tensor in mtp_tensors("DeepSeek's").items()})
    return folder


def _add(folder: Path, tensors: dict[str, Tensor]) -> None:
    path = folder / "model.safetensors"
    save_file({**load_file(path), **tensors}, path, {"format": "pt"})


def _decoder_layer(line: Line, config: transformers.PreTrainedConfig) -> nn.Module:
    config._attn_implementation = "eager"
    return line.modules[0](config, 0)


@torch.no_grad()
def report_logits(line: str, target: Target, text: list[int], anchor: int, num_steps: int) -> Tensor:
    """[K, V]: what the MTP layer says behind an anchor, by equations 21 to 23 of DeepSeek-V3's report.

    The anchor's own pair reads the target's state. Each further step reads what the step before it gave.
    """
    own, tensors = LINES[line], mtp_tensors(line)
    config = own.config()
    layer = _decoder_layer(own, config)
    layer.load_state_dict({name: tensors[own.layer + name] for name in layer.state_dict()})
    layer.eval()

    def norm(states: Tensor, name: str) -> Tensor:
        scaled = states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps)
        return scaled * (tensors[name] + own.offset)

    output = target.prefix(torch.tensor([text[: anchor + 1]]), layers=(PRE_NORM,))
    known = output.feature(PRE_NORM)  # [1, T, D]
    known = target.ends.final_norm(known) if own.reads_normed else known
    logits = []
    for step in range(num_steps):
        embedded = target.ends.embed(torch.tensor([text[1 : anchor + step + 2]]))
        parts = [norm(embedded, own.names[0]), norm(known, own.names[1])]
        joined = torch.cat(parts[::-1] if own.state_first else parts, dim=-1) @ tensors[own.names[2]].T  # equation 21
        positions = torch.arange(joined.shape[1])[None]
        hidden_mask = torch.full((joined.shape[1],) * 2, float("-inf")).triu(1)[None, None]
        angles = own.modules[1](config)(joined, positions)
        given = layer(joined, attention_mask=hidden_mask, position_embeddings=angles, position_ids=positions)  # 22
        normed = norm(given, own.names[3])
        logits.append(target.ends.logits(normed[0, -1]))  # equation 23
        fed = normed if own.feeds_normed else given
        known = torch.cat([known, fed[:, -1:]], dim=1)
    return torch.stack(logits)

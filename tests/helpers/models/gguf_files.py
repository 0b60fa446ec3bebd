"""GGUF files as converters write them: a tiny model of a folder, or a tokenizer alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.torch import load_file
from tiny import EOS, TEMPLATE

NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
KINDS = {"F32": np.float32, "F16": np.float16, "Q8_0": None}
Change = Callable[[gguf.GGUFWriter], object]
FIRST = 1  # the number of the token that files name as a text's first


def gguf_name(name: str) -> str:
    stem = name.removesuffix(".weight")
    if stem.startswith("model.layers."):
        _, _, layer, part = stem.split(".", 3)
        return f"blk.{layer}.{NAMES[part]}.weight"
    return f"{NAMES[stem]}.weight"


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rotary halves of each head as llama.cpp orders them."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    file: Path,
    folder: Path,
    kind: str = "F32",
    change: Change | None = None,
    without: str = "",
    architecture: str = "llama",
    first: int | None = FIRST,
    begins: bool = False,
    pre: str = "gpt-2",
    short: str = "",
) -> Path:
    """The model in a folder as a GGUF file with a byte-level BPE; one tensor can be left out or lack rows."""
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    add_tokenizer(writer, json.loads((folder / "tokenizer.json").read_text()), first, begins, pre)
    if change is not None:
        change(writer)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if name == without:
            continue
        data, own = tensor.numpy(), gguf_name(name)
        data = data[:-16] if name == short else data
        data = next((interleaved(data, count) for part, count in heads.items() if part in own), data)
        if kind == "Q8_0" and data.ndim > 1:
            quantized = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(own, gguf.quants.quantize(data, quantized), raw_dtype=quantized)
        else:
            writer.add_tensor(own, data.astype(KINDS[kind] or np.float32) if data.ndim > 1 else data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def add_tokenizer(writer: gguf.GGUFWriter, saved: dict[str, Any], first: int | None, begins: bool, pre: str) -> None:
    special = {token["id"] for token in saved["added_tokens"]}
    tokens = sorted(saved["model"]["vocab"].items(), key=lambda item: item[1])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([token for token, _ in tokens])
    writer.add_token_types(
        [gguf.TokenType.CONTROL if number in special else gguf.TokenType.NORMAL for _, number in tokens]
    )
    writer.add_token_merges([" ".join(pair) for pair in saved["model"]["merges"]])
    if first is not None:
        writer.add_bos_token_id(first)
    writer.add_eos_token_id(EOS)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(begins)
    writer.add_chat_template(TEMPLATE)


def write_tokenizer(file: Path, tokens: Sequence[tuple[str, int]], **fields: Any) -> Path:
    """A GGUF file with nothing but a tokenizer.

    Args:
        file: to be written.
        tokens: each with its type.
        fields: by their names behind `tokenizer.ggml.`, None for none; `templates`, the default chat template and the one for tools; and
            `architecture`.
    """
    writer = gguf.GGUFWriter(file, fields.pop("architecture", "llama"))
    writer.add_token_list([token for token, _ in tokens])
    writer.add_token_types([kind for _, kind in tokens])
    if templates := fields.pop("templates", None):
        writer.add_chat_template(
            [{"name": n, "template": t} for n, t in zip(("default", "tool_use"), templates, strict=True)]
        )
    for name, value in fields.items():
        key = f"tokenizer.ggml.{name}"
        if value is None:
            continue
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file

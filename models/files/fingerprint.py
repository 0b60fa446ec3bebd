"""Fingerprints: short hashes that tell whether two stages speak of the same weights, tokenizer or chat template.

Owns how each is computed. Knows nothing of what is done with them.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

_WHOLE_BELOW = 64 * 2**20  # bytes; a smaller file is hashed whole
_BLOCK = 64 * 2**10
_NUM_BLOCKS = 256


def checkpoint_fingerprint(folder: Path) -> str:
    """Hash a checkpoint's weights as they lie on disk.

    Files of up to 64 MiB are hashed whole. Of a larger one, its size, its safetensors header and 256 spaced blocks of 64 KiB
    are hashed, so that a 140 GB target takes seconds. Any retraining moves all weights; an edit that misses every block does not show.

    Args:
        folder: with ``*.safetensors``.

    Returns:
        sha256 (hex).

    Raises:
        ValueError: the folder holds no safetensors file.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(
            f"{folder} holds no *.safetensors weights; pickled checkpoints are never loaded, convert the model with "
            "`model.save_pretrained(path, safe_serialization=True)`"
        )
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name}:{size};".encode())
        with file.open("rb") as handle:
            if size <= _WHOLE_BELOW:
                digest.update(handle.read())
                continue
            header = int.from_bytes(handle.read(8), "little")
            digest.update(handle.read(min(header, _WHOLE_BELOW)))
            for block in range(_NUM_BLOCKS):
                handle.seek(block * (size - _BLOCK) // (_NUM_BLOCKS - 1))
                digest.update(handle.read(_BLOCK))
    return digest.hexdigest()


def module_fingerprint(module: nn.Module, with_tables: bool = False) -> str:
    """Hash all parameters of a module in memory: names, shapes and values as float32.

    Args:
        module: on any device.
        with_tables: hash its buffers too, byte by byte: what a module without weights drafts from.

    Returns:
        sha256 (hex).
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(module.named_parameters()):
        digest.update(f"{name}:{tuple(parameter.shape)};".encode())
        digest.update(parameter.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    tables = sorted(module.named_buffers()) if with_tables else []
    for name, table in tables:
        digest.update(f"{name}:{tuple(table.shape)};".encode())
        digest.update(table.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash a tokenizer's vocabulary and special tokens: what makes two id sequences mean the same.

    Args:
        tokenizer: of any kind.

    Returns:
        sha256 (hex).
    """
    return _of_json([sorted(tokenizer.get_vocab().items()), sorted(map(str, tokenizer.all_special_tokens))])


def template_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash the chat template of a tokenizer.

    Args:
        tokenizer: of any kind.

    Returns:
        sha256 (hex); empty where there is no template.
    """
    template = tokenizer.chat_template
    return "" if template is None else _of_json(template)


def _of_json(value: object) -> str:
    return hashlib.sha256(json.dumps(value, ensure_ascii=False, sort_keys=True).encode()).hexdigest()

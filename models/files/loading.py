"""From the name of a model to its tokenizer and weights.

Owns what a quantization may be called, and how weights are read. Knows nothing of the doors of a target or of drafters.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.distributed import DistributedConfig
from transformers.integrations import is_deepspeed_zero3_enabled

from draftsmith.models.files.device_and_dtype import as_device
from draftsmith.models.files.fingerprint import checkpoint_fingerprint
from draftsmith.models.files.model_folder import resolve, resolve_model
from draftsmith.models.files.pretrained import (
    check_tensors,
    language_model_class,
    read_config,
    read_model,
    read_tokenizer,
)


def load_tokenizer(path: str, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model directory or hub id.

    Args:
        path: directory or hub id.
        revision: the hub's revision.
        trust_remote_code: whether Python files that come with it may run.

    Returns:
        The tokenizer.

    Raises:
        ValueError: there is none, or it needs code that may not run.
    """
    folder = resolve(path, revision)
    if not holds_tokenizer(folder):
        raise ValueError(f"{path} holds no tokenizer (tokenizer.json); give the directory of a complete model")
    return read_tokenizer(folder, trust_remote_code)


def holds_tokenizer(folder: Path) -> bool:
    """Tell whether a model's folder has a tokenizer beside its weights.

    Args:
        folder: of the model.

    Returns:
        True where one of a tokenizer's files is there.
    """
    return any((folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model"))


def load_causal_lm(
    path: str,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    device_map: str | None = None,
    revision: str | None = None,
    adapter: str | None = None,
    quantization: str | None = None,
    distributed: DistributedConfig | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, str]:
    """Load a causal LM, its adapter merged into it.

    Args:
        path: directory or hub id.
        dtype: of the weights.
        device: where to put it; ignored with ``device_map``, ``quantization`` and ``distributed``, which place it themselves.
        device_map: accelerate's placement over several devices, such as auto.
        revision: the hub's revision of the model, not of the adapter.
        adapter: directory or hub id of a PEFT adapter.
        quantization: ``8bit`` or ``4bit`` (bitsandbytes).
        distributed: how the processes of this run share the weights, each of which then reads its own part of the files only.
        trust_remote_code: whether Python files that come with the model may run.

    Returns:
        The model, and the fingerprint of model and adapter together.

    Raises:
        ValueError: bad path, device or quantization, an adapter on quantized weights, weights that do not fit the config, or code that
            may not run.
    """
    folder = resolve_model(path, revision)
    config: Any = read_config(folder, trust_remote_code)
    kind = language_model_class(config, folder)
    arguments = _reading_arguments(config, device_map, quantization, distributed)
    if adapter is not None and quantization is not None:
        raise ValueError(
            "an adapter is merged into the weights, which 8bit and 4bit weights do not allow; drop one of the two"
        )
    # Before the weights: an adapter that is not there should not cost the time of loading a target.
    fingerprint = target_fingerprint(path, revision, adapter)
    if distributed is not None:
        # Loaders of parts report their own part, or less. Whole and before any part, every process comes to the same verdict.
        check_tensors(kind, folder, trust_remote_code)
    model = read_model(kind, folder, trust_remote_code, dtype=dtype, **arguments)
    if adapter is not None:
        from draftsmith.models.files.adapter_files import adapter_folder
        from draftsmith.models.files.merged_adapter import merge_into_target

        model = merge_into_target(model, adapter_folder(adapter))
    if device_map is None and quantization is None and distributed is None and not is_deepspeed_zero3_enabled():
        nn.Module.to(model, as_device(device))
    return model, fingerprint


def _reading_arguments(
    config: Any, device_map: str | None, quantization: str | None, distributed: DistributedConfig | None
) -> dict[str, Any]:
    """What ``from_pretrained`` needs besides the dtype: attention, placement, quantization.

    Raises:
        ValueError: an unknown quantization.
    """
    text_config = config.get_text_config()
    arguments: dict[str, Any] = {}
    if getattr(text_config, "attn_logit_softcapping", None):
        # Transformers' SDPA path leaves attention soft-caps out (Gemma-2), which would change the target.
        arguments["attn_implementation"] = "eager"
    if device_map is not None:
        arguments["device_map"] = device_map
    if distributed is not None:
        arguments |= {"distributed_config": distributed, "config": config}
        # FSDP's plans keep the last weights whole for the backward pass, which a frozen model has not.
        plan = getattr(text_config, "base_model_fsdp_plan", None)
        if plan:
            text_config.base_model_fsdp_plan = dict.fromkeys(plan, "free_full_weight")
    if quantization is not None:
        arguments["quantization_config"] = _quantization(quantization)
    return arguments


def target_fingerprint(path: str, revision: str | None = None, adapter: str | None = None) -> str:
    """Hash a model's files, those of its adapter included; nothing is loaded.

    Args:
        path: directory or hub id of the model.
        revision: the hub's revision of the model.
        adapter: directory or hub id of a PEFT adapter.

    Returns:
        sha256 (hex).

    Raises:
        ValueError: bad path, no safetensors weights there, or an adapter that is none.
    """
    fingerprint = checkpoint_fingerprint(resolve(path, revision))
    if adapter is None:
        return fingerprint
    from draftsmith.models.files.adapter_files import adapter_fingerprint, adapter_folder

    # Hashed together: messages show the beginning of a fingerprint, which must tell base and base with adapter apart.
    return hashlib.sha256(f"{fingerprint}{adapter_fingerprint(adapter_folder(adapter))}".encode()).hexdigest()


def _quantization(kind: str) -> Any:
    from transformers import BitsAndBytesConfig

    if kind not in ("8bit", "4bit"):
        raise ValueError(f"quantization {kind!r} is not one of 8bit, 4bit")
    return BitsAndBytesConfig(load_in_8bit=kind == "8bit", load_in_4bit=kind == "4bit")

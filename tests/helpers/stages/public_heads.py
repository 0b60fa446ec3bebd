"""Folders of draft heads as their publishers lay them out: names and fields are spelled out here, not written by our exporters.

The weights are random. EAGLE-1 and EAGLE-3 are SafeAILab's, the others are folders of several versions of the speculators package, and
z-lab's DFlash, of which only names count.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from heads import eagle, eagle3
from safetensors.torch import save_file
from torch import Tensor

from draftsmith.models import PRE_NORM, TargetEnds

DRAFTED = [0, 3, 4, 9, 10, 17, 30, 36]  # below the smallest vocabulary of the tests
LAYERS = ["layer.0.output", PRE_NORM]  # of a target of two layers
LAYER_IDS = [1, 2]

Builder = Callable[[Path, TargetEnds], None]


def layer_fields(ends: TargetEnds) -> dict[str, Any]:
    """A one-layer Llama's fields, with the sizes of the target."""
    config = ends.config
    return {
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "num_hidden_layers": 1,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "vocab_size": config.vocab_size,
        "attention_bias": False,
        "mlp_bias": False,
        "pretraining_tp": 1,
    }


def write(folder: Path, fields: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Both files."""
    folder.mkdir(parents=True, exist_ok=True)
    contiguous = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(fields, indent=2))


def embedding(ends: TargetEnds) -> Tensor:
    """What publishers copy from the target."""
    return ends.embed(torch.arange(ends.vocab_size))


def official_eagle(folder: Path, ends: TargetEnds) -> None:
    """EAGLE-1 as its authors train it: a bias that the config does not name, the target's embedding in half precision."""
    tensors = dict(eagle(ends).state_dict())
    tensors |= {"fc.bias": torch.linspace(-0.5, 0.5, ends.hidden_size), "embed_tokens.weight": embedding(ends).half()}
    write(folder, {"architectures": ["LlamaForCausalLM"], "torch_dtype": "float16", **layer_fields(ends)}, tensors)


def eagle3_tensors(ends: TargetEnds, prefix: str, **switches: bool) -> dict[str, Tensor]:
    """EAGLE-3's tensors with both vocabulary maps."""
    own = dict(eagle3(ends, DRAFTED, LAYERS, **switches).state_dict())
    tensors = {name.replace("midlayer.", prefix): tensor for name, tensor in own.items()}
    tensors["t2d"] = torch.zeros(ends.vocab_size, dtype=torch.bool)
    tensors["t2d"][DRAFTED] = True
    return tensors


def official_eagle3(folder: Path, ends: TargetEnds) -> None:
    """EAGLE-3 as its authors train it; the layers are named as vLLM names them, since the target is too shallow for the default."""
    fields = {"architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": len(DRAFTED), "pad_token_id": 0}
    fields |= {"eagle_aux_hidden_state_layer_ids": LAYER_IDS, **layer_fields(ends)}
    write(folder, fields, eagle3_tensors(ends, "midlayer."))


def speculators_fields(ends: TargetEnds, kind: str, **own: Any) -> dict[str, Any]:
    """The package's config."""
    return {
        "architectures": ["Eagle3Speculator"],
        "auto_map": {"": "eagle3.Eagle3SpeculatorConfig"},
        "has_no_defaults_at_init": False,
        "speculators_config": {
            "algorithm": kind,
            "default_proposal_method": "greedy",
            "proposal_methods": [
                {"accept_tolerance": 0.0, "proposal_type": "greedy", "speculative_tokens": 3, "verifier_accept_k": 1}
            ],
            "verifier": {"architectures": ["LlamaForCausalLM"], "name_or_path": ends.name},
        },
        "speculators_model_type": kind,
        "target_hidden_size": None,
        "transformer_layer_config": layer_fields(ends),
        **own,
    }


def speculators_eagle3(folder: Path, ends: TargetEnds, **switches: bool) -> None:
    """EAGLE-3 of the speculators package."""
    fields = speculators_fields(
        ends, "eagle3", draft_vocab_size=len(DRAFTED), eagle_aux_hidden_state_layer_ids=LAYER_IDS
    )
    fields |= {"norm_before_residual": False, "speculators_version": "0.9.0", "torch_dtype": "float32"} | switches
    tensors = eagle3_tensors(ends, "layers.0.", **switches)
    write(folder, fields, tensors | {"embed_tokens.weight": embedding(ends)})


def normed_residual(folder: Path, ends: TargetEnds) -> None:
    """As most published folders of the package are."""
    speculators_eagle3(folder, ends, norm_before_residual=True)


def all_norms(folder: Path, ends: TargetEnds) -> None:
    """As newer versions of the package train by default, with the output fed back normalised."""
    speculators_eagle3(folder, ends, norm_before_residual=True, norm_before_fc=True, norm_output=True)


def with_verifier(folder: Path, ends: TargetEnds) -> None:
    """With the target's norm and its head's rows of the draft vocabulary, and a verifier without architectures."""
    fields = speculators_fields(
        ends, "eagle3", draft_vocab_size=len(DRAFTED), eagle_aux_hidden_state_layer_ids=LAYER_IDS
    )
    fields["speculators_config"]["verifier"] = {"architectures": [], "name_or_path": ends.name}
    fields |= {"norm_before_residual": True, "norm_before_fc": False, "embed_requires_grad": False}
    tensors = eagle3_tensors(ends, "layers.0.", norm_before_residual=True)
    tensors |= {"verifier_norm.weight": ends.norm.weight, "verifier_lm_head.weight": ends.head_weight[DRAFTED]}
    write(folder, fields, tensors)


def speculators_eagle(folder: Path, ends: TargetEnds) -> None:
    """EAGLE-1 of the package's early versions, converted from the official form: other names, the target's head in the folder."""
    fields = speculators_fields(ends, "eagle", layernorms=False, fusion_bias=True, speculators_version="0.1.0.dev14")
    fields |= {"architectures": ["EagleSpeculator"], "transformer_layer_architecture": "LlamaDecoderLayer"}
    own = dict(eagle(ends).state_dict())
    tensors = {name.replace("layers.0.", "transformer."): tensor for name, tensor in own.items() if name != "fc.weight"}
    tensors |= {"fusion_fc.weight": own["fc.weight"], "fusion_fc.bias": torch.linspace(-0.5, 0.5, ends.hidden_size)}
    write(folder, fields, tensors | {"lm_head.weight": ends.head_weight})


READ: dict[str, tuple[Builder, str]] = {
    "EAGLE-1": (official_eagle, "EAGLE-1"),
    "EAGLE-3": (official_eagle3, "EAGLE-3"),
    "speculators": (speculators_eagle3, "EAGLE-3"),
    "speculators-normed-residual": (normed_residual, "EAGLE-3"),
    "speculators-all-norms": (all_norms, "EAGLE-3"),
    "speculators-verifier-inside": (with_verifier, "EAGLE-3"),
    "speculators-eagle": (speculators_eagle, "EAGLE-1"),
}
"""Every folder that draftsmith reads, by a name for tests, with the kind of drafter in it."""


def dflash(folder: Path, ends: TargetEnds) -> None:
    """z-lab's DFlash: its config, and tensors of the right names."""
    fields = layer_fields(ends) | {
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        "num_hidden_layers": 5,
        "num_target_layers": 36,
        "block_size": 16,
        "dflash_config": {"mask_token_id": 299, "target_layer_ids": [1, 9, 17, 25, 33]},
    }
    names = ["fc", "hidden_norm", "norm", "layers.0.self_attn.q_norm", "layers.4.mlp.up_proj"]
    write(folder, fields, {f"{name}.weight": torch.ones(2, 2) for name in names})

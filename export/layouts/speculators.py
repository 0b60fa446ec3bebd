"""EAGLE-3 in the layout of the ``speculators`` package, which vLLM reads too.

Owns its config and tensor names: the layer lies in a config of its own, the target is named, the embedding comes along. Knows nothing
of cards and commands.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import LlamaConfig

from draftsmith.export.layouts import eagle3
from draftsmith.export.layouts.embedding import NAME as EMBEDDING
from draftsmith.export.layouts.embedding import embedding_rows
from draftsmith.export.layouts.layer_ids import KEY, block_counts
from draftsmith.export.layouts.layout import Foreign, Layout
from draftsmith.export.layouts.llama import SIZES, SPECULATORS_KEY, llama_fields
from draftsmith.export.layouts.readback import refuse_difference, tensors_of
from draftsmith.export.layouts.serving import vllm
from draftsmith.models.families.eagle3 import Eagle3
from draftsmith.models.files.checkpoint_files import as_text, read_fields, read_tensors, write_files
from draftsmith.models.files.model_folder import openable_name
from draftsmith.models.target.ends import TargetEnds

VERSION = "0.9.0"


def write(drafter: Eagle3, folder: Path, ends: TargetEnds | None) -> tuple[str, ...]:
    """Write the layout into an existing folder, read it back and compare.

    Returns:
        what a user must know of the result.

    Raises:
        ValueError: no target is at hand, whose embedding and architecture belong into the folder; or the drafter does not fit its table.
    """
    if ends is None:
        raise ValueError("the speculators layout holds the target's embedding and names its architecture; add --target")
    tensors = eagle3.with_membership(tensors_of(drafter), drafter.config.vocab_size)
    tensors[EMBEDDING] = embedding_rows(ends).to(drafter.dtype)
    eagle3.engine_table(drafter.config).check(tensors, "the drafter in memory")
    write_files(folder, as_text(_fields(drafter, ends)), {_outside(name): tensor for name, tensor in tensors.items()})
    refuse_difference(drafter, read(read_fields(folder), read_tensors(folder), ends, str(folder)), folder)
    if Path(_verifier(ends)).is_dir():
        return (
            f"The config names the target by a path of the machine that wrote it, `{_verifier(ends)}`. Before you publish this folder, "
            "put the target's hub id into `speculators_config.verifier.name_or_path`: `vllm serve` on this folder alone needs one.",
        )
    return ()


def _fields(drafter: Eagle3, ends: TargetEnds) -> dict[str, Any]:
    config = drafter.config
    layer = llama_fields(config, drafter.dtype, ends)
    dtype = layer.pop("torch_dtype")
    return {
        "architectures": ["Eagle3DraftModel"],
        SPECULATORS_KEY: "eagle3",
        "speculators_version": VERSION,
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": config.num_draft_steps}],
            "verifier": {"name_or_path": _verifier(ends), "architectures": list(ends.config.architectures or [])},
        },
        "transformer_layer_config": layer,
        "draft_vocab_size": config.draft_vocab_size or config.vocab_size,
        # Written although it is the default: vLLM's is the other one.
        "norm_before_residual": False,
        KEY: block_counts(config.layers, eagle3.num_layers(ends)),
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
    }


def _verifier(ends: TargetEnds) -> str:
    """What others can open: an embedded model or a GGUF file by its folder."""
    return openable_name(ends.name)


def read(fields: Mapping[str, Any], tensors: Mapping[str, Tensor], ends: TargetEnds | None, where: str) -> Eagle3:
    """A drafter from this layout; it knows no target yet beyond its sizes and layers.

    Raises:
        ValueError: another algorithm than EAGLE-3, and whatever :func:`eagle3.read` refuses.
    """
    algorithm = fields.get(SPECULATORS_KEY)
    if algorithm != "eagle3":
        raise ValueError(
            f"{where} is a {algorithm!r} of the speculators package; of its drafters only 'eagle3' can be read"
        )
    layer = fields.get("transformer_layer_config")
    if not isinstance(layer, Mapping) or layer.get("model_type") != "llama":
        raise ValueError(f"{where}: transformer_layer_config is not a Llama layer's; such a drafter cannot be read")
    own = {name: value for name, value in fields.items() if name != "transformer_layer_config"}
    # The package leaves out what equals Llama's defaults.
    defaults = LlamaConfig()
    sizes = {name: getattr(defaults, name) for name in SIZES}
    drafter = eagle3.read({**sizes, **layer, **own}, tensors, ends, where)
    methods = (fields.get("speculators_config") or {}).get("proposal_methods") or [{}]
    drafter.config.num_draft_steps = int(methods[0].get("speculative_tokens") or drafter.config.num_draft_steps)
    return drafter


def _outside(name: str) -> str:
    """``midlayer.mlp.up_proj.weight`` -> ``layers.0.mlp.up_proj.weight``."""
    return name.replace(f"{eagle3.LAYER}.", f"{eagle3.OTHER_LAYER}.", 1) if name.startswith(eagle3.LAYER) else name


def holds(fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bool:
    """Whether a folder is in this layout."""
    return SPECULATORS_KEY in fields


def _commands(target: str, num_steps: int) -> str:
    return vllm("eagle3", target, num_steps)


LAYOUTS = (
    Layout(
        "speculators",
        write,
        "the layout of the speculators package, with the target's embedding",
        Foreign("the speculators package's", holds, read),
        _commands,
    ),
)

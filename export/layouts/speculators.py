"""The layout of the ``speculators`` package, which vLLM reads too: EAGLE-3 and P-EAGLE both ways, and EAGLE-1 of its early versions
to read.

Owns its config and tensor names: the layer lies in a config of its own, the target is named, the embedding comes along. Folders of several
versions are read: with and without the layers to read, with and without the target's own tensors. Knows nothing of cards and commands.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, Qwen3Config

from draftsmith.export.layouts import eagle3
from draftsmith.export.layouts.embedding import NAME as EMBEDDING
from draftsmith.export.layouts.embedding import embedding_rows
from draftsmith.export.layouts.layer_ids import KEY, block_counts
from draftsmith.export.layouts.layout import Layout, LayoutReader
from draftsmith.export.layouts.llama import SIZES
from draftsmith.export.layouts.readback import refuse_difference, tensors_of
from draftsmith.export.layouts.serving import vllm
from draftsmith.models.families.eagle3 import Eagle3
from draftsmith.models.files.checkpoint_files import CONFIG, as_text, read_fields, read_tensors, write_files
from draftsmith.models.files.model_folder import openable_name
from draftsmith.models.files.tables import target_ids, vocabulary_faults
from draftsmith.models.other_software.speculators_config import SPECULATORS_KEY, algorithm_of, proposed_tokens
from draftsmith.models.target.ends import TargetEnds

VERSION = "0.9.0"
_KINDS = {"eagle3": "Eagle3DraftModel", "peagle": "PEagleSpeculator"}
_DEFAULTS: dict[str, type[LlamaConfig | Qwen3Config]] = {eagle3.LLAMA: LlamaConfig, eagle3.QWEN3: Qwen3Config}
_LAYERS = tuple(_DEFAULTS)
_RESIDUAL = "norm_before_residual"
_VERIFIER_HEAD, _VERIFIER_NORM = "verifier_lm_head.weight", "verifier_norm.weight"


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
    if not drafter.config.own_embedding:
        tensors[EMBEDDING] = embedding_rows(ends).to(drafter.dtype)
    eagle3.engine_table(drafter.config).check(tensors, "the drafter in memory")
    write_files(
        folder, as_text(_fields(drafter, ends)), {eagle3.renamed(name): tensor for name, tensor in tensors.items()}
    )
    refuse_difference(drafter, read(read_fields(folder), read_tensors(folder), ends, str(folder)), folder)
    return *path_note(ends), *eagle3.attention_notes(drafter.config)


def _fields(drafter: Eagle3, ends: TargetEnds) -> dict[str, Any]:
    config = drafter.config
    layer = eagle3.decoder_fields(config, drafter.dtype, ends)
    dtype, kind = layer.pop("torch_dtype"), "peagle" if config.parallel else "eagle3"
    return {
        "architectures": [_KINDS[kind]],
        **package_fields(kind, config.num_draft_steps, ends),
        **({"mask_token_id": config.mask_token_id} if config.parallel else {}),
        "transformer_layer_config": layer,
        "draft_vocab_size": config.draft_vocab_size or config.vocab_size,
        # All are written, although false is the default: vLLM's default of the first is the other one.
        **config.switches,
        KEY: block_counts(config.layers, eagle3.num_layers(ends)),
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
    }


def package_fields(algorithm: str, num_tokens: int, ends: TargetEnds) -> dict[str, Any]:
    """The fields by which the package knows what a folder holds.

    Args:
        algorithm: the package's name for the kind of drafter.
        num_tokens: of a draft.
        ends: the target's.
    """
    return {
        SPECULATORS_KEY: algorithm,
        "speculators_version": VERSION,
        "speculators_config": {
            "algorithm": algorithm,
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": num_tokens}],
            "verifier": {"name_or_path": _verifier(ends), "architectures": list(ends.config.architectures or [])},
        },
    }


def path_note(ends: TargetEnds) -> tuple[str, ...]:
    """What a user must know where the target is named by a path; nothing where it has a hub id."""
    if not Path(_verifier(ends)).is_dir():
        return ()
    return (
        f"The config names the target by a path of the machine that wrote it, `{_verifier(ends)}`. Before you publish this folder, "
        "put the target's hub id into `speculators_config.verifier.name_or_path`: `vllm serve` on this folder alone needs one.",
    )


def _verifier(ends: TargetEnds) -> str:
    """What others can open: an embedded model or a GGUF file by its folder."""
    return openable_name(ends.name)


def read(fields: Mapping[str, Any], tensors: Mapping[str, Tensor], ends: TargetEnds | None, where: str) -> Eagle3:
    """A drafter from this layout; it knows no target yet beyond its sizes and layers.

    Raises:
        ValueError: another layer than Llama's or Qwen3's, tensors of the target that are not this target's, and whatever
            :func:`eagle3.read` refuses.
    """
    kept = without_verifier(tensors, ends, where)
    if fields.get(_RESIDUAL) is None and algorithm_of(fields) == "eagle3":  # of a P-EAGLE, vLLM takes false as well
        warnings.warn(
            f"{where}: {CONFIG} does not name {_RESIDUAL}; draftsmith and the speculators package take false, vLLM takes true: add it",
            stacklevel=2,
        )
    drafter = eagle3.read(flat_fields(fields, where, _LAYERS), kept, ends, where)
    drafter.config.num_draft_steps = proposed_tokens(fields) or drafter.config.num_draft_steps
    return drafter


def flat_fields(fields: Mapping[str, Any], where: str, kinds: Collection[str] = (eagle3.LLAMA,)) -> dict[str, Any]:
    """The package's nested config as one level of fields, as engines and the official code write them.

    Args:
        fields: of the config.
        where: for messages.
        kinds: which kinds of layers are read.

    Returns:
        The layer's fields, the defaults of its kind where the package leaves them out, and the drafter's own.

    Raises:
        ValueError: the layer is of another kind.
    """
    layer = fields.get("transformer_layer_config")
    if not isinstance(layer, Mapping) or layer.get("model_type") not in kinds:
        expected = " or ".join(_DEFAULTS[kind].__name__.removesuffix("Config") for kind in kinds)
        raise ValueError(
            f"{where}: transformer_layer_config is not a {expected} layer's; such a drafter cannot be read"
        )
    own = {name: value for name, value in fields.items() if name not in ("transformer_layer_config", "model_type")}
    # The package leaves out what equals the defaults. What is null is left out, too.
    defaults = _DEFAULTS[layer["model_type"]]()
    given = [{name: value for name, value in part.items() if value is not None} for part in (layer, own)]
    return {**{name: getattr(defaults, name) for name in SIZES}, **given[0], **given[1]}


def eagle_tensors(fields: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Give an EAGLE-1's tensors their common names: ``fusion_fc.weight`` -> ``fc.weight``, ``transformer.*`` -> ``layers.0.*``.

    A head of its own is the target's, as in the folders that hold the target's tensors: ``lm_head`` -> ``verifier_lm_head``.

    Args:
        fields: of the config.
        tensors: under the package's names.
        where: for messages.

    Returns:
        The tensors by their common names.

    Raises:
        ValueError: the drafter has norms that EAGLE-1 has not (HASS with ``layernorms``).
    """
    if fields.get("layernorms"):
        raise ValueError(f"{where} asks for layernorms, which an EAGLE-1 does not have; such a drafter cannot be read")
    parts = {"fusion_fc": "fc", "transformer": "layers.0", "lm_head": "verifier_lm_head"}
    named = {}
    for name, tensor in tensors.items():
        first, dot, rest = name.partition(".")
        named[f"{parts.get(first, first)}{dot}{rest}"] = tensor
    return named


def without_verifier(tensors: Mapping[str, Tensor], ends: TargetEnds | None, where: str) -> dict[str, Tensor]:
    """Take the target's own head and norm away, which folders of some versions hold beside the drafter.

    Args:
        tensors: of the folder.
        ends: the target's; without them the tensors are not looked at.
        where: for messages.

    Returns:
        The drafter's tensors.

    Raises:
        ValueError: they are another target's.
    """
    kept = dict(tensors)
    stored = {name: kept.pop(name) for name in (_VERIFIER_HEAD, _VERIFIER_NORM) if name in kept}
    if ends is None:
        return kept
    for name, tensor in stored.items():
        own = _rows(ends.head_weight, tensor, kept) if name == _VERIFIER_HEAD else getattr(ends.norm, "weight", None)
        if own is None or not torch.equal(own.detach().cpu().to(tensor.dtype), tensor):
            raise ValueError(
                f"{where}: {name} differs from that of {ends.name!r}; name the target that the drafter was made for"
            )
    return kept


def _rows(head_weight: Tensor, stored: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """The target's head, or its rows of the draft vocabulary where so many are stored."""
    if "d2t" not in tensors or len(stored) == len(head_weight) or vocabulary_faults(tensors, len(head_weight)):
        return head_weight
    return head_weight[target_ids(tensors["d2t"]).to(head_weight.device)]


def holds(fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bool:
    """Whether a folder is in this layout."""
    return algorithm_of(fields) in _KINDS


def _commands(target: str, num_steps: int) -> str:
    return vllm("eagle3", target, num_steps)


LAYOUTS = (
    Layout(
        "speculators",
        write,
        "the layout of the speculators package, with the target's embedding",
        LayoutReader("the speculators package's", holds, read, understood=eagle3.UNDERSTOOD),
        _commands,
    ),
)

"""Block drafters in the layout of the speculators package (vllm-project/speculators 0.9): its ``dflash``, ``dflash2`` and ``dspark``.

Owns the package's config. The layers are in a config of their own, the target is named, and layers are counted from 1. Layers with full
attention see the whole block there; those with a sliding window do so where ``sliding_window_non_causal`` is true. vLLM makes all layers
causal where that is false, so it is written as true unless every layer slides and is causal. Other causal drafters have no place in this
layout. A window is so many tokens before the root for all slots, and the block. The package takes embedding and head from the target, but
for the head's rows of a draft vocabulary. Knows nothing of cards and commands.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config

from draftsmith.export.layouts import speculators
from draftsmith.export.layouts.block import dflash_reader, kinds
from draftsmith.export.layouts.block.qwen3 import (
    MARKOV_TYPES,
    last_block_note,
    public_tensors,
    qwen3_fields,
    refuse_learned_mask,
)
from draftsmith.export.layouts.eagle3 import num_layers
from draftsmith.export.layouts.embedding import is_plain
from draftsmith.export.layouts.layer_ids import block_counts
from draftsmith.export.layouts.layout import Layout, LayoutReader
from draftsmith.export.layouts.llama import SIZES
from draftsmith.export.layouts.readback import refuse_difference
from draftsmith.export.layouts.serving import vllm
from draftsmith.models.families.block.block_drafter import BlockDrafter
from draftsmith.models.files.checkpoint_files import CONFIG, as_text, read_fields, read_tensors, write_files
from draftsmith.models.files.field_rules import OBJECT, check_fields
from draftsmith.models.other_software.speculators_config import SPECULATORS_KEY, algorithm_of
from draftsmith.models.target.ends import TargetEnds

_LAYERS = "transformer_layer_config"
_KINDS = {kinds.DFLASH: "DFlashSpeculator", kinds.DFLASH2: "DFlash2DraftModel", kinds.DSPARK: "DSparkSpeculator"}


def write(drafter: BlockDrafter, folder: Path, ends: TargetEnds | None) -> tuple[str, ...]:
    """Write the layout into an existing folder, read it back and compare.

    Returns:
        what a user must know of the result.

    Raises:
        ValueError: no target is at hand, or a drafter that the package or the engines behind it would compute in another way: it is causal
            and has a layer with full attention, has a window that counts from each slot, has Domino's correction or a learned mask, or its
            target computes more than a look-up for its embedding.
    """
    if ends is None:
        raise ValueError("the speculators layout names the target and its architecture; add --target")
    config, kind = drafter.config, kinds.kind_of(drafter.config)
    if (config.causal or config.sliding_causal) and len(set(config.sliding_layers)) < config.num_draft_layers:
        raise ValueError(
            "this drafter is causal, and layers with full attention see the whole block in the speculators package; export it with "
            "--layout dflash"
        )
    if kind not in _KINDS:
        raise ValueError(
            "this drafter's correction is 'gru', which this layout does not hold; export it with --layout domino"
        )
    if config.sliding_layers and not config.window_from_root:
        raise ValueError(
            "this drafter's window counts from each slot, and the speculators package counts it from the root; export it with "
            f"--layout {kind}, or train it with window_from_root true"
        )
    if not is_plain(ends):
        raise ValueError(
            f"{ends.name!r} computes more than a look-up for its embedding, and the speculators package takes its bare matrix; export the "
            "drafter with --layout dflash"
        )
    tensors = public_tensors(drafter, ends, with_membership=True)
    write_files(folder, as_text(_fields(drafter, kind, ends)), tensors)
    refuse_difference(drafter, read(read_fields(folder), read_tensors(folder), ends, str(folder)), folder)
    return (*speculators.path_note(ends), *last_block_note(config), *kinds.engine_notes(config))


def _fields(drafter: BlockDrafter, kind: str, ends: TargetEnds) -> dict[str, Any]:
    config = drafter.config
    layer = qwen3_fields(config, drafter.dtype, ends)
    dtype = layer.pop("torch_dtype")
    fields = {
        "architectures": [_KINDS[kind]],
        **speculators.package_fields(kind, config.block_size - config.first_slot, ends),
        _LAYERS: layer,
        "draft_vocab_size": config.num_draft_tokens,
        "block_size": config.block_size,
        "aux_hidden_state_layer_ids": block_counts(config.layers, num_layers(ends)),
        "mask_token_id": refuse_learned_mask(config),
        "sliding_window_non_causal": not (config.causal or config.sliding_causal),
        "sample_from_anchor": config.sample_from_anchor,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
    }
    if kind == kinds.DSPARK:
        fields |= {"markov_rank": config.correction_rank, "markov_head_type": MARKOV_TYPES[config.correction]}
        fields |= kinds.confidence_fields(config)
    if kind == kinds.DFLASH2:
        fields |= kinds.selector_fields(config)
    return fields


def read(fields: Mapping[str, Any], tensors: Mapping[str, Tensor], ends: TargetEnds | None, where: str) -> BlockDrafter:
    """A drafter from this layout; it knows no target yet beyond its sizes and layers.

    Raises:
        ValueError: another layer than Qwen3's, a DSpark that does not say which slot predicts first, tensors of another target, and
            whatever :func:`dflash_reader.read` refuses.
    """
    check_fields(fields, {_LAYERS: OBJECT}, f"{where}: {CONFIG}", "correct it by hand", required=(_LAYERS,))
    layer = _named(fields[_LAYERS])
    if layer.get("model_type") != "qwen3":
        raise ValueError(f"{where}: {_LAYERS} is not a Qwen3 layer's; such a drafter cannot be read")
    kind = fields[SPECULATORS_KEY]
    own = _named({name: value for name, value in fields.items() if name not in (_LAYERS, SPECULATORS_KEY)})
    if kind == kinds.DSPARK and "sample_from_anchor" not in own:
        raise ValueError(
            f"{where} does not say sample_from_anchor, whose default differs between versions of the package; add it by hand: true where "
            "the root's slot predicts the first drafted token"
        )
    # What is not named has the package's default: layers with a sliding window see no later slot, but for those of a DFlash 2.
    package = {"projector_type": kind, "sliding_window_non_causal": kind == kinds.DFLASH2}
    # The package may leave out what equals Qwen3's defaults.
    defaults = {name: getattr(Qwen3Config(), name) for name in SIZES[:2]}
    flat = {**defaults, **layer, **package, **own, "is_causal": False}
    kept = speculators.without_verifier(tensors, ends, where)
    return dflash_reader.read(flat, kept, ends, where, window_from_root=True)


def _named(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields without those that are null, which stand for a default."""
    return {name: value for name, value in fields.items() if value is not None}


def holds(fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bool:
    """Whether a folder is in this layout."""
    return algorithm_of(fields) in _KINDS


def _commands(target: str, num_steps: int) -> str:
    return (
        f"{vllm(kinds.DFLASH, target, num_steps)}\n\nFor a drafter with a correction, the method is `{kinds.DSPARK}`."
    )


LAYOUTS = (
    Layout(
        "speculators",
        write,
        "the layout of the speculators package. Embedding and head are the target's",
        LayoutReader("the speculators package's", holds, read, understood=dflash_reader.UNDERSTOOD),
        _commands,
    ),
)

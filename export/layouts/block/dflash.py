"""Block drafters on disk: z-lab's DFlash layout, and its relatives for JetSpec, DFlash 2, DSpark and Domino, which vLLM and SGLang read.

Owns how they are written: layers and causality for both engines, each in its own field. A DSpark is ``Qwen3DSparkModel`` to vLLM;
``DSparkDraftModel`` is another model there. Knows nothing of cards and commands.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from draftsmith.export.layouts.block.dflash_reader import NESTED, UNDERSTOOD, read
from draftsmith.export.layouts.block.kinds import (
    DFLASH,
    DFLASH2,
    DOMINO,
    DSPARK,
    confidence_fields,
    engine_notes,
    kind_of,
    selector_fields,
)
from draftsmith.export.layouts.block.qwen3 import (
    MARKOV_TYPES,
    add_embedding,
    last_block_note,
    public_tensors,
    qwen3_fields,
    refuse_learned_mask,
)
from draftsmith.export.layouts.eagle3 import num_layers
from draftsmith.export.layouts.layer_ids import block_counts
from draftsmith.export.layouts.layout import Layout, LayoutReader
from draftsmith.export.layouts.readback import refuse_difference
from draftsmith.export.layouts.serving import sglang_block, vllm
from draftsmith.models.families.block.block_drafter import BlockDrafter
from draftsmith.models.files.checkpoint_files import as_text, read_fields, read_tensors, write_files
from draftsmith.models.other_software.named_kinds import named_kind
from draftsmith.models.other_software.speculators_config import SPECULATORS_KEY
from draftsmith.models.target.ends import TargetEnds

_ARCHITECTURES = {
    DFLASH: "DFlashDraftModel",
    DFLASH2: "DFlash2DraftModel",
    DSPARK: "Qwen3DSparkModel",
    DOMINO: "DFlashDraftModel",
}


def write(drafter: BlockDrafter, folder: Path, ends: TargetEnds | None) -> tuple[str, ...]:
    """Write a DFlash or a JetSpec into an existing folder, read it back and compare.

    Returns:
        what a user must know of the result.

    Raises:
        ValueError: a drafter that no engine serves, since its mask is a learned vector or its root's slot predicts without a correction;
            one of another layout; or a draft vocabulary without the target at hand.
    """
    return _write(DFLASH, drafter, folder, ends)


def write_dflash2(drafter: BlockDrafter, folder: Path, ends: TargetEnds | None) -> tuple[str, ...]:
    """As :func:`write`, a DFlash 2.

    Raises:
        ValueError: as there.
    """
    return _write(DFLASH2, drafter, folder, ends)


def write_dspark(drafter: BlockDrafter, folder: Path, ends: TargetEnds | None) -> tuple[str, ...]:
    """As :func:`write`, a DSpark.

    Raises:
        ValueError: as there.
    """
    return _write(DSPARK, drafter, folder, ends)


def write_domino(drafter: BlockDrafter, folder: Path, ends: TargetEnds | None) -> tuple[str, ...]:
    """As :func:`write`, a Domino.

    Raises:
        ValueError: as there.
    """
    return _write(DOMINO, drafter, folder, ends)


def _write(layout: str, drafter: BlockDrafter, folder: Path, ends: TargetEnds | None) -> tuple[str, ...]:
    config, kind = drafter.config, kind_of(drafter.config)
    if kind != layout:
        raise ValueError(
            f"this drafter has the correction {config.correction!r}, which --layout {layout} does not hold; use --layout {kind}"
        )
    if config.window_from_root:
        other = "" if kind == DOMINO else "export it with --layout speculators, or "
        raise ValueError(
            f"this drafter's window counts from the root (window_from_root true), and engines count a window from each slot; {other}train "
            "it with window_from_root false"
        )
    tensors = public_tensors(drafter, ends, with_membership=False)
    notes = [*add_embedding(tensors, ends, drafter.dtype), *last_block_note(config), *engine_notes(config)]
    write_files(folder, as_text(_fields(drafter, kind, ends)), tensors)
    refuse_difference(drafter, read(read_fields(folder), read_tensors(folder), ends, str(folder)), folder)
    return tuple(notes)


def _fields(drafter: BlockDrafter, kind: str, ends: TargetEnds | None) -> dict[str, Any]:
    config = drafter.config
    depth = num_layers(ends)
    nested: dict[str, Any] = {
        "mask_token_id": refuse_learned_mask(config),
        "target_layer_ids": [count - 1 for count in block_counts(config.layers, depth)],
        "block_size": config.block_size,
    }
    fields = {
        "architectures": [_ARCHITECTURES[kind]],
        **qwen3_fields(config, drafter.dtype, ends),
        "block_size": config.block_size,
        NESTED: nested,
    }
    if config.causal or not config.sliding_causal:
        fields["is_causal"] = nested["causal"] = config.causal
    if depth is not None:
        fields["num_target_layers"] = depth
    if config.draft_vocab_size is not None:
        fields["draft_vocab_size"] = config.num_draft_tokens
    if kind == DOMINO:
        nested |= {"projector_type": DOMINO, "shift_label": True, "pure_draft_prefix_len": 1}
        nested |= {"gru_hidden_dim": config.correction_state, "emb_dim": config.correction_rank}
    elif kind == DFLASH2:
        nested |= selector_fields(config)
    elif kind == DSPARK:
        # vLLM reads these at the top.
        fields |= {name: nested[name] for name in ("mask_token_id", "target_layer_ids")}
        fields |= {"markov_rank": config.correction_rank, "markov_head_type": MARKOV_TYPES[config.correction]}
        fields |= confidence_fields(config)
        fields["sample_from_anchor"] = True
        nested["projector_type"] = DSPARK
    return fields


def holds(fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bool:
    """Whether a folder is in this layout."""
    return SPECULATORS_KEY not in fields and named_kind(fields, tensors) in ("DFlash", "DFlash 2", "DSpark")


def _commands(target: str, num_steps: int) -> str:
    return f"{vllm(DFLASH, target, num_steps)}\n\n{sglang_block('DFLASH', target)}"


def _dspark_commands(target: str, num_steps: int) -> str:
    return f"{vllm(DSPARK, target, num_steps)}\n\n{sglang_block('DSPARK', target)}"


def _domino_commands(target: str, num_steps: int) -> str:
    return sglang_block("DFLASH", target)


LAYOUTS = (
    Layout(
        "dflash",
        write,
        "z-lab's DFlash layout, which vLLM and SGLang load. The target is named in `provenance.json`",
        LayoutReader("z-lab's", holds, read, understood=UNDERSTOOD),
        _commands,
    ),
    Layout(
        "dflash2",
        write_dflash2,
        "the DFlash 2 layout of vLLM and SGLang. The target is named in `provenance.json`",
        commands=_commands,
    ),
    Layout(
        "dspark",
        write_dspark,
        "the DSpark layout of vLLM and SGLang: DFlash's with a Markov head. The target is named in `provenance.json`",
        commands=_dspark_commands,
    ),
    Layout(
        "domino",
        write_domino,
        "the Domino layout of SGLang: DFlash's with a recurrent head. The target is named in `provenance.json`",
        commands=_domino_commands,
    ),
)

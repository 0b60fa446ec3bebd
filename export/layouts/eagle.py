"""EAGLE-1 on disk: one layout for vLLM and SGLang, and the official one, of which it is a special case.

Owns its tables. Both engines take embedding and head from the target. They differ in ``fc``: SGLang's has a bias, random unless the
checkpoint brings one; vLLM's has none and drops what it finds. Zeros serve both, and only zeros. The official code
(github.com/SafeAILab/EAGLE) writes the same names, with a trained bias by default. Knows nothing of cards and commands.

Shape legend: D hidden, V vocabulary, Vd draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from draftsmith.export.layouts import speculators
from draftsmith.export.layouts.embedding import NAME as EMBEDDING
from draftsmith.export.layouts.embedding import embedding_rows, is_plain, refuse_other_embedding
from draftsmith.export.layouts.layout import Layout, LayoutReader
from draftsmith.export.layouts.llama import (
    LAYER_FIELDS,
    has_own_head,
    layer_settings,
    llama_fields,
    warn_of_idle_window,
)
from draftsmith.export.layouts.readback import refuse_difference, tensors_of
from draftsmith.export.layouts.serving import sglang, vllm
from draftsmith.models.drafters.drafter_reader import assemble, module_table
from draftsmith.models.families.eagle import Eagle
from draftsmith.models.families.eagle_config import EagleConfig
from draftsmith.models.files.checkpoint_files import as_text, read_fields, read_tensors, write_files
from draftsmith.models.files.tables import Table, TensorSpec
from draftsmith.models.other_software.named_kinds import named_kind
from draftsmith.models.other_software.speculators_config import SPECULATORS_KEY
from draftsmith.models.target.ends import TargetEnds

WHAT = "EAGLE-1"
# SGLang's name first, vLLM's second: each passes over the other's.
ARCHITECTURES = ("LlamaForCausalLMEagle", "EagleLlamaForCausalLM")
_UNDERSTOOD = {*LAYER_FIELDS, "bias", "fusion_bias", "layernorms", "transformer_layer_architecture"}
_FREQUENCIES = "layers.0.self_attn.rotary_emb.inv_freq"  # left by old Transformers; follows from the config


def engine_table(config: EagleConfig, where: str = "the config") -> Table:
    """Every tensor that vLLM, SGLang and the official code know: our module's without a draft vocabulary, and a few more."""
    D = config.hidden_size
    specs = {
        **module_table(Eagle, config, where).specs,
        "fc.bias": TensorSpec((D,), optional=True),
        EMBEDDING: TensorSpec((config.vocab_size, D), optional=True),
        _FREQUENCIES: TensorSpec((config.head_dim // 2,), optional=True),
    }
    specs.pop("d2t", None)
    return Table(WHAT, config.vocab_size, specs)


def write(drafter: Eagle, folder: Path, ends: TargetEnds | None) -> tuple[str, ...]:
    """Write the layout of vLLM and SGLang into an existing folder, read it back and compare.

    A draft vocabulary is left out: the head is the target's, so that the served drafter scores every token.

    Returns:
        what a user must know of the result.

    Raises:
        ValueError: ``fc`` has a bias that is not zero.
    """
    tensors, notes = tensors_of(drafter), []
    if "fc.bias" in tensors and bool(tensors["fc.bias"].any()):
        raise ValueError(
            "fc.bias of this drafter is not zero, and vLLM drops it in silence; serve it from --layout draftsmith, or fine-tune a "
            "drafter without one (bias false in its config)"
        )
    tensors["fc.bias"] = torch.zeros(drafter.config.hidden_size, dtype=drafter.fc.weight.dtype)
    if tensors.pop("d2t", None) is not None:
        notes.append(
            f"The draft vocabulary of {drafter.config.draft_vocab_size:,} tokens could not come along: engines score with the target's "
            "whole head, so that each step costs more. Figures on this page were measured with it."
        )
    if ends is not None and not is_plain(ends):
        tensors[EMBEDDING] = embedding_rows(ends).to(drafter.fc.weight.dtype)
        notes.append(
            "The target computes more than a look-up for its embedding, so `embed_tokens` with the result is here. vLLM reads it; SGLang "
            "takes the target's bare matrix instead, with which this drafter was not trained."
        )
    fields = {"architectures": list(ARCHITECTURES)}
    fields |= llama_fields(drafter.config, drafter.fc.weight.dtype, ends)
    engine_table(drafter.config).check(tensors, "the drafter in memory")
    write_files(folder, as_text(fields), tensors)
    refuse_difference(_served(drafter), read(read_fields(folder), read_tensors(folder), ends, str(folder)), folder)
    return tuple(notes)


def read(fields: Mapping[str, Any], tensors: Mapping[str, Tensor], ends: TargetEnds | None, where: str) -> Eagle:
    """A drafter from the engines' or the official layout, or from that of early speculators; it knows no target yet beyond its sizes.

    Args:
        fields: of the config.
        tensors: of the checkpoint.
        ends: the target's; without them a stored embedding is not looked at.
        where: for messages.

    Raises:
        ValueError: the tensors are not the table's, the layer is not of our kind, or the embedding is not the target's.
    """
    kept = dict(tensors)
    if SPECULATORS_KEY in fields:
        kept = speculators.without_verifier(speculators.eagle_tensors(fields, tensors, where), ends, where)
        fields = {**speculators.flat_fields(fields, where), "bias": fields.get("fusion_bias")}
    bias = kept.get("fc.bias")
    if bias is None and fields.get("bias") is True:
        raise ValueError(f"{where}: the config says bias true, but fc.bias is missing; get a whole checkpoint")
    config = EagleConfig(**layer_settings(fields, where), num_draft_steps=1)
    warn_of_idle_window(fields, where)
    engine_table(config, where).check(kept, where)
    config.bias = bias is not None and bool(bias.any())
    if not config.bias:
        kept.pop("fc.bias", None)
    kept.pop(_FREQUENCIES, None)
    embedding = kept.pop(EMBEDDING, None)
    if embedding is not None and ends is not None:
        refuse_other_embedding(embedding, ends, where)
    return assemble(Eagle, config, kept)


def _served(drafter: Eagle) -> Eagle:
    """The drafter as engines will run it: without draft vocabulary, and without a bias of zeros."""
    fields = drafter.config.to_dict() | {"draft_vocab_size": None, "bias": False}
    tensors = {name: tensor for name, tensor in tensors_of(drafter).items() if name not in ("d2t", "fc.bias")}
    return assemble(Eagle, EagleConfig.from_dict(fields), tensors)


def holds(fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bool:
    """Whether a folder is in this layout. Engines' configs of EAGLE-1 and EAGLE-3 look alike; their tensors do not."""
    if SPECULATORS_KEY in fields:
        return fields[SPECULATORS_KEY] == "eagle"
    if named_kind(fields, tensors):
        return False
    return "fc.weight" in tensors and not has_own_head(tensors)


def _commands(target: str, num_steps: int) -> str:
    return vllm("eagle", target, num_steps) + "\n\n" + sglang("EAGLE", target)


LAYOUTS = (
    Layout(
        "eagle",
        write,
        "the EAGLE-1 layout that vLLM and SGLang both load: two architectures, each engine's own, and an `fc.bias` of zeros. Embedding and "
        "head are the target's. The target is named in `provenance.json`",
        LayoutReader("the common EAGLE-1", holds, read, understood=_UNDERSTOOD),
        _commands,
        whole_vocabulary=True,
    ),
)

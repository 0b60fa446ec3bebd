"""Medusa on disk: the official layout, which vLLM up to 0.32 reads too.

Owns its names and config fields. Each head has residual blocks and an output matrix of its own: ``{h}.{l}.linear``, ``{h}.{L}``. The
official training writes `medusa_lm_head.safetensors`; its own decoder reads a pickle, which nothing here writes. vLLM drops the biases of
the blocks unless ``medusa_fc_bias`` is true. It takes any field with "num" and "heads" in its name for the number of heads. Knows
nothing of cards and commands.

Shape legend: D hidden, V vocabulary, Vd draft vocabulary, K heads, L blocks of a head.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from draftsmith.export.layouts.heads.own_heads import written_out
from draftsmith.export.layouts.layout import Layout, LayoutReader
from draftsmith.export.layouts.readback import refuse_difference, tensors_of
from draftsmith.export.layouts.serving import vllm
from draftsmith.models.drafters.drafter_reader import assemble, module_table
from draftsmith.models.families.heads import HeadsConfig, HeadsDrafter
from draftsmith.models.files.checkpoint_files import CONFIG, as_text, read_fields, read_tensors, write_files
from draftsmith.models.files.field_rules import COUNT, COUNT_OR_NULL, FLAG, PARTS, Rule, check_fields
from draftsmith.models.files.model_folder import openable_name
from draftsmith.models.files.tables import num_drafted, target_ids
from draftsmith.models.other_software.named_kinds import named_kind
from draftsmith.models.target.ends import TargetEnds

WHAT = "Medusa"
_TOKENS = "token_map"  # vLLM's draft vocabulary: the target id of each row
_RULES: dict[str, Rule] = {
    "medusa_num_heads": PARTS,
    "medusa_num_layers": PARTS,
    "num_heads": PARTS,
    "num_hidden_layers": PARTS,
    "hidden_size": COUNT,
    "vocab_size": COUNT,
    "truncated_vocab_size": COUNT_OR_NULL,
    "medusa_fc_bias": FLAG,
    "original_lm_head": FLAG,
}
_UNDERSTOOD = {*_RULES, "version", "max_paths", "medusa_choices", "topk"}  # the last three say how a tree is searched
# Our names, the official ones, and vLLM's own.
_BLOCK, _HEAD = "steps.blocks.{h}.{l}.linear.", "heads.{h}.weight"
_OFFICIAL_BLOCK, _OFFICIAL_HEAD = "{h}.{l}.linear.", "{h}.{L}.weight"
_VLLM_BLOCK, _VLLM_HEAD = re.compile(r"blocks\.(\d+)\.layers\.(\d+)\."), re.compile(r"lm_heads\.(\d+)\.")


def write(drafter: HeadsDrafter, folder: Path, ends: TargetEnds | None) -> tuple[str, ...]:
    """Write the layout into an existing folder, read it back and compare.

    Returns:
        what a user must know of the result.

    Raises:
        ValueError: the steps are no residual blocks over the target's state, or the target is needed and not at hand.
    """
    if drafter.config.network != "medusa":
        raise ValueError(
            f"this drafter's network is {drafter.config.network!r}, and Medusa's layout holds only 'medusa'; export it with --layout "
            "draftsmith"
        )
    own = written_out(drafter, ends, "Medusa's")
    config, tensors = own.config, tensors_of(own)
    fields: dict[str, Any] = {
        "model_type": "medusa",
        "architectures": ["MedusaModel"],
        "medusa_num_heads": config.num_draft_steps,
        "medusa_num_layers": config.num_blocks,
        "medusa_fc_bias": True,
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "base_model_name_or_path": config.target_name if ends is None else openable_name(ends.name),
        "version": "2",
        "torch_dtype": str(own.dtype).removeprefix("torch."),
    }
    notes = [
        "The official Medusa code decodes from `medusa_lm_head.pt`, a pickle, so convert `model.safetensors` for it."
    ]
    outside = {theirs: tensors[ours] for ours, theirs in _names(config).items()}
    if own.d2t is not None:
        fields["truncated_vocab_size"] = len(own.d2t)
        outside[_TOKENS] = target_ids(tensors["d2t"])
        notes.append(
            "Its draft vocabulary is vLLM's `token_map`. vLLM 0.32 stops with an error at it, and the official code does not know it: to "
            "serve these heads, train them with draft_vocab_size null."
        )
    write_files(folder, as_text(fields), outside)
    refuse_difference(own, read(read_fields(folder), read_tensors(folder), ends, str(folder)), folder)
    return tuple(notes)


def read(fields: Mapping[str, Any], tensors: Mapping[str, Tensor], ends: TargetEnds | None, where: str) -> HeadsDrafter:
    """A drafter from this layout; it knows no target yet beyond its sizes.

    Args:
        fields: of the config; sizes that it lacks follow from the tensors.
        tensors: of the checkpoint, under official names or vLLM's own.
        ends: the target's, whose vocabulary counts where the config does not give one.
        where: for messages.

    Raises:
        ValueError: a field breaks its rule, the tensors are not a Medusa's, its heads are not linear layers of its own, or it has
            biases and says that it has none.
    """
    given = {name: value for name, value in fields.items() if value is not None}
    check_fields(given, _RULES, f"{where}: {CONFIG}", "correct it by hand")
    if given.get("original_lm_head"):
        raise ValueError(f"{where} has original_lm_head, one head for all steps, which is not read; serve it with vLLM")
    named_heads = given.get("medusa_num_heads", given.get("num_heads"))
    num_blocks = given.get("medusa_num_layers", given.get("num_hidden_layers", 1))
    named = {_official(name, num_blocks): tensor for name, tensor in tensors.items() if name != _TOKENS}
    first_head = named.get(f"0.{num_blocks}.weight")
    if named_heads is None or first_head is None or first_head.ndim != 2:
        raise ValueError(
            f"{where} is no whole Medusa: it needs medusa_num_heads, and a tensor 0.{num_blocks}.weight behind {num_blocks} blocks of "
            "medusa_num_layers; get a whole checkpoint"
        )
    ids, size = tensors.get(_TOKENS), num_drafted(tensors, where, _TOKENS)
    vocab_size = given.get("vocab_size") or (len(first_head) if ends is None else ends.vocab_size)
    named_size = given.get("truncated_vocab_size", size)
    if named_size not in (size, vocab_size if ids is None else size):
        raise ValueError(
            f"{where}: {CONFIG} has truncated_vocab_size {named_size}, and the map {_TOKENS} has {size or 0} tokens; take both files of "
            "one export"
        )
    config = HeadsConfig(
        network="medusa",
        head="per_step",
        num_blocks=num_blocks,
        hidden_size=given.get("hidden_size") or first_head.shape[1],
        vocab_size=vocab_size,
        draft_vocab_size=size,
        num_draft_steps=_num_heads(named_heads, named, num_blocks, where),
    )
    names = {theirs: ours for ours, theirs in _names(config).items()}
    named |= _absent_biases(named, names, first_head)
    if ids is not None:
        named["d2t"], names["d2t"] = ids.to(torch.int64) - torch.arange(len(ids)), "d2t"
    module_table(HeadsDrafter, config, where).renamed(names).check(named, where)
    if given.get("medusa_fc_bias") is False and (kept := [name for name in _biases(named) if bool(named[name].any())]):
        raise ValueError(
            f"{where}: {CONFIG} has medusa_fc_bias false, and {kept[0]} is not zero: vLLM drops it, and Medusa's own code adds it; set "
            "medusa_fc_bias true, or take the biases out"
        )
    return assemble(HeadsDrafter, config, {names[name]: tensor for name, tensor in named.items()})


def _num_heads(named_heads: int, named: Collection[str], num_blocks: int, where: str) -> int:
    """How many heads a folder has. The config of public ones may name fewer than there are; Medusa's own code reads them all."""
    held = named_heads
    while f"{held}.{num_blocks}.weight" in named:
        held += 1
    if held > named_heads:
        warnings.warn(
            f"{where}: {CONFIG} names {named_heads} heads, and the weights hold {held}: all of them are read",
            stacklevel=2,
        )
    return held


def _absent_biases(named: Mapping[str, Tensor], names: Collection[str], head: Tensor) -> dict[str, Tensor]:
    """Zeros in place of all biases, under official names, where a folder has none."""
    if _biases(named):
        return {}
    return {name: torch.zeros(head.shape[1], dtype=head.dtype) for name in _biases(names)}


def _biases(names: Collection[str]) -> list[str]:
    return [name for name in names if name.endswith(".bias")]


def _names(config: HeadsConfig) -> dict[str, str]:
    """The official name of each of our tensors, but for the draft vocabulary."""
    names = {}
    for h in range(config.num_draft_steps):
        for block in range(config.num_blocks):
            for part in ("weight", "bias"):
                names[_BLOCK.format(h=h, l=block) + part] = _OFFICIAL_BLOCK.format(h=h, l=block) + part
        names[_HEAD.format(h=h)] = _OFFICIAL_HEAD.format(h=h, L=config.num_blocks)
    return names


def _official(name: str, num_blocks: int) -> str:
    """An official name as it is; vLLM's ``blocks.0.layers.1.weight`` -> ``0.1.linear.weight``, ``lm_heads.0.weight`` -> ``0.2.weight``."""
    bare = name.removeprefix("medusa_heads.").removeprefix("medusa_head.")
    return _VLLM_HEAD.sub(rf"\g<1>.{num_blocks}.", _VLLM_BLOCK.sub(r"\1.\2.linear.", bare))


def holds(fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bool:
    """Whether a folder is in this layout."""
    return named_kind(fields, tensors) == WHAT


def _commands(target: str, num_steps: int) -> str:
    return f"{vllm('medusa', target, num_steps)}\n\nvLLM 0.32 is the last release with Medusa; it drafts a chain."


LAYOUTS = (
    Layout(
        "medusa",
        write,
        "the layout of Medusa's official training, with an output head for each step. The target is named in `provenance.json`",
        LayoutReader("Medusa's", holds, read, understood=_UNDERSTOOD),
        _commands,
    ),
)

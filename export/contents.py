"""What lies in a drafter's folder, told from its files alone: the kind, whose layout, sizes, switches, and which target it names.

Owns how a folder is described. Every field may be somebody else's, so that a value is shown and nothing is concluded from it. Knows no
command; whether the drafter is whole is the readers' business.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from draftsmith import provenance
from draftsmith.models.drafters.other_layouts import layout_of, part_in, unknown_layout
from draftsmith.models.drafters.registry import registry
from draftsmith.models.files.adapter_files import BOND
from draftsmith.models.files.checkpoint_files import read_fields, read_tensors, weight_files
from draftsmith.models.files.tables import target_ids, vocabulary_faults
from draftsmith.models.lora.lora_adapter import read_bond
from draftsmith.models.other_software.named_kinds import NESTED, claims_known_head, named_kind
from draftsmith.models.other_software.speculators_config import SPECULATORS_KEY, proposed_tokens, verifier_name

# Fields that are shown where a config has them, each with the words for it.
_SHOWN = {
    "hidden_size": "hidden size",
    "target_hidden_size": "hidden size of the target",
    "vocab_size": "vocabulary",
    "intermediate_size": "MLP size",
    "num_attention_heads": "query heads",
    "num_key_value_heads": "key/value heads",
    "num_hidden_layers": "layers of its own",
    "exit_dim": "exit dimension",
    "num_draft_layers": "layers of its own",
    "head_norms": "norms of its heads",
    "block_size": "block size",
    "mask_token_id": "mask token",
    "layers": "reads",
    "eagle_aux_hidden_state_layer_ids": "reads outputs of blocks",
    "aux_hidden_state_layer_ids": "reads outputs of blocks",
    "target_layer_ids": "reads outputs of blocks (from 0)",
    "norm_before_residual": "norm_before_residual",
    "norm_before_fc": "norm_before_fc",
    "fc_norm": "fc_norm",
    "norm_output": "norm_output",
    "score_scale": "score scale",
}


@dataclass(frozen=True)
class Contents:
    """What a folder holds.

    Attributes:
        kind: what it is, such as ``EAGLE-3``.
        layout: whose layout it is in, in words.
        facts: names and values to show, in order.
        decodes: whether draftsmith decodes with it.
        needs_target: whether its target has to be named to read it.
    """

    kind: str
    layout: str
    facts: tuple[tuple[str, str], ...]
    decodes: bool
    needs_target: bool = False


def contents_of(folder: Path) -> Contents:
    """Describe a folder by its config and the names, shapes and dtypes of its tensors.

    Args:
        folder: of a drafter, of an adapter of one, or of a whole model.

    Returns:
        The description.

    Raises:
        ValueError: no config, no weights as safetensors, or a broken file.
    """
    if (folder / BOND).is_file():
        return Contents("adapter of a drafter", "draftsmith's", _adapter_facts(folder), decodes=True)
    fields = read_fields(folder)
    if not weight_files(folder) and any(folder.glob("*.safetensors")) and not claims_known_head(fields):
        return _whole_model(fields)
    tensors = read_tensors(folder)
    flat, facts = _flat(fields), _facts(folder, fields, tensors)
    model_type = fields.get("model_type")
    family = registry().get(model_type) if isinstance(model_type, str) else None
    if family is not None and "target_fingerprint" in fields:
        return Contents(family.about.title, "draftsmith's", facts, decodes=True)
    match, kind = layout_of(fields, tensors), named_kind(fields, tensors)
    package = "the speculators package's" if SPECULATORS_KEY in fields else ""
    if match is not None:
        family, layout = match
        return Contents(family.about.title, package or layout.software, facts, decodes=True, needs_target=True)
    if kind or package:
        title = kind or f"{fields[SPECULATORS_KEY]!r:.80}"
        return Contents(title, package or "its publisher's", facts, decodes=False)
    if claims_known_head(fields):
        raise ValueError(unknown_layout(folder, fields, tensors))
    if "hidden_size" not in flat:
        raise ValueError(
            f"{folder} holds no drafter that is known here (model_type {model_type!r:.80}); give the folder of a drafter"
        )
    return _whole_model(fields, tensors.keys())


def _whole_model(fields: Mapping[str, Any], tensors: Collection[str] = ()) -> Contents:
    """A causal LM, which decodes as a draft LM, and may hold a drafter of its own."""
    names = fields.get("architectures")
    architecture = ", ".join(map(str, names)) if isinstance(names, list) else ""
    facts = (("architecture", architecture), *_shown(_flat(fields)))
    if (part := part_in(tensors)) is not None:
        facts += (("drafter inside", f"{part[0].about.title}, for this model as the target"),)
    return Contents("whole model (a draft LM)", "Transformers'", facts, decodes=True)


def _flat(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The config's fields with those of the objects in it; a field at the top counts."""
    nested = [fields[name] for name in NESTED if isinstance(fields.get(name), dict)]
    own = {name: value for name, value in fields.items() if value is not None}
    return {name: value for place in nested for name, value in place.items()} | own


def _shown(flat: Mapping[str, Any]) -> list[tuple[str, str]]:
    # A ReDrafter counts the blocks before its head by that name.
    named = _SHOWN | ({"num_draft_layers": "residual blocks"} if "exit_dim" in flat else {})
    return [(words, str(flat[name])) for name, words in named.items() if flat.get(name) is not None]


def _facts(folder: Path, fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[tuple[str, str], ...]:
    """Tensors, config, vocabulary, embedding, target and draft length."""
    numbers = sum(tensor.numel() for tensor in tensors.values())
    dtypes = ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}))
    facts = [("tensors", f"{len(tensors)}, {numbers:,} numbers ({dtypes})"), *_shown(_flat(fields))]
    facts.append(("draft vocabulary", _vocabulary(_flat(fields), tensors)))
    facts.append(("embedding", "in the folder" if "embed_tokens.weight" in tensors else "the target's"))
    bias = tensors.get("fc.bias", tensors.get("fusion_fc.bias"))
    if bias is not None:
        facts.append(("fc.bias", "trained" if bool(bias.any()) else "zeros"))
    proposed = proposed_tokens(fields)
    if proposed is not None:
        facts.append(("tokens per draft", str(proposed)))
    return (*facts, ("target", _target(folder, fields)))


def _vocabulary(flat: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """How many of the target's tokens are drafted, and which ids."""
    size = flat.get("vocab_size")
    if "d2t" not in tensors:
        return "the whole vocabulary"
    if not isinstance(size, int) or tensors["d2t"].is_floating_point() or vocabulary_faults(tensors, size):
        return f"{tensors['d2t'].numel()} tokens, but d2t does not map to increasing token ids"
    ids = target_ids(tensors["d2t"])
    return f"{len(ids):,} of {size:,} tokens, ids {int(ids[0])} to {int(ids[-1])}"


def _target(folder: Path, fields: Mapping[str, Any]) -> str:
    """The target that the folder names: in its config, or in the record of the export that wrote it."""
    named = fields.get("target_name") or verifier_name(fields)
    if not named and (folder / provenance.FILE_NAME).is_file():
        config = provenance.read(folder).get("config", {})
        named = config.get("target_name") if isinstance(config, dict) else None
    return str(named) if named else "not named"


def _adapter_facts(folder: Path) -> tuple[tuple[str, str], ...]:
    bond = read_bond(folder)
    return (("drafter below", bond.drafter), ("target", bond.target_name or "not named"))

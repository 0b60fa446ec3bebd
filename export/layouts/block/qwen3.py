"""What the layouts of block drafters share: tensors under their public names, and the fields of a Qwen3 with a few layers.

Owns those names, and which tensors of the target come along: rows of its head for a draft vocabulary, and an embedding that is more than a
look-up. Knows no config of a single layout.

Shape legend: D hidden, V vocabulary, Vd draft vocabulary, r rank of a correction, S size of its state.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config

from draftsmith.export.layouts.embedding import NAME as EMBEDDING
from draftsmith.export.layouts.embedding import embedding_rows, is_plain, refuse_other_embedding
from draftsmith.export.layouts.llama import (
    SLIDING,
    layer_settings,
    llama_fields,
    qwen3_kinds,
    sliding_layers,
    with_qwen3_defaults,
)
from draftsmith.export.layouts.readback import tensors_of
from draftsmith.models.drafters.drafter_reader import assemble, module_table
from draftsmith.models.families.block.block_config import BlockConfig
from draftsmith.models.families.block.block_drafter import BlockDrafter
from draftsmith.models.files.tables import Table, TensorSpec, membership, target_ids
from draftsmith.models.target.ends import TargetEnds
from draftsmith.models.target.target import PRE_NORM

HEAD = "lm_head.weight"
# Our names of a correction's tensors and the public ones: DSpark's Markov heads, Domino's recurrent head and DFlash 2's selector.
_MARKOV = {
    "correction.tokens.weight": "markov_head.markov_w1.weight",
    "correction.output.weight": "markov_head.markov_w2.weight",
    "correction.gate_proj.weight": "markov_head.gate_proj.weight",
    "correction.gate_proj.bias": "markov_head.gate_proj.bias",
    "correction.joint_proj.weight": "markov_head.joint_proj.weight",
    "correction.joint_proj.bias": "markov_head.joint_proj.bias",
}
_DOMINO = {
    "correction.gru.weight_ih": "prefix_gru.weight_ih_l0",
    "correction.gru.weight_hh": "prefix_gru.weight_hh_l0",
    "correction.input.weight": "embed_proj.0.weight",
    "correction.output.weight": "embed_proj.2.weight",
}
_SELECTOR = {
    "correction.tokens.weight": "candidate_selector.predecessor_codebook",
    "correction.output.weight": "candidate_selector.successor_codebook",
    "correction.hidden_projection.weight": "candidate_selector.hidden_projection.weight",
}
MARKOV_TYPES = {"vanilla": "vanilla", "gated": "gated", "recurrent": "rnn"}
"""What DSpark's ``markov_head_type`` calls our corrections."""


def public_names(config: BlockConfig) -> dict[str, str]:
    """Our name of each tensor whose public name differs -> that name."""
    return {"gru": _DOMINO, "selector": _SELECTOR}.get(config.correction, _MARKOV)


def public_table(config: BlockConfig, where: str = "the config") -> Table:
    """Every tensor that a folder may hold: our module's under public names, and those of the target that come along."""
    names, specs = public_names(config), module_table(BlockDrafter, config, where).specs
    D, V, Vd = config.hidden_size, config.vocab_size, config.num_draft_tokens
    public = {names.get(name, name): spec for name, spec in specs.items()}
    # Both are the target's, whether they come along or not.
    public |= {EMBEDDING: TensorSpec((V, D), optional=True), HEAD: TensorSpec((Vd, D), optional=True)}
    if "d2t" in specs:
        public["t2d"] = TensorSpec((V,), "bool", optional=True)
    return Table("block drafter", V, public)


def refuse_learned_mask(config: BlockConfig) -> int:
    """The token whose embedding fills the slots behind the root.

    Raises:
        ValueError: the drafter has learned a vector for them.
    """
    if config.mask_token_id is None:
        raise ValueError(
            "this drafter learned a vector for the slots behind the root, and no engine reads one from safetensors; train it with "
            "mask_token_id, an unused token of the target, or serve it from --layout draftsmith or custom_generate"
        )
    return config.mask_token_id


def public_tensors(drafter: BlockDrafter, ends: TargetEnds | None, with_membership: bool) -> dict[str, Tensor]:
    """A drafter's tensors under public names, with the target's rows of a draft vocabulary.

    Args:
        drafter: that borrows the target's head.
        ends: the target's.
        with_membership: whether ``t2d`` comes beside ``d2t``.

    Raises:
        ValueError: a draft vocabulary without the target, whose rows belong into the folder; or a confidence head
            without a Markov head.
    """
    if drafter.config.confidence and drafter.config.correction not in MARKOV_TYPES:
        raise ValueError(
            f"this drafter has a confidence head and the correction {drafter.config.correction!r}, and engines read such a head beside "
            "a Markov head alone (dspark); serve it from --layout draftsmith or custom_generate, or train it with confidence false"
        )
    names = public_names(drafter.config)
    tensors = {names.get(name, name): tensor for name, tensor in tensors_of(drafter).items()}
    if "d2t" in tensors:
        if ends is None:
            raise ValueError(
                "engines want the target's rows of a draft vocabulary beside the drafter; add --target to copy them"
            )
        tensors[HEAD] = drafter.bound(ends).head_weight.detach().to(drafter.dtype).cpu().clone()
        if with_membership:
            tensors["t2d"] = membership(target_ids(tensors["d2t"]), drafter.config.vocab_size)
    public_table(drafter.config).check(tensors, "the drafter in memory")
    return tensors


def add_embedding(tensors: dict[str, Tensor], ends: TargetEnds | None, dtype: torch.dtype) -> list[str]:
    """Put the target's embedding beside a drafter's tensors where a look-up in the target's matrix would give something else.

    Returns:
        what a user must know of that.
    """
    if ends is None or is_plain(ends):
        return []
    tensors[EMBEDDING] = embedding_rows(ends).to(dtype)
    return [
        "The target computes more than a look-up for its embedding, so `embed_tokens` with the result is here. Engines that look tokens up "
        "in the target's bare matrix draft with another embedding than the one of training."
    ]


def last_block_note(config: BlockConfig) -> list[str]:
    """What a user must know where the last block's output is read."""
    if PRE_NORM not in config.layers:
        return []
    return [
        "It reads the last block's output before the final norm, which vLLM captures. The official code takes that state after the norm, "
        "with which this drafter was not trained."
    ]


def qwen3_fields(config: BlockConfig, dtype: torch.dtype, ends: TargetEnds | None) -> dict[str, Any]:
    """The layers as the fields of a Qwen3's ``config.json``."""
    fields = llama_fields(config, dtype, ends)
    del fields["mlp_bias"]
    layers = config.num_draft_layers
    kinds = [SLIDING if layer in config.sliding_layers else "full_attention" for layer in range(layers)]
    own = {"model_type": "qwen3", "num_hidden_layers": layers, "layer_types": kinds}
    window = config.sliding_window
    return fields | own | {"use_sliding_window": window is not None, "sliding_window": window}


def qwen3_settings(fields: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The keyword arguments of :class:`BlockConfig` that the fields of a Qwen3 stand for. What they leave out is Qwen3's default.

    Raises:
        ValueError: a size is missing, a field breaks its rule, or the layers compute what ours do not.
    """
    whole = {"num_hidden_layers": Qwen3Config().num_hidden_layers} | with_qwen3_defaults(fields)
    settings = layer_settings(whole, where, understood=("num_hidden_layers", "layer_types", "attention_bias"))
    settings |= {
        "num_draft_layers": int(whole["num_hidden_layers"]),
        "attention_bias": bool(whole.get("attention_bias")),
    }
    return settings | _windows(whole, where)


def _windows(fields: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The keyword arguments of :class:`BlockConfig` about sliding windows.

    Raises:
        ValueError: a field breaks its rule, or they contradict each other.
    """
    count = int(fields["num_hidden_layers"])
    kinds = qwen3_kinds(fields, count, where)
    if SLIDING in kinds and len(kinds) != count:
        raise ValueError(f"{where} has {len(kinds)} layer_types and num_hidden_layers {count}; correct one of the two")
    window, layers = sliding_layers(fields, kinds, where)
    return {} if window is None else {"sliding_window": window, "sliding_layers": layers}


def assembled(config: BlockConfig, tensors: Mapping[str, Tensor], ends: TargetEnds | None, where: str) -> BlockDrafter:
    """A drafter of tensors under public names, whose copies of the target's tensors must be the target's.

    Args:
        config: with the sizes.
        tensors: by public name.
        ends: the target's; without them, copies are not looked at.
        where: for messages.

    Raises:
        ValueError: the tensors are not the table's, or a head or embedding is not the target's.
    """
    public_table(config, where).check(tensors, where)
    ours = {theirs: name for name, theirs in public_names(config).items()}
    kept = {ours.get(name, name): tensor for name, tensor in tensors.items() if name not in ("t2d", HEAD, EMBEDDING)}
    drafter = assemble(BlockDrafter, config, kept)
    drafter.loaded_from = Path(where)  # errors name it
    if ends is None:
        return drafter
    if EMBEDDING in tensors:
        refuse_other_embedding(tensors[EMBEDDING], ends, where)
    if HEAD in tensors:
        rows, stored = drafter.bound(ends).head_weight.detach().cpu(), tensors[HEAD]
        if not torch.equal(rows.to(stored.dtype), stored):
            raise ValueError(
                f"{where}: {HEAD} differs from the head of {ends.name!r}; name the target that the drafter was made for. Block drafters "
                "with a head of their own cannot be read"
            )
    return drafter

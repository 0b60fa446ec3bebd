"""MTP heads on disk: the tensors of a target's own multi-token prediction layer, under the names of its checkpoint.

Owns the names of three styles. A style also says how the layer computes, which its tensors do not show. Sizes and rotary settings are the
target's. Loading a target skips these tensors. Knows nothing of cards and commands.

Shape legend: D hidden, V vocabulary, H heads, Dh head size, L blocks of the target.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from draftsmith.export.layouts.layout import Layout, LayoutReader
from draftsmith.export.layouts.readback import refuse_difference, tensors_of
from draftsmith.models.drafters.drafter_reader import assemble, module_table
from draftsmith.models.families.eagle_config import layer_fields
from draftsmith.models.families.riders.mtp import MtpConfig, MtpHead
from draftsmith.models.files.checkpoint_files import (
    CONFIG,
    StoredTensors,
    as_text,
    mtp_beginnings,
    read_fields,
    write_files,
)
from draftsmith.models.files.field_rules import COUNT, Rule, check_fields
from draftsmith.models.target.ends import TargetEnds

WHAT = "MTP head"
_RULES: dict[str, Rule] = {
    "hidden_size": COUNT,
    "vocab_size": COUNT,
    "num_nextn_predict_layers": (lambda value: value == 1, f"1, since an {WHAT} has one layer"),
}
_GATE = "layers.0.self_attn.gate_proj.weight"
_QUERIES = "layers.0.self_attn.q_proj.weight"
# Parts of names that tell of a layer that is not dense, each with the fields of the target's config that go with it.
_OTHER_LAYERS = {
    "experts": "experts (n_routed_experts, num_experts)",
    "mlp.gate.": "experts (n_routed_experts, num_experts)",
    "kv_a_proj": "latent attention (kv_lora_rank)",
    "q_a_proj": "latent attention (q_lora_rank)",
    "linear_attn": "linear attention (layer_types)",
    **dict.fromkeys(
        ("_scale", ".scales", "qweight", "qzeros", "weight_packed", "g_idx", "absmax", "quant_map"),
        "quantised weights (quantization_config)",
    ),
}


@dataclass(frozen=True)
class Style:
    """How one line of models names an MTP layer, and how it computes.

    Attributes:
        written: the beginning of every name as it is written; ``{L}`` stands for the number of the target's blocks.
        parts: our names -> theirs behind the prefix; the decoder layer's own names are Llama's.
        layer: what stands before the names of the decoder layer.
        switches: of the config.
        copies: of the target's own embedding and head, which some checkpoints hold once more.
    """

    written: str
    parts: Mapping[str, str]
    layer: str = ""
    switches: Mapping[str, bool] = field(default_factory=dict)
    copies: Collection[str] = ()


STYLES = {
    "DeepSeek's": Style(
        "model.layers.{L}.",
        {"enorm": "enorm", "hnorm": "hnorm", "eh_proj": "eh_proj", "norm": "shared_head.norm"},
        switches={"state_first": False, "reads_normed": True, "feeds_normed": False},
        copies=("embed_tokens.weight", "shared_head.head.weight"),
    ),
    "MiMo's": Style(
        "model.mtp_layers.0.",
        {"enorm": "token_layernorm", "hnorm": "hidden_layernorm", "eh_proj": "input_proj", "norm": "final_layernorm"},
        switches={"state_first": True, "reads_normed": False, "feeds_normed": True},
    ),
    "Qwen's": Style(
        "mtp.",
        {"enorm": "pre_fc_norm_embedding", "hnorm": "pre_fc_norm_hidden", "eh_proj": "fc", "norm": "norm"},
        layer="layers.0.",
        switches={"state_first": False, "reads_normed": True, "feeds_normed": True},
        copies=("embed_tokens.weight",),
    ),
}


def style_of(names: Collection[str]) -> tuple[str, str] | None:
    """Find an MTP layer among names of tensors.

    Args:
        names: of all tensors of a checkpoint.

    Returns:
        The name of the style, and the beginning of the names of its first layer; None where there is no such layer.
    """
    return next(((title, beginnings[0]) for title, beginnings in mtp_beginnings(names).items()), None)


def read(fields: Mapping[str, Any], tensors: Mapping[str, Tensor], ends: TargetEnds | None, where: str) -> MtpHead:
    """A drafter from the tensors of a target's checkpoint, or from a folder that holds no others; it knows no target yet.

    Args:
        fields: of the config. The layer's sizes are the target's, and a folder without a target must not name others.
        tensors: by name; only those of the MTP layer are read.
        ends: the target's.
        where: for messages.

    Raises:
        ValueError: no ends; a folder for a target of other sizes; more than one layer; a layer that is not dense; tensors that are
            missing, unknown or misshapen; or copies of embedding and head that are not the target's.
    """
    place = style_of(tensors.keys())
    if ends is None or place is None:
        raise ValueError(f"{where}: the sizes of an {WHAT} are its target's; name the target")
    title, beginning = place
    style = STYLES[title]
    if not in_target(tensors.keys()):
        _check_sizes(fields, beginning, ends, where)
    _check_one_layer(tensors, mtp_beginnings(tensors)[title], where)
    own = {name[len(beginning) :]: tensors[name] for name in tensors if name.startswith(beginning)}
    _refuse_copies(own, style, ends, where)
    named = _our_names(own, style)
    config = MtpConfig(**layer_fields(ends), num_draft_steps=1, **_switches(named, style, ends))
    if config.gated_attention and named[_QUERIES].shape[0] % (2 * config.head_dim) == 0:
        named[_QUERIES], named[_GATE] = _halves(named[_QUERIES], config.head_dim)
    table = module_table(MtpHead, config, where)
    table.renamed({_outside(name, style, beginning): name for name in table.specs}).check(
        {_outside(name, style, beginning): tensor for name, tensor in named.items()}, where
    )
    return assemble(MtpHead, config, named)


def _check_sizes(fields: Mapping[str, Any], beginning: str, ends: TargetEnds, where: str) -> None:
    """Check what a folder without its target says of the target.

    Raises:
        ValueError: a field breaks its rule, or is of another target, as is the number in the names of the tensors.
    """
    given = {name: value for name, value in fields.items() if value is not None}
    check_fields(given, _RULES, f"{where}: {CONFIG}", "correct it by hand")
    wanted = {"hidden_size": ends.hidden_size, "vocab_size": ends.vocab_size}
    for name, size in wanted.items():
        if given.get(name, size) != size:
            raise ValueError(
                f"{where}: {CONFIG} has {name} {given[name]}, and {ends.name!r} has {size}; name the target that the layer was made for"
            )
    number, depth = re.search(r"layers\.(\d+)\.$", beginning), ends.config.num_hidden_layers
    if number is not None and "mtp" not in beginning and int(number[1]) != depth:
        raise ValueError(
            f"{where}: {beginning} is the MTP layer of a target of {number[1]} layers, and {ends.name!r} has {depth}; name the target that "
            "the layer was made for"
        )


def _check_one_layer(tensors: Mapping[str, Tensor], beginnings: list[str], where: str) -> None:
    """Refuse several layers, and layers of other kinds, by the names of their tensors.

    Raises:
        ValueError: naming a tensor.
    """
    beginning = beginnings[0]
    own = [name for name in tensors if name.startswith(beginning)]
    further = [name for name in own if re.match(r"layers\.[1-9]", name[len(beginning) :])]
    if len(beginnings) > 1 or further:
        raise ValueError(
            f"{where} holds several MTP layers ({(beginnings + further)[1]}; num_nextn_predict_layers, mtp_num_hidden_layers), and a "
            f"{WHAT} has one; train a new one"
        )
    for name in own:
        for part, kind in _OTHER_LAYERS.items():
            if part in name:
                raise ValueError(
                    f"{where}: the MTP layer has {kind}, as {name} shows, and a {WHAT} is a dense layer with ordinary attention; train "
                    "a new one for this target"
                )


def _refuse_copies(own: dict[str, Tensor], style: Style, ends: TargetEnds, where: str) -> None:
    """Take copies of the target's embedding and head away.

    Raises:
        ValueError: they are not the target's.
    """
    embedding = dict(ends.embedding.named_parameters())["weight"]
    for name in style.copies:
        copy = own.pop(name, None)
        weight = embedding if name.startswith("embed") else ends.head_weight
        if copy is not None and not _is_same(copy, weight.detach().cpu()):
            raise ValueError(f"{where}: {name} of the MTP layer is not the target's, and a {WHAT} shares the target's")


def _is_same(copy: Tensor, weight: Tensor) -> bool:
    """Whether a copy holds the target's numbers; either may have been rounded to the other's dtype."""
    if copy.shape != weight.shape:
        return False
    return any(torch.equal(copy.to(dtype), weight.to(dtype)) for dtype in (weight.dtype, copy.dtype))


def _our_names(own: Mapping[str, Tensor], style: Style) -> dict[str, Tensor]:
    """Their names behind the prefix to ours; what no style knows keeps its name, and the table refuses it."""
    parts = {f"{theirs}.weight": f"{ours}.weight" for ours, theirs in style.parts.items()}
    return {parts.get(name, f"layers.0.{name.removeprefix(style.layer)}"): tensor for name, tensor in own.items()}


def _outside(name: str, style: Style, beginning: str) -> str:
    """Our name of a tensor to theirs in a file."""
    parts = {f"{ours}.weight": f"{theirs}.weight" for ours, theirs in style.parts.items()}
    return beginning + parts.get(name, style.layer + name.removeprefix("layers.0."))


def _switches(named: Mapping[str, Tensor], style: Style, ends: TargetEnds) -> dict[str, Any]:
    """What the style, the tensors and the target's config say of the layer."""
    sizes = layer_fields(ends)
    queries = named.get(_QUERIES)
    width = sizes["num_attention_heads"] * sizes["head_dim"]
    return {
        **style.switches,
        "attention_bias": "layers.0.self_attn.q_proj.bias" in named,
        "head_norms": "layers.0.self_attn.q_norm.weight" in named,
        "gated_attention": queries is not None and queries.shape[:1] == (2 * width,),
        "zero_centred_norms": _has_zero_centred_norms(ends),
        "rotary_dim": _rotary_dim(ends, sizes["head_dim"]),
    }


def _rotary_dim(ends: TargetEnds, head_dim: int) -> int | None:
    """R, where the target rotates a part of each head."""
    rope = getattr(ends.config, "rope_parameters", None) or {}
    share = rope.get("partial_rotary_factor") or getattr(ends.config, "partial_rotary_factor", None) or 1.0
    return None if share == 1.0 else int(head_dim * share)


@torch.no_grad()
def _has_zero_centred_norms(ends: TargetEnds) -> bool:
    """Whether the target's final norm multiplies by 1 + weight: of ones, a norm makes what it multiplies by."""
    weight = getattr(ends.norm, "weight", None)
    if weight is None:
        return False
    factors = ends.final_norm(torch.ones(ends.hidden_size, device=ends.device, dtype=ends.dtype)).float()
    weight = weight.float().to(factors.device)
    return bool((factors - 1.0 - weight).abs().mean() < (factors - weight).abs().mean())


def _halves(queries: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Rows of queries and of gates, which the checkpoint has side by side in every head: [2 H Dh, D] -> [H Dh, D] each."""
    both = queries.unflatten(0, (-1, 2, head_dim))
    return both[:, 0].flatten(0, 1).contiguous(), both[:, 1].flatten(0, 1).contiguous()


def write(drafter: MtpHead, folder: Path, ends: TargetEnds | None) -> tuple[str, ...]:
    """Write the tensors under the names of a target's checkpoint, read them back and compare.

    Returns:
        what a user must know of the result.

    Raises:
        ValueError: no target is at hand; or no style computes as this drafter does, or can say what it has.
    """
    if ends is None:
        raise ValueError("the mtp layout has the names and sizes of the target's checkpoint; add --target")
    config = drafter.config
    title = _style_for(drafter, ends)
    style = STYLES[title]
    tensors = tensors_of(drafter)
    if config.gated_attention:
        gates = tensors.pop(_GATE).unflatten(0, (-1, 1, config.head_dim))
        queries = tensors[_QUERIES].unflatten(0, (-1, 1, config.head_dim))
        tensors[_QUERIES] = torch.cat([queries, gates], dim=1).flatten(0, 2)
    beginning = style.written.format(L=ends.config.num_hidden_layers)
    outside = {_outside(name, style, beginning): tensor for name, tensor in tensors.items()}
    fields = {"hidden_size": config.hidden_size, "vocab_size": config.vocab_size, "num_nextn_predict_layers": 1}
    write_files(folder, as_text(fields | {"torch_dtype": str(drafter.dtype).removeprefix("torch.")}), outside)
    refuse_difference(drafter, read(read_fields(folder), StoredTensors(folder), ends, str(folder)), folder)
    return (
        f"The names are {title}: `{beginning}`. An engine takes an MTP layer from the target's own folder, so these tensors have to take "
        "the place of those there. vLLM 0.32 decoded with MiMo's names; no engine was tried with the others.",
    )


def _style_for(drafter: MtpHead, ends: TargetEnds) -> str:
    """The style whose layer computes as this drafter does.

    Raises:
        ValueError: there is none, or the drafter has what no checkpoint can say.
    """
    config = drafter.config
    remedy = "export it with --layout draftsmith"
    if drafter.d2t is not None or config.sliding_window is not None or config.bias:
        name = "draft_vocab_size" if drafter.d2t is not None else "sliding_window" if config.sliding_window else "bias"
        raise ValueError(f"this drafter has {name}, which the checkpoint of a target cannot say; {remedy}")
    of_target = {
        "zero_centred_norms": _has_zero_centred_norms(ends),
        "rotary_dim": _rotary_dim(ends, config.head_dim),
    }
    for name, value in of_target.items():
        if getattr(config, name) != value:
            raise ValueError(
                f"this drafter has {name} {getattr(config, name)}, and the target's own layers have {value}; {remedy}"
            )
    for title, style in STYLES.items():
        if all(getattr(config, name) == value for name, value in style.switches.items()):
            return title
    raise ValueError(
        f"this drafter has state_first {config.state_first}, reads_normed {config.reads_normed} and feeds_normed {config.feeds_normed}, "
        f"which no known checkpoint has together; {remedy}"
    )


def holds(fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bool:
    """Whether a folder holds an MTP layer alone, and no target around it."""
    place = style_of(tensors.keys())
    return place is not None and all(name.startswith(place[1]) for name in tensors)


def in_target(names: Collection[str]) -> bool:
    """Whether a checkpoint holds an MTP layer beside a whole model."""
    place = style_of(names)
    return place is not None and not all(name.startswith(place[1]) for name in names)


LAYOUTS = (
    Layout(
        "mtp",
        write,
        "the MTP layer under the names of its target's checkpoint. Embedding and head are the target's. The target is named in "
        "`provenance.json`",
        LayoutReader("a target's", holds, read, in_target),
        whole_vocabulary=True,
    ),
)

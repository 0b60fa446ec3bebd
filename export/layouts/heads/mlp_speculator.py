"""The MLP speculator on disk: the layout of IBM's fms-extras.

Owns its names and config fields. Every step has an embedding, a projection, a norm and a head. Where steps share them, the files hold
copies. Knows nothing of cards and commands.

Shape legend: D hidden (``emb_dim``), I inner (``inner_dim``), V vocabulary, K steps (``n_predict``).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from draftsmith.export.layouts.heads.own_heads import written_out
from draftsmith.export.layouts.layout import Layout, LayoutReader
from draftsmith.export.layouts.readback import refuse_difference, tensors_of
from draftsmith.models.drafters.drafter_reader import assemble, module_table
from draftsmith.models.families.heads import HeadsConfig, HeadsDrafter
from draftsmith.models.files.checkpoint_files import CONFIG, as_text, read_fields, read_tensors, write_files
from draftsmith.models.files.field_rules import COUNT, COUNT_OR_ZERO, FLAG, PARTS, Rule, check_fields
from draftsmith.models.other_software.named_kinds import named_kind
from draftsmith.models.target.ends import TargetEnds

WHAT = "MLP speculator"
_RULES: dict[str, Rule] = {
    "emb_dim": COUNT,
    "inner_dim": COUNT_OR_ZERO,
    "n_predict": PARTS,
    "vocab_size": COUNT,
    "tie_weights": FLAG,
    "scale_input": FLAG,
}
_REQUIRED = ("emb_dim", "n_predict", "vocab_size")
_UNDERSTOOD = {*_RULES, "n_candidates", "top_k_tokens_per_head"}  # the last two say how a tree is searched
_CANDIDATES = (5, 4, 3)  # of the first steps in the authors' beams; later ones have as many as the last


def write(drafter: HeadsDrafter, folder: Path, ends: TargetEnds | None) -> tuple[str, ...]:
    """Write the layout into an existing folder, read it back and compare.

    Returns:
        what a user must know of the result.

    Raises:
        ValueError: another network, a draft vocabulary, which the layout cannot express, or the target is needed and not at hand.
    """
    config = drafter.config
    if config.network != "mlp":
        raise ValueError(
            f"this drafter's network is {config.network!r}, and the MLP speculator's layout holds only 'mlp'; export it with --layout "
            "draftsmith"
        )
    if drafter.d2t is not None:
        raise ValueError(
            f"this drafter has a draft vocabulary of {config.draft_vocab_size} of {config.vocab_size} tokens, which the MLP speculator's "
            "layout cannot express; export it with --layout draftsmith, or train it with draft_vocab_size null"
        )
    own, tied = _as_stored(drafter, ends)
    num_steps = config.num_draft_steps
    fields = {
        "model_type": "mlp_speculator",
        "architectures": ["MLPSpeculatorPreTrainedModel"],
        "emb_dim": config.hidden_size,
        "inner_dim": config.inner_size,
        "n_predict": num_steps,
        "n_candidates": _CANDIDATES[0],
        "top_k_tokens_per_head": [_CANDIDATES[min(step, len(_CANDIDATES) - 1)] for step in range(num_steps)],
        "vocab_size": config.vocab_size,
        "tie_weights": tied,
        "scale_input": config.scale_input,
        "torch_dtype": str(own.dtype).removeprefix("torch."),
    }
    tensors = tensors_of(own)
    # Each copy is a tensor of its own: safetensors holds no shared ones.
    outside = {theirs: tensors[ours].clone() for theirs, ours in _names(own.config).items()}
    write_files(folder, as_text(fields), outside)
    refuse_difference(own, read(read_fields(folder), read_tensors(folder), ends, str(folder)), folder)
    return (
        "No current engine serves an MLP speculator; fms-extras and Arctic Inference's plugin for vLLM read this layout.",
    )


def _as_stored(drafter: HeadsDrafter, ends: TargetEnds | None) -> tuple[HeadsDrafter, bool]:
    """The drafter in the form that the layout holds, and whether its steps are tied there: one head for all, or one for each."""
    config = drafter.config
    if config.tied and config.head == "shared" and not config.rank and config.prefix_layer is None:
        return drafter, True
    own = written_out(drafter, ends, "the MLP speculator's")
    if not own.config.tied:
        return own, False
    untied = HeadsConfig.from_dict(own.config.to_dict() | {"tied": False})
    tensors = tensors_of(own)
    apart = {
        ours: tensors[name] for ours, name in zip(_names(untied).values(), _names(own.config).values(), strict=True)
    }
    return assemble(HeadsDrafter, untied, apart), False


def read(fields: Mapping[str, Any], tensors: Mapping[str, Tensor], ends: TargetEnds | None, where: str) -> HeadsDrafter:
    """A drafter from this layout; it knows no target yet beyond its sizes.

    Args:
        fields: of the config.
        tensors: of the checkpoint.
        ends: the target's, not looked at.
        where: for messages.

    Raises:
        ValueError: a field is missing or breaks its rule, a tensor is there twice, the tensors are not an MLP
            speculator's, or tied ones differ.
    """
    fields = {name: value for name, value in fields.items() if value is not None}
    check_fields(fields, _RULES, f"{where}: {CONFIG}", "correct it by hand", required=_REQUIRED)
    tied = fields.get("tie_weights", False)
    config = HeadsConfig(
        network="mlp",
        head="shared" if tied else "per_step",
        tied=tied,
        scale_input=fields.get("scale_input", False),
        hidden_size=fields["emb_dim"],
        inner_size=fields.get("inner_dim") or fields["emb_dim"],
        vocab_size=fields["vocab_size"],
        num_draft_steps=fields["n_predict"],
    )
    names = _names(config)
    public: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        whole = f"speculator.{name.removeprefix('speculator.')}"
        if whole in public:
            raise ValueError(
                f"{where} holds {whole} twice, with and without the prefix 'speculator.'; delete the tensor that does not count"
            )
        public[whole] = tensor
    module_table(HeadsDrafter, config, where).renamed(names, public).check(public, where)
    named = {names[name]: tensor for name, tensor in public.items()}
    for name, tensor in public.items():
        if not torch.equal(tensor, named[names[name]]):
            raise ValueError(
                f"{where} has tie_weights true, but {name} differs from other steps'; set tie_weights false"
            )
    return assemble(HeadsDrafter, config, named)


def _names(config: HeadsConfig) -> dict[str, str]:
    """The layout's name of each tensor of each step -> our name of the one that the step uses."""
    names = {}
    for step in range(config.num_draft_steps):
        own = 0 if config.tied else step
        names[f"speculator.emb.{step}.weight"] = f"steps.emb.{own}.weight"
        names[f"speculator.proj.{step}.weight"] = f"steps.proj.{min(step, 1) if config.tied else step}.weight"
        for part in ("weight", "bias"):
            names[f"speculator.ln.{step}.{part}"] = f"steps.ln.{own}.{part}"
        names[f"speculator.head.{step}.weight"] = f"heads.{step if config.head == 'per_step' else 0}.weight"
    return names


def holds(fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bool:
    """Whether a folder is in this layout."""
    return named_kind(fields, tensors) == WHAT


LAYOUTS = (
    Layout(
        "mlp_speculator",
        write,
        "the layout of the MLP speculator in fms-extras, with every step's tensors. The target is named in `provenance.json`",
        LayoutReader("the MLP speculator's", holds, read, understood=_UNDERSTOOD),
    ),
)

"""EAGLE-3 on disk: the common layout of vLLM, SGLang and the official code, and the one of TensorRT-LLM.

Owns their tables and config fields. Layers whose heads are normalised are those of a Qwen3. TensorRT-LLM's layout differs by what it leaves
out: ``t2d``, and the embedding. A P-EAGLE has vLLM's layout of one: EAGLE-3's with the learned state and the token of its masks. Knows
nothing of cards and commands.

Shape legend: D hidden, V vocabulary, Vd draft vocabulary, n fused layers.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from draftsmith.export.layouts.embedding import NAME as EMBEDDING
from draftsmith.export.layouts.embedding import embedding_rows, is_plain, num_other_rows, refuse_other_embedding
from draftsmith.export.layouts.layer_ids import KEY, block_counts, id_fields, layer_names, read_counts
from draftsmith.export.layouts.layout import Layout, LayoutReader
from draftsmith.export.layouts.llama import (
    LAYER_FIELDS,
    has_own_head,
    layer_settings,
    llama_fields,
    qwen3_kinds,
    sliding_layers,
    warn_of_idle_window,
    with_qwen3_defaults,
)
from draftsmith.export.layouts.readback import refuse_difference, tensors_of
from draftsmith.export.layouts.serving import sglang, vllm
from draftsmith.models.drafters.drafter_reader import assemble, module_table
from draftsmith.models.families.eagle3 import SWITCHES, Eagle3, Eagle3Config
from draftsmith.models.files.checkpoint_files import CONFIG, as_text, read_fields, read_tensors, write_files
from draftsmith.models.files.field_rules import TOKEN_OR_NULL, check_fields
from draftsmith.models.files.tables import Table, TensorSpec, membership, regular_maps, target_ids
from draftsmith.models.other_software.named_kinds import named_kind
from draftsmith.models.other_software.speculators_config import SPECULATORS_KEY
from draftsmith.models.target.ends import TargetEnds
from draftsmith.models.target.target import PRE_NORM

WHAT, MASK, HEAD = "EAGLE-3", "mask_hidden", "lm_head.weight"
LLAMA, QWEN3 = "llama", "qwen3"
# Of a P-EAGLE too: vLLM puts "Eagle3" before names that neither begin nor end with it, and knows no class called so.
_ARCHITECTURES = {LLAMA: "LlamaForCausalLMEagle3", QWEN3: "Eagle3Qwen3ForCausalLM"}
_HEAD_NORM = ".self_attn.q_norm.weight"
LAYER, OTHER_LAYER = "midlayer", "layers.0"
_MASK_TOKENS = ("mask_token_id", "pard_token", "ptd_token_id")
# What ModelOpt's config says of a head, and what ours is: another value means another computation.
_FIXED: dict[str, tuple[Any, ...]] = {
    "use_aux_hidden_state": (True,),
    "use_input_layernorm_in_first_layer": (True,),
    "use_last_layernorm": (True,),
    "use_mtp_layernorm": (False,),
    "next_layer_regular": (True,),
    "parallel_draft_step": (0, 1),
}
_IN_TENSORS = ("embed_requires_grad", "has_lm_head", "num_aux_hidden_states", "parallel_draft_heads_num_layers")
UNDERSTOOD = frozenset({*LAYER_FIELDS, KEY, *_MASK_TOKENS, *_FIXED, *_IN_TENSORS})
"""The fields of a config that :func:`read` knows."""


def engine_table(config: Eagle3Config, layer: str = LAYER, where: str = "the config") -> Table:
    """Every tensor that engines and the official code know: our module's, its first layer under either name, and a few more."""
    own = module_table(Eagle3, config, where).specs
    specs = {name.replace(f"{LAYER}.", f"{layer}.", 1): spec for name, spec in own.items()}
    specs.setdefault(EMBEDDING, TensorSpec((config.vocab_size, config.hidden_size), optional=True))
    if "d2t" in specs:
        specs["t2d"] = TensorSpec((config.vocab_size,), "bool", optional=True)
    return Table(WHAT, config.vocab_size, specs)


def write(drafter: Eagle3, folder: Path, ends: TargetEnds | None) -> tuple[str, ...]:
    """Write the common layout into an existing folder, read it back and compare.

    Returns:
        what a user must know of the result.

    Raises:
        ValueError: the drafter does not fit its table, or reads layers that no engine's setting can name.
    """
    refuse_parallel(drafter.config)
    return _write_common(drafter, folder, ends)


def write_parallel(drafter: Eagle3, folder: Path, ends: TargetEnds | None) -> tuple[str, ...]:
    """As :func:`write`, a P-EAGLE.

    Raises:
        ValueError: as there; or the drafter is an ordinary EAGLE-3.
    """
    if not drafter.config.parallel:
        raise ValueError("this drafter is no P-EAGLE (mask_token_id), which --layout peagle holds; use --layout eagle3")
    return _write_common(drafter, folder, ends)


def _write_common(drafter: Eagle3, folder: Path, ends: TargetEnds | None) -> tuple[str, ...]:
    config, notes = drafter.config, list[str]()
    tensors = with_membership(tensors_of(drafter), config.vocab_size)
    seen = "" if config.head_norms else " vLLM 0.32 decodes with it."
    if config.own_embedding:
        notes.append(f"Its embedding is its own (`embed_tokens`).{seen}")
    elif ends is not None and not is_plain(ends):
        tensors[EMBEDDING] = embedding_rows(ends).to(drafter.dtype)
        notes.append(
            "The target computes more than a look-up for its embedding, so `embed_tokens` with the result is here. vLLM reads it; SGLang "
            "takes the target's bare matrix. A constant factor makes no difference behind the drafter's own norm."
        )
    if config.norm_before_residual:
        notes.append(
            "Its residual is the normalised state (`norm_before_residual`). vLLM computes that; SGLang and the official code do not."
        )
    notes += attention_notes(config)
    if config.num_draft_layers > 1:
        notes.append(f"It has {config.num_draft_layers} layers. SGLang's EAGLE-3 has one.{seen}")
    if PRE_NORM in config.layers:
        tried = "no engine was tried" if config.head_norms else "vLLM 0.32 decodes with it; no other engine was tried"
        notes.append(f"It reads the last block's output; {tried}.")
    _write(drafter, folder, ends, tensors)
    return tuple(notes)


def attention_notes(config: Eagle3Config) -> list[str]:
    """What a user must know of engines where the layers' attention has more than Llama's.

    Args:
        config: of the drafter.
    """
    if config.head_norms and config.attention_bias:
        return [
            "Its attention is Qwen3's, with norms of its heads and biases. vLLM's class for it has no bias of `o_proj`, and no engine was "
            "tried with it."
        ]
    if config.head_norms:
        return [
            "Its attention is Qwen3's, with norms of its heads. vLLM has a class for it; SGLang's EAGLE-3 is Llama's, and no engine was "
            "tried with it."
        ]
    if config.attention_bias:
        return ["Its attention has biases. SGLang's EAGLE-3 has none, and vLLM 0.32 decodes with them."]
    return []


def write_tensorrt(drafter: Eagle3, folder: Path, ends: TargetEnds | None) -> tuple[str, ...]:
    """Write TensorRT-LLM's variant into an existing folder, read it back and compare; see :func:`write`.

    Raises:
        ValueError: as there; or a switch of EAGLE-3.1 is on, attention has biases or norms of its heads, or there are several layers or
            an embedding of its own, none of which TensorRT-LLM reads.
    """
    refuse_parallel(drafter.config)
    config = drafter.config
    others = config.switches | {
        "attention_bias": config.attention_bias,
        "head_norms": config.head_norms,
        "several layers": config.num_draft_layers > 1,
        "an embedding of its own": config.own_embedding,
    }
    if on := [name for name, value in others.items() if value]:
        raise ValueError(
            f"this drafter has {', '.join(on)}, which TensorRT-LLM does not read; export it with --layout eagle3 for vLLM"
        )
    _write(drafter, folder, ends, tensors_of(drafter))
    counts = block_counts(drafter.config.layers, num_layers(ends))
    captured = ", ".join(str(count - 1) for count in counts)
    return (f"TensorRT-LLM needs the layers to capture from you: `eagle3_layers_to_capture={{{captured}}}`.",)


def refuse_parallel(config: Eagle3Config) -> None:
    """Refuse a P-EAGLE, which engines would draft with step by step.

    Raises:
        ValueError: it is one.
    """
    if config.parallel:
        raise ValueError(
            "this drafter is a P-EAGLE (mask_token_id), which the layouts of EAGLE-3 do not hold; use --layout peagle or speculators"
        )


def _write(drafter: Eagle3, folder: Path, ends: TargetEnds | None, tensors: dict[str, Tensor]) -> None:
    config = drafter.config
    layers = decoder_fields(config, drafter.dtype, ends)
    fields = {"architectures": [_ARCHITECTURES[layers["model_type"]]], **layers}
    fields["draft_vocab_size"] = len(tensors[HEAD])
    fields |= {name: True for name, value in config.switches.items() if value}
    if config.parallel:
        # vLLM's second model runner, and earlier versions, read the second name alone.
        fields |= dict.fromkeys(_MASK_TOKENS[:2], config.mask_token_id)
        # vLLM takes this as true where it is absent.
        fields[SWITCHES[0]] = config.norm_before_residual
    fields |= id_fields(block_counts(config.layers, num_layers(ends)), num_layers(ends))
    engine_table(config).check(tensors, "the drafter in memory")
    if config.num_draft_layers > 1:
        tensors = {renamed(name): tensor for name, tensor in tensors.items()}
    write_files(folder, as_text(fields), tensors)
    refuse_difference(drafter, read(read_fields(folder), read_tensors(folder), ends, str(folder)), folder)


def decoder_fields(config: Eagle3Config, dtype: torch.dtype, ends: TargetEnds | None) -> dict[str, Any]:
    """The layers as the fields of a Llama's ``config.json``, or of a Qwen3's where heads are normalised.

    Raises:
        ValueError: the layers have a sliding window.
    """
    fields = llama_fields(config, dtype, ends)
    if config.head_norms:
        del fields["mlp_bias"]
        fields["model_type"] = QWEN3
    return fields


def read(fields: Mapping[str, Any], tensors: Mapping[str, Tensor], ends: TargetEnds | None, where: str) -> Eagle3:
    """A drafter from the engines' or the official layout; it knows no target yet beyond its sizes and layers.

    Args:
        fields: of the config.
        tensors: of the checkpoint.
        ends: the target's; without them a stored embedding is not looked at, and the config must name the layers.
        where: for messages.

    Raises:
        ValueError: the tensors are not the table's, the layer is not of our kind, the layers to read are in doubt, or the embedding is
            not the target's.
    """
    understood = [*SWITCHES, "attention_bias", "layer_types", "num_hidden_layers"]
    understood += ["parallel_drafting"] if MASK in tensors else []
    _refuse_other_heads(fields, where)
    has_norms = _has_head_norms(fields, tensors)
    is_qwen3 = has_norms and fields.get("model_type") == QWEN3
    fields = with_qwen3_defaults(fields) if is_qwen3 else fields
    settings, depth = layer_settings(fields, where, understood), num_layers(ends)
    size, count = fields.get("draft_vocab_size"), _num_draft_layers(fields, tensors)
    kinds = qwen3_kinds(fields, count, where) if is_qwen3 else fields.get("layer_types") or ()
    config = Eagle3Config(
        **settings,
        **_switches(fields, where),
        attention_bias=bool(fields.get("attention_bias")),
        head_norms=has_norms,
        num_draft_layers=count,
        own_embedding=MASK in tensors and _is_own(tensors.get(EMBEDDING), ends, where),
        sliding_window=_window(fields, kinds, count, where),
        **_masks(fields, tensors, where),
        layers=layer_names(read_counts(fields, depth, where), depth, where),
        draft_vocab_size=None if size in (None, settings["vocab_size"]) else int(size),
        num_draft_steps=7,
    )
    config.check(where, "correct it by hand")
    layer = OTHER_LAYER if any(name.startswith(f"{OTHER_LAYER}.") for name in tensors) else LAYER
    tensors = _regular(tensors, config, ends, where)
    engine_table(config, layer, where).check(tensors, where)
    kept = {name.replace(f"{layer}.", f"{LAYER}.", 1): tensor for name, tensor in tensors.items()}
    kept.pop("t2d", None)
    embedding = None if config.own_embedding else kept.pop(EMBEDDING, None)
    if embedding is not None and ends is not None:
        refuse_other_embedding(embedding, ends, where)
    return assemble(Eagle3, config, kept)


def _num_draft_layers(fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> int:
    """How many layers a folder has, by its config or, where that leaves it out, by its tensors."""
    named = fields.get("num_hidden_layers")
    if named is not None:
        return named
    numbers = [match[1] for name in tensors if (match := re.match(r"layers\.(\d{1,4})\.", name))]
    return 1 + max(map(int, numbers), default=0)


def _has_head_norms(fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bool:
    """Whether attention normalises its heads: by the tensors, or in the package's folders, whose Qwen3 layers always do, by the config."""
    is_packages = SPECULATORS_KEY in fields and fields.get("model_type") == QWEN3
    return is_packages or any(name.endswith(_HEAD_NORM) for name in tensors)


def _is_own(embedding: Tensor | None, ends: TargetEnds | None, where: str) -> bool:
    """Whether the embedding in a P-EAGLE's folder is its own: trainers of these often train it, too.

    Without a target nobody knows, and it is kept.

    Raises:
        ValueError: it is of another size than the target's.
    """
    if embedding is None or ends is None:
        return embedding is not None
    if not num_other_rows(embedding, ends, where):
        return False
    warnings.warn(
        f"{where}: {EMBEDDING} differs from the embedding of {ends.name!r}; it is taken for one that was trained with this P-EAGLE. Make "
        "sure that this is the target that it was made for",
        stacklevel=2,
    )
    return True


def _window(fields: Mapping[str, Any], kinds: Sequence[Any], count: int, where: str) -> int | None:
    """The sliding window of all layers, or None.

    Raises:
        ValueError: some layers have one and others none, or there are other layers than kinds of them.
    """
    window, layers = sliding_layers(fields, kinds, where)
    if not kinds:
        warn_of_idle_window(fields, where)
    if window is not None and not len(layers) == len(kinds) == count:
        raise ValueError(
            f"{where} has {count} layers, {len(kinds)} layer_types and {len(layers)} of them with sliding attention; our EAGLE-3 has one "
            "window for all layers or none, so such a drafter cannot be read"
        )
    return window


def _regular(
    tensors: Mapping[str, Tensor], config: Eagle3Config, ends: TargetEnds | None, where: str
) -> dict[str, Tensor]:
    """The tensors as the table has them, where other software writes the same in another form, or leaves the target's own head out.

    Raises:
        ValueError: the head is the target's, and no target is at hand.
    """
    # Older software saves the frequencies, which the config says.
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith("rotary_emb.inv_freq")}
    kept = regular_maps(kept, config.vocab_size)
    if MASK in kept and kept[MASK].ndim == 2 and len(kept[MASK]) == 1:
        kept[MASK] = kept[MASK][None]
    if HEAD in kept or "d2t" in kept or config.draft_vocab_size is not None:
        return kept
    if ends is None:
        raise ValueError(f"{where} holds no {HEAD}, so its head is the target's; add --target")
    warnings.warn(f"{where} holds no {HEAD}; a copy of the target's head takes its place, as in vLLM", stacklevel=2)
    dtype = next((tensor.dtype for tensor in kept.values() if tensor.is_floating_point()), ends.dtype)
    kept[HEAD] = (ends.head_weight.detach() * ends.logit_scale).cpu().to(dtype)
    return kept


def _switches(fields: Mapping[str, Any], where: str) -> dict[str, bool]:
    """The switches of EAGLE-3.1 that a config turns on, at its top or among its ``eagle_config``.

    Raises:
        ValueError: the two places differ.
    """
    nested = fields.get("eagle_config") or {}
    for name in SWITCHES:
        if len({place[name] for place in (fields, nested) if place.get(name) is not None}) > 1:
            raise ValueError(
                f"{where} has {name} {fields[name]}, and {nested[name]} in eagle_config; correct one of the two"
            )
    return {name: bool(fields.get(name) or nested.get(name)) for name in SWITCHES}


def _refuse_other_heads(fields: Mapping[str, Any], where: str) -> None:
    """Refuse settings of ModelOpt under which the same tensors would mean another head.

    Raises:
        ValueError: naming each.
    """
    nested = fields.get("eagle_config")
    places = (fields, nested if isinstance(nested, Mapping) else {})
    given = [(name, place[name]) for place in places for name in _FIXED if place.get(name) is not None]
    if faults := [f"{name} {value!r:.80}" for name, value in given if value not in _FIXED[name]]:
        raise ValueError(f"{where} asks for {', '.join(faults)}, which our EAGLE-3 does not do; it cannot be read")


def _masks(fields: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> dict[str, Any]:
    """What makes a P-EAGLE of an EAGLE-3: the tensor of its masks, and their token.

    Raises:
        ValueError: the folder has the tensor and names no token, or two; or it says that it is a P-EAGLE and lacks the tensor.
    """
    tokens = {name: fields[name] for name in _MASK_TOKENS if fields.get(name) is not None}
    if MASK not in tensors:
        if tokens or named_kind(fields) == "P-EAGLE":
            raise ValueError(
                f"{where} says that it is a P-EAGLE ({', '.join(tokens) or 'by its kind'}) and has no tensor {MASK}; fetch the folder again"
            )
        return {}
    check_fields(tokens, dict.fromkeys(tokens, TOKEN_OR_NULL), f"{where}: {CONFIG}", "correct it by hand")
    if len(set(tokens.values())) != 1:
        raise ValueError(
            f"{where} has {MASK}, so it is a P-EAGLE, and names {tokens or 'no mask_token_id'}; give the one token of its masks by hand"
        )
    return {"parallel": True, "mask_token_id": next(iter(tokens.values()))}


def renamed(name: str) -> str:
    """The first layer's tensors as layer 0's: ``midlayer.mlp.up_proj.weight`` -> ``layers.0.mlp.up_proj.weight``."""
    return name.replace(f"{LAYER}.", f"{OTHER_LAYER}.", 1) if name.startswith(LAYER) else name


def with_membership(tensors: dict[str, Tensor], vocab_size: int) -> dict[str, Tensor]:
    """The tensors with ``t2d`` beside ``d2t``, which the official code and speculators want."""
    if "d2t" in tensors:
        tensors["t2d"] = membership(target_ids(tensors["d2t"]), vocab_size)
    return tensors


def num_layers(ends: TargetEnds | None) -> int | None:
    """L, where a target is at hand."""
    return None if ends is None else int(ends.config.num_hidden_layers)


def holds(fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bool:
    """Whether a folder is in the engines' or the official layout. Kinds that only look alike have a name of their own."""
    if SPECULATORS_KEY in fields or named_kind(fields, tensors) not in ("", "P-EAGLE"):
        return False
    return "fc.weight" in tensors and has_own_head(tensors)


def _commands(target: str, num_steps: int) -> str:
    return vllm("eagle3", target, num_steps) + "\n\n" + sglang("EAGLE3", target)


def _tensorrt_commands(target: str, num_steps: int) -> str:
    return f"TensorRT-LLM: `Eagle3DecodingConfig(max_draft_len={num_steps}, speculative_model=...)`."


def _parallel_commands(target: str, num_steps: int) -> str:
    return vllm("eagle3", target, num_steps, parallel=True)


LAYOUTS = (
    Layout(
        "peagle",
        write_parallel,
        "vLLM's layout of a P-EAGLE. The target is named in `provenance.json`",
        commands=_parallel_commands,
    ),
    Layout(
        "eagle3",
        write,
        "the EAGLE-3 layout that vLLM, SGLang and the official code load. The target is named in `provenance.json`",
        LayoutReader("the common EAGLE-3", holds, read, understood=UNDERSTOOD),
        _commands,
    ),
    Layout(
        "tensorrt-llm",
        write_tensorrt,
        "the EAGLE-3 layout of TensorRT-LLM, without `t2d` and embedding. The target is named in `provenance.json`",
        commands=_tensorrt_commands,
    ),
)

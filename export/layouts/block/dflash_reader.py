"""Reads block drafters in z-lab's DFlash layout, and in its relatives for JetSpec, DFlash 2, DSpark and Domino.

Owns the rules of their config fields, and which of them would have engines or trainers compute something else:

- Layers are counted from 0 in ``target_layer_ids``, and from 1 in ``eagle_aux_hidden_state_layer_ids``, which vLLM prefers.
- ``is_causal`` at the top is for both engines, ``dflash_config.causal`` for vLLM. Without either, full attention sees the whole block, and
  layers with a sliding window see no later slot.

Does not know how such a folder is written.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from draftsmith.export.layouts.block.kinds import CONVOLUTION, DFLASH, DFLASH2, DOMINO, DSPARK
from draftsmith.export.layouts.block.qwen3 import MARKOV_TYPES, assembled, qwen3_settings
from draftsmith.export.layouts.eagle3 import num_layers
from draftsmith.export.layouts.embedding import NAME as EMBEDDING
from draftsmith.export.layouts.embedding import is_plain
from draftsmith.export.layouts.layer_ids import KEY, layer_names
from draftsmith.export.layouts.llama import LAYER_FIELDS
from draftsmith.models.families.block.block_config import BlockConfig
from draftsmith.models.families.block.block_correction import CorrectionKind
from draftsmith.models.families.block.block_drafter import BlockDrafter
from draftsmith.models.files.checkpoint_files import CONFIG
from draftsmith.models.files.field_rules import (
    COUNT,
    FLAG,
    NOT_NEGATIVE,
    OBJECT,
    PARTS,
    POSITIVE,
    Rule,
    check_fields,
    is_whole,
)
from draftsmith.models.files.tables import num_drafted, regular_maps
from draftsmith.models.other_software.named_kinds import named_kind
from draftsmith.models.target.ends import TargetEnds

NESTED = "dflash_config"
"""The field that holds those of its own."""
_WITH_MARKOV, _CONFIDENCE = "confidence_head_with_markov", "confidence_head.proj.weight"
_IDS: Rule = (
    lambda value: isinstance(value, list) and bool(value) and all(is_whole(number, 0) for number in value),
    "a list of whole numbers",
)
_RULES: dict[str, Rule] = {
    NESTED: OBJECT,
    "block_size": COUNT,
    "mask_token_id": (lambda value: is_whole(value, 0), "a token id"),
    "target_layer_ids": _IDS,
    KEY: _IDS,
    "aux_hidden_state_layer_ids": _IDS,
    "num_target_layers": COUNT,
    "num_hidden_layers": PARTS,
    "draft_vocab_size": COUNT,
    "is_causal": FLAG,
    "causal": FLAG,
    "sliding_window_non_causal": FLAG,
    "sample_from_anchor": FLAG,
    "shift_label": FLAG,
    "markov_rank": (lambda value: is_whole(value, 0), "a whole number of at least 0"),
    "markov_head_type": (lambda value: value in MARKOV_TYPES.values(), "vanilla, gated or rnn"),
    "gru_hidden_dim": COUNT,
    "emb_dim": COUNT,
    "selector_rank": COUNT,
    "selector_top_k": COUNT,
    "enable_confidence_head": FLAG,
    _WITH_MARKOV: FLAG,
    "output_multiplier": POSITIVE,
    "final_logit_softcapping": NOT_NEGATIVE,
}
# What our layers and corrections are. Another value means another computation, which loading the weights alone would hide.
_FIXED: dict[str, Any] = {
    "pure_draft_prefix_len": 1,
    "is_neox_style": True,
    "use_swa": False,
    "attention_sink_bias": False,
    **CONVOLUTION,
}
UNDERSTOOD = frozenset({*LAYER_FIELDS, *_RULES, *_FIXED, "input_embedding_scale", "projector_type", "swa_window_size"})
"""The fields of a config that :func:`read` knows."""
_WINDOWS = ("layer_types", "max_window_layers", "sliding_window", "use_sliding_window")  # engines read them at the top


def read(
    fields: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    ends: TargetEnds | None,
    where: str,
    window_from_root: bool = False,
) -> BlockDrafter:
    """A drafter from this layout; it knows no target yet beyond its sizes and layers.

    Args:
        fields: of the config; those of its own stand at the top or in ``dflash_config``.
        tensors: of the checkpoint.
        ends: the target's; without them, copies of the target's tensors are not looked at.
        where: for messages.
        window_from_root: a sliding window counts from the root in this layout, not from each slot.

    Raises:
        ValueError: a field is missing or breaks its rule, two fields contradict each other, the layers compute what ours do not, or the
            tensors are not those of the config.
    """
    flat, tensors = _flat(fields, where), regular_maps(tensors, fields.get("vocab_size"))
    _refuse_other_computation(flat, where)
    if ends is not None and EMBEDDING not in tensors:
        _refuse_other_scale(flat, ends, where)
    size = _draft_vocabulary(flat, tensors, where)
    _refuse_other_depth(flat, ends, where)
    settings = qwen3_settings({**fields, **{name: flat[name] for name in _WINDOWS if name in flat}}, where)
    config = BlockConfig(
        **settings,
        **_correction(flat, settings["hidden_size"], tensors, where),
        layers=layer_names(_counts(flat, where), num_layers(ends), where),
        block_size=_required(flat, "block_size", where),
        mask_token_id=_required(flat, "mask_token_id", where),
        **_causality(flat, settings, where),
        window_from_root=window_from_root and "sliding_layers" in settings,
        draft_vocab_size=None if size == fields.get("vocab_size") else size,
    )
    config.num_draft_steps = config.block_size - config.first_slot
    config.check(where, "correct it by hand")
    _refuse_other_logits(flat, config, ends, where)
    return assembled(config, tensors, ends, where)


def _draft_vocabulary(flat: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> int | None:
    """Vd, by the config or by the map.

    Raises:
        ValueError: the two differ.
    """
    counted = num_drafted(tensors, where)
    named = flat.get("draft_vocab_size", counted)
    if counted is not None and named != counted:
        raise ValueError(
            f"{where}: {CONFIG} has draft_vocab_size {named}, and d2t maps {counted} tokens; take both files of one export"
        )
    return None if named is None else int(named)


def _refuse_other_depth(flat: Mapping[str, Any], ends: TargetEnds | None, where: str) -> None:
    """Refuse a drafter for a target of another depth.

    Raises:
        ValueError: naming both depths.
    """
    depth, named = num_layers(ends), flat.get("num_target_layers")
    if ends is not None and named is not None and named != depth:
        raise ValueError(
            f"{where}: {CONFIG} has num_target_layers {named}, and {ends.name!r} has {depth} layers; name the target that the drafter was "
            "made for"
        )


def _flat(fields: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The fields at the top and those of ``dflash_config`` as one level, each of which follows its rule.

    Raises:
        ValueError: one breaks its rule, has one value at the top and another one below, or asks for a sliding window below alone.
    """
    place = f"{where}: {CONFIG}"
    top = {name: value for name, value in fields.items() if value is not None}
    check_fields(top, _RULES, place, "correct it by hand")
    nested = {name: value for name, value in top.get(NESTED, {}).items() if value is not None}
    check_fields(nested, _RULES, f"{place}: {NESTED}", "correct it by hand")
    for name in sorted({*_RULES, *_FIXED, *_WINDOWS, "projector_type"} & top.keys() & nested.keys()):
        if top[name] != nested[name]:
            raise ValueError(
                f"{place} has {name} {top[name]!r}, and {nested[name]!r} in {NESTED}, between which engines differ; correct one of the two"
            )
    # False stands for what is so without the field.
    if below := [name for name in _WINDOWS if name in nested and name not in top and nested[name] is not False]:
        named = ", ".join(f"{name} {nested[name]!r:.80}" for name in below)
        raise ValueError(
            f"{place} has {named} in {NESTED} and not at the top, where engines read which layers have a sliding window; put it at the "
            "top if the drafter was trained with it, or take it out"
        )
    return {**nested, **top}


def _refuse_other_computation(flat: Mapping[str, Any], where: str) -> None:
    """Refuse settings under which the same tensors would mean something else.

    Raises:
        ValueError: naming each.
    """
    faults = [f"{name} {flat[name]!r}" for name, value in _FIXED.items() if name in flat and flat[name] != value]
    if flat.get("projector_type", DFLASH) not in (DFLASH, DFLASH2, DSPARK, DOMINO):
        faults.append(f"projector_type {flat['projector_type']!r}")
    if flat.get("enable_confidence_head") and flat.get(_WITH_MARKOV) and not flat.get("markov_rank"):
        faults.append(f"{_WITH_MARKOV} True with markov_rank {flat.get('markov_rank', 0)}")
    if faults:
        raise ValueError(
            f"{where} asks for {', '.join(faults)}, which our block drafters do not have; it cannot be read"
        )


def _refuse_other_scale(flat: Mapping[str, Any], ends: TargetEnds, where: str) -> None:
    """Refuse a drafter that was trained with the bare rows of an embedding that computes more, or with rows times a factor.

    Raises:
        ValueError: naming the factor.
    """
    scale = flat.get("input_embedding_scale", 1.0)
    if (scale == 1.0) != is_plain(ends):
        raise ValueError(
            f"{where} was trained with rows of the target's embedding matrix times {scale}, and {ends.name!r} computes something else for "
            "its embedding; such a drafter cannot be read"
        )


def _refuse_other_logits(flat: Mapping[str, Any], config: BlockConfig, ends: TargetEnds | None, where: str) -> None:
    """Refuse a correction that was trained beside other logits than ours: capped ones, or of the target's head times another factor.

    Without a correction, both leave the order of a slot's tokens as it is.

    Raises:
        ValueError: naming the cap or the factor.
    """
    cap, factor = flat.get("final_logit_softcapping"), flat.get("output_multiplier")
    own = 1.0 if ends is None else ends.logit_scale
    faults = [f"final_logit_softcapping {cap}"] if cap else []
    if factor is not None and ends is not None and not math.isclose(factor, own, rel_tol=1e-3):
        faults.append(f"output_multiplier {factor}, and {ends.name!r} multiplies its logits by {own:g}")
    if faults and config.correction != "none":
        raise ValueError(
            f"{where} has {' and '.join(faults)}, and its correction would be added to other logits here; such a drafter cannot be read"
        )


def _counts(flat: Mapping[str, Any], where: str) -> list[int]:
    """The layers that are read, as outputs of blocks counted from 1.

    Raises:
        ValueError: none are named, or two lists differ.
    """
    lists = {name: list(flat[name]) for name in (KEY, "aux_hidden_state_layer_ids") if name in flat}
    if "target_layer_ids" in flat:
        lists["target_layer_ids"] = [number + 1 for number in flat["target_layer_ids"]]
    if not lists:
        raise ValueError(f"{where} names no target_layer_ids, the layers to read; add them by hand, counted from 0")
    if any(counts != next(iter(lists.values())) for counts in lists.values()):
        raise ValueError(
            f"{where} names different layers in {' and '.join(lists)}; target_layer_ids count blocks from 0, the others from 1: correct one"
        )
    return next(iter(lists.values()))


def _causality(flat: Mapping[str, Any], settings: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The keyword arguments of :class:`BlockConfig` about which slots of its block a slot sees.

    Raises:
        ValueError: the two fields that say whether it sees no later one differ.
    """
    values = {flat[name] for name in ("is_causal", "causal") if name in flat}
    if len(values) > 1:
        raise ValueError(
            f"{where} has is_causal {flat['is_causal']} and causal {flat['causal']}; correct one of the two"
        )
    # The speculators package has a field of its own for layers with a window, beside full ones that see the whole block.
    of_windows = not flat.get("sliding_window_non_causal", bool(values))
    return {"causal": bool(values and values.pop()), "sliding_causal": of_windows and "sliding_layers" in settings}


def _correction(flat: Mapping[str, Any], D: int, tensors: Mapping[str, Tensor], where: str) -> dict[str, Any]:
    """The keyword arguments of :class:`BlockConfig` about correction and confidence, and which slot predicts first.

    Raises:
        ValueError: a Domino that does not say which slot predicts first, or which are not corrected; or what :func:`_confidence` refuses.
    """
    if flat.get("projector_type") == DOMINO:
        if absent := [name for name in ("shift_label", "pure_draft_prefix_len") if name not in flat]:
            raise ValueError(
                f"{where} does not say {' and '.join(absent)}, whose defaults differ between the trainers of Domino; add by hand what it "
                "was trained with: shift_label true where the root's slot predicts the first drafted token, pure_draft_prefix_len 1 where "
                "that prediction is not corrected"
            )
        return {
            "correction": "gru",
            "correction_rank": flat.get("emb_dim", 256),
            "correction_state": flat.get("gru_hidden_dim", 1024),
            "sample_from_anchor": flat["shift_label"],
        }
    if named_kind(flat) == "DFlash 2" or flat.get("projector_type") == DFLASH2:
        return {
            "convolution": True,
            "correction": "selector",
            "correction_rank": flat.get("selector_rank", 256),
            "candidates": flat.get("selector_top_k", 16),
            "sample_from_anchor": flat.get("sample_from_anchor", False),
        }
    rank = flat.get("markov_rank", 0)
    is_dspark = bool(rank) or flat.get("projector_type") == DSPARK or named_kind(flat) == "DSpark"
    kinds: dict[str, CorrectionKind] = {theirs: ours for ours, theirs in MARKOV_TYPES.items()}  # type: ignore[misc]
    return {
        "sample_from_anchor": flat.get("sample_from_anchor", is_dspark),
        **_confidence(flat, D, tensors, where),
        **({"correction": kinds[flat.get("markov_head_type", "vanilla")], "correction_rank": rank} if rank else {}),
    }


def _confidence(flat: Mapping[str, Any], D: int, tensors: Mapping[str, Tensor], where: str) -> dict[str, bool]:
    """The keyword arguments of :class:`BlockConfig` about confidence.

    Whether the head reads the token before its slot shows in the width of its weight, [1, D + r] or [1, D]. Defaults of the field differ
    between the speculators package and engines.

    Raises:
        ValueError: the field contradicts the width.
    """
    has_confidence, rank = flat.get("enable_confidence_head", False), flat.get("markov_rank", 0)
    if not (has_confidence and rank):
        # Without a Markov head there is no row to read, whatever the field says.
        return {"confidence": has_confidence, "confidence_with_markov": True}
    shape = list(tensors[_CONFIDENCE].shape) if _CONFIDENCE in tensors else []
    shown = shape == [1, D + rank]
    if not shown and shape != [1, D]:  # the check of all tensors says so
        return {"confidence": True, "confidence_with_markov": flat.get(_WITH_MARKOV, True)}
    if flat.get(_WITH_MARKOV, shown) != shown:
        raise ValueError(
            f"{where}: {CONFIG} has {_WITH_MARKOV} {not shown}, and {_CONFIDENCE} is {shape}, as with {shown} (hidden_size {D}, "
            f"markov_rank {rank}); correct the field, or take both files of one export"
        )
    return {"confidence": True, "confidence_with_markov": shown}


def _required(flat: Mapping[str, Any], name: str, where: str) -> int:
    if name not in flat:
        raise ValueError(f"{where} lacks {name}, without which no block can be drafted; add it by hand")
    return int(flat[name])

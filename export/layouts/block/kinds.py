"""The four kinds of block drafters that other software knows: DFlash (and JetSpec), DFlash 2, DSpark and Domino.

Owns which drafter is which kind, the config fields of a kind alone, and what a user must know of the engines. vLLM refuses a DFlash whose
root's slot predicts. Knows no layout.
"""

from __future__ import annotations

from draftsmith.models.families.block.block_config import BlockConfig
from draftsmith.models.families.block.block_layer import GROUP

DFLASH, DFLASH2, DSPARK, DOMINO = "dflash", "dflash2", "dspark", "domino"
CONVOLUTION = {"conv_kernel_size": 2, "conv_group_size": GROUP}
"""The sizes of our convolution, as a DFlash 2's config has them."""


def kind_of(config: BlockConfig) -> str:
    """Which of the four kinds a drafter is.

    Args:
        config: of the drafter.

    Returns:
        ``dflash``, ``dflash2``, ``dspark`` or ``domino``.

    Raises:
        ValueError: it is none of them.
    """
    remedy = "serve it from --layout draftsmith or custom_generate"
    if config.correction == "lookaround":
        raise ValueError(f"this drafter has the correction 'lookaround', which no other software holds; {remedy}")
    if config.convolution or config.correction == "selector":
        return _dflash2(config, remedy)
    if config.correction == "none":
        if config.sample_from_anchor:
            raise ValueError(
                "the root's slot of this drafter predicts (sample_from_anchor), and vLLM refuses such a DFlash; train it with "
                f"sample_from_anchor false or with a correction, or {remedy}"
            )
        return DFLASH
    if not config.sample_from_anchor:
        raise ValueError(
            f"this drafter has the correction {config.correction!r} without sample_from_anchor, which no engine serves as far as we know; "
            f"train it with sample_from_anchor true, or {remedy}"
        )
    if config.correction != "gru":
        return DSPARK
    if config.num_draft_tokens != config.vocab_size:
        raise ValueError(
            f"this drafter has the correction 'gru' and a draft vocabulary of {config.num_draft_tokens} tokens, and Domino's layout holds "
            f"only the whole one; train it with draft_vocab_size null, or {remedy}"
        )
    return DOMINO


def _dflash2(config: BlockConfig, remedy: str) -> str:
    """The kind of a drafter with a convolution or a selector.

    Raises:
        ValueError: it lacks one of the two, its root's slot predicts, or it has a draft vocabulary.
    """
    if not config.convolution or config.correction != "selector" or config.sample_from_anchor:
        raise ValueError(
            f"a DFlash 2 has convolution true, correction 'selector' and sample_from_anchor false; this drafter has {config.convolution}, "
            f"{config.correction!r} and {config.sample_from_anchor}; train it with those, or {remedy}"
        )
    if config.num_draft_tokens != config.vocab_size:
        raise ValueError(
            f"this drafter is a DFlash 2 with a draft vocabulary of {config.num_draft_tokens} tokens, and its layouts hold only the whole "
            f"one; train it with draft_vocab_size null, or {remedy}"
        )
    return DFLASH2


def engine_notes(config: BlockConfig) -> list[str]:
    """What a user must know of engines that compute something else, or nothing."""
    notes = []
    if config.correction in ("gated", "recurrent"):
        notes.append(f"Its correction is {config.correction!r}, which SGLang reads. vLLM has no parameters for it.")
    if config.confidence and not config.confidence_with_markov:
        notes.append(
            "Its confidence head reads no token (`confidence_head_with_markov` false). Public code of SGLang refuses such a head, and no "
            "engine was tried with one."
        )
    if config.correction == "gru":
        notes.append("Its correction is Domino's, which SGLang reads and vLLM does not.")
    if config.correction != "none" and config.num_draft_tokens != config.vocab_size:
        notes.append(
            "vLLM reads its draft vocabulary. SGLang drops the head of a DSpark and scores the whole vocabulary."
        )
    if config.sliding_layers:
        if len(config.sliding_layers) < config.num_draft_layers:
            seen = "Other layers have none: vLLM reads such a mixture only with its second model runner, and it was not tried."
        elif config.causal or config.sliding_causal:
            seen = "Its mask is causal, too. No engine was tried with that."
        else:
            seen = "No engine was tried with that." if config.window_from_root else "vLLM 0.32 has the same window."
        place = (
            "All slots see so many tokens before the root, as in the speculators package. vLLM's source counts from each slot, and never "
            "shows slot k, with k from 0, the first k + 1 of them."
            if config.window_from_root
            else "It is counted from each slot."
        )
        notes.append(
            f"Its layers {config.sliding_layers} have a sliding window of {config.sliding_window}. {place} {seen}"
        )
    return notes


def confidence_fields(config: BlockConfig) -> dict[str, bool]:
    """What a DSpark's config says of its confidence head."""
    with_markov = config.confidence and config.confidence_with_markov
    return {"enable_confidence_head": config.confidence, "confidence_head_with_markov": with_markov}


def selector_fields(config: BlockConfig) -> dict[str, int]:
    """What a DFlash 2's config says of its convolution and its selector."""
    sizes = {"selector_rank": config.correction_rank, "selector_top_k": config.candidates}
    return {**CONVOLUTION, **sizes}

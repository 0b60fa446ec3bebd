"""Generation settings in vLLM's words, and how its answers become replies.

Owns: which of our settings another engine can keep and under which names, and where a reply of its tokens ends. Does not know:
HTTP, how vLLM is called.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from draftsmith.data.replies.reply_sources import BadReply, RawReply, Reply
from draftsmith.decode.batch import Recorder, Request
from draftsmith.decode.sampling import GenerationSettings

# What JSON and vLLM hold a seed in.
_SEEDS = 2**63
# vLLM samples at this temperature where it is asked for a lower one above 0.
_COLDEST = 0.01


def check_settings(settings: GenerationSettings) -> None:
    """Check that vLLM gives the settings the same meaning.

    Args:
        settings: of generation.

    Raises:
        ValueError: one means something else there.
    """
    if 0.0 < settings.temperature < _COLDEST:
        raise ValueError(
            f"temperature is {settings.temperature}; vLLM samples at {_COLDEST} where less is asked for, which is another distribution; "
            f"set --temperature 0 (greedy) or at least {_COLDEST}"
        )
    _check_constraints(settings)
    if settings.min_p > 0.0 and settings.top_p < 1.0:
        # With top_k alone the order makes no difference: what is kept is what both keep.
        raise ValueError(
            f"min_p is {settings.min_p} together with top_p {settings.top_p}; vLLM leaves out by min_p before top_p, the bundled decoder "
            "after it, which is another distribution; set --min_p 0 or --top_p 1"
        )


def _check_constraints(settings: GenerationSettings) -> None:
    asked = {} if settings.constraints is None else settings.constraints.asked()
    foreign = [f"{name} ({value!r})" for name, value in asked.items() if name != "min_new_tokens"]
    if foreign:
        raise ValueError(
            f"the target's generation config asks for {', '.join(foreign)}, which vLLM has no exact word for; use --engine bundled, or "
            "ignore that file with --generation_config none"
        )


def sampling(settings: GenerationSettings, request_id: int, budget: int) -> dict[str, Any]:
    """The fields of vLLM's SamplingParams, which its completions endpoint has too. Every field is set that vLLM would otherwise take from
    the model.

    A request's seed is a function of the run's seed and the request's id alone. So replies do not depend on the other requests.
    End tokens are ours, not the server's; stop strings are cut by `settle`.

    Args:
        settings: of generation.
        request_id: which noise the prompt draws.
        budget: most tokens of the reply.

    Returns:
        The fields by name.
    """
    least = 0 if settings.constraints is None else settings.constraints.min_new_tokens
    return {
        "max_tokens": budget,
        "temperature": settings.temperature,
        "top_k": settings.top_k,
        "top_p": settings.top_p,
        "min_p": settings.min_p,
        "repetition_penalty": settings.repetition_penalty,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "seed": (settings.seed * 2**32 + request_id) % _SEEDS,
        "stop": list(settings.stop_strings),
        "stop_token_ids": list(settings.eos_token_ids),
        "ignore_eos": True,
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
    } | ({"min_tokens": least} if least else {})


def settle(
    raw: RawReply, settings: GenerationSettings, budget: int, tokenizer: PreTrainedTokenizerBase | None
) -> Reply:
    """End a reply as the bundled decoder would have: at the first end token, stop string or the budget, whichever comes first.

    Args:
        raw: the engine's answer.
        settings: of generation.
        budget: most tokens of the reply.
        tokenizer: the target's, for stop strings.

    Returns:
        The reply.

    Raises:
        BadReply: it ended for a reason of the engine's own, which no bundled reply would have.
    """
    request = Request(0, [], 0, budget)
    finished = Recorder(settings.eos_token_ids, settings.stop_strings, tokenizer, None).add(
        request, raw.token_ids, None
    )
    generation = request.generation
    if not finished:
        raise BadReply(
            f"a reply of {len(raw.token_ids)} tokens ended ({raw.finish}) at token {raw.token_ids[-1]}, which is no end token of this "
            f"target ({list(settings.eos_token_ids)}), at no stop string and below its {budget} tokens; the engine stops at tokens of its "
            "own: start it with --generation-config vllm and without a default for stop tokens"
        )
    return Reply(generation.token_ids, generation.finish)

"""How a folder is served by an engine: commands for the model card.

Owns their text. Knows no layout, no card and no tensor.
"""

from __future__ import annotations

import json

from draftsmith.escapes import shell_word

_STEPS, _TOP_K, _NODES = 5, 8, 32


def vllm(method: str, target: str, num_steps: int, parallel: bool = False) -> str:
    """What starts vLLM, in Markdown.

    Args:
        method: what vLLM calls the manner of drafting.
        target: what the engine is to load as its model.
        num_steps: tokens to draft in a chain.
        parallel: all tokens of a draft are made in one pass.
    """
    settings: dict[str, object] = {"method": method, "model": "/path/to/this/folder"}
    settings |= {"num_speculative_tokens": num_steps, **({"parallel_drafting": True} if parallel else {})}
    return f"vLLM:\n\n```sh\nvllm serve {shell_word(target)} --speculative-config '{json.dumps(settings)}'\n```"


def sglang(algorithm: str, target: str) -> str:
    """What starts SGLang, in Markdown.

    Args:
        algorithm: what SGLang calls the manner of drafting.
        target: what the engine is to load as its model.
    """
    shape = (
        f"--speculative-num-steps {_STEPS} --speculative-eagle-topk {_TOP_K} --speculative-num-draft-tokens {_NODES}"
    )
    return _sglang(algorithm, target, f" \\\n  {shape}")


def sglang_block(algorithm: str, target: str) -> str:
    """What starts SGLang with a block drafter, whose config says how much it drafts, in Markdown.

    Args:
        algorithm: what SGLang calls the manner of drafting.
        target: what the engine is to load as its model.
    """
    return _sglang(algorithm, target)


def _sglang(algorithm: str, target: str, further: str = "") -> str:
    return (
        f"SGLang:\n\n```sh\npython -m sglang.launch_server --model-path {shell_word(target)} \\\n"
        f"  --speculative-algorithm {algorithm} --speculative-draft-model-path /path/to/this/folder{further}\n```"
    )

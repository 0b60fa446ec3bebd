"""How a folder of each layout is served: commands for the model card.

Owns their text. Knows no card and no tensor.
"""

from __future__ import annotations

import json

from draftsmith.foreign import shell_word

_METHODS = {"eagle": "eagle", "eagle3": "eagle3", "speculators": "eagle3"}
_STEPS, _TOP_K, _NODES = 5, 8, 32


def commands(layout: str, target: str, num_steps: int) -> str:
    """What starts each engine that reads the layout, in Markdown; empty where none does.

    Args:
        layout: its name.
        target: what the engine is to load as its model.
        num_steps: tokens to draft in a chain.
    """
    parts = []
    if layout in _METHODS:
        settings = {"method": _METHODS[layout], "model": "/path/to/this/folder", "num_speculative_tokens": num_steps}
        parts.append(
            f"vLLM:\n\n```sh\nvllm serve {shell_word(target)} --speculative-config '{json.dumps(settings)}'\n```"
        )
    if layout in ("eagle", "eagle3"):
        parts.append(
            f"SGLang:\n\n```sh\npython -m sglang.launch_server --model-path {shell_word(target)} \\\n"
            f"  --speculative-algorithm {layout.upper()} --speculative-draft-model-path /path/to/this/folder \\\n"
            f"  --speculative-num-steps {_STEPS} --speculative-eagle-topk {_TOP_K} --speculative-num-draft-tokens {_NODES}\n```"
        )
    if layout == "tensorrt-llm":
        parts.append(f"TensorRT-LLM: `Eagle3DecodingConfig(max_draft_len={num_steps}, speculative_model=...)`.")
    return "\n\n".join(parts)

"""A drafter's folder that Transformers decodes with by itself: ``model.generate(..., custom_generate=FOLDER, trust_remote_code=True)``.

Owns the layout: our own, plus the very modules that decode here and those of the drafter's family (`shipped_code.py`), and how much is
drafted by default. Knows nothing of cards and commands.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from draftsmith.export.layouts import own_layout as own
from draftsmith.export.layouts.layout import Layout
from draftsmith.export.layouts.shipped_code import shipped_code
from draftsmith.models.drafters.drafter import Drafter
from draftsmith.models.drafters.registry import default_limits
from draftsmith.models.files.model_folder import openable_name
from draftsmith.models.target.ends import TargetEnds
from draftsmith.models.target.target_probe import end_values
from draftsmith.models.tree.limits import DraftLimits

FOLDER, SETTINGS = "custom_generate", "settings.json"
REQUIREMENTS = ("torch>=2.9", "transformers>=5.17")


def write(drafter: Drafter, folder: Path, ends: TargetEnds | None) -> tuple[str, ...]:
    """Write the layout into an existing folder; weights and config are read back and compared.

    Returns:
        what a user must know of the result.

    Raises:
        ValueError: no target is at hand, numbers of which let the folder tell it from others; or the drafter does not fit its table.
    """
    if ends is None:
        raise ValueError("the custom_generate layout holds numbers by which it knows its target; add --target")
    own.write(drafter, folder)
    code = folder / FOLDER
    code.mkdir()
    shipped = shipped_code(type(drafter))
    for name, text in shipped.modules.items():
        (code / f"{name}.py").write_text(text, encoding="utf-8")
    (code / "requirements.txt").write_text("\n".join([*REQUIREMENTS, *shipped.requirements]) + "\n", encoding="utf-8")
    settings = {"limits": limits_by_default(drafter), "target_ends": end_values(ends)}
    (code / SETTINGS).write_text(json.dumps(settings) + "\n", encoding="utf-8")
    return (
        "The code in `custom_generate/` knows its target by sizes and by some numbers of embedding, final norm and head, not by all "
        "weights: a light fine-tune of that target may pass for it, which costs accepted tokens and never changes the output.",
    )


def limits_by_default(drafter: Drafter) -> dict[str, Any]:
    """How much is drafted where a call does not say: as the family has it, or a small dynamic tree, which suits a CPU."""
    limits = default_limits(drafter, DraftLimits(min(4, len(drafter.draft_ids())), draft_length=5, node_budget=11))
    return {name: getattr(limits, name) for name in ("beam_width", "draft_length", "node_budget", "paths")}


def example(target: str, question: str, has_template: bool) -> str:
    """A program that decodes one prompt with the drafter in the current folder, with Transformers alone."""
    name = json.dumps(openable_name(target))
    if has_template:
        prompt = f'messages = [{{"role": "user", "content": {json.dumps(question)}}}]\n'
        prompt += (
            "prompt = tokenizer.apply_chat_template(\n"
            '    messages, add_generation_prompt=True, return_dict=False, return_tensors="pt"\n)'
        )
    else:
        prompt = f'prompt = tokenizer.encode({json.dumps(question)}, return_tensors="pt")'
    return (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"model = AutoModelForCausalLM.from_pretrained({name})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({name})\n"
        f"{prompt}\n"
        'output = model.generate(prompt, custom_generate=".", trust_remote_code=True, max_new_tokens=64)  # this folder\n'
        "print(tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True))\n"
    )


LAYOUT = Layout(
    "custom_generate",
    write,
    "draftsmith's layout, and in `custom_generate/` the code with which Transformers decodes",
    holds_shapes=True,
)

"""A drafter's folder that Transformers decodes with by itself: ``model.generate(..., custom_generate=FOLDER, trust_remote_code=True)``.

Owns the layout: our own, plus the very modules that decode here, copied with what they import and renamed so that they find each other
there. Nothing is written a second time for it, so nothing can come to differ. Knows nothing of cards and commands, nor of what the
modules do.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from draftsmith import __version__
from draftsmith.export.layouts import own_layout as own
from draftsmith.models.drafters.drafter import Drafter
from draftsmith.models.files.model_folder import resolve
from draftsmith.models.target.ends import TargetEnds
from draftsmith.models.target.target_probe import end_values
from draftsmith.models.tree.limits import DraftLimits

FOLDER, ENTRY, SETTINGS = "custom_generate", "generate", "settings.json"
REQUIREMENTS = ("torch>=2.9", "transformers>=5.17")
PACKAGES = ("huggingface_hub", "numpy", "safetensors", "torch", "transformers")
"""What the copied modules may import beside the standard library: Transformers and what it cannot be without."""

_SOURCE = "draftsmith.decode.hf_generate"
# What reads a target from disk. Transformers has done that already, and it would bring more packages along.
_LEFT_OUT = {
    "draftsmith.models.target.target": {"Target.load"},
    "draftsmith.models.target.ends": {"TargetEnds.load"},
    "draftsmith.models.files.end_tokens": {"read_end_tokens"},
}
_REGISTRIES = {"AutoConfig", "AutoModel"}


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
    for name, text in shipped_modules().items():
        (code / f"{name}.py").write_text(text, encoding="utf-8")
    (code / "requirements.txt").write_text("\n".join(REQUIREMENTS) + "\n", encoding="utf-8")
    settings = {"limits": default_limits(drafter), "target_ends": end_values(ends)}
    (code / SETTINGS).write_text(json.dumps(settings) + "\n", encoding="utf-8")
    return (
        "The code in `custom_generate/` knows its target by sizes and by some numbers of embedding, final norm and head, not by all "
        "weights: a light fine-tune of that target may pass for it, which costs accepted tokens and never changes the output.",
    )


def default_limits(drafter: Drafter) -> dict[str, int | None]:
    """How much is drafted where a call does not say: a small dynamic tree, which suits a CPU; a GPU has room for more."""
    limits = DraftLimits(beam_width=min(4, len(drafter.draft_ids())), draft_length=5, node_budget=11)
    return {
        "beam_width": limits.beam_width,
        "draft_length": limits.draft_length,
        "node_budget": limits.node_budget,
    }


def example(target: str, question: str, has_template: bool) -> str:
    """A program that decodes one prompt with the drafter in the current folder, with Transformers alone."""
    name = json.dumps(str(resolve(target)) if target.startswith("embedded:") else target)
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


def shipped_modules() -> dict[str, str]:
    """Every module that is shipped, by its name there: ``generate`` and what it imports, directly or not.

    Names are flat: ``draftsmith.models.tree.tree`` becomes ``models_tree_tree``. Transformers copies relative imports of one level only.
    """
    found: dict[str, str] = {}
    pending = [_SOURCE]
    while pending:
        module = pending.pop()
        if _flat(module) in found:
            continue
        text, imported = _shipped(module)
        found[_flat(module)] = text
        pending += imported
    return dict(sorted(found.items()))


def _shipped(module: str) -> tuple[str, list[str]]:
    """A module as it is shipped, and the modules of ours that it imports."""
    spec = find_spec(module)
    assert spec is not None, module
    assert spec.origin is not None, module
    text = Path(spec.origin).read_text(encoding="utf-8")
    text = _without(text, list(_left_out(ast.parse(text), _LEFT_OUT.get(module, set()))))
    while dead := list(_dead(ast.parse(text))):
        text = _without(text, dead)
    named = _named(ast.parse(text))
    imported, edits = [], []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.ImportFrom | ast.Import):
            continue
        source = node.module or "" if isinstance(node, ast.ImportFrom) else node.names[0].name
        if source.split(".")[0] != "draftsmith":
            continue
        assert isinstance(node, ast.ImportFrom), f"{module}: only `from {source} import` can be shipped"
        assert not _is_package(source), f"{module}: imports the package {source}; import from the module that owns it"
        imported.append(source)
        kept = [one for one in node.names if (one.asname or one.name) in named]
        names = ", ".join(one.name if one.asname is None else f"{one.name} as {one.asname}" for one in kept)
        edits.append(_Edit.of(node, f"{' ' * node.col_offset}from .{_flat(source)} import {names}\n"))
    head = f"# From draftsmith {__version__}, module {module}. SPDX-License-Identifier: Apache-2.0\n"
    return head + _without(text, edits), imported


def _is_package(source: str) -> bool:
    spec = find_spec(source)
    assert spec is not None, source
    return spec.submodule_search_locations is not None


def _flat(module: str) -> str:
    return ENTRY if module == _SOURCE else module.removeprefix("draftsmith.").replace(".", "_")


@dataclass(frozen=True)
class _Edit:
    """Lines of a text, counted from 0, up to ``end``, and what stands there instead."""

    start: int
    end: int
    text: str = ""

    @classmethod
    def of(cls, node: ast.stmt, text: str = "") -> _Edit:
        """The whole lines of a statement, its decorators included."""
        decorators: list[ast.expr] = getattr(node, "decorator_list", [])
        assert node.end_lineno is not None
        return cls(min([node.lineno, *(one.lineno for one in decorators)]) - 1, node.end_lineno, text)


def _without(text: str, edits: list[_Edit]) -> str:
    lines = text.splitlines(keepends=True)
    for edit in sorted(edits, key=lambda one: one.start, reverse=True):
        lines[edit.start : edit.end] = [edit.text] if edit.text else []
    return "".join(lines)


def _left_out(tree: ast.Module, functions: set[str]) -> Iterator[_Edit]:
    """What is named, and whatever is registered with Transformers: a copy must not take the place of another's classes."""
    missing = set(functions)
    for node in tree.body:
        if isinstance(node, ast.Expr | ast.For) and any(_registers(part) for part in ast.walk(node)):
            yield _Edit.of(node)
        owner, members = (f"{node.name}.", node.body) if isinstance(node, ast.ClassDef) else ("", [node])
        for member in members:
            if isinstance(member, ast.FunctionDef) and f"{owner}{member.name}" in functions:
                missing.discard(f"{owner}{member.name}")
                yield _Edit.of(member)
    assert not missing, f"nowhere to be left out: {missing}"


def _registers(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "register"
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id in _REGISTRIES
    )


def _dead(tree: ast.Module) -> Iterator[_Edit]:
    """Imports and private functions at the top that nothing in the module names; whole statements only."""
    named = _named(tree)
    for node in tree.body:
        if isinstance(node, ast.ImportFrom | ast.Import):
            bound = {(one.asname or one.name).split(".")[0] for one in node.names}
            if bound.isdisjoint(named) and getattr(node, "module", "") != "__future__":
                yield _Edit.of(node)
        elif isinstance(node, ast.FunctionDef) and node.name.startswith("_") and node.name not in named:
            yield _Edit.of(node)


def _named(tree: ast.Module) -> set[str]:
    """Names that are read anywhere; words in strings count, since ``__all__`` and quoted annotations are such."""
    nodes = list(ast.walk(tree))
    words = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return words | {node.id for node in nodes if isinstance(node, ast.Name)}

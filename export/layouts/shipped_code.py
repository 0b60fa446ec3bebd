"""The modules with which a ``custom_generate`` folder decodes: ours, and those of the drafter's family, copied with what they import.

Modules are renamed so that they find each other there. Nothing is written a second time, so nothing can come to differ. Owns that
copying: which modules, under which names, and what is left out of them. Knows nothing of what the modules do.
"""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import packages_distributions, version
from importlib.util import find_spec, resolve_name
from pathlib import Path

from draftsmith import __version__
from draftsmith.models.drafters.drafter import Drafter

ENTRY = "generate"
PACKAGES = ("huggingface_hub", "numpy", "safetensors", "torch", "transformers")
"""What our modules may import beside the standard library: Transformers and what it cannot be without."""

_OURS = "draftsmith"
_SOURCE = "draftsmith.decode.hugging_face.hf_generate"
_REGISTRY = "draftsmith.models.drafters.registry"
# What reads a target from disk. Transformers has done that already, and it would bring more packages along.
_LEFT_OUT = {
    "draftsmith.models.target.target": {"Target.load"},
    "draftsmith.models.target.ends": {"TargetEnds.load"},
    "draftsmith.models.files.end_tokens": {"read_end_tokens"},
}
_REGISTRIES = {"AutoConfig", "AutoModel"}
_RECORD, _SETTINGS_ARGUMENT = "Family", 3


@dataclass(frozen=True)
class ShippedCode:
    """What a folder decodes with.

    Attributes:
        modules: the text of every module by its name there; ``generate`` is where Transformers begins.
        requirements: lines of ``requirements.txt`` for what the family imports beyond torch and transformers.
    """

    modules: dict[str, str]
    requirements: tuple[str, ...] = ()


def shipped_code(kind: type[Drafter]) -> ShippedCode:
    """The modules that decode with one family's drafters: ``generate`` and what it imports, directly or not.

    Names are flat (``draftsmith.models.tree.tree`` becomes ``models_tree_tree``), as Transformers copies relative imports of one level
    only.

    Args:
        kind: the class of the drafters; its module and those it imports from its own package are copied, too.

    Raises:
        ValueError: a module of the family cannot be copied: its source is not in a file, or it imports in a way that has no flat form.
    """
    family = kind.__module__.partition(".")[0]
    roots = (_OURS,) if family == _OURS else (_OURS, family)
    copied: dict[str, _Copied] = {_REGISTRY: _Copied(_registry_of_one(kind), [kind.__module__])}
    pending = [_SOURCE, kind.__module__]
    while pending:
        module = pending.pop()
        if module not in copied:
            copied[module] = _copied(module, roots)
            pending += copied[module].imports
    texts = {_flat(module): copy.text for module, copy in sorted(copied.items())}
    others = set().union(*(copy.packages for copy in copied.values())) - {*roots, *PACKAGES}
    return ShippedCode(dict(sorted(texts.items())), tuple(_requirement(name) for name in sorted(others)))


def _registry_of_one(kind: type[Drafter]) -> str:
    """The module that takes the registry's place: it knows this one family."""
    model_type, name = kind.config_class.model_type, kind.__name__
    return (
        f'"""The one drafter family that this folder decodes with."""\n\nfrom .{_flat(kind.__module__)} import {name}\n\n\n'
        f'def drafter_class(model_type):\n    """See draftsmith, module {_REGISTRY}."""\n    if model_type != {model_type!r}:\n'
        f'        raise ValueError(f"this code decodes with model_type {model_type}, not {{model_type!r:.80}}; export the drafter again")\n'
        f"    return {name}\n"
    )


def _requirement(package: str) -> str:
    names = packages_distributions().get(package)
    return f"{names[0]}>={version(names[0])}" if names else package


@dataclass
class _Copied:
    """A module as it is shipped: its text, the modules of ours and of the family that it imports, and packages of others."""

    text: str
    imports: list[str]
    packages: set[str] = field(default_factory=set)


def _copied(module: str, roots: tuple[str, ...]) -> _Copied:
    text = _source(module)
    text = _without(text, list(_left_out(ast.parse(text), _LEFT_OUT.get(module, set()))))
    while dead := list(_dead(ast.parse(text))):
        text = _without(text, dead)
    copied = _Copied(text, [])
    named = _named(ast.parse(text))
    edits = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom | ast.Import):
            edits += _import_edits(module, node, roots, named, copied)
    owner = f"draftsmith {__version__}, module {module}. SPDX-License-Identifier: Apache-2.0"
    head = f"# From {owner}\n" if module.startswith(f"{_OURS}.") else f"# From module {module}\n"
    copied.text = head + _without(text, edits)
    return copied


def _source(module: str) -> str:
    """The text of a module.

    Raises:
        ValueError: it lies in no file.
    """
    spec = None if module == "__main__" else find_spec(module)
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        raise ValueError(
            f"the drafter's code is in {module!r}, which is no Python file of a package; move it into one, since the folder ships it"
        )
    return Path(spec.origin).read_text(encoding="utf-8")


def _import_edits(
    module: str, node: ast.ImportFrom | ast.Import, roots: tuple[str, ...], named: set[str], copied: _Copied
) -> list[_Edit]:
    """The edits that give an import its flat form; none for packages of others, which are noted."""
    if isinstance(node, ast.Import):
        tops = {alias.name.partition(".")[0] for alias in node.names}
        if tops & set(roots):
            raise ValueError(
                f"{module}, line {node.lineno}: `{ast.unparse(node)}` has no flat form; write `from module import name`"
            )
        copied.packages |= tops - set(sys.stdlib_module_names)
        return []
    source = _absolute(module, node)
    if source.partition(".")[0] not in roots:
        copied.packages |= {source.partition(".")[0]} - set(sys.stdlib_module_names)
        return []
    lines: dict[str, list[str]] = {}
    for alias in node.names:
        if (alias.asname or alias.name) not in named:
            continue
        home = _home(source, alias.name)
        if home is None:
            raise ValueError(
                f"{module}, line {node.lineno}: `{ast.unparse(node)}` has no flat form; import {alias.name} from the module that defines it"
            )
        lines.setdefault(home, []).append(alias.name if alias.asname is None else f"{alias.name} as {alias.asname}")
    copied.imports += lines
    indent = " " * node.col_offset
    return [
        _Edit.of(
            node, "".join(f"{indent}from .{_flat(home)} import {', '.join(names)}\n" for home, names in lines.items())
        )
    ]


def _absolute(module: str, node: ast.ImportFrom) -> str:
    """The full name of the module that names are imported from. Example: ``.heads`` in ``my.hydra`` -> ``my.heads``."""
    if node.level == 0:
        return node.module or ""
    package = module if _is_package(module) else module.rpartition(".")[0]
    return resolve_name("." * node.level + (node.module or ""), package)


def _home(source: str, name: str) -> str | None:
    """The module to import a name from: our packages only pass names on from their modules. None for a module, or where none is known."""
    if not _is_package(source):
        return source
    if find_spec(f"{source}.{name}") is not None:
        return None
    if source.partition(".")[0] != _OURS:
        return source
    for node in ast.parse(_source(source)).body:
        if isinstance(node, ast.ImportFrom):
            passed_on = {alias.asname or alias.name for alias in node.names}
            if name in passed_on or ("*" in passed_on and hasattr(importlib.import_module(node.module or ""), name)):
                return _home(node.module or "", name)
    home = getattr(getattr(importlib.import_module(source), name), "__module__", None)
    return home if isinstance(home, str) and home.startswith(f"{_OURS}.") else None


def _is_package(module: str) -> bool:
    spec = find_spec(module)
    return spec is not None and spec.submodule_search_locations is not None


def _flat(module: str) -> str:
    if module == _SOURCE:
        return ENTRY
    ours = module.startswith(f"{_OURS}.")
    return (module.removeprefix(f"{_OURS}.") if ours else f"family_{module}").replace(".", "_")


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
        return cls(min([node.lineno, *(decorator.lineno for decorator in decorators)]) - 1, node.end_lineno, text)


def _without(text: str, edits: list[_Edit]) -> str:
    lines = text.splitlines(keepends=True)
    for edit in sorted(edits, key=lambda edit: edit.start, reverse=True):
        lines[edit.start : edit.end] = [edit.text] if edit.text else []
    return "".join(lines)


def _left_out(tree: ast.Module, functions: set[str]) -> Iterator[_Edit]:
    """What is named, whatever is registered with Transformers, and a family's record with its settings, which serve training.

    A copy must not take the place of another's classes in a registry.
    """
    missing, settings = set(functions), _settings_named(tree)
    for node in tree.body:
        is_settings = isinstance(node, ast.ClassDef) and node.name in settings
        if is_settings or _record(node) is not None or _is_registration(node):
            yield _Edit.of(node)
        owner, members = (f"{node.name}.", node.body) if isinstance(node, ast.ClassDef) else ("", [node])
        for member in members:
            if isinstance(member, ast.FunctionDef) and f"{owner}{member.name}" in functions:
                missing.discard(f"{owner}{member.name}")
                yield _Edit.of(member)
    assert not missing, f"nowhere to be left out: {missing}"


def _record(node: ast.stmt) -> ast.Call | None:
    """The call of ``NAME = Family(...)``."""
    call = node.value if isinstance(node, ast.Assign | ast.AnnAssign) else None
    if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == _RECORD:
        return call
    return None


def _settings_named(tree: ast.Module) -> set[str]:
    """The classes that a module's records name as settings."""
    arguments: list[ast.expr] = []
    for call in filter(None, map(_record, tree.body)):
        by_name = [word.value for word in call.keywords if word.arg == "settings"]
        arguments += by_name or call.args[_SETTINGS_ARGUMENT : _SETTINGS_ARGUMENT + 1]
    return {value.id for value in arguments if isinstance(value, ast.Name)}


def _is_registration(node: ast.stmt) -> bool:
    """Whether this registers classes with Transformers."""
    return isinstance(node, ast.Expr | ast.For) and any(_registers(part) for part in ast.walk(node))


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
            bound = {(alias.asname or alias.name).split(".")[0] for alias in node.names}
            if bound.isdisjoint(named) and getattr(node, "module", "") != "__future__":
                yield _Edit.of(node)
        elif isinstance(node, ast.FunctionDef) and node.name.startswith("_") and node.name not in named:
            yield _Edit.of(node)


def _named(tree: ast.Module) -> set[str]:
    """Names that are read anywhere; words in strings count, since ``__all__`` and quoted annotations are such."""
    nodes = list(ast.walk(tree))
    words = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return words | {node.id for node in nodes if isinstance(node, ast.Name)}

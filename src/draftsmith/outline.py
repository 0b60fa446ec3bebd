"""The outline of a command: its signature and docstring, read from its source without running its module.

A command's module imports torch and transformers, which takes seconds. Help and mistakes in the arguments need the signature alone.
Owns the reading of source. Knows none of the commands.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import docstring_parser

PACKAGE = "draftsmith"


def outline(module: str, function: str) -> Callable[..., Any]:
    """A function of the same parameters, types, defaults and docstring, which does nothing.

    Types and defaults are made from the source of the modules that define them; dataclasses keep their fields and lose their methods.
    """
    made: Callable[..., Any] = _Outlines().value(module, function)
    return made


@dataclass(frozen=True)
class Setting:
    """One parameter of a class: its name, its default as it is written (None where it is required), and what it is for."""

    name: str
    default: str | None
    text: str


@dataclass(frozen=True)
class ClassSettings:
    """What a class is for, and its parameters with what its docstring says of each."""

    summary: str
    settings: tuple[Setting, ...]


def class_settings(module: str, name: str) -> ClassSettings:
    """The parameters of a class by which it is made, from its source alone.

    Raises:
        ValueError: the module defines no such class with an `__init__` of its own.
    """
    body = ast.parse(_source(module).read_bytes()).body
    definition = next((part for part in body if isinstance(part, ast.ClassDef) and part.name == name), None)
    made = (
        [part for part in definition.body if isinstance(part, ast.FunctionDef) and part.name == "__init__"]
        if definition
        else []
    )
    if definition is None or not made:
        raise ValueError(f"{module} defines no class {name} with an __init__")
    described = docstring_parser.parse(ast.get_docstring(definition) or "")
    texts = {param.arg_name: param.description or "" for param in described.params}
    arguments = made[0].args
    names = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)][1:]
    defaults: list[ast.expr | None] = [*arguments.defaults, *arguments.kw_defaults]
    written = [None] * (len(names) - len(defaults)) + [ast.unparse(value) if value else None for value in defaults]
    settings = tuple(Setting(each, default, texts.get(each, "")) for each, default in zip(names, written, strict=True))
    return ClassSettings(described.short_description or "", settings)


class _Outlines:
    """Names of modules, each made when something asks for it."""

    def __init__(self) -> None:
        self._statements: dict[str, dict[str, ast.stmt]] = {}
        self._values: dict[tuple[str, str], Any] = {}

    def value(self, module: str, name: str) -> Any:
        """What `name` is in `module`. Modules outside of this package are imported."""
        if module.partition(".")[0] != PACKAGE:
            return getattr(importlib.import_module(module), name)
        if (module, name) not in self._values:
            self._values[module, name] = self._made(module, name)
        return self._values[module, name]

    def _made(self, module: str, name: str) -> Any:
        statement = self._of(module).get(name)
        if statement is None:
            return getattr(builtins, name)
        if isinstance(statement, ast.ImportFrom):
            alias = next(alias for alias in statement.names if name == (alias.asname or alias.name))
            return self.value(str(statement.module), alias.name)
        if isinstance(statement, ast.Import):
            return importlib.import_module(name)
        bare = _without_bodies(statement)
        used = {node.id for node in ast.walk(bare) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
        # Readers of signatures import the module that a function says it is from: let that be this one.
        space = {"__name__": __name__} | {other: self.value(module, other) for other in used}
        # Not inherited from this file: with it, annotations would stay text.
        exec(compile(ast.Module([bare], []), module, "exec", dont_inherit=True), space)
        return space[name]

    def _of(self, module: str) -> dict[str, ast.stmt]:
        """The statements at the top of a module by the names that they bind; imports for type checkers are among them."""
        if module not in self._statements:
            statements: dict[str, ast.stmt] = {}
            waiting: list[ast.stmt] = ast.parse(_source(module).read_bytes()).body[::-1]
            while waiting:
                statement = waiting.pop()
                if isinstance(statement, ast.If):
                    waiting += statement.body[::-1]
                statements.update(dict.fromkeys(_bound(statement), statement))
            self._statements[module] = statements
        return self._statements[module]


def _bound(statement: ast.stmt) -> list[str]:
    if isinstance(statement, ast.Import | ast.ImportFrom):
        return [alias.asname or alias.name for alias in statement.names]
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        return [statement.name]
    targets = statement.targets if isinstance(statement, ast.Assign) else []
    if isinstance(statement, ast.AnnAssign):
        targets = [statement.target]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _without_bodies(statement: ast.stmt) -> ast.stmt:
    """A function with its docstring only, a class without its methods, anything else as it is."""
    if isinstance(statement, ast.FunctionDef):
        has_docstring = ast.get_docstring(statement) is not None
        statement.body = statement.body[:1] if has_docstring else [ast.copy_location(ast.Pass(), statement)]
        statement.decorator_list, statement.returns = [], None
    if isinstance(statement, ast.ClassDef):
        statement.body = [part for part in statement.body if not isinstance(part, ast.FunctionDef)]
        statement.body = statement.body or [ast.copy_location(ast.Pass(), statement)]
    return statement


def _source(module: str) -> Path:
    """The file of a module, found without importing the subpackage, or the other package, that it is in."""
    names = module.split(".")
    depth = 2 if names[0] == PACKAGE else 1
    spec = importlib.util.find_spec(".".join(names[:depth]))
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent
    if len(names) <= depth:
        return Path(spec.origin)
    inside = folder.joinpath(*names[depth:])
    return inside / "__init__.py" if inside.is_dir() else inside.with_suffix(".py")

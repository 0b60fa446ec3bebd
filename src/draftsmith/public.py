"""Public names: short import paths that stay, wherever a module lies today.

Owns two things. A room's own name offers what its main module holds, and nothing is imported before it is asked for. Modules that
have moved answer to their earlier names, so that class paths in a user's YAML and imports in a user's code keep working.
Knows no module but by name.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def names_of(module: str) -> Callable[[str], Any]:
    """A package's ``__getattr__`` that looks names up in one module, imported at the first of them.

    The package's own modules come first, so that ``from package import module`` imports nothing else.
    """
    package = module.rpartition(".")[0]

    def look_up(name: str) -> Any:
        if name.startswith("__") or importlib.util.find_spec(f"{package}.{name}") is not None:
            raise AttributeError(name)
        return _attribute(module, name)

    return look_up


def lazy_names(package: str, homes: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """A package's ``__getattr__`` and ``__dir__`` for public names.

    Args:
        package: the package's full name.
        homes: which module each name lives in, below the package.
    """

    def look_up(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return _attribute(f"{package}.{homes[name]}", name)

    def listing() -> list[str]:
        return sorted(homes)

    return look_up, listing


def _attribute(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


class MovedModules(MetaPathFinder, Loader):
    """Answers imports of modules that have moved with a module that looks every name up in the new place."""

    def __init__(self, moved: Mapping[str, str]) -> None:
        self._moved = moved

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """A spec for a moved module, None for any other."""
        return ModuleSpec(fullname, self, origin=self._moved[fullname]) if fullname in self._moved else None

    def exec_module(self, module: ModuleType) -> None:
        """Makes the new module the source of every name."""
        module.__dict__["__getattr__"] = partial(_attribute, self._moved[module.__name__])


def answer_for_moved(moved: Mapping[str, str]) -> None:
    """Lets modules answer to their earlier names. Real modules come first: this finder is asked last."""
    if not any(isinstance(finder, MovedModules) for finder in sys.meta_path):
        sys.meta_path.append(MovedModules(moved))

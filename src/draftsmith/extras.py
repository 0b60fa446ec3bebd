"""Packages that only one part of draftsmith needs: the command that installs them.

The command names the packages themselves, so it works in a checkout, beside an installed wheel and with a package index alike: pip does
not have to find draftsmith anywhere. It names this process's Python too, so no environment has to be activated. Version ranges come from
the extras in `pyproject.toml`. Knows nothing of what uses a package.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import shlex
import sys

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def install_command(*packages: str) -> str:
    """The command that installs `packages` where this process finds its own, to paste into a shell.

    Example: `install_command("fastapi", "s3fs")` -> `/x/.venv/bin/python -m pip install 'fastapi<1,>=0.115' 's3fs>=2024.6'`.

    Args:
        packages: names as on the package index. A package that `pyproject.toml` lists gets the version range stated there.
    """
    ranges = _listed_requirements()
    return shlex.join([*_installer(), *(ranges.get(_normalised(package), package) for package in packages)])


def _installer() -> list[str]:
    """The words that install into this process's environment: its own pip, or uv, whose environments have none."""
    python = sys.executable or "python"
    if importlib.util.find_spec("pip") is None:
        return ["uv", "pip", "install", "--python", python]
    return [python, "-m", "pip", "install"]


def _listed_requirements() -> dict[str, str]:
    """What draftsmith and its extras require, by normalised name: `{"fastapi": "fastapi<1,>=0.115"}`; empty where it is not installed."""
    try:
        lines = importlib.metadata.requires("draftsmith") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    requirements = [line.partition(";")[0].replace(" ", "") for line in lines]
    return {_normalised(name[0]): line for line in requirements if (name := _NAME.match(line))}


def _normalised(package: str) -> str:
    """A package's name as the index compares names (PEP 503)."""
    return re.sub(r"[-_.]+", "-", package).lower()

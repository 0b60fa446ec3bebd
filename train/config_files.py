"""Configurations that change others: `base: other.yaml` in a file means that `other.yaml` is read first.

It lies beside the file, or is one that ships with draftsmith.

Owns: the order in which configuration files are read. Does not know: what the files hold.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path

import yaml

KEY = "base"
_OPTIONS = ("--config", "-c")


def with_bases(arguments: Sequence[str]) -> list[str]:
    """The arguments with the base of every configuration file before it. Each file is read once.

    Example: `fit --config mine.yaml`, and mine.yaml holds `base: drafter.yaml` -> `fit --config drafter.yaml --config mine.yaml`.

    Raises:
        ValueError: a base that does not exist, or files that are each other's base.
    """
    expanded: list[str] = []
    read: set[Path] = set()
    waiting = list(arguments)
    while waiting:
        word = waiting.pop(0)
        option, equals, value = word.partition("=")
        if option not in _OPTIONS or not (equals or waiting):
            expanded.append(word)
            continue
        value = value if equals else waiting.pop(0)
        for file in _bases(Path(value), ()):
            if file.resolve() not in read:
                expanded.append(f"--config={file}")
                read.add(file.resolve())
        expanded.append(f"--config={value}")
    return expanded


def _bases(file: Path, above: tuple[Path, ...]) -> Iterator[Path]:
    """The files to read before this one, the first first."""
    name = _base_of(file)
    if name is None:
        return
    base = file.parent / name
    if not base.is_file() and name == Path(name).name:
        base = Path(str(files("draftsmith.configs"))) / name
    if not base.is_file():
        raise ValueError(
            f"{file}: base is {name!r}, which is neither a file beside this one nor one of draftsmith's configurations; name one of these"
        )
    if base.resolve() in (one.resolve() for one in (*above, file)):
        raise ValueError(f"{file}: base is {name!r}, whose base is this file; remove one of the two")
    yield from _bases(base, (*above, file))
    yield base


def _base_of(file: Path) -> str | None:
    """What a file names as its base. A file that cannot be read has none: the parser says what is wrong with it."""
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError, yaml.YAMLError):
        return None
    name = content.get(KEY) if isinstance(content, dict) else None
    return name if isinstance(name, str) else None


def already_read(name: str) -> None:
    """The type of the key `base`. Its value becomes null, so that a saved configuration needs no other file."""

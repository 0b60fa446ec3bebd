"""What a user gives a training run: the keys of its configuration files and flags, one by one, in the order in which they are read.

Owns: that order, and which file a key comes from. Imports neither torch nor Lightning.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

_DEPTH = 5  # down to model.init_args.drafter.init_args.draft_vocab_size


@dataclass(frozen=True)
class Given:
    """One key with its value.

    Attributes:
        key: joined by dots, such as `model.init_args.lr`.
        value: as YAML reads it; of a flag, the word behind it.
        file: where it stands; empty for a flag.
    """

    key: str
    value: Any
    file: str = ""


def sources(arguments: Sequence[str]) -> Iterator[list[Given]]:
    """The keys of each configuration file in the order in which they are read, then those of all flags.

    Args:
        arguments: of the command, with the base of each file before it.

    Yields:
        The keys of one file, or of all flags.
    """
    flags: list[Given] = []
    words = list(arguments)
    while words:
        option, equals, value = words.pop(0).partition("=")
        if not option.startswith("--"):
            continue
        if not equals and words and not words[0].startswith("--"):
            value = words.pop(0)
        if option == "--config":
            yield list(_in_file(value))
        else:
            flags.append(Given(option[2:], value))
    yield flags


def within(given: Given) -> Iterator[Given]:
    """A key and those inside of its value, where a flag's value is a mapping.

    Args:
        given: a key of a file or a flag.

    Yields:
        The key itself first.
    """
    yield given
    if given.file or "{" not in str(given.value):
        return
    try:
        content = yaml.safe_load(given.value)
    except yaml.YAMLError:
        return
    yield from _flat(content, f"{given.key}.", "", _DEPTH)


def _in_file(name: str) -> Iterator[Given]:
    """The keys of a configuration, which may be its text. The parser says what is wrong with one that is no YAML."""
    try:
        content = yaml.safe_load(Path(name).read_bytes() if Path(name).is_file() else name)
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return
    yield from _flat(content, "", name, _DEPTH)


def _flat(content: Any, prefix: str, file: str, depth: int) -> Iterator[Given]:
    if not isinstance(content, dict) or not depth:
        return
    for key, value in content.items():
        yield Given(f"{prefix}{key}", value, file)
        yield from _flat(value, f"{prefix}{key}.", file, depth - 1)

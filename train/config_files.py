"""Configurations that change others: `base: other.yaml` in a file means that `other.yaml` is read first.

It lies beside the file, or is one that ships with draftsmith.

Owns: the order in which configuration files are read, and the earlier names of those that ship. Does not know: what the files hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from importlib.resources import files
from pathlib import Path

import yaml

KEY = "base"
MOVED = {
    "embedded_draft_house.yaml": "embedded/draft_house.yaml",
    "embedded_draft_wordings.yaml": "embedded/draft_wordings.yaml",
    "embedded_target_house.yaml": "embedded/target_house.yaml",
    "embedded_target_wordings.yaml": "embedded/target_wordings.yaml",
    "engine_ddp.yaml": "engines/ddp.yaml",
    "engine_fsdp2.yaml": "engines/fsdp2.yaml",
    "engine_one.yaml": "engines/one.yaml",
    "engine_zero2.yaml": "engines/zero2.yaml",
    "engine_zero3.yaml": "engines/zero3.yaml",
}
"""Earlier names of shipped configurations, which keep working: each with its path today in the folder `configs`."""
_OPTIONS = ("--config", "-c")


def _tell(line: str) -> None:
    # Only here: Lightning takes seconds to import, and help and misspelt keys need no more than the names of files.
    from pytorch_lightning.utilities.rank_zero import rank_zero_info

    rank_zero_info(line)


def with_bases(arguments: Sequence[str], tell: Callable[[str], None] = _tell) -> list[str]:
    """The arguments with the base of every configuration file before it. Each file is read once.

    Example: `fit --config mine.yaml`, and mine.yaml holds `base: drafter.yaml` -> `fit --config drafter.yaml --config mine.yaml`.

    Args:
        arguments: of the command.
        tell: takes a line about each file that has another name today; the first process prints it by default.

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
        value = _by_todays_name(value if equals else waiting.pop(0), tell)
        for file in _bases(Path(value), (), tell):
            if file.resolve() not in read:
                expanded.append(f"--config={file}")
                read.add(file.resolve())
        expanded.append(f"--config={value}")
    return expanded


def _by_todays_name(value: str, tell: Callable[[str], None]) -> str:
    """The value as it is. For the earlier name of a shipped file, where no such file is: its path today, with a line that says so."""
    file = Path(value)
    name = MOVED.get(file.name)
    if name is None or file.is_file():
        return value
    beside = file.parent / name
    today = beside if beside.is_file() else _shipped(name)
    tell(f"{file} is now {today}")
    return str(today)


def _shipped(name: str) -> Path:
    """Where a configuration of draftsmith's would lie."""
    return Path(str(files("draftsmith.configs"))) / name


def is_shipped(file: Path) -> bool:
    """Whether a file is a configuration of draftsmith's, unchanged, wherever it lies.

    Args:
        file: of any folder.
    """
    if not file.is_file():
        return False
    content = file.read_bytes()
    return any(shipped.read_bytes() == content for shipped in _shipped("").rglob(file.name))


def _bases(file: Path, above: tuple[Path, ...], tell: Callable[[str], None]) -> Iterator[Path]:
    """The files to read before this one, in order."""
    name = _base_of(file)
    if name is None:
        return
    base = Path(_by_todays_name(str(file.parent / name), tell))
    if not base.is_file() and ".." not in Path(name).parts:
        base = _shipped(name)
    if not base.is_file():
        raise ValueError(
            f"{file}: base is {name!r}, which is neither a file beside this one nor one of draftsmith's configurations; name one of these"
        )
    if base.resolve() in (configuration.resolve() for configuration in (*above, file)):
        raise ValueError(f"{file}: base is {name!r}, whose base is this file; remove one of the two")
    yield from _bases(base, (*above, file), tell)
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

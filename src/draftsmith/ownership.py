"""Whose a folder is: the claim that a stage leaves in each folder it writes whole, and the refusal to replace any other.

Owns the claim inside `provenance.json`, and where caches of this user lie. Does not know what stages write, nor how a folder gets to
its place.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from draftsmith.json_text import json_text, parse_json

CLAIM_FILE = "provenance.json"
_KEY = "folder"
_NUM_NAMED = 3


@dataclass(frozen=True)
class Claim:
    """What a stage says of a folder that it wrote: its own name, and everything that it put there.

    Attributes:
        stage: such as `draftsmith export`.
        entries: files and folders inside, relative, with forward slashes.
    """

    stage: str
    entries: frozenset[str]


def claimed(folder: Path, stage: str) -> str:
    """The text of the folder's `provenance.json`, with a claim of `stage` to all that the folder holds now."""
    path = folder / CLAIM_FILE
    record = json.loads(path.read_bytes()) if path.exists() else {}
    entries = sorted({*_entries(folder), CLAIM_FILE})
    return json_text({**record, _KEY: {"stage": stage, "entries": entries}}, indent=2) + "\n"


def claimed_too(folder: Path, entry: str) -> str | None:
    """The text of the folder's `provenance.json` with one entry more in its claim; None where nothing is to be changed."""
    claim = read_claim(folder)
    if claim is None or entry in claim.entries:
        return None
    record = json.loads((folder / CLAIM_FILE).read_bytes())
    record[_KEY] = {"stage": claim.stage, "entries": sorted({*claim.entries, entry})}
    return json_text(record, indent=2) + "\n"


def read_claim(folder: Path) -> Claim | None:
    """The claim in a folder; None where there is none that can be read."""
    try:
        record = parse_json((folder / CLAIM_FILE).read_bytes(), str(folder / CLAIM_FILE), "delete it")
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError):
        return None
    claim: Any = record.get(_KEY) if isinstance(record, dict) else None
    if not isinstance(claim, dict) or not isinstance(claim.get("stage"), str):
        return None
    entries = claim.get("entries")
    if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
        return None
    return Claim(claim["stage"], frozenset(entries))


def check_replaceable(path: Path, stage: str, inputs: Sequence[Path] = ()) -> None:
    """Lets `stage` replace what is at `path`: nothing, an empty folder, or one that it wrote and nobody added to.

    Links are followed. Call it before the work begins: `atomic_directory` asks again, but only once the work is done.

    Args:
        path: of the folder to be.
        stage: who is to write it.
        inputs: files and folders that the stage reads; what is not there does not count.

    Raises:
        ValueError: `path` is a file, a mount point, the folder that the command runs in or one above it; it holds an input, or
            something that `stage` did not write; or another stage wrote it.
    """
    folder = Path(path).resolve()
    working = Path.cwd()
    if folder in (working, *working.parents):
        raise ValueError(f"{path} holds the folder that you are in ({working}), so it cannot be replaced; name another")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{path} is a file, but a folder is to be written there; remove it or name another folder")
    if os.path.ismount(folder):
        raise ValueError(f"{path} is a mount point, so it cannot be replaced; name a folder inside it")
    for source in inputs:
        if source.exists() and folder in (source.resolve(), *source.resolve().parents):
            raise ValueError(f"`{stage}` reads {source}, and would delete it with {path}; name another folder")
    if folder.is_dir():
        check_contents(folder, stage, path)


def check_contents(folder: Path, stage: str, shown: Path) -> None:
    """The part of `check_replaceable` that looks into an existing folder, which the error calls `shown`.

    Raises:
        ValueError: see there.
    """
    claim = read_claim(folder)
    if claim is None:
        others = sorted(entry.name for entry in os.scandir(folder))
        hint = " (if an earlier version of draftsmith wrote it, delete it yourself)" if CLAIM_FILE in others else ""
    elif claim.stage != stage:
        raise ValueError(f"`{claim.stage}` wrote {shown}, and `{stage}` would replace it; name another folder")
    else:
        others, hint = sorted(set(_entries(folder)) - claim.entries), ""
    if others:
        raise ValueError(
            f"{shown} holds {_named(others)}, which `{stage}` did not write and would delete; move what you need, "
            f"or name an empty or a new folder{hint}"
        )


def check_unclaimed(folder: Path, reports: Iterable[str] = ()) -> None:
    """Keeps stages that add files to a folder out of those that another stage writes whole: they would replace its record.

    Args:
        folder: where the files go.
        reports: names of those that the stage writes anew, behind its record.

    Raises:
        ValueError: the folder belongs to a stage, or holds a file of such a name and no record.
    """
    claim = read_claim(folder)
    if claim is not None:
        raise ValueError(f"`{claim.stage}` wrote {folder}, record included; name another folder for these files")
    for name in reports:
        check_alone(folder / name, folder / CLAIM_FILE)


def check_alone(log: Path, settings: Path) -> None:
    """Keeps a stage that replaces a file, or adds to it and cuts off its torn last line, away from a file that it did not begin.

    Raises:
        ValueError: `log` is there and the `settings` that the stage writes before it are not.
    """
    if log.exists() and not settings.exists():
        raise ValueError(
            f"{log} is there without {settings.name}, so this command did not begin it; name another folder"
        )


def check_begun(log: Path, *fields: str) -> None:
    """As `check_alone`, where no settings lie beside the file: what the stage writes there begins with one of these fields.

    Raises:
        ValueError: `log` is there and begins otherwise.
    """
    if not log.exists():
        return
    openings = [f'{{"{field}": '.encode() for field in fields]
    with open(log, "rb") as file:
        beginning = file.read(max(map(len, openings)))
    if not any(beginning.startswith(opening) or opening.startswith(beginning) for opening in openings):
        raise ValueError(
            f"{log} was not written by this command, which would change it; rename it or name another folder"
        )


def check_output_file(path: Path, inputs: Iterable[Path] = ()) -> None:
    """Let a command write one file, which replaces what is at `path`: nothing, or a file that nothing else depends on.

    Args:
        path: of the file to be.
        inputs: files and folders that the command reads; what is not there does not count.

    Raises:
        ValueError: `path` is a folder, an input, a file inside one, or a file of a folder that a stage wrote whole.
    """
    file = Path(path).resolve()
    if file.is_dir():
        raise ValueError(f"{path} is a folder, but a file is to be written there; name a file inside it")
    if not file.exists():
        return
    for source in inputs:
        if source.exists() and source.resolve() in (file, *file.parents):
            raise ValueError(f"the command reads {source}, and would overwrite it with {path}; name another file")
    claim = read_claim(file.parent)
    if claim is not None and file.name in claim.entries:
        raise ValueError(f"`{claim.stage}` wrote {path}, which would be overwritten; name another file")


def _entries(folder: Path) -> Iterable[str]:
    return (path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def _named(entries: list[str]) -> str:
    """Example: `a, b, c and 2 more`."""
    more = len(entries) - _NUM_NAMED
    return ", ".join(entries[:_NUM_NAMED]) + (f" and {more} more" if more > 0 else "")


def user_cache_folder(name: str, remedy: str = "") -> Path:
    """One of this user's caches: `draftsmith/NAME` in `$XDG_CACHE_HOME`, or else in `~/.cache`.

    Args:
        name: of the cache, such as shards.
        remedy: what else the user can do, for the message: `, or give shard_cache`.

    Returns:
        The folder, which need not be there.

    Raises:
        ValueError: that variable is no absolute path, or this user has no home.
    """
    cache = os.environ.get("XDG_CACHE_HOME")
    if cache:
        if not Path(cache).is_absolute():
            raise ValueError(f"XDG_CACHE_HOME is {cache!r}, which is no absolute path; correct it{remedy}")
        return Path(cache) / "draftsmith" / name
    try:
        return Path.home() / ".cache" / "draftsmith" / name
    except RuntimeError as error:
        raise ValueError(f"this user has no home folder for {name} ({error}); set XDG_CACHE_HOME{remedy}") from error

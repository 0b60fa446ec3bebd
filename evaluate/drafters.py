"""Which drafters are evaluated and with which shapes: the words of the command line.

Owns how names, folders and shapes are joined. Does not know how a shape is read, drafters are loaded or anything is decoded.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from draftsmith.models.drafter_folder import drafter_folder
from draftsmith.models.limits import DraftLimits
from draftsmith.models.shapes import parse_shape


@dataclass(frozen=True)
class Entry:
    """One drafter to evaluate: its name in the report, its folder, and the shapes it drafts with."""

    name: str
    path: Path
    shapes: tuple[DraftLimits, ...]


def parse_entries(words: Sequence[str], shapes: Sequence[str]) -> list[Entry]:
    """Drafters from `PATH`, `NAME=PATH` or either with its own shapes, `NAME=PATH@1x4,10x4n60`; else they take `shapes`.

    PATH may also be a hub id or `embedded:draft_lm`.

    Example: words `["runs/a/drafter", "wide=runs/b@10x4"]` and shapes `["1x4"]` give `drafter` with 1x4, `wide` with
        10x4.

    Raises ValueError for a path that is no folder, a bad shape, no shape, or two drafters of one name.
    """
    entries = []
    for word in words:
        place, _, own = word.partition("@")
        name, equals, path = place.partition("=")
        given = path if equals else place
        folder = drafter_folder(given)
        chosen = tuple(parse_shape(shape) for shape in (own.split(",") if own else shapes))
        if not chosen:
            raise ValueError(f"drafter {word!r} has no shape; give --shapes 1x4, or {word}@1x4")
        if len(set(chosen)) < len(chosen):
            raise ValueError(f"drafter {word!r} has one shape twice; give each once")
        entries.append(Entry(name if equals else _name_of(given), folder, chosen))
    names = [entry.name for entry in entries]
    for name in names:
        if names.count(name) > 1 or name in ("plain", "transformers"):
            raise ValueError(f"drafter name {name!r} is taken; name the drafters apart with NAME=PATH")
    return entries


def _name_of(given: str) -> str:
    """Example: `runs/a/drafter` is called `drafter`, `embedded:draft_lm` `draft_lm` and a hub id's `org/small` `small`."""
    return Path(given.removeprefix("embedded:")).resolve().name

"""Which drafters are evaluated and with which shapes: the words of the command line.

Owns how names, folders and shapes are joined. Does not know how a shape is read, drafters are loaded or anything is decoded.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from draftsmith.models.drafters.drafter_folder import drafter_folder
from draftsmith.models.tree.limits import DraftLimits
from draftsmith.models.tree.shapes import parse_shape

RESERVED = ("plain", "transformers")  # rows of every report


@dataclass(frozen=True)
class Entry:
    """One drafter to evaluate: its name in the report, its folder, and the shapes it drafts with."""

    name: str
    path: Path
    shapes: tuple[DraftLimits, ...]


def parse_entries(words: Sequence[str], shapes: Sequence[str] | None) -> list[Entry]:
    """Drafters from `PATH`, `NAME=PATH` or either with its own shapes, `NAME=PATH@1x4,10x4n60`; else they take `shapes`.

    Where `shapes` is None they get none: each is drafted with as its family has it.

    PATH may also be a hub id or `embedded:draft_lm`.

    Example: words `["runs/a/drafter", "wide=runs/b@10x4"]` and shapes `["1x4"]` give `drafter` with 1x4, `wide` with
        10x4.

    Drafters without a name of their own in folders of one name are called after their parents: `runs/a/drafter` and `runs/b/drafter`
    are `a` and `b`.

    Raises:
        ValueError: a path is no folder, a shape is bad, missing or there twice, or two drafters cannot be told apart.
    """
    entries: list[Entry] = []
    unnamed: list[int] = []
    for word in words:
        place, _, own = word.partition("@")
        name, equals, path = place.partition("=")
        given = path if equals else place
        if "," in given and not Path(given).exists():
            raise ValueError(f"drafter {word!r} holds a comma before its shapes; name several as --drafters A B")
        folder = drafter_folder(given)
        chosen = tuple(parse_shape(shape) for shape in (own.split(",") if own else shapes or ()))
        if not chosen and shapes is not None:
            raise ValueError(f"drafter {word!r} has no shape; give --shapes 1x4, or {word}@1x4")
        if len(set(chosen)) < len(chosen):
            raise ValueError(f"drafter {word!r} has one shape twice; give each once")
        if not equals:
            unnamed.append(len(entries))
        entries.append(Entry(name if equals else given, folder, chosen))
    taken = [*RESERVED, *(entry.name for number, entry in enumerate(entries) if number not in unnamed)]
    names = names_apart([entries[number].name for number in unnamed], taken)
    for number, name in zip(unnamed, names, strict=True):
        entries[number] = replace(entries[number], name=name)
    names = [*RESERVED, *(entry.name for entry in entries)]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"drafter name {name!r} is taken; name the drafters apart with NAME=PATH")
    return entries


def names_apart(given: Sequence[str], taken: Sequence[str] = ()) -> list[str]:
    """Short names for folders: each its own name, or where that is another's or taken, those of as many parents as it takes.

    Example: `x/a/drafter`, `x/b/drafter`, `y/b/drafter`, `x/wide` are `x/a`, `x/b`, `y/b`, `wide`; `embedded:draft_lm` is `draft_lm`.
        The same folder twice keeps one name.
    """
    places = [Path(folder.removeprefix("embedded:")).resolve().parts for folder in given]
    own = [place[-1] for place in places]
    kept = {name for name in own if own.count(name) == 1} - {*taken}
    names = []
    for place in places:
        alike = [other for other in places if other[-1] == place[-1]]
        for height in range(1, 1 if place[-1] in kept else max(map(len, alike))):
            parents = ["/".join(other[-1 - height : -1]) for other in alike]
            if len({*parents}) == len(parents) and not {*parents} & {*taken, *kept}:
                names.append("/".join(place[-1 - height : -1]))
                break
        else:
            names.append(place[-1])
    return names

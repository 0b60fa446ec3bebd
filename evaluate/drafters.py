"""Which drafters are evaluated and with which beam shapes: from the words of the command line to loaded drafters.

Owns that little language and the refusal of a checkpoint that does not load whole. Does not know how anything is
decoded.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoModel

from draftsmith.evaluate.records import shape_text
from draftsmith.models.drafter import Drafter, DraftLimits
from draftsmith.models.redrafter import ReDrafterConfig

_SHAPE = re.compile(r"(?P<width>\d+)x(?P<length>\d+)(?:n(?P<nodes>\d+))?(?:p(?P<floor>0?\.\d+))?")
# naming a config class here is what registers its family for AutoModel
FAMILIES = (ReDrafterConfig,)


@dataclass(frozen=True)
class Entry:
    """One drafter to evaluate: its name in the report, its folder, and the shapes it drafts with."""

    name: str
    path: Path
    shapes: tuple[DraftLimits, ...]


def parse_shape(text: str) -> DraftLimits:
    """`10x4`: beam width 10, 4 drafted tokens below the root. `10x4n16` verifies at most 16 nodes, `1x8p0.1` none whose
    cumulative draft probability is below 0.1.

    Raises ValueError for anything else.
    """
    found = _SHAPE.fullmatch(text.strip())
    if found is None:
        raise ValueError(
            f"beam shape {text!r} is not WIDTHxLENGTH, such as 1x4 or 10x4 (then n16 for a node budget, p0.1 for a "
            "least probability); LENGTH counts drafted tokens, the root excluded"
        )
    nodes, floor = found["nodes"], found["floor"]
    return DraftLimits(
        beam_width=int(found["width"]),
        draft_length=int(found["length"]),
        node_budget=int(nodes) if nodes else None,
        min_probability=float(floor) if floor else 0.0,
    )


def shape_name(limits: DraftLimits) -> str:
    """The text that `parse_shape` reads back."""
    return shape_text(limits.beam_width, limits.draft_length, limits.node_budget, limits.min_probability)


def parse_entries(words: Sequence[str], shapes: Sequence[str]) -> list[Entry]:
    """Drafters from `PATH`, `NAME=PATH` or either with its own shapes, `NAME=PATH@1x4,10x4`; else they take `shapes`.

    Example: words `["runs/a/drafter", "wide=runs/b@10x4"]` and shapes `["1x4"]` give `drafter` with 1x4, `wide` with
        10x4.

    Raises ValueError for a path that is no folder, a bad shape, no shape, or two drafters of one name.
    """
    entries = []
    for word in words:
        place, _, own = word.partition("@")
        name, equals, path = place.partition("=")
        folder = Path(path if equals else place)
        if not (folder / "config.json").is_file():
            raise ValueError(
                f"drafter {str(folder)!r} is no folder with a config.json; give what training or export wrote"
            )
        chosen = tuple(parse_shape(shape) for shape in (own.split(",") if own else shapes))
        if not chosen:
            raise ValueError(f"drafter {word!r} has no beam shape; give --shapes 1x4, or {word}@1x4")
        if len(set(chosen)) < len(chosen):
            raise ValueError(f"drafter {word!r} has one beam shape twice; give each once")
        entries.append(Entry(name if equals else folder.resolve().name, folder, chosen))
    names = [entry.name for entry in entries]
    for name in names:
        if names.count(name) > 1 or name in ("plain", "transformers"):
            raise ValueError(f"drafter name {name!r} is taken; name the drafters apart with NAME=PATH")
    return entries


def load_drafter(path: Path) -> Drafter:
    """A drafter of any registered family, every tensor of which is in its checkpoint.

    Raises ValueError when the checkpoint lacks tensors, or has others: the rest would be random numbers.
    """
    drafter, info = AutoModel.from_pretrained(path, output_loading_info=True)
    faults = {kind: sorted(map(str, info[kind])) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    if any(faults.values()):
        told = "; ".join(f"{kind.replace('_', ' ')}: {', '.join(found)}" for kind, found in faults.items() if found)
        raise ValueError(f"{path} is not a whole drafter ({told}); export it again")
    if not isinstance(drafter, Drafter):
        raise ValueError(f"{path} holds a {type(drafter).__name__}, not a drafter; give what training or export wrote")
    return drafter.eval()

"""The little language of draft shapes: `10x4`, `10x6n60`, `t3.2.1`, `s1.1.1.1`, `1x8e0.5`.

Owns how every :class:`DraftLimits` is written on a command line, in a report and in a file of paths. Each text reads back as the limits
it was written from. Knows nothing of how a shape is drafted; which limits make sense is decided in :mod:`draftsmith.models.tree.limits`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import fields
from decimal import Decimal
from itertools import accumulate, product
from operator import mul
from pathlib import Path
from typing import Any

from draftsmith.json_text import parse_json
from draftsmith.models.tree.limits import DraftLimits, EarlyStop, Rule, SampledChildren

RankPath = tuple[int, ...]

_NUMBER = r"(?:\d+\.?\d*|\.\d+)"
_SHAPE = re.compile(
    rf"""(?: (?P<width>\d+) x (?P<length>\d+) (?: n (?P<nodes>\d+) (?: m (?P<merge>\d+) )? )?
           | tree: (?P<file>.+\.json)
           | paths: (?P<leaves>\d[\d.+]*)
           | (?P<kind>[tskb]) (?P<children>\d+(?:\.\d+)*) )
        (?P<likeliest> l )?
        (?: p (?P<floor>{_NUMBER}) )?
        (?: e (?P<threshold>{_NUMBER}) (?P<controls>(?:[gasrm]{_NUMBER})*) )?""",
    re.VERBOSE,
)
_MOST_NODES = 4096
_CONTROLS = {"g": "scale", "a": "goal", "s": "step", "r": "rate_memory", "m": "threshold_memory"}
_RULES: dict[str, Rule] = {"s": "mcsd", "k": "kseq", "b": "block"}
_EXPLAINED = (
    "it is not WIDTHxLENGTH, such as 1x4 or 10x4 (LENGTH counts drafted tokens, the root excluded), WIDTHxLENGTHnNODES for a dynamic "
    "tree (then m2 to merge branches), tree:FILE.json, t3.2.1 for a static tree, or s1.1.1, b1.1.1 and k4.2.1 for sampled ones; then "
    "l for the likeliest tokens at every temperature, p0.1 for a least probability, e0.5 to stop early"
)


def parse_shape(text: str) -> DraftLimits:
    """The limits that a text describes.

    ======================  ===============================================================================================
    ``10x4``                beams: width 10, 4 drafted tokens below the root
    ``10x6n60``             a dynamic tree (arXiv:2406.16858): width 10, depth 6, the best 60 nodes are verified
    ``10x6n60m2``           the same; branches that come to the same 2 tokens share what follows (arXiv:2407.16207)
    ``tree:FILE.json``      a static tree (arXiv:2401.10774): a JSON list of paths of ranks, ``[[0], [1], [0, 0]]``
    ``t3.2.1``              a full static tree: 3 children of the root, 2 of each of them, 1 of each of those
    ``paths:0.0+0.1+1``     a static tree by the paths to its leaves; every report writes static trees so
    ``s1.1.1.1``            a sampled chain; ``s4.2.1`` a sampled tree without replacement (MCSD)
    ``k4.2.1``              a sampled tree with replacement (SpecTr's K-SEQ)
    ``b1.1.1.1``            a sampled chain, verified as one block
    ``...l``                behind those that are not sampled: draft the likeliest tokens at every temperature
    ``...p0.1``             behind any of them: verify no node whose cumulative draft probability is below 0.1
    ``...e0.5``             behind any of them: stop early (AdaEDL) from this threshold on; then, where they differ from the defaults of
                            :class:`EarlyStop`, ``g`` scale, ``a`` goal, ``s`` step, ``r`` rate memory, ``m`` threshold memory
    ======================  ===============================================================================================

    Args:
        text: one of these.

    Returns:
        The limits.

    Raises:
        ValueError: anything else, a file that holds no tree, or limits that exclude each other.
    """
    parts = _SHAPE.fullmatch(text.strip())
    if parts is None:
        raise ValueError(f"shape {text!r} cannot be read: {_EXPLAINED}")
    chosen: dict[str, Any] = {}
    if parts["width"]:
        chosen = {"beam_width": int(parts["width"]), "draft_length": int(parts["length"])}
        chosen["node_budget"] = int(parts["nodes"]) if parts["nodes"] else None
        chosen["merge"] = int(parts["merge"]) if parts["merge"] else None
    elif parts["file"]:
        chosen = {"paths": read_paths(Path(parts["file"]))}
    elif parts["leaves"]:
        chosen = {"paths": _with_prefixes(_leaves(parts["leaves"]))}
    elif parts["kind"] == "t":
        chosen = {"paths": full_tree(_numbers(parts["children"]))}
    else:
        chosen = {"sampled": SampledChildren(_numbers(parts["children"]), _RULES[parts["kind"]])}
    if parts["likeliest"]:
        chosen["likeliest"] = True
    if parts["floor"]:
        chosen["min_probability"] = float(parts["floor"])
    if parts["threshold"]:
        chosen["early_stop"] = _early_stop(parts["threshold"], parts["controls"])
    return DraftLimits(**chosen)


def shape_text(limits: DraftLimits) -> str:
    """Write limits as :func:`parse_shape` reads them.

    Args:
        limits: any.

    Returns:
        The text; parsing it gives equal limits.
    """
    if limits.sampled is not None:
        letters = {rule: letter for letter, rule in _RULES.items()}
        text = letters[limits.sampled.rule] + _dotted(limits.sampled.children)
    elif limits.paths is not None:
        text = _static_text(limits.paths)
    else:
        budget = "" if limits.node_budget is None else f"n{limits.node_budget}"
        budget += "" if limits.merge is None else f"m{limits.merge}"
        text = f"{limits.beam_width}x{limits.draft_length}{budget}"
    text += "l" * limits.likeliest
    if limits.min_probability:
        text += f"p{_decimal(limits.min_probability)}"
    if limits.early_stop is not None:
        text += _early_stop_text(limits.early_stop)
    return text


def is_sampled(text: str) -> bool:
    """Whether a shape's tokens are drawn, so that texts equal those of plain decoding in distribution only.

    Args:
        text: a shape, as :func:`shape_text` writes it; empty for none.

    Returns:
        True for sampled trees and chains, those verified as one block among them.
    """
    return text[:1] in _RULES


def short_shape(text: str, longest: int = 28) -> str:
    """Shorten a shape's text for a table or a chart. A static tree of many paths becomes its size and a mark of four hexadecimal digits.

    Example: ``static 26x5 (3fa2)`` has 26 nodes down to depth 5.

    Args:
        text: a shape, as :func:`shape_text` writes it.
        longest: characters up to which a text stays as it is.

    Returns:
        The text or its short form.
    """
    if len(text) <= longest or not text.startswith("paths:"):
        return text
    paths = parse_shape(text).paths or ()
    mark = hashlib.sha256(text.encode()).hexdigest()[:4]
    return f"static {len(paths)}x{max(map(len, paths))} ({mark})"


def full_tree(children: Sequence[int]) -> tuple[RankPath, ...]:
    """The paths of a static tree where every node of one depth has equally many children.

    Example: (2, 1) gives (0,), (1,), (0, 0), (1, 0).

    Args:
        children: of each node, depth by depth.

    Returns:
        The paths, by depth and rank.

    Raises:
        ValueError: more nodes than any machine would verify in one step.
    """
    num_nodes = sum(accumulate(children, mul))
    if num_nodes > _MOST_NODES:
        raise ValueError(f"t{_dotted(children)} has {num_nodes} nodes, more than {_MOST_NODES}; give fewer children")
    return tuple(
        path for depth in range(1, len(children) + 1) for path in product(*(range(count) for count in children[:depth]))
    )


def read_paths(path: Path) -> tuple[RankPath, ...]:
    """Read the paths of a static tree from a JSON file: a list of lists of ranks, as other projects write such trees.

    Args:
        path: of the file.

    Returns:
        The paths, in the order of the file.

    Raises:
        ValueError: no such file, no JSON, or no list of lists of numbers.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist; a static tree is a JSON file of paths such as [[0], [1], [0, 0]]")
    rows = parse_json(path.read_bytes(), str(path), "write paths such as [[0], [1], [0, 0]]")
    if not isinstance(rows, list) or not all(isinstance(row, list) and all(map(_is_rank, row)) for row in rows):
        raise ValueError(f"{path} is not a list of paths of ranks such as [[0], [1], [0, 0]]")
    return tuple(tuple(row) for row in rows)


def paths_json(paths: Sequence[RankPath]) -> str:
    """Write paths as :func:`read_paths` reads them.

    Args:
        paths: of a static tree.

    Returns:
        JSON, a line for each depth.
    """
    depths = sorted({len(path) for path in paths})
    lines = [", ".join(str(list(path)) for path in paths if len(path) == depth) for depth in depths]
    return "[\n  " + ",\n  ".join(lines) + "\n]\n"


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _early_stop(threshold: str, controls: str) -> EarlyStop:
    given = re.findall(rf"([gasrm])({_NUMBER})", controls)
    names = [name for name, _ in given]
    if len(set(names)) < len(names):
        raise ValueError(f"early stop e{threshold}{controls} sets one letter twice; give each once")
    return EarlyStop(float(threshold), **{_CONTROLS[name]: float(value) for name, value in given})


def _early_stop_text(stop: EarlyStop) -> str:
    usual = {field.name: field.default for field in fields(EarlyStop)}
    controls = (
        f"{letter}{_decimal(getattr(stop, name))}"
        for letter, name in _CONTROLS.items()
        if getattr(stop, name) != usual[name]
    )
    return f"e{_decimal(stop.threshold)}" + "".join(controls)


def _numbers(dotted: str) -> tuple[int, ...]:
    return tuple(map(int, dotted.split(".")))


def _dotted(numbers: Sequence[int]) -> str:
    return ".".join(map(str, numbers))


def _decimal(value: float) -> str:
    """Every digit that matters and no exponent, whose letter means something else here."""
    return format(Decimal(repr(float(value))).normalize(), "f")


def _leaves(written: str) -> list[RankPath]:
    try:
        return [_numbers(leaf) for leaf in written.split("+")]
    except ValueError as error:
        raise ValueError(
            f"paths:{written} is not a list of leaves such as paths:0.0+0.1+1, ranks joined by dots"
        ) from error


def _with_prefixes(leaves: Sequence[RankPath]) -> tuple[RankPath, ...]:
    return tuple({leaf[:end]: None for leaf in leaves for end in range(1, len(leaf) + 1)})


def _static_text(paths: Sequence[RankPath]) -> str:
    depths = range(max(map(len, paths)))
    # As many children as a node of each depth must have if the tree is full, which it is if it then has that many nodes.
    children = [1 + max(path[depth] for path in paths if len(path) > depth) for depth in depths]
    if len(paths) == sum(accumulate(children, mul)):
        return f"t{_dotted(children)}"
    inner = {path[:-1] for path in paths}
    return "paths:" + "+".join(_dotted(path) for path in sorted(paths) if path not in inner)

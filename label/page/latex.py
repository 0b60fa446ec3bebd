"""LaTeX in a text as MathML, as a tree that the page builds node by node.

Owns what counts as a formula, and which elements and attributes reach the page: those listed here, with text as text. So whatever a
prompt holds, no HTML comes of it. The library latex2mathml knows LaTeX. Knows nothing of answers and labels.
"""

from __future__ import annotations

import functools
import html
import re
from collections.abc import Iterator
from typing import Any
from xml.etree.ElementTree import Element

from latex2mathml import exceptions
from latex2mathml.converter import convert_to_element

_LONGEST = 4000
# Levels of elements. Each is two levels of JSON, of which a reply may have 255.
_DEEPEST = 100
# A macro may stand for more and more of itself.
_DEFINES = re.compile(r"\\(?:(?:re|provide)?newcommand|def|let|DeclareMathOperator)")
# $$..$$, \\[..\\], \\(..\\), an environment of its own, and $..$ as Pandoc reads it: no space inside its dollars and no digit behind,
# so that "$5 and $6" stays money. None reaches past a second beginning of its own kind: so a text of beginnings alone is read once, not
# once for each of them.
_FORMULA = re.compile(
    r"""
    \$\$(?P<dollars>.+?)\$\$
    | (?<!\\)\\\[(?P<brackets>(?:(?!(?<!\\)\\\[).)+?)\\\]
    | (?<!\\)\\\((?P<parentheses>(?:(?!(?<!\\)\\\().)+?)\\\)
    | (?P<environment>\\begin\{(?P<name>(?:align|equation|gather|multline|eqnarray)\*?)\}
        (?:(?!\\begin\{(?P=name)\}).)+?\\end\{(?P=name)\})
    | (?<![\\$\w])\$(?P<dollar>(?=\S)(?:[^$\n\\]|\\.)+?(?<=\S))\$(?![\d$])
    | (?P<boxed>\\boxed\{(?:[^{}]|\{[^{}]*\})*\})
    """,
    re.VERBOSE | re.DOTALL,
)
_TAGS = """math mrow mi mn mo ms mtext mspace mfrac msqrt mroot mstyle mpadded mphantom
    msub msup msubsup munder mover munderover mtable mtr mtd"""
_ATTRIBUTES = """display displaystyle scriptlevel mathvariant stretchy fence form separator lspace rspace minsize maxsize
    accent accentunder linethickness width height depth columnalign"""
_VALUE = re.compile(r"[\w.%+ -]{1,40}", re.ASCII)
# How many children MathML asks for; with others a browser draws something else than what was meant.
_NUM_CHILDREN = {"mfrac": 2, "mroot": 2, "msub": 2, "msup": 2, "munder": 2, "mover": 2, "msubsup": 3, "munderover": 3}
_REFUSALS: tuple[type[Exception], ...] = (
    *(kind for kind in vars(exceptions).values() if isinstance(kind, type) and issubclass(kind, Exception)),
    # What latex2mathml meets where LaTeX ends too early or nests too deeply.
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    RuntimeError,
    StopIteration,
    TypeError,
    ValueError,
)

# An element: its name, its attributes, and its children, each an element or text.
Tree = list[Any]


def blocks(text: str) -> list[dict[str, Any]]:
    """A text by lines, each with its formulas drawn.

    A formula over several lines joins them into one block. Spans count characters of the text.

    Args:
        text: any.

    Returns:
        For each block `start`, `end` and `parts`: text, or an object of `tex`, `display` and `tree`. Empty where there is no formula.
    """
    parts = list(_parts(text))
    if all(isinstance(part, str) for _, part in parts):
        return []
    made: list[dict[str, Any]] = [{"start": 0, "end": 0, "parts": []}]
    for raw, part in parts:
        if not isinstance(part, str):
            made[-1]["end"] += len(raw)
            made[-1]["parts"].append(part)
            continue
        for index, line in enumerate(raw.split("\n")):
            if index:
                start = made[-1]["end"] + 1
                made.append({"start": start, "end": start, "parts": []})
            made[-1]["end"] += len(line)
            if line:
                made[-1]["parts"].append(line)
    return made


@functools.lru_cache(4096)
def tree(tex: str, display: bool) -> Tree | None:
    """A formula as a tree of MathML; None where it cannot be read.

    Args:
        tex: LaTeX without its dollars.
        display: on a line of its own.
    """
    if len(tex) > _LONGEST or _DEFINES.search(tex):
        return None
    try:
        element = convert_to_element(tex, display="block" if display else "inline")
        return _node(element)
    except _REFUSALS:
        return None


def _parts(text: str) -> Iterator[tuple[str, Any]]:
    """The text in order: what stands there, and how it is shown."""
    done = 0
    for match in _FORMULA.finditer(text):
        tex = next(match[name] for name in match.re.groupindex if name != "name" and match[name] is not None)
        display = match.lastgroup in ("dollars", "brackets", "name", "environment")
        drawn = tree(tex, display)
        if drawn is None:
            continue
        if done < match.start():
            yield text[done : match.start()], text[done : match.start()]
        yield match[0], {"tex": match[0], "display": display, "tree": drawn}
        done = match.end()
    if done < len(text):
        yield text[done:], text[done:]


def _node(element: Element, depth: int = 0) -> Tree:
    if depth > _DEEPEST:
        raise ValueError(f"more than {_DEEPEST} levels")
    name = element.tag.rpartition("}")[2]
    children: Tree = [_node(child, depth + 1) for child in element]
    if name in _NUM_CHILDREN and len(children) != _NUM_CHILDREN[name]:
        raise ValueError(f"{name} has {len(children)} children")
    attributes = {
        key: value
        for key, value in element.attrib.items()
        if key in _ATTRIBUTES.split() and _VALUE.fullmatch(str(value))
    }
    if name == "menclose":
        attributes = {"class": "boxed"}
    text = html.unescape(element.text or "")
    return [name if name in _TAGS.split() else "mrow", attributes, [*([text] if text else []), *children]]

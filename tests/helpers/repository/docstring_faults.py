"""What is not yet Google's style, or plain English, in the docstrings of a module: each fault with its line."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass

from banned_words import banned_in

SECTIONS = ("Args", "Attributes", "Example", "Examples", "Raises", "References", "Returns", "Yields")
CHARMING = {"Beginning", "Lesson", "Taught", "Laid", "Places", "Held", "Ahead", "Desk"}
VAGUE = {"one", "found", "told"}
# The checks of our own invariants and the methods of abstract classes: no caller handles these.
OWN_ERRORS = {"AssertionError", "NotImplementedError"}
CONSTRUCTORS = {"__init__", "__post_init__"}

Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
DEFINITIONS = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Owner:
    """A module, class or function, and whether users may call it."""

    node: ast.Module | Definition
    public: bool

    @property
    def name(self) -> str:
        """What a fault calls it."""
        return "the module" if isinstance(self.node, ast.Module) else self.node.name

    @property
    def docstring(self) -> str:
        """Its docstring without indentation, empty where it has none."""
        return ast.get_docstring(self.node) or ""

    @property
    def line(self) -> int:
        """The line of its docstring, or of its definition where it has none."""
        if self.docstring or isinstance(self.node, ast.Module):
            return self.node.body[0].lineno if self.node.body else 1
        return self.node.lineno


def owners(tree: ast.Module) -> Iterator[Owner]:
    """All that may have a docstring. What is in a private class, or in a function, is private."""

    def inner(node: ast.AST, public: bool) -> Iterator[Owner]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, DEFINITIONS):
                child_is_public = public and (child.name in CONSTRUCTORS or not child.name.startswith("_"))
                yield Owner(child, child_is_public)
                yield from inner(child, child_is_public and isinstance(child, ast.ClassDef))
            else:
                yield from inner(child, public)

    yield Owner(tree, public=True)
    yield from inner(tree, public=True)


def sections(docstring: str) -> dict[str, str]:
    """The text below each heading of Google's style; the prose before them is under ''."""
    heading = re.compile(rf"^({'|'.join(SECTIONS)}):\n", re.MULTILINE)
    prose, *rest = heading.split(docstring + "\n")
    return {"": prose, **dict(zip(rest[::2], rest[1::2], strict=True))}


def own_statements(function: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a function's body without those of the functions, classes and lambdas in it."""
    for child in ast.iter_child_nodes(function):
        if not isinstance(child, (*DEFINITIONS, ast.Lambda)):
            yield child
            yield from own_statements(child)


def raised_by(function: ast.AST) -> set[str]:
    """The classes of errors that a function raises by name; one that it has caught and raises again does not count."""
    names = set()
    for node in own_statements(function):
        if isinstance(node, ast.Raise) and node.exc is not None:
            error = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            name = ast.unparse(error).rpartition(".")[2]
            if name[:1].isupper():
                names.add(name)
    return names - OWN_ERRORS


def constructors(owner: Owner) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    """The methods that make an object of a class; none where the owner is a function."""
    body = owner.node.body if isinstance(owner.node, ast.ClassDef) else []
    return [node for node in body if isinstance(node, FUNCTIONS) and node.name in CONSTRUCTORS]


def missing_errors(owner: Owner) -> set[str]:
    """The errors that an owner raises and its docstring's Raises section does not name; a class may leave them to its constructor."""
    raised_here = raised_by(owner.node) if isinstance(owner.node, FUNCTIONS) else set()
    documented = sections(owner.docstring).get("Raises", "")
    for method in constructors(owner):
        raised_here |= raised_by(method)
        documented += sections(ast.get_docstring(method) or "").get("Raises", "")
    return {name for name in raised_here if not re.search(rf"^\s+(\w+, )*{name}\b.*:", documented, re.MULTILINE)}


def prose_of(docstring: str) -> str:
    """A docstring without its sections: what precedes them, and what follows them without indentation."""
    before, *rest = sections(docstring).values()
    after = [line for part in rest for line in part.splitlines() if line[:1].strip()]
    return "\n".join([before, *after])


def prose_for_section(owner: Owner) -> list[str]:
    """The openings of sentences that say in prose what Google's style puts into a section."""
    opening = re.compile(r"(?:^|[.;:!?)`]\s+|\n)((?:Raises|Returns)\s+\S+)")
    return [" ".join(match.split()) for match in opening.findall(prose_of(owner.docstring))]


def parameters(owner: Owner) -> set[str]:
    """What an Args or Attributes section of an owner may name: a function's parameters, a class's fields and its constructor's."""
    if isinstance(owner.node, FUNCTIONS):
        every = owner.node.args
        named = [*every.posonlyargs, *every.args, *every.kwonlyargs, every.vararg, every.kwarg]
        return {parameter.arg for parameter in named if parameter is not None}
    body = owner.node.body if isinstance(owner.node, ast.ClassDef) else []
    fields = {node.target.id for node in body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)}
    return fields.union(*(parameters(Owner(method, public=True)) for method in constructors(owner)))


def listed_in_prose(owner: Owner) -> list[str]:
    """The parameters or fields that a docstring describes as a section would, `name: what it is`, and outside of one."""
    lines = prose_of(owner.docstring).splitlines()
    headings = [line.split(":")[0] for line in lines if ":" in line]
    return [names for names in headings if {name.strip("` ") for name in names.split(",")} <= parameters(owner)]


def strangers(owner: Owner) -> set[str]:
    """The names in an Args section that no parameter has."""
    entries = re.findall(r"^ {4}(\S[^:\n]*):", sections(owner.docstring).get("Args", ""), re.MULTILINE)
    return {name.strip("*` ") for names in entries for name in names.split(",")} - parameters(owner)


def style_faults(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """The line and description of each docstring that is not in Google's style, and of each name that does not tell."""
    for owner in owners(tree):
        if owner.name in CHARMING:
            yield owner.line, f"{owner.name}: a name tells what it holds"
        for opening in prose_for_section(owner):
            section = opening.split()[0]
            yield owner.line, f"{owner.name}: '{opening} ...' in prose; a section '{section}:', or say what it is"
        for names in listed_in_prose(owner):
            yield owner.line, f"{owner.name}: describes {names} in prose; list it under 'Args:' or 'Attributes:'"
        for name in sorted(strangers(owner)):
            yield owner.line, f"{owner.name}: describes {name} under 'Args:', and has no such parameter"
        if not owner.public:
            continue
        for old in re.findall(r":(?:param|returns?|raises|rtype)\b|^-{4,}$", owner.docstring, re.MULTILINE):
            yield owner.line, f"{owner.name}: '{old}' is another style than Google's"
        if isinstance(owner.node, DEFINITIONS) and owner.name not in CONSTRUCTORS:
            for error in sorted(missing_errors(owner)):
                yield owner.line, f"{owner.name}: raises {error}, and no section 'Raises:' of its docstring names it"


def comments(source: str) -> Iterator[tuple[int, str]]:
    """Each comment with its line; lines of comment that follow each other in one column are one."""
    first, last_line, text = (0, 0), 0, ""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        line, column = token.start
        if text and (line - 1, column) == (last_line, first[1]):
            text += token.string.replace("#", " ", 1)
        else:
            if text:
                yield first[0], text
            first, text = token.start, token.string
        last_line = line
    if text:
        yield first[0], text


def banned_faults(source: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """The line and banned phrase of each docstring and comment that holds one."""
    for line, text in [*((owner.line, owner.docstring) for owner in owners(tree)), *comments(source)]:
        for what in banned_in(text):
            yield line, what


def vague_locals(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """The line and name of each variable or parameter whose name says nothing of what it holds."""
    for node in ast.walk(tree):
        name = node.arg if isinstance(node, ast.arg) else node.id if isinstance(node, ast.Name) else ""
        if name in VAGUE:
            yield node.lineno, f"the name {name!r} does not say what it holds"

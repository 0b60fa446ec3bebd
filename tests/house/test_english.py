"""Plain English: no banned words, no long sentences, and a README that is read in minutes.

What a reader sees is checked: the pages, the help of the commands, messages and comments. Code in a page is no prose, and neither are
tables and the addresses of links; words in tables are checked against the banned ones all the same.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import re
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from banned_words import banned_in
from pages import PACKAGES, PAGES, ROOT

from draftsmith import cli

README_WORDS = 900
SENTENCE_WORDS = 25
# Dated records of measurements, and the list of changes, keep the words that they were published with.
RECORDS = {page for page in PAGES if page.is_relative_to(ROOT / "benchmarks") or page.name == "CHANGELOG.md"}
CHECKED = [page for page in PAGES if page not in RECORDS]
CODE = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def prose(text: str) -> str:
    """A page's text without code, comments and the addresses of links; a span of code is one word."""
    text = re.sub(r"```.*?```|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"^ {4,}(?![-*\d ]).*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"`[^`]*`", "code", text)
    return re.sub(r"!?\[((?:[^\[\]]|\[[^\]]*\])*)\]\([^)]*\)", r"\1", text)


def paragraphs(text: str) -> list[str]:
    """The paragraphs and items of lists in a page's prose; headings and tables are neither."""
    lines = [re.sub(r"^\s*(?:[-*]|\d+\.) ", "\n\n", line) for line in prose(text).splitlines()]
    kept = ["" if line.lstrip().startswith(("|", "#")) else line for line in lines]
    return [" ".join(block.split()) for block in re.split(r"\n\s*\n", "\n".join(kept)) if block.strip()]


def sentences(text: str) -> list[str]:
    """The sentences of a page; each ends with its paragraph, or with a full stop, question or exclamation mark before a capital."""
    ends = r"(?<=[.!?])[)\"*_]*\s+(?=[\"(*_]*(?:[A-Z0-9]|code))"
    return [part for paragraph in paragraphs(text) for part in re.split(ends, paragraph)]


def num_words(sentence: str) -> int:
    """Words that hold a letter or a digit."""
    return sum(any(sign.isalnum() for sign in word) for word in sentence.split())


def docstrings(tree: ast.Module) -> set[ast.AST]:
    """The constants that are docstrings, of a module, its classes and functions."""
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef)
    found = {node.body[0] for node in ast.walk(tree) if isinstance(node, owners) and ast.get_docstring(node)}
    return {statement.value for statement in found if isinstance(statement, ast.Expr)}


def strings_and_comments(source: str) -> Iterator[tuple[int, str]]:
    """Each string of a module that is no docstring, and each comment, with its line. A field of an f-string is one letter."""
    tree = ast.parse(source)
    skipped = docstrings(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            skipped |= set(node.values)
            yield (
                node.lineno,
                "".join(str(part.value) if isinstance(part, ast.Constant) else "x" for part in node.values),
            )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in skipped:
            yield node.lineno, node.value
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def help_texts(function: Callable[..., Any]) -> Iterator[str]:
    """The docstrings that the help of a command is made from: its function's, and those of its option groups."""
    yield inspect.getdoc(function) or ""
    for parameter in inspect.signature(function, eval_str=True).parameters.values():
        for kind in (parameter.annotation, *get_args(parameter.annotation)):
            if dataclasses.is_dataclass(kind):
                yield inspect.getdoc(kind) or ""


@pytest.mark.parametrize("page", CHECKED, ids=[str(page.relative_to(ROOT)) for page in CHECKED])
def test_a_page_has_no_banned_words_and_no_long_sentences(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert banned_in(prose(text)) == []
    assert [sentence for sentence in sentences(text) if num_words(sentence) > SENTENCE_WORDS] == []


def test_the_readme_is_read_in_minutes() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.split()) <= README_WORDS
    assert len(re.findall(r"^\|[-| ]+\|$", text, re.MULTILINE)) == 1, "one table"
    assert len(re.findall(r"!\[", text)) == 1, "one picture"


def test_sentences_are_counted_as_a_reader_reads_them() -> None:
    text = (
        "# A title. It is none.\n\nOne `a. B` two (three). Four, 4.5 of\nfive!\n\n- Six\n- seven\n\n| no. | Table |\n"
    )
    assert sentences(text) == ["One code two (three).", "Four, 4.5 of five!", "Six", "seven"]
    assert num_words("One code, two - [three](x) 4.") == 5


def test_a_banned_phrase_is_found_across_lines_and_not_in_code() -> None:
    assert len(banned_in(prose("The key is\nrefused, and the run Goes on."))) == 2
    assert banned_in(prose("`is told` and\n```\nis refused\n```\n[goes](held to)")) == []


def test_messages_and_comments_have_no_banned_words() -> None:
    found = []
    for path in CODE:
        for line, text in strings_and_comments(path.read_text(encoding="utf-8")):
            found += [f"{path.relative_to(ROOT)}:{line}: {what}" for what in banned_in(text)]
    assert found == []


@pytest.mark.parametrize(
    "name", [name for name, command in cli.COMMANDS.items() if not command.reads_arguments], ids=" ".join
)
def test_the_help_of_a_command_has_no_banned_words(name: tuple[str, ...]) -> None:
    command = cli.COMMANDS[name]
    assert [what for text in (command.summary, *help_texts(command.load())) for what in banned_in(text)] == []


def test_strings_and_comments_are_told_from_docstrings() -> None:
    source = '"""It goes on."""\nx = f"a {1} goes on"  # is told\ndef f():\n    """Goes on."""\n    raise ValueError("held to")\n'
    assert sorted(strings_and_comments(source)) == [(2, "# is told"), (2, "a x goes on"), (5, "held to")]

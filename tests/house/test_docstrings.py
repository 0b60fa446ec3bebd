"""Docstrings are in Google's style and in plain English, and say which errors a caller must expect."""

import ast
from pathlib import Path

import pytest
from docstring_faults import banned_faults, style_faults, vague_locals
from pages import PACKAGES, ROOT

FOLDERS = (*PACKAGES, "tests")


def sources(folder: str) -> list[Path]:
    """The modules of a top folder; the script beside them counts to `train`."""
    return sorted((ROOT / folder).rglob("*.py")) + [ROOT / "train.py"] * (folder == "train")


@pytest.mark.parametrize("folder", FOLDERS)
def test_docstrings_have_one_style_and_no_banned_words(folder: str) -> None:
    faults = []
    for path in sources(folder):
        source = path.read_text(encoding="utf-8")
        tree = ast.parse(source)
        in_file = [*banned_faults(source, tree), *(style_faults(tree) if folder != "tests" else ())]
        faults += [f"{path.relative_to(ROOT)}:{line}: {what}" for line, what in sorted(in_file)]
    assert faults == []


@pytest.mark.parametrize("folder", PACKAGES)
def test_names_of_variables_tell_what_they_hold(folder: str) -> None:
    faults = []
    for path in sources(folder):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        faults += [f"{path.relative_to(ROOT)}:{line}: {what}" for line, what in vague_locals(tree)]
    assert faults == []


def style_of(source: str) -> list[str]:
    return [what for _, what in style_faults(ast.parse(source))]


@pytest.mark.parametrize(
    "prose", ["Raises ValueError for 0.", "Half of it. Raises\n    ValueError for 0.", "Returns it."]
)
def test_prose_in_the_place_of_a_section_is_a_fault(prose: str) -> None:
    assert len(style_of(f'def half(x):\n    """{prose}"""\n')) == 1
    assert len(style_of(f'def half(x):\n    """Half.\n\n    Args:\n        x: it.\n\n    {prose}\n    """\n')) == 1
    assert style_of('def half(x):\n    """Half of it; never raises, returns a whole."""\n') == []


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ("raise ValueError(x)", True),
        ("raise errors.OddNumber(x) from None", True),
        ("raise ValueError", True),
        ("raise", False),
        ("raise failure", False),
        ("raise NotImplementedError", False),
        ("def inner():\n        raise ValueError(x)", False),
    ],
)
def test_a_public_function_names_the_errors_that_it_raises(body: str, named: bool) -> None:
    source = 'def half(x):\n    """Half of it."""\n    ' + body
    assert bool(style_of(source)) == named
    assert style_of(source.replace("half", "_half")) == []
    section = "\n\n    Raises:\n        ValueError, OddNumber: x is odd.\n    "
    assert style_of(source.replace("Half of it.", "Half of it." + section)) == []


def test_a_class_or_its_constructor_names_the_errors_of_the_constructor() -> None:
    source = 'class Half:\n    """A half."""\n\n    def __post_init__(self):\n        """Checks."""\n        raise ValueError(0)\n'
    assert len(style_of(source)) == 1
    assert style_of(source.replace("A half.", "A half.\n\n    Raises:\n        ValueError: always.\n    ")) == []
    assert (
        style_of(source.replace("Checks.", "Checks.\n\n        Raises:\n            ValueError: always.\n        "))
        == []
    )


@pytest.mark.parametrize("listed", ["x: the whole.", "Half of it.\n\n    `x`: the whole."])
def test_parameters_are_listed_in_a_section(listed: str) -> None:
    assert len(style_of(f'def half(x):\n    """{listed}\n    """\n')) == 1
    assert style_of('def half(x):\n    """Half of it.\n\n    Args:\n        x: the whole.\n    """\n') == []
    assert len(style_of('def half(y):\n    """Half of it.\n\n    Args:\n        x, y: the whole.\n    """\n')) == 1


def test_other_styles_and_names_that_do_not_tell_are_faults() -> None:
    assert len(style_of('def half(x):\n    """Half.\n\n    :param x: the whole.\n    """\n')) == 1
    assert len(style_of('def half(x):\n    """Half.\n\n    Args\n    ----\n    x, the whole.\n    """\n')) == 1
    assert len(style_of("class Places: ...\n")) == 1


def test_banned_words_are_found_in_docstrings_and_comments_alone() -> None:
    source = '"""It goes on."""\nx = "held to"  # is told\n# It goes\n# on.\nx = 1\n# It goes\n    # on.\n'
    assert [line for line, _ in banned_faults(source, ast.parse(source))] == [1, 2, 3]


def test_variables_and_parameters_of_vague_names_are_faults() -> None:
    source = "def total(one):\n    found = [told for told in one]\n    return sum(found), total.found, 'one'\n"
    assert [line for line, _ in vague_locals(ast.parse(source))] == [1, 2, 2, 2, 2, 3]

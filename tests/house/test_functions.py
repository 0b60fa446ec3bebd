"""Every function fits a screen: from its first line to its last, the docstring included, at most 60 lines."""

import ast
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LONGEST = 60


def long_functions(source: str) -> dict[str, int]:
    """The functions of a file that are too long, by name, with their lines."""
    functions = (
        node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    lengths = [(node.name, (node.end_lineno or node.lineno) - node.lineno + 1) for node in functions]
    return {name: length for name, length in lengths if length > LONGEST}


def test_no_function_is_longer_than_a_screen() -> None:
    files = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True)
    too_long = {
        f"{name}: {function}": length
        for name in files.stdout.split()
        for function, length in long_functions((ROOT / name).read_text(encoding="utf-8")).items()
    }
    assert too_long == {}, "a second idea hides in it: give it a function of its own"


def test_a_long_function_is_noticed() -> None:
    body = "    pass\n" * LONGEST
    assert long_functions(f"def short():\n    pass\n\n\ndef long():\n{body}") == {"long": LONGEST + 1}

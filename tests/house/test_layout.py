"""The shape of the tree: which folders are packages, who may import whom, and that nothing slips out of the wheel."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]
NOT_PACKAGES = {"src", "tests", "docs", "benchmarks", "build", "dist", "runs", "cache"}

# Each package with all that it may import from; `root` is files, provenance and arguments. Only cli stands above all,
# and it imports lazily, by name.
BELOW = {
    "root": set(),
    "configs": set(),
    "embedded": {"root", "models"},
    "models": {"root"},
    "decode": {"root", "models"},
    "data": {"root", "models", "decode"},
    "label": {"root", "models", "decode", "data", "embedded"},
    "train": {"root", "models", "decode", "data", "label", "embedded", "configs"},
    "evaluate": {"root", "models", "decode", "data", "label", "train", "embedded"},
    "export": {"root", "models"},
}


def folders() -> set[str]:
    return {
        entry.name
        for entry in ROOT.iterdir()
        if entry.is_dir() and not entry.name.startswith((".", "_")) and not entry.name.endswith(".egg-info")
    } - NOT_PACKAGES


def sources(package: str) -> list[Path]:
    folder = ROOT / "src" / "draftsmith" if package == "root" else ROOT / package
    return [path for path in sorted(folder.rglob("*.py")) if path.name != "cli.py" or package != "root"]


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}; write draftsmith.…"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_folder_is_a_mapped_package() -> None:
    names = {f"draftsmith.{name}" for name in folders()} | {"draftsmith"}
    assert set(SETUPTOOLS["packages"]) == names
    expected = {f"draftsmith.{name}": name for name in folders()} | {"draftsmith": "src/draftsmith"}
    assert SETUPTOOLS["package-dir"] == expected
    assert all((ROOT / folder / "__init__.py").is_file() for folder in expected.values())


def test_no_package_has_an_unlisted_subpackage() -> None:
    nested = [path for name in folders() for path in (ROOT / name).rglob("*/__init__.py")]
    assert nested == [], "a nested package is missing from the wheel unless pyproject.toml lists it"


@pytest.mark.parametrize("package", sorted({*BELOW, *folders()}))
def test_imports_point_downwards(package: str) -> None:
    assert package in BELOW, f"{package}/ is new: say in BELOW what it may import"
    for path in sources(package):
        for name in imported(ast.parse(path.read_text(encoding="utf-8"))):
            parts = name.split(".")
            assert parts[0] not in BELOW, f"{path}: import draftsmith.{parts[0]}, not {parts[0]}"
            if parts[0] != "draftsmith" or len(parts) == 1 or parts[1].startswith("__version"):
                continue
            other = parts[1] if parts[1] in BELOW else "root"
            assert other == package or other in BELOW[package], (
                f"{path.relative_to(ROOT)} imports {name}, which is above"
            )


def test_only_train_knows_lightning() -> None:
    for package in BELOW.keys() - {"train"}:
        for path in sources(package):
            names = set(imported(ast.parse(path.read_text(encoding="utf-8"))))
            assert not any(name.split(".")[0] in ("pytorch_lightning", "lightning") for name in names), path


def test_what_is_imported_is_declared() -> None:
    project = PYPROJECT["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *extras["label"], *extras["deepspeed"], *extras["vllm"]]
    declared = {re.split(r"[\[<>=]", line)[0].replace("-", "_") for line in lines}
    found = {
        name.split(".")[0]
        for package in BELOW
        for path in sources(package)
        for name in imported(ast.parse(path.read_text(encoding="utf-8")))
    }
    ships_along = {"lightning_fabric", "yaml"}  # in the distributions pytorch-lightning and pyyaml
    assert found - declared - ships_along - set(sys.stdlib_module_names) - {"draftsmith"} == set()


def test_only_the_labelling_page_needs_its_extra() -> None:
    needed = {
        path.name
        for package in BELOW
        for path in sources(package)
        for name in imported(ast.parse(path.read_text(encoding="utf-8")))
        if name.split(".")[0] in ("fastapi", "uvicorn")
    }
    assert needed == {"server.py", "serve_command.py"}


def test_every_module_says_what_it_owns() -> None:
    silent = [
        str(path.relative_to(ROOT))
        for package in BELOW
        for path in sources(package)
        if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert silent == []


def test_ignore_rules_are_anchored_so_that_none_hides_a_package() -> None:
    rules = [line for line in (ROOT / ".gitignore").read_text().splitlines() if line and not line.startswith("#")]
    loose = [rule for rule in rules if not rule.startswith("/") and rule.strip("/*") in folders()]
    assert loose == []

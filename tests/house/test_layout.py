"""The shape of the tree: which folders are packages, who may import whom, and that nothing slips out of the wheel."""

import ast
import re
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]
NOT_PACKAGES = {"src", "tests", "docs", "benchmarks", "build", "dist", "runs", "cache"}
MOST_FILES = 14
"""In one folder of the repository, whatever they are: modules, tests, pages, configurations, scripts, results."""
NOT_COUNTED = {"__init__.py", "py.typed"}

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

# The rooms of each package with those that each may import from; "" is the package's own files.
ROOMS: dict[str, dict[str, set[str]]] = {
    "models": {
        "gguf": set(),
        "files": {"gguf"},
        "slots": set(),
        "tree": {"files", "slots"},
        "trunk": {"files", "slots", "tree"},
        "target": {"files", "slots", "trunk"},
        "other_software": {"files"},
        "ngrams": {"files"},
        "drafters": {"files", "slots", "tree", "trunk", "target", "other_software"},
        "lora": {"files", "drafters"},
        "composed": {"files", "slots", "tree", "trunk", "target", "drafters", "ngrams"},
        "families": {"files", "slots", "tree", "target", "drafters"},
        "block": {"files", "slots", "tree", "target", "drafters", "families"},
        "riders": {"files", "slots", "tree", "trunk", "target", "drafters", "families"},
        "": {"files", "tree", "target", "drafters", "families"},
    },
    "decode": {"verify": set(), "": {"verify"}, "hugging_face": {""}},
    "data": {
        "chats": set(),
        "": {"chats"},
        "shards": set(),
        "remote": {"shards"},
        "replies": {"", "chats"},
        "cache": {"", "chats", "shards", "remote", "replies"},
    },
    "label": {
        "": set(),
        "checkers": {""},
        "store": {""},
        "formats": {"", "store"},
        "page": {"", "store"},
        "mine": {"", "checkers"},
        "corrupt": {"", "checkers"},
        "commands": {"", "checkers", "store", "formats"},
    },
    "train": {
        "run": set(),
        "batches": set(),
        "losses": set(),
        "drafter": {"run", "batches", "losses"},
        "drafter_callbacks": {"run", "batches", "drafter"},
        "draft_lm": {"run", "batches", "losses", "drafter", "drafter_callbacks"},
        "judge": {"run", "batches", "drafter_callbacks"},
        "embedded_lm": {"run"},
        "": {"run", "batches", "drafter", "drafter_callbacks", "draft_lm", "judge"},
    },
    "evaluate": {
        "roofline": set(),
        "strata": set(),
        "": {"roofline", "strata"},
        "lossy": {"", "strata"},
        "doctor": {"", "strata", "lossy"},
        "tune": {"", "roofline", "strata"},
    },
    "export": {"layouts": set(), "block": {"layouts"}, "heads": {"layouts"}, "judge": set(), "": {"layouts"}},
    "embedded": {"": set()},
    "configs": {"": set()},
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


def rooms(package: str) -> list[Path]:
    """The subfolders of a package that hold code."""
    return [path.parent for path in sorted((ROOT / package).rglob("*.py")) if path.parent != ROOT / package]


def module_files() -> dict[str, Path]:
    """Every module of the package by its full name."""
    found = {}
    for package in BELOW:
        base = ROOT / "src" if package == "root" else ROOT
        for path in sources(package):
            parts = list(path.relative_to(base).with_suffix("").parts)
            names = parts if package == "root" else ["draftsmith", *parts]
            found[".".join(names[:-1] if names[-1] == "__init__" else names)] = path
    return found


def imports_at_run_time(path: Path, modules: dict[str, Path]) -> set[str]:
    """The modules of ours that a file imports, inside of functions too; imports for type checkers are left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = [ast.Pass()]
    names = {name if name in modules else name.rpartition(".")[0] for name in imported(tree)}
    return {name for name in names if name in modules and modules[name] != path}


def circles(graph: dict[str, set[str]]) -> list[str]:
    """What remains when modules that import nothing that remains are taken away again and again."""
    left = {name: set(others) for name, others in graph.items()}
    while done := {name for name, others in left.items() if not others & left.keys()}:
        left = {name: others for name, others in left.items() if name not in done}
    return sorted(left)


def test_every_folder_is_a_mapped_package() -> None:
    names = {f"draftsmith.{name}" for name in folders()} | {"draftsmith"}
    nested = {".".join(("draftsmith", *room.relative_to(ROOT).parts)) for name in folders() for room in rooms(name)}
    assert set(SETUPTOOLS["packages"]) == names | nested
    expected = {f"draftsmith.{name}": name for name in folders()} | {"draftsmith": "src/draftsmith"}
    assert SETUPTOOLS["package-dir"] == expected
    own = [ROOT / folder for folder in expected.values()]
    assert all((folder / "__init__.py").is_file() for folder in [*own, *(r for name in folders() for r in rooms(name))])


def crowded(files: Iterable[str]) -> dict[str, int]:
    """The folders that hold more than `MOST_FILES` of these files themselves, each with their number."""
    counts = Counter(str(Path(file).parent) for file in files if Path(file).name not in NOT_COUNTED)
    return {folder: count for folder, count in sorted(counts.items()) if count > MOST_FILES}


def test_no_folder_is_crowded() -> None:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    inside = {file for file in listed if "/" in file and (ROOT / file).is_file()}
    assert {file.partition("/")[0] for file in inside} >= {*folders(), "src", "tests", "docs", "benchmarks"}
    assert crowded(inside) == {}, "make rooms: subfolders that hold what belongs together"


def test_a_crowded_folder_is_found() -> None:
    full = [f"docs/how-to/train/{number}.md" for number in range(MOST_FILES)]
    assert crowded([*full, "docs/how-to/train/__init__.py", "docs/how-to/train/below/more.md"]) == {}
    assert crowded([*full, "docs/how-to/train/more.yaml"]) == {"docs/how-to/train": MOST_FILES + 1}


def test_no_two_files_import_each_other() -> None:
    modules = module_files()
    assert circles({name: imports_at_run_time(path, modules) for name, path in modules.items()}) == []


def test_the_search_for_circles_finds_one() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["a", "b", "c"]


@pytest.mark.parametrize("package", sorted(folders()))
def test_rooms_import_in_one_order(package: str) -> None:
    modules = module_files()
    found = {path.parent.name if path.parent != ROOT / package else "" for path in sources(package)}
    assert found == set(ROOMS[package]), f"the rooms of {package}/ and their order belong in ROOMS"
    assert circles(ROOMS[package]) == []
    for path in sources(package):
        room = "" if path.parent == ROOT / package else path.parent.name
        if path.name == "__init__.py":
            continue  # offers public names of the rooms below
        for name in imports_at_run_time(path, modules):
            parts = name.split(".")
            if len(parts) < 3 or parts[1] != package:
                continue
            other = parts[2] if parts[2] in ROOMS[package] else ""
            assert other == room or other in ROOMS[package][room], f"{path.relative_to(ROOT)} imports {name}"


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
    lines = [*project["dependencies"], *extras["label"], *extras["deepspeed"], *extras["gguf"], *extras["vllm"]]
    declared = {re.split(r"[\[<>=]", line)[0].replace("-", "_") for line in lines}
    found = {
        name.split(".")[0]
        for package in BELOW
        for path in sources(package)
        for name in imported(ast.parse(path.read_text(encoding="utf-8")))
    }
    ships_along = {"lightning_fabric", "sklearn", "yaml"}  # of pytorch-lightning, scikit-learn and pyyaml
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

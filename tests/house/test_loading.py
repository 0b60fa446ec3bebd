"""Folders in Hugging Face's form are opened by one module, which decides whether their code may run and whether they are whole."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOOR = ROOT / "models" / "files" / "pretrained.py"
FOLDERS = ("src", "models", "decode", "data", "label", "train", "evaluate", "export", "embedded", "benchmarks")
READERS = {"from_pretrained", "get_class_from_dynamic_module", "load_custom_generate"}
# The loaders of another package are what this script tries, on folders that it wrote itself.
TRIES_OTHERS = ROOT / "benchmarks" / "export" / "speculators_conformity.py"
AUTO_USES = {"register"}  # our own classes are made known to Auto classes; that reads nothing


def openings(tree: ast.Module) -> list[str]:
    """Where a module opens a folder by itself: `line: name`."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            by_auto = isinstance(node.value, ast.Name) and node.value.id.startswith("Auto")
            if ast.unparse(node.value) == "super()":
                continue  # a class that adds to its parent's: who calls it has opened the folder
            if node.attr in READERS or (by_auto and node.attr not in AUTO_USES):
                found.append(f"{node.lineno}: {ast.unparse(node)}")
    return found


def test_nothing_is_opened_beside_the_one_door() -> None:
    others = {
        str(path.relative_to(ROOT)): found
        for folder in FOLDERS
        for path in sorted((ROOT / folder).rglob("*.py"))
        if path not in (DOOR, TRIES_OTHERS) and (found := openings(ast.parse(path.read_text(encoding="utf-8"))))
    }
    assert others == {}, "open folders with draftsmith.models.files.pretrained, which says whether their code may run"


def test_the_rule_sees_an_opening() -> None:
    text = "AutoModelForCausalLM.from_config(x)\nload = Llama.from_pretrained\nShape.from_config(y)\nAutoModel.register(a, b)"
    assert sorted(line.split(":")[0] for line in openings(ast.parse(text))) == ["1", "2"]


def test_the_door_says_at_every_opening_whether_code_may_run() -> None:
    """GenerationConfig and PEFT's class have no code to run and take no such argument."""
    silent = []
    for node in ast.walk(ast.parse(DOOR.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "from_pretrained":
            given = {keyword.arg for keyword in node.keywords}
            if "trust_remote_code" not in given:
                silent.append(ast.unparse(node))
    assert sorted(silent) == ["GenerationConfig.from_pretrained(folder)", "kind.from_pretrained(model, str(folder))"]


def test_one_module_asks_a_config_for_its_context() -> None:
    """Others name the field only to write it: into a drafter's config, an exported one, or that of a model they make."""
    writers = {
        "models/target/context.py",
        "models/families/eagle_config.py",
        "models/trunk/shrink.py",
        "export/layouts/llama.py",
        "train/embedded_lm/module.py",
    }
    others = {
        str(path.relative_to(ROOT))
        for folder in FOLDERS
        if folder != "benchmarks"
        for path in (ROOT / folder).rglob("*.py")
        if re.search(r"(?<!original_)max_position_embeddings", path.read_text(encoding="utf-8"))
    }
    assert others == writers, (
        "ask draftsmith.models.target.context.context_of, Target.max_positions or TargetEnds.max_positions"
    )

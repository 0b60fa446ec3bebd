"""No family's name outside its own files: everything else asks the registry."""

import re
from pathlib import Path

import pytest

from draftsmith.models.drafters.registry import registry
from draftsmith.models.families import __all__ as class_names

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("src", "models", "decode", "data", "label", "train", "evaluate", "export", "embedded")
OWN = {ROOT / "models" / "families"}
LAYOUTS = ROOT / "export" / "layouts"
OTHER_SOFTWARE = {
    *(
        LAYOUTS / f"{name}.py"
        for name in ("apple", "eagle", "eagle3", "embedding", "layer_ids", "llama", "serving", "speculators")
    ),
    *(LAYOUTS / "block").glob("*.py"),
    *(LAYOUTS / "heads").glob("*.py"),
    ROOT / "export" / "contents.py",
    ROOT / "models" / "other_software" / "named_kinds.py",
}
EARLIER_NAMES = ROOT / "src" / "draftsmith" / "moved.py"


def names() -> set[str]:
    """What the package's own families are called: records, titles, model types, classes."""
    found = {name.lower() for name in class_names}
    for family in registry().all():
        if family.drafter.__module__.startswith("draftsmith."):
            found |= {
                family.name,
                family.about.title.lower(),
                family.config.model_type,
                family.settings.__name__.lower(),
            }
    return found


def mentions(text: str) -> list[str]:
    """The lines of a text that name a family, in code, comments and strings alike."""
    pattern = re.compile("|".join(sorted(map(re.escape, names()))), re.IGNORECASE)
    return [line.strip() for line in text.splitlines() if pattern.search(line)]


@pytest.mark.parametrize("package", PACKAGES)
def test_no_family_is_named_outside_its_own_files(package: str) -> None:
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        if not OWN & {path, *path.parents} and path not in OTHER_SOFTWARE | {EARLIER_NAMES}:
            found[str(path.relative_to(ROOT))] = mentions(path.read_text(encoding="utf-8"))
    assert {path: lines for path, lines in found.items() if lines} == {}, "ask draftsmith.models.drafters.registry"


def test_a_mention_is_found() -> None:
    assert mentions("class Reader(Eagle3Config):\n    pass\n# as EAGLE-2 does\nvalue = 'redrafter'\n") == [
        "class Reader(Eagle3Config):",
        "# as EAGLE-2 does",
        "value = 'redrafter'",
    ]

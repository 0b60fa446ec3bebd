"""A family of another installed package is found by its entry point, and its code goes along with a custom_generate folder."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import parallel_heads
import pytest
from tiny import save_target

from draftsmith.export.layouts.shipped_code import shipped_code
from draftsmith.models import Family
from draftsmith.models.drafters.registry import GROUP, Registry

ROOT = Path(__file__).resolve().parents[3]
PAGE = ROOT / "docs" / "how-to" / "drafters" / "new-family.md"
HEADS = Path(parallel_heads.__file__)

# A program with the package installed: the drafter is read, and exported in both layouts.
INSTALLED = """
import sys
from pathlib import Path
import torch
from draftsmith.cli import main
from draftsmith.models import Target, all_families

[family] = [one for one in all_families() if one.name == "medusa"]
assert family.drafter.__module__ == "medusa_heads.heads", family
place = Path(sys.argv[1])
target = Target.load(str(place / "target"))
torch.manual_seed(0)
drafter = family.settings().build(target.ends, None, 3, "")
drafter.save_pretrained(place / "drafter")
words = ["--drafter", str(place / "drafter"), "--target", str(place / "target")]
assert main(["export", *words, "--out", str(place / "own")]) == 0
assert main(["export", *words, "--out", str(place / "code"), "--layout", "custom_generate"]) == 0
assert "Needs `python -m pip install draftsmith medusa-heads`" in (place / "own" / "README.md").read_text()
words = ["--target", str(place / "target"), "--drafter", str(place / "own"), "--max-new-tokens", "4"]
assert main(["decode", "--prompt", "hello", *words]) == 0
"""

# A program with Transformers alone.
ALONE = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("draftsmith", "medusa_heads"):
            raise ModuleNotFoundError(f"{name} is hidden from this test")

sys.meta_path.insert(0, Hidden())
import torch
from transformers import AutoModelForCausalLM

place = sys.argv[1]
model, prompt = AutoModelForCausalLM.from_pretrained(place + "/target"), torch.tensor([[5, 9, 20, 31]])
settings = {"do_sample": False, "max_new_tokens": 20}
plain = model.generate(prompt, **settings)
forwards = []
model.base_model.register_forward_pre_hook(lambda *_: forwards.append(1))
drafted = model.generate(prompt, custom_generate=place + "/code", trust_remote_code=True, **settings)
assert drafted.tolist() == plain.tolist()
"""


def install(site: Path, distribution: str, value: str) -> None:
    """Writes what pip leaves of a distribution with one entry point."""
    info = site / f"{distribution}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{GROUP}]\nmedusa = {value}\n")


def write_package(site: Path, name: str = "medusa_heads") -> Path:
    """The family as a package of three modules, which import each other in both ways."""
    package = site / name
    package.mkdir(parents=True)
    text = HEADS.read_text(encoding="utf-8")
    start, end = text.index("class Block("), text.index("class ParallelHeads(")
    blocks = "import torch\nfrom torch import Tensor, nn\nfrom torch.nn import functional as F\n\n\n" + text[start:end]
    (package / "__init__.py").write_text(f"from {name}.heads import FAMILY\n")
    (package / "blocks.py").write_text(blocks)
    (package / "heads.py").write_text(
        (text[:start] + text[end:]).replace("from dataclasses", "from .blocks import Block\nfrom dataclasses", 1)
    )
    return package


def run(program: str, place: Path, site: Path | None = None) -> str:
    paths = os.pathsep.join(filter(None, [None if site is None else str(site), os.environ.get("PYTHONPATH")]))
    surroundings = {**os.environ, "PYTHONPATH": paths, "HF_MODULES_CACHE": str(place / "modules")}
    done = subprocess.run(
        [sys.executable, "-c", program, str(place)], env=surroundings, capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_an_installed_family_is_found_and_its_code_ships(tmp_path: Path) -> None:
    site = tmp_path / "site"
    write_package(site)
    install(site, "medusa-heads", "medusa_heads:FAMILY")
    install(site, "no-heads", "no_such_module:FAMILY")
    save_target(tmp_path / "target")
    told = run(INSTALLED, tmp_path, site)
    assert told.count("of no-heads 1.0 (no_such_module:FAMILY) is left out: ModuleNotFoundError") == 1
    run(ALONE, tmp_path)


def test_the_page_shows_the_family_that_these_tests_use() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    assert HEADS.read_text(encoding="utf-8") in blocks


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of installed packages."""
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("raise RuntimeError('no such device')", "RuntimeError: no such device"),
        ("FAMILY = 3", "it is a int, not a Family"),
        ("import draftsmith.nothing", "ModuleNotFoundError"),
        ("from draftsmith.models.families.redrafter import FAMILY as known\nimport dataclasses\n"
         "FAMILY = dataclasses.replace(known, name='other')", "would take the place of"),
    ],
)  # fmt: skip
def test_a_broken_family_is_a_warning_that_names_its_distribution(site: Path, code: str, problem: str) -> None:
    from draftsmith.models.drafters.registry import registry

    install(site, "broken-heads", "broken_heads:FAMILY")
    (site / "broken_heads.py").write_text(code)
    known = Registry()
    for family in registry().all():
        known.add(family)
    importlib.invalidate_caches()
    sys.modules.pop("broken_heads", None)
    with pytest.warns(UserWarning, match="of broken-heads 1.0 .* is left out") as told:
        assert {family.name for family in known.all()} == {family.name for family in registry().all()}
    assert len(told) == 1
    assert problem in str(told[0].message)
    assert problem in known.faults[0]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("import shipped_heads.blocks as blocks; blocks", "has no flat form; write `from module import name`"),
        ("from shipped_heads import blocks; blocks", "import blocks from the module that defines it"),
    ],
)
def test_an_import_that_cannot_be_shipped_is_named(site: Path, line: str, problem: str) -> None:
    package = write_package(site, "shipped_heads")
    heads = package / "heads.py"
    heads.write_text(heads.read_text().replace("import torch\n", f"import torch\n{line}\n", 1))
    for name in [name for name in sys.modules if name.startswith("shipped_heads")]:
        del sys.modules[name]
    kind = importlib.import_module("shipped_heads.heads").ParallelHeads
    with pytest.raises(ValueError, match=re.escape(problem)):
        shipped_code(kind)


def test_what_a_family_imports_of_others_is_a_requirement(site: Path) -> None:
    package = write_package(site, "needy_heads")
    heads = package / "heads.py"
    heads.write_text(heads.read_text().replace("import torch\n", "import torch\nimport yaml\n\nprint(yaml)\n", 1))
    kind = importlib.import_module("needy_heads.heads").ParallelHeads
    shipped = shipped_code(kind)
    assert [line.split(">=")[0].lower() for line in shipped.requirements] == ["pyyaml"]
    assert {"family_needy_heads_heads", "family_needy_heads_blocks"} <= set(shipped.modules)
    assert "ParallelHeadsFamily" not in shipped.modules["family_needy_heads_heads"]


def test_a_record_whose_classes_do_not_belong_together_is_refused() -> None:
    from dataclasses import replace

    from draftsmith.models import Drafter, DrafterConfig

    class Lost(DrafterConfig):
        model_type = "lost"

        def __init__(self, depth: int = 1, **kwargs: object) -> None:
            super().__init__(**kwargs)
            self.depth = depth

    class LostHead(Drafter):
        config_class = Lost

    class LostFamily(parallel_heads.ParallelHeadsFamily):
        kind = LostHead

    family: Family = parallel_heads.FAMILY
    with pytest.raises(ValueError, match="config_class is ParallelHeadsConfig, the record names Lost"):
        replace(family, config=Lost)
    with pytest.raises(ValueError, match=r"set ParallelHeadsFamily\.kind = LostHead"):
        replace(family, config=Lost, drafter=LostHead)
    with pytest.raises(ValueError, match=r"Lost\.rules says nothing of depth"):
        replace(family, config=Lost, drafter=LostHead, settings=LostFamily)

"""What the pages promise: their commands parse, their links lead somewhere, their configurations exist."""

import itertools
import pydoc
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
from pages import PAGES, ROOT, make_lines, make_recipes, make_suggestions, shell_lines

from draftsmith import cli
from draftsmith.arguments import gather_lists, list_options, parser_for, with_underscores
from draftsmith.models import ReDrafter, Target, TargetEnds
from draftsmith.models.drafters.draft_lm import load_draft_lm
from draftsmith.models.judge import Judge, JudgeConfig

COMMANDS = [(page.relative_to(ROOT), line) for page in PAGES for line in shell_lines(page)]


def check_command(line: str) -> None:
    words = [word.removeprefix(".venv/bin/") for word in shlex.split(line, comments=True) if word != "…"]
    if words[:2] == ["python", "train.py"]:
        words = ["draftsmith", "train", *words[2:]]
    if words[0] == "make":
        goals = [word for word in words[1:] if "=" not in word and not word.startswith("-")]
        rules = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("Makefile", "benchmarks/real/real.mk"))
        assert all(re.search(rf"^{re.escape(goal)}:", rules, re.MULTILINE) for goal in goals), line
    elif words[0] == "draftsmith":
        check_draftsmith(words[1:])


def check_draftsmith(words: list[str]) -> None:
    if words[0].startswith("--"):
        assert words[0] in ("--help", "--version")
        return
    name = tuple(words[:2]) if words[0] in cli.GROUPS else (words[0],)
    assert name in cli.COMMANDS, f"there is no command {' '.join(name)}"
    rest = words[len(name) :]
    if cli.COMMANDS[name].reads_arguments:
        configs = [value for option, value in itertools.pairwise(rest) if option in ("--config", "-c")]
        assert all((ROOT / config).is_file() for config in configs), f"no such configuration: {configs}"
        return
    function = cli.COMMANDS[name].load()
    if ">" in rest:
        rest = rest[: rest.index(">")]
    if "--config" in rest or "--help" in rest or "--print_config" in rest:
        return
    words = gather_lists([with_underscores(word) for word in rest], list_options(function))
    parser_for(function, "draftsmith").parse_args(words)


@pytest.mark.parametrize(("page", "line"), COMMANDS, ids=[f"{page}: {line[:60]}" for page, line in COMMANDS])
def test_every_command_on_a_page_is_one_that_exists(page: Path, line: str) -> None:
    check_command(line)


def test_every_command_that_make_runs_or_suggests_is_one_that_exists() -> None:
    recipes = make_recipes("RUN=runs/none", "REAL=runs/none/real", "quickstart", "real", "embedded")
    suggestions = make_suggestions("RUN=runs/none")
    assert len(recipes) >= 17
    assert len(suggestions) >= 3
    for line in recipes + suggestions:
        check_command(re.sub(r"\$\(.*\)", "x", line))


@pytest.mark.parametrize("goal", ["quickstart", "real"])
def test_the_makefile_plans_its_goals_from_another_folder(goal: str, tmp_path: Path) -> None:
    for name in ("configs", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).symlink_to(ROOT / name)
    assert any("bin/draftsmith train fit" in line for line in make_lines(goal, folder=tmp_path))


def test_the_quickstart_names_the_folders_that_its_configuration_names() -> None:
    text = (ROOT / "configs" / "quickstart.yaml").read_text(encoding="utf-8")
    recipes = "\n".join(make_recipes("quickstart"))
    assert "--out runs/quickstart/cache" in recipes
    assert "cache: runs/quickstart/cache" in text
    assert "--drafter runs/quickstart/train/drafter" in recipes
    assert "default_root_dir: runs/quickstart/train" in text


def linked(page: Path) -> list[tuple[Path, str]]:
    """Files of this repository that a page links to, each with the heading's anchor or an empty string."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    links = [link.partition("#") for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    return [(page.parent / name if name else page, anchor) for name, _, anchor in links]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to a page's headings: lower case, hyphens for spaces, no other punctuation."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", line) for line in re.findall(r"^#+ +(.*)$", text, re.MULTILINE)]
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_every_link_on_a_page_leads_somewhere(page: Path) -> None:
    links = linked(page)
    assert [str(file) for file, _ in links if not file.exists()] == []
    sections = [(file, anchor) for file, anchor in links if anchor and file.suffix == ".md"]
    assert [f"{file.name}#{anchor}" for file, anchor in sections if anchor not in anchors(file)] == []


def named_files(text: str) -> set[str]:
    """Files of this repository that a page's spans of code name, such as ``models/tree/tree.py``."""
    tops = {path.name for path in ROOT.iterdir() if path.is_dir()}
    named = re.findall(r"`([a-z_]+/[\w/]+\.(?:py|yaml))`", text)
    return {name for name in named if name.partition("/")[0] in tops}


def named_objects(text: str) -> set[str]:
    """Modules, classes and functions that a page names in full or imports in an example."""
    spans = set(re.findall(r"`(draftsmith(?:\.[a-z_]\w*)+(?:\.[A-Z]\w*)?)", text))
    imports = re.findall(r"from (draftsmith[\w.]*) import ([\w, ]+)", text)
    imported = {f"{module}.{name.strip()}" for module, names in imports for name in names.split(",")}
    return (spans | imported) - {"draftsmith.families"}  # a group of entry points


def test_every_file_and_object_that_a_page_names_exists() -> None:
    texts = {page: page.read_text(encoding="utf-8") for page in PAGES if page.is_relative_to(ROOT / "docs")}
    texts[ROOT / "README.md"] = (ROOT / "README.md").read_text(encoding="utf-8")
    files = [(page.name, name) for page, text in texts.items() for name in named_files(text)]
    objects = [(page.name, name) for page, text in texts.items() for name in named_objects(text)]
    assert min(len(files), len(objects)) >= 10
    assert [(page, name) for page, name in files if not (ROOT / name).is_file()] == []
    assert [(page, name) for page, name in objects if pydoc.locate(name) is None] == []


def test_the_index_lists_every_page() -> None:
    index = ROOT / "docs" / "index.md"
    listed = {file.resolve() for file, _ in linked(index)}
    assert [str(page) for page in (ROOT / "docs").rglob("*.md") if page not in listed | {index}] == []


def test_the_architecture_page_names_every_folder() -> None:
    listed: set[str] = set()
    top = ""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for indent, name in re.findall(r"^( *)([\w/]+)/ ", page, re.MULTILINE):
        top = top if indent else name
        listed.add(f"{top}/{name}" if indent else name)
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    files = [Path(name) for name in tracked if not name.startswith(".")]
    folders = {str(file.parents[-2]) for file in files if len(file.parts) > 1} - {"src"} | {"src/draftsmith"}
    folders |= {
        str(file.parent) for file in files if len(file.parts) == 3 and file.parts[0] not in ("docs", "tests", "src")
    }
    assert sorted(folders - listed) == []
    assert [name for name in sorted(listed) if not (ROOT / name).is_dir()] == []


def test_the_python_example_for_ones_own_model_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ends = TargetEnds.load("embedded:target")
    ReDrafter.for_target(ends).save_pretrained(tmp_path / "drafter")
    page = ROOT / "docs" / "start" / "your-model.md"
    [code] = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    assert "runs/quickstart/drafter" in code
    assert "for_target(" in code
    exec(compile(code.replace("runs/quickstart/drafter", str(tmp_path / "drafter")), page.name, "exec"), {})
    assert "accepted in each cycle: [" in capsys.readouterr().out


@pytest.mark.parametrize("page", ["docs/how-to/judge/judge.md", "docs/how-to/judge/lossy.md"])
def test_the_examples_with_a_judge_run(page: str, tmp_path: Path) -> None:
    target = Target.load("embedded:target")
    Judge(JudgeConfig(hidden_size=target.ends.hidden_size, threshold=0.5)).save_pretrained(tmp_path / "judge")
    code = "".join(re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL))
    known = {
        "target": target,
        "drafter": load_draft_lm("embedded:draft_lm"),
        "prompt_ids": [5, 6, 7],
        "states": torch.zeros(4, target.ends.hidden_size),
    }
    exec(compile(code.replace("runs/judge/train/judge", str(tmp_path / "judge")), page, "exec"), known)
    assert "accepted" in known or "reply" in known

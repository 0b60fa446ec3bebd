"""The pages of the repository as tests read them: which there are, the commands they show, the commands of `make quickstart`."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").rglob("*.md")])
# The top folders whose modules are the package and its benchmarks.
PACKAGES = ("src", "models", "decode", "data", "label", "train", "evaluate", "export", "embedded", "benchmarks")


def shell_lines(page: Path) -> Iterator[str]:
    """Commands in the page's ```sh blocks, continued lines joined, comments cut."""
    for block in re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if line.strip() and not line.lstrip().startswith("#"):
                yield line.strip()


def make_lines(*goals: str, folder: Path = ROOT) -> list[str]:
    """The lines that `make GOALS` would run from nothing in a folder, each whole; goals may be settings (``RUN=x``)."""
    asked = ["make", "--file", str(ROOT / "Makefile"), "--always-make", "--dry-run", *goals]
    done = subprocess.run(asked, cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.replace("\\\n", " ").splitlines()


def make_recipes(*goals: str) -> list[str]:
    """The draftsmith commands that `make GOALS` runs."""
    runs = re.compile(r"[^'\"]*/bin/(draftsmith .*)")
    return [match[1] for line in make_lines(*goals) if (match := runs.match(line))]


def make_suggestions(*settings: str) -> list[str]:
    """The draftsmith commands that `make quickstart` prints at its end, to try next; settings as ``RUN=runs/x``."""
    show = 'next-steps:; @printf "%s\\n" "$$NEXT_STEPS"'
    asked = ["make", "--no-print-directory", "--eval", show, *settings, "next-steps"]
    done = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=True)
    return re.findall(r"/bin/(draftsmith .*)", done.stdout)

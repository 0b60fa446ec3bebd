"""Shows mypy the packages as one tree: `build/types/draftsmith/` made of links to the folders that pyproject.toml maps.

An editable install finds those folders through an import hook, which mypy does not follow.
"""

import shutil
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def link_packages(tree: Path) -> None:
    """Makes `tree` anew, one link for each mapped folder and one for each file of the root package."""
    mapping = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["package-dir"]
    shutil.rmtree(tree, ignore_errors=True)
    for package, folder in mapping.items():
        place = tree.joinpath(*package.split("."))
        if "." in package:
            place.symlink_to(ROOT / folder, target_is_directory=True)
            continue
        place.mkdir(parents=True)
        for file in (ROOT / folder).iterdir():
            if file.is_file():
                (place / file.name).symlink_to(file)


if __name__ == "__main__":
    link_packages(ROOT / "build" / "types")

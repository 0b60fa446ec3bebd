"""A target deep enough for EAGLE-3's default layers, in memory and on disk."""

from pathlib import Path

import pytest
from heads import deep_target, save_deep_target

from draftsmith.models import Target, TargetEnds


@pytest.fixture(scope="session")
def deep() -> Target:
    """Eight layers, llama3 rotary scaling, heads of a size of their own."""
    return deep_target()


@pytest.fixture(scope="session")
def deep_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights as `deep`, saved."""
    return save_deep_target(tmp_path_factory.mktemp("deep"))


@pytest.fixture(scope="session")
def deep_ends(deep_folder: Path) -> TargetEnds:
    """The ends of the saved one, named by its folder."""
    return TargetEnds.load(str(deep_folder))


@pytest.fixture(scope="session")
def other_deep() -> Target:
    """Another of the same shape."""
    target = deep_target(seed=9)
    target.ends.name = "other"
    return target

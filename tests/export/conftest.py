from pathlib import Path

import pytest
from tiny import save_drafter, save_target


@pytest.fixture(scope="session")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_target(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="session")
def other_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_target(tmp_path_factory.mktemp("other"), seed=9)


@pytest.fixture(scope="session")
def drafter(tmp_path_factory: pytest.TempPathFactory, target: Path) -> Path:
    return save_drafter(tmp_path_factory.mktemp("drafter"), target)

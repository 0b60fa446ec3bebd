"""Saved models that tests of several folders read and none writes to; and no test finds what another left in the environment."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from tiny import save_drafter, save_target

# How long an example takes depends on what else the machine does; a test that is too slow meets the limit of all tests.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Iterator[None]:
    """A seed or a rank that training notes for its child processes (PL_GLOBAL_SEED, LOCAL_RANK) ends with its test."""
    before = dict(os.environ)
    try:
        return (yield)
    finally:
        os.environ.clear()
        os.environ.update(before)


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Bytes get the argument's name: what a packer writes holds the time, and two processes would name the test differently."""
    return argname if isinstance(val, bytes) else None


SHARED = ("target", "other_target", "drafter")


@pytest.fixture(autouse=True)
def shared_folders_are_left_as_they_were(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test that writes into a folder that others read fails itself, not whichever of them comes next in its process."""
    folders = [request.getfixturevalue(name) for name in SHARED if name in request.fixturenames]
    folders = [folder for folder in folders if isinstance(folder, Path)]  # a few files have models of these names
    before = [_state(folder) for folder in folders]
    yield
    changed = [str(folder) for folder, state in zip(folders, before, strict=True) if _state(folder) != state]
    assert not changed, f"the test wrote into {', '.join(changed)}, which all tests share; let it copy the folder first"


def _state(folder: Path) -> list[tuple[str, int, int]]:
    stats = ((path, path.stat()) for path in sorted(folder.rglob("*")))
    return [(str(path), stat.st_size, stat.st_mtime_ns) for path, stat in stats]


@pytest.fixture(scope="session")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved target with tokenizer and chat template."""
    return save_target(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="session")
def other_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another of the same shape and tokenizer."""
    return save_target(tmp_path_factory.mktemp("other"), seed=9)


@pytest.fixture(scope="session")
def drafter(tmp_path_factory: pytest.TempPathFactory, target: Path) -> Path:
    """A saved drafter of `target`."""
    return save_drafter(tmp_path_factory.mktemp("drafter"), target)

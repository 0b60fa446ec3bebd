"""Saved models that tests of several folders read and none writes to; and no test finds what another left in the environment."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny import save_drafter, save_target


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Iterator[None]:
    """A seed or a rank that training notes for its child processes (PL_GLOBAL_SEED, LOCAL_RANK) ends with its test."""
    before = dict(os.environ)
    try:
        return (yield)
    finally:
        os.environ.clear()
        os.environ.update(before)


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

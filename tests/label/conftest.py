"""Answers that the tests of labels are made of."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from draftsmith.data.chats.messages import Message
from draftsmith.label.checkers.sandbox import SandboxError, run
from draftsmith.label.schema import Answer, Label
from draftsmith.label.store.store import Store


def an_answer(name: str = "a", response: str = "1+1=3, so 3", label: Label | None = None) -> Answer:
    messages = (Message(role="user", content=f"How many? ({name})"),)
    return Answer(name, messages, response, "some-model", "MIT", "tests", label)


@pytest.fixture(scope="session")
def sandbox() -> None:
    """Skips where this system has no sandbox for unit tests: `.ci/run` installs bwrap, elsewhere it may be absent."""
    try:
        run("pass")
    except SandboxError:
        raise  # it broke: that is no reason to skip
    except ValueError as error:
        pytest.skip(str(error))


@pytest.fixture
def make() -> Callable[..., Answer]:
    return an_answer


@pytest.fixture
def wrong() -> Label:
    """The 3 of "1+1=3, so 3"."""
    return Label("wrong", "alice", "person", (4, 5))


@pytest.fixture
def place(tmp_path: Path) -> str:
    return str(tmp_path / "labels.db")


@pytest.fixture
def store(place: str) -> Iterator[Store]:
    with Store(place, create=True) as opened:
        yield opened

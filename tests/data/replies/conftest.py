"""A server of replies, and prompts to ask it."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from reply_server import Server

from draftsmith.cli import main
from draftsmith.data.replies import http_json
from draftsmith.data.replies import server_source as engine_server


@pytest.fixture
def server(target: Path) -> Iterator[Server]:
    with Server(str(target)) as serving:
        thread = threading.Thread(target=serving.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield serving
        serving.shutdown()
        thread.join(10)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits of the same shape, a hundredth as long."""
    real = http_json.JsonClient
    monkeypatch.setattr(engine_server, "JsonClient", lambda *arguments: real(*arguments, first_wait=0.01))


@pytest.fixture
def prompt_file(write_jsonl: Callable[..., Path], tmp_path: Path) -> Path:
    """Twelve prompts, every third of them with two turns, as `data prompts` writes them."""

    def messages(number: int) -> list[dict[str, str]]:
        first, more = {"role": "user", "content": f"How many {number}?"}, {"role": "user", "content": "And then?"}
        return [first, {"role": "assistant", "content": "."}, more] if number % 3 == 0 else [first]

    source = write_jsonl([{"messages": messages(number)} for number in range(12)], "source.jsonl")
    assert main(["data", "prompts", "--source", str(source), "--out", str(tmp_path / "prompts")]) == 0
    return tmp_path / "prompts"

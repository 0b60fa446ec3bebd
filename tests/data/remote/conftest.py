"""Caches behind URLs: in memory, and on a web server."""

import hashlib
import http.server
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest
from remote_caches import Flaky, Server


@pytest.fixture
def upload(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """upload(folder) -> its URL; nothing fails until a test says so."""

    def copy(folder: Path) -> str:
        url = f"flaky://bucket/{hashlib.sha256(str(folder).encode()).hexdigest()[:8]}"
        file_system, root = fsspec.core.url_to_fs(url)
        for file in folder.iterdir():
            file_system.pipe_file(f"{root}/{file.name}", file.read_bytes())
        return url

    for counter in (Flaky.reads, Flaky.failures, Flaky.cuts):
        counter.clear()
    Flaky.pause = 0.0
    yield copy
    Flaky.store.clear()
    Flaky.pause = 0.0


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[[Path], str]]:
    """serve(folder) -> its URL on a free port."""
    pytest.importorskip("aiohttp")
    servers: list[http.server.ThreadingHTTPServer] = []

    def start(folder: Path) -> str:
        Server.folder, Server.ranges, Server.pause = folder, True, 0.0
        Server.asked.clear()
        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()

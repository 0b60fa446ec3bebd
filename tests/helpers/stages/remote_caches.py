"""A small cache, a file system that fails on demand, and what tests ask of a reader of both."""

import hashlib
import http.server
import os
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import torch
from fsspec.implementations.memory import MemoryFileSystem

from draftsmith.data.cache.reader import HiddenStateCache
from draftsmith.data.remote.node_folder import ShardFolder
from draftsmith.data.remote.remote_folder import Retry
from draftsmith.data.shards.lengths import write_lengths
from draftsmith.data.shards.manifest import CacheIdentity, Manifest
from draftsmith.data.shards.shards import ShardContent, write_shard

LAYER = "last.pre_norm"
AT_ONCE = Retry(attempts=3, wait=0.0)
LENGTHS = [[3, 5, 2], [4], [6, 1, 7, 2], [5, 5], [8, 3, 4]]


def write_cache(folder: Path, lengths: list[list[int]] = LENGTHS, with_lengths: bool = True) -> Path:
    """A small cache of one shard a list."""
    identity = CacheIdentity(
        "t", None, "f", "k", "c", (LAYER,), 4, "bfloat16", "float32", "s", None, "m", 99, 0, 1.0, 9
    )
    flat = [length for own in lengths for length in own]
    labelled = sum((sum(own) + 1) // 2 for own in lengths)
    manifest = Manifest(identity, len(flat), sum(flat), labelled, 0, 0)
    for number, own in enumerate(lengths):
        ids = torch.arange(sum(own), dtype=torch.int32) + 100 * number
        content = ShardContent(
            ids=[f"s{number}-{place}" for place in range(len(own))],
            offsets=torch.tensor([0, *own]).cumsum(0),
            input_ids=ids,
            loss_mask=ids % 2 == 0,
            hidden={LAYER: ids[:, None].to(torch.bfloat16).expand(-1, 4).contiguous()},
            greedy_ids=None,
        )
        record = write_shard(folder / f"shard-{number:05d}.safetensors", content)
        manifest = manifest.with_shards((*manifest.shards, record))
    manifest.save(folder)
    if with_lengths:
        write_lengths(folder, flat)
    return folder


class Flaky(MemoryFileSystem):
    """Files in memory behind a network: counts what is read, and fails as told."""

    protocol = "flaky"
    store: dict[str, Any] = {}  # noqa: RUF012  (fsspec's own way)
    pseudo_dirs = [""]  # noqa: RUF012
    reads: ClassVar[Counter] = Counter()
    failures: ClassVar[Counter] = Counter()
    cuts: ClassVar[Counter] = Counter()
    pause = 0.0

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        """As in memory, but slower and less sure."""
        name = path.rsplit("/", 1)[-1]
        Flaky.reads[name] += 1
        time.sleep(Flaky.pause)
        if Flaky.failures[name] > 0:
            Flaky.failures[name] -= 1
            raise ConnectionResetError("the line went dead")
        content = super().cat_file(path, start=start, end=end, **kwargs)
        if Flaky.cuts[name] > 0:
            Flaky.cuts[name] -= 1
            return content[:-3]
        return content


fsspec.register_implementation("flaky", Flaky, clobber=True)


def opened(url: str | Path, tmp_path: Path, **settings: Any) -> HiddenStateCache:
    return HiddenStateCache(url, **{"shard_cache": tmp_path / "node", "retry": AT_ONCE, **settings})


def same(first: HiddenStateCache, second: HiddenStateCache) -> bool:
    pairs = zip(first, second, strict=True)
    return all(
        one.id == other.id
        and torch.equal(one.input_ids, other.input_ids)
        and torch.equal(one.loss_mask, other.loss_mask)
        and torch.equal(one.hidden[LAYER], other.hidden[LAYER])
        for one, other in pairs
    )


def fetched(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "node").glob("*.safetensors"))


def hold(folder: ShardFolder, content: bytes, patient: bool = True) -> Any:
    return folder.hold(
        hashlib.sha256(content).hexdigest(), len(content), lambda into: os.pwrite(into, content, 0) and None, patient
    )


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class Server(http.server.BaseHTTPRequestHandler):
    """Serves a folder with or without ranges, and counts what is asked for."""

    folder: Path
    ranges = True
    asked: ClassVar[Counter] = Counter()
    pause = 0.0

    def do_GET(self) -> None:
        path = self.folder / self.path.lstrip("/")
        if not path.is_file():
            self.send_error(404)
            return
        Server.asked[path.name] += 1
        time.sleep(Server.pause)
        content = path.read_bytes()
        wanted = self.headers.get("Range") if Server.ranges else None
        if wanted is None:
            self.send_response(200)
        else:
            start, stop = wanted.removeprefix("bytes=").split("-")
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{stop}/{len(content)}")
            content = content[int(start) : int(stop) + 1]
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments: Any) -> None:
        """Says nothing."""

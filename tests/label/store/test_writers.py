"""Several processes on one store, and one that is killed while it writes."""

import os
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from draftsmith.label.schema import Answer, Label
from draftsmith.label.store.store import Store

WORKER = """
import sys
from draftsmith.label.schema import Label
from draftsmith.label.store.store import Store

place, name = sys.argv[1:]
with Store(place, create=True) as store:
    print("ready", flush=True)
    sys.stdin.readline()
    while (answer := store.assign(name)) is not None:
        number = store.annotate(answer.id, Label("wrong", name, "person", (0, 1)))
        print(number, answer.id, flush=True)
"""
ENDLESS = """
import sys
from draftsmith.label.schema import Label
from draftsmith.label.store.store import Store

with Store(sys.argv[1]) as store:
    for count in range(10**9):
        print(store.annotate("a", Label("correct", "alice", "person", note=str(count))), flush=True)
"""
CREATOR = """
import sys
from draftsmith.label.store.store import Store

print("ready", flush=True)
sys.stdin.readline()
Store(sys.argv[1], create=True).close()
"""


def start(script: str, *words: str) -> "subprocess.Popen[str]":
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", script, *words], stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def start_together(processes: "list[subprocess.Popen[str]]") -> None:
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()


def finish(process: "subprocess.Popen[str]") -> str:
    out, error = process.communicate(timeout=240)
    assert process.returncode == 0, error
    return out


def test_processes_that_label_at_once_share_the_items_and_lose_no_label(
    store: Store, place: str, make: Callable[..., Answer]
) -> None:
    names = ["alice", "bob", "carol"]
    items = [f"item-{number}" for number in range(24)]
    store.add([make(item) for item in items], "importer")
    processes = [start(WORKER, place, name) for name in names]
    start_together(processes)
    told = [line.split() for process in processes for line in finish(process).splitlines()]
    assert Counter(item for _, item in told) == Counter(items), "each item once, to one of them"
    assert sorted(int(number) for number, _ in told) == list(range(1, 25))
    assert store.num_entries() == 24
    assert {answer.id for answer in store.answers()} == set(items)


def test_processes_that_make_one_store_at_once_make_one(tmp_path: Path, make: Callable[..., Answer]) -> None:
    place = str(tmp_path / "new" / "labels.db")
    processes = [start(CREATOR, place) for _ in range(3)]
    start_together(processes)
    for process in processes:
        finish(process)
    with Store(place) as store:
        store.add([make("a")], "importer")
        assert store.answers(unlabelled=True) == [make("a")]


def test_a_killed_writer_loses_nothing_that_it_had_told(store: Store, place: str, make: Callable[..., Answer]) -> None:
    store.add([make("a")], "importer")
    process = start(ENDLESS, place)
    assert process.stdout is not None
    told = [int(process.stdout.readline()) for _ in range(20)]
    os.kill(process.pid, signal.SIGKILL)
    rest, _ = process.communicate(timeout=60)
    told += [int(line) for line in rest.split("\n")[:-1]]
    with sqlite3.connect(place) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    kept = [entry.number for entry in store.history("a")]
    assert kept[: len(told)] == told
    assert len(kept) <= len(told) + 1, "at most the entry that it had no time to tell"
    assert store.annotate("a", Label("correct", "bob", "person")) == kept[-1] + 1

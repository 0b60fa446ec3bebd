"""Small writers of this project's files, a check of what each leaves, and a campaign that kills them at random moments.

`python writers.py FOLDER SEED NUM_KILLS` forks, for each kind, a writer for every kill from one process that has imported everything,
checks what is there after each, lets the last writer finish, and prints how many kills left something half-done and what lies about
in the end.
"""

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from draftsmith.files import JsonlAppender, atomic_directory, atomic_file, exclusive
from draftsmith.train.run.checkpoints import AtomicCheckpointIO

_SIZE = 1_000_000
_WEIGHTS = 100_000


def write_file(root: Path, numbers: Iterator[int]) -> None:
    for number in numbers:
        with atomic_file(root / "text") as file:
            for _ in range(20):
                file.write(bytes([number % 251]) * (_SIZE // 20))


def check_file(root: Path) -> None:
    if (root / "text").exists():
        content = (root / "text").read_bytes()
        assert (len(content), len({*content})) == (_SIZE, 1)


def write_folder(root: Path, numbers: Iterator[int]) -> None:
    for number in numbers:
        with atomic_directory(root / "folder", "draftsmith weave") as folder:
            for name in "abc":
                (folder / name).write_text(str(number) * 1000)


def check_folder(root: Path) -> None:
    if (root / "folder").exists():
        assert len({(root / "folder" / name).read_text() for name in "abc"}) == 1


def write_log(root: Path, numbers: Iterator[int]) -> None:
    with exclusive(root / "log.jsonl"), JsonlAppender(root / "log.jsonl", sync_rows=3) as log:
        for _ in numbers:
            log.write({"number": len(log.rows), "text": "x" * 5000})


def check_log(root: Path) -> None:
    """A last line may be torn; it does not count."""
    if (root / "log.jsonl").exists():
        *whole, _ = (root / "log.jsonl").read_bytes().split(b"\n")
        assert [json.loads(line)["number"] for line in whole] == list(range(len(whole)))


def write_checkpoint(root: Path, numbers: Iterator[int]) -> None:
    for number in numbers:
        fields = {"loops": {}, "global_step": number, "epoch": 0, "pytorch-lightning_version": "2"}
        weights = {"weight": torch.full((_WEIGHTS,), float(number))}
        AtomicCheckpointIO().save_checkpoint({"state_dict": weights, **fields}, root / f"step={number % 3}.ckpt")


def check_checkpoint(root: Path) -> None:
    for path in root.glob("*.ckpt"):
        checkpoint = AtomicCheckpointIO().load_checkpoint(path)
        assert {*checkpoint["state_dict"]["weight"].tolist()} == {float(checkpoint["global_step"])}


Writer = Callable[[Path, Iterator[int]], None]
KINDS: dict[str, tuple[Writer, Callable[[Path], None]]] = {
    "file": (write_file, check_file),
    "folder": (write_folder, check_folder),
    "log": (write_log, check_log),
    "checkpoint": (write_checkpoint, check_checkpoint),
}


def forked(write: Writer, root: Path, numbers: Iterator[int]) -> int:
    child = os.fork()
    if child == 0:
        write(root, numbers)
        os._exit(0)
    return child


def campaign(kind: str, root: Path, seed: int, num_kills: int) -> dict[str, object]:
    """Kills, checks, finishes. Raises AssertionError where anything that counts is not whole."""
    (write, check), draw = KINDS[kind], random.Random(seed)
    num_half = 0
    for _ in range(num_kills):
        child = forked(write, root, iter(range(10**9)))
        time.sleep(draw.uniform(0.01, 0.08))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        check(root)
        num_half += bool(strays(root))
    _, status = os.waitpid(forked(write, root, iter(range(1))), 0)
    check(root)
    return {"half": num_half, "status": status, "strays": strays(root)}


def strays(root: Path) -> list[str]:
    return sorted(path.name for path in root.rglob(".*"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    place, seed, num_kills = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    for one in KINDS:
        (place / one).mkdir()
    print(json.dumps({one: campaign(one, place / one, seed, num_kills) for one in KINDS}))

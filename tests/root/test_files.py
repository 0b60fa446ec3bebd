"""What `draftsmith.files` promises: whole or absent, resumable, one writer."""

import errno
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from draftsmith import files
from draftsmith.files import (
    JsonlAppender,
    atomic_directory,
    atomic_file,
    atomic_write,
    exclusive,
    is_abandoned,
    read_jsonl,
    sha256_file,
)
from draftsmith.ownership import CLAIM_FILE


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def raise_full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_atomic_write_replaces_the_content_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    atomic_write(path, "first")
    atomic_write(path, "zweite Fassung: ü".encode())
    assert path.read_text(encoding="utf-8") == "zweite Fassung: ü"
    assert names(path.parent) == ["a.txt"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    path = tmp_path / "a.txt"
    atomic_write(path, "old")
    monkeypatch.setattr(os, call, raise_full_disk)
    with pytest.raises(OSError, match="No space left"):
        atomic_write(path, "new")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_a_directory_appears_only_when_its_block_ended_well(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    with atomic_directory(path) as partial:
        (partial / "a").write_text("1")
        assert not path.exists()
    assert names(tmp_path) == ["cache"]
    assert (path / "a").read_text() == "1"


def test_a_failed_block_keeps_the_old_directory_and_removes_the_new(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    with atomic_directory(path) as partial:
        (partial / "a").write_text("old")
    with pytest.raises(FileNotFoundError), atomic_directory(path) as partial:
        (partial / "a").write_text(str((partial / "missing").stat()))
    assert names(tmp_path) == ["cache"]
    assert (path / "a").read_text() == "old"


def test_a_second_directory_replaces_the_first_entirely(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    for name in ("old", "new"):
        with atomic_directory(path) as partial:
            (partial / name).touch()
    assert names(path) == ["new", CLAIM_FILE]
    assert names(tmp_path) == ["cache"]


def test_what_a_killed_writer_left_is_cleared_by_the_next(tmp_path: Path) -> None:
    ours, theirs = leftovers("cache", dead_process()), leftovers("cache", os.getppid())
    for name in (*ours, *theirs):
        (tmp_path / name).mkdir()
    with atomic_directory(tmp_path / "cache"):
        pass
    assert names(tmp_path) == sorted([*theirs, "cache"])


def dead_process() -> int:
    killed = subprocess.Popen([sys.executable, "-c", ""])
    killed.wait()
    return killed.pid


def leftovers(name: str, pid: int) -> list[str]:
    """What a process of this machine may leave."""
    return [f".{name}.{kind}-{files._machine()}-{pid}-0123abcd" for kind in ("partial", "replaced")]


def test_what_a_process_of_another_machine_is_writing_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid = dead_process()
    with monkeypatch.context() as patch:
        patch.setattr(socket, "gethostname", lambda: "far-away")
        theirs = leftovers("cache", pid)
        assert all("-far-away" in name for name in theirs)
        assert all(is_abandoned(Path(name)) for name in theirs)
    for name in theirs:
        (tmp_path / name).mkdir()
    with atomic_directory(tmp_path / "cache"):
        pass
    assert names(tmp_path) == sorted([*theirs, "cache"])


def test_what_an_earlier_version_left_is_cleared_once_nobody_touched_it_for_a_day(tmp_path: Path) -> None:
    """Its name does not say on which machine that process was."""
    pid = dead_process()
    for name, age in (("old", 90_000), ("new", 80_000)):
        leftover = tmp_path / f".{name}.partial-{pid}"
        leftover.mkdir()
        os.utime(leftover, (time.time() - age,) * 2)
        with atomic_directory(tmp_path / name):
            pass
    assert names(tmp_path) == [f".new.partial-{pid}", "new", "old"]
    assert not is_abandoned(tmp_path / f".gone.partial-{pid}")


def test_writers_of_one_path_with_the_same_process_id_keep_out_of_each_others_way(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with atomic_file(path) as first:
        first.write(b"first, ")
        with atomic_file(path) as second:
            second.write(b"second")
        assert path.read_bytes() == b"second"
        first.write(b"whole")
    assert path.read_bytes() == b"first, whole"
    with atomic_directory(tmp_path / "d") as one, atomic_directory(tmp_path / "d") as other:
        (one / "one").touch()
        (other / "other").touch()
    assert names(tmp_path / "d") == ["one", CLAIM_FILE]
    assert names(tmp_path) == ["a.txt", "d"]


def test_a_failed_exchange_puts_the_old_directory_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "cache"
    with atomic_directory(path) as partial:
        (partial / "a").write_text("old")
    real_replace = os.replace

    def refuse_the_new(source: Path, target: Path) -> None:
        if "partial" in Path(source).name:
            raise_full_disk()
        real_replace(source, target)

    monkeypatch.setattr(os, "replace", refuse_the_new)
    with pytest.raises(OSError, match="No space left"), atomic_directory(path) as partial:
        (partial / "a").write_text("new")
    assert names(tmp_path) == ["cache"]
    assert (path / "a").read_text() == "old"


def test_a_directory_never_replaces_a_file(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(ValueError, match="is a file"), atomic_directory(tmp_path / "cache"):
        pass
    assert (tmp_path / "cache").read_text() == "a file"


def test_read_jsonl_counts_lines_from_one_and_passes_over_blank_ones(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n\n{"a": 2}')
    assert list(read_jsonl(path)) == [(1, {"a": 1}), (3, {"a": 2})]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\n \n", "is empty"),
        (b'{"a": 1}\n{"a": \n', r"a\.jsonl:2: not valid JSON"),
        (b'{"a": 1}\n[1]\n', r"a\.jsonl:2: not a JSON object but list"),
        (b'{"a": "\xff"}\n', r"a\.jsonl:1: not UTF-8"),
    ],
)
def test_read_jsonl_names_the_line_that_is_wrong(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(read_jsonl(tmp_path / "a.jsonl"))


def test_read_jsonl_refuses_a_missing_path_at_the_call(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"missing\.jsonl does not exist"):
        read_jsonl(tmp_path / "missing.jsonl")
    with pytest.raises(ValueError, match="is a folder"):
        read_jsonl(tmp_path)


def test_an_appender_cuts_a_torn_line_and_goes_on_after_the_whole_ones(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"id": 1}\n{"id": 2}\n{"id": 3, "te')
    with JsonlAppender(path) as log:
        assert log.rows == [{"id": 1}, {"id": 2}]
        log.write({"id": 3})
    assert path.read_text() == '{"id": 1}\n{"id": 2}\n{"id": 3}\n'


def test_an_appender_refuses_a_file_spoilt_in_its_middle(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"id": 1}\n{"id": \n{"id": 3}\n')
    with pytest.raises(ValueError, match=r"log\.jsonl:2: not valid JSON"):
        JsonlAppender(path)


def test_an_appender_brings_its_rows_to_the_disk_without_being_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    log = JsonlAppender(tmp_path / "log.jsonl", sync_rows=2, sync_seconds=3600)
    log.write({"id": 1})
    assert not synced
    log.write({"id": 2})
    assert len(synced) == 1
    log.close()
    log.close()


def test_a_killed_process_loses_no_row_that_it_wrote(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    script = f"""
import os, signal
from draftsmith.files import JsonlAppender
log = JsonlAppender({str(path)!r}, sync_rows=1000, sync_seconds=1000)
for number in range(5):
    log.write({{"number": number}})
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -signal.SIGKILL
    assert [row["number"] for _, row in read_jsonl(path)] == [0, 1, 2, 3, 4]


def test_a_killed_appender_resumes_to_the_rows_of_an_undisturbed_one(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    script = (
        "import sys, time; from pathlib import Path; from draftsmith.files import JsonlAppender\n"
        "log = JsonlAppender(Path(sys.argv[1]), sync_rows=1)\n"
        "for i in range(len(log.rows), 10**6): log.write({'id': i, 'text': 'x' * 5000})\n"
    )
    for _ in range(2):
        process = subprocess.Popen([sys.executable, "-c", script, str(path)])
        size, start = path.stat().st_size if path.exists() else 0, time.monotonic()
        while (not path.exists() or path.stat().st_size <= size + 50_000) and time.monotonic() - start < 60:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    with JsonlAppender(path) as log:
        assert len(log.rows) >= 18
        assert [row["id"] for row in log.rows] == list(range(len(log.rows)))


def test_a_second_writer_is_refused_with_the_first_ones_process_id(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from draftsmith.files import exclusive\n"
        "with exclusive(Path(sys.argv[1])):\n"
        "    print('held', flush=True); sys.stdin.read()\n"
    )
    path = tmp_path / "cache"
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    with pytest.raises(ValueError, match=f"pid {process.pid}"), exclusive(path):
        pass
    process.kill()  # kill -9: the lock must go with its owner
    process.communicate()
    with exclusive(path):
        assert names(tmp_path) == [".cache.lock"]
    assert names(tmp_path) == []


def test_sha256_of_a_file_is_the_standard_one(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_file(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    with pytest.raises(ValueError, match="is not a file"):
        sha256_file(tmp_path / "b")


def test_an_appender_keeps_only_what_it_is_asked_to(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with JsonlAppender(path, keep=lambda row: row["id"]) as log:
        log.write({"id": "a", "text": "long"})
    with JsonlAppender(path, keep=lambda row: row["id"]) as log:
        log.write({"id": "b", "text": "long"})
        assert log.rows == ["a", "b"]
    assert [row["text"] for _, row in read_jsonl(path)] == ["long", "long"]


def test_a_lock_that_its_last_owner_takes_away_while_it_is_looked_at_is_taken_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, looks = Path.stat, []

    def gone_at_first(path: Path, **options: bool) -> os.stat_result:
        if path.name == ".cache.lock" and not looks:
            looks.append(path)
            raise FileNotFoundError(path)
        return real(path, **options)

    monkeypatch.setattr(Path, "exists", lambda path: True)
    monkeypatch.setattr(Path, "stat", gone_at_first)
    with exclusive(tmp_path / "cache"):
        assert names(tmp_path) == [".cache.lock"]
    assert len(looks) == 1


def test_a_folder_cleared_away_before_the_lock_is_opened_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, cleared = os.open, []

    def clear_first(path: Path, *options: int) -> int:
        if not cleared:
            cleared.append(path)
            os.rmdir(tmp_path / "parts")
        return real(path, *options)

    monkeypatch.setattr(os, "open", clear_first)
    with exclusive(tmp_path / "parts" / "part"):
        assert names(tmp_path / "parts") == [".part.lock"]
    assert cleared


def test_a_log_of_replies_goes_on_whatever_characters_they_hold(tmp_path: Path) -> None:
    with files.JsonlAppender(tmp_path / "log.jsonl") as log:
        log.write({"text": "\0"})
        log.write({"text": "\ud83d", "place": os.fsdecode(b"caf\xe9")})
    with files.JsonlAppender(tmp_path / "log.jsonl") as log:
        assert log.rows == [{"text": "\0"}, {"text": "\ud83d", "place": "caf\udce9"}]

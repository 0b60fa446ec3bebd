"""The script between `sandbox.run` and the program: starts it, listens, and kills what is left.

Owns time, pipes and the end of processes. Knows nothing of answers and tests, or of what keeps the program apart (`bubblewrap`). Linux
only, and the standard library only: it runs as a script of its own.

The launcher adopts whatever the program leaves behind and kills it. Inside bwrap the kernel does so already; elsewhere nobody else does.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

START_SECONDS = 20.0  # the longest that the interpreter may take until it reaches the program
PROGRAM_FD, STATUS_FD, REPORT_FD = 60, 61, 62  # above what bwrap and an interpreter open on their way
BEGUN = b"begun"

_PDEATHSIG, _SUBREAPER = 1, 36


def _launch(order: dict[str, Any]) -> dict[str, Any]:
    """The launcher's work: start, listen, kill."""
    prctl = ctypes.CDLL(None).prctl
    prctl(_SUBREAPER, 1, 0, 0, 0)
    prctl(_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    child, readers = _start(order)
    timed_out, received = _listen(child, readers, order["seconds"], order["output_bytes"])
    exit_code = _end(child)
    return {
        "begun": received["status"] == BEGUN,
        "exit_code": None if timed_out else exit_code,
        "output": received["output"].decode(errors="replace"),
        "report": received["report"].decode(errors="replace"),
    }


def _start(order: dict[str, Any]) -> tuple[int, dict[str, int]]:
    """Starts the command; gives its process id and what to read from."""
    pipes = {name: os.pipe() for name in ("output", "report", "status")}
    with tempfile.TemporaryFile() as program:
        program.write(order["program"].encode("utf-8", "surrogatepass"))
        program.seek(0)
        os.dup2(program.fileno(), PROGRAM_FD)
    os.dup2(pipes["status"][1], STATUS_FD)
    os.dup2(pipes["report"][1], REPORT_FD)
    child = subprocess.Popen(
        order["command"],
        stdin=subprocess.DEVNULL,
        stdout=pipes["output"][1],
        stderr=pipes["output"][1],
        pass_fds=(PROGRAM_FD, STATUS_FD, REPORT_FD),
        cwd=order["folder"],
        env=order["environment"],
        start_new_session=True,
    )
    for end in (PROGRAM_FD, STATUS_FD, REPORT_FD, *(pair[1] for pair in pipes.values())):
        os.close(end)
    child.returncode = 0  # `_end` waits for it, among all others
    return child.pid, {name: pair[0] for name, pair in pipes.items()}


def _listen(child: int, readers: dict[str, int], seconds: float, output_bytes: int) -> tuple[bool, dict[str, bytes]]:
    """Reads until the child ends or the time is up, which begins anew where the program begins; whether it was up.

    Keeps the first `output_bytes` of each pipe and drops the rest.
    """
    most = dict.fromkeys(readers, output_bytes) | {"status": len(BEGUN)}
    received = dict.fromkeys(readers, b"")
    ended = os.pidfd_open(child)
    begun, ends = False, time.monotonic() + START_SECONDS
    with selectors.DefaultSelector() as selector:
        selector.register(ended, selectors.EVENT_READ)
        for name, reader in readers.items():
            os.set_blocking(reader, False)
            selector.register(reader, selectors.EVENT_READ, name)
        while (left := ends - time.monotonic()) > 0:
            ready = selector.select(left)
            for key, _ in ready:
                if key.data is not None and not _read(key.data, key.fd, received, most[key.data]):
                    selector.unregister(key.fd)
            if not begun and received["status"] == BEGUN:
                begun, ends = True, time.monotonic() + seconds
            if any(key.fd == ended for key, _ in ready):
                break
        else:
            return True, received
    for name, reader in readers.items():
        while len(received[name]) < most[name] and _read(name, reader, received, most[name]):
            pass
    return False, received


def _read(name: str, reader: int, received: dict[str, bytes], most: int) -> bool:
    """Whether there may be more."""
    try:
        part = os.read(reader, 1 << 16)
    except BlockingIOError:
        return False
    received[name] = (received[name] + part)[:most]
    return bool(part)


def _end(child: int) -> int:
    """Kills the child's group and, generation by generation, whatever it leaves to this process; gives the child's exit code."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    exit_code = 0
    while True:
        for process in _children():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        process = -1
        while process != 0:
            try:
                process, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return exit_code
            if process == child:
                exit_code = os.waitstatus_to_exitcode(status)
        time.sleep(0.002)


def _children() -> Iterator[int]:
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # The name in parentheses may hold anything; the fields after the last one are state and parent.
            if int(entry.read_text(errors="replace").rpartition(")")[2].split()[1]) == os.getpid():
                yield int(entry.parent.name)


if __name__ == "__main__":
    json.dump(_launch(json.load(sys.stdin)), sys.stdout)

"""Runs a Python program that nobody has read: limited, cut off from the rest of the machine, and gone afterwards.

Owns what a caller sees: the limits, what became of a program, and the errors of a sandbox that did not start. `bubblewrap` says how a
program is kept apart, `sandbox_launcher` starts and ends it. Knows nothing of answers and tests. Linux only.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from typing import Any

from draftsmith.label.checkers import sandbox_launcher
from draftsmith.label.checkers.bubblewrap import WORK, Confinement, find_confinement, other_user
from draftsmith.label.checkers.sandbox_launcher import BEGUN, PROGRAM_FD, REPORT_FD, START_SECONDS, STATUS_FD

REPORT = 3  # the file descriptor on which a program may say something beside its output

_TIDYING_SECONDS = 20  # for killing what a program left behind
_FILES = 64  # how many files a program may open
_PROGRAM = "program.py"
# Only an interpreter that has come up can say so; what the program does from here on is its own. The program cannot say it: the
# descriptor is closed before its first line.
_BOOT = f"""\
import os
os.dup2({REPORT_FD}, {REPORT})
with open({PROGRAM_FD}, encoding="utf-8", errors="surrogatepass") as file:
    program = file.read()
with open({_PROGRAM!r}, "w", encoding="utf-8", errors="surrogatepass") as file:
    file.write(program)
os.write({STATUS_FD}, {BEGUN!r})
os.closerange({REPORT + 1}, {REPORT_FD + 1})
del os, file
__file__ = {_PROGRAM!r}
exec(compile(program, {_PROGRAM!r}, "exec"))
"""


@dataclass(frozen=True)
class Limits:
    """What a program may use.

    Attributes:
        seconds: of the clock.
        memory_bytes: of each process.
        disk_bytes: of all processes together.
        num_processes: at a time.
        output_bytes: of its output that are kept.

    Raises:
        ValueError: the time is not above 0 and finite.
    """

    seconds: float = 5.0
    memory_bytes: int = 1 << 30
    disk_bytes: int = 16 << 20
    num_processes: int = 8
    output_bytes: int = 1 << 16

    def __post_init__(self) -> None:
        if not (math.isfinite(self.seconds) and self.seconds > 0):
            raise ValueError(f"seconds is {self.seconds}; a program needs a finite time above 0; correct it")

    def for_prlimit(self) -> dict[str, int]:
        """The limits that the kernel enforces on each process, by the names of `prlimit`."""
        memory, disk, processes = self.memory_bytes, self.disk_bytes, self.num_processes
        seconds = math.ceil(self.seconds) + 1
        return {"cpu": seconds, "as": memory, "fsize": disk, "nproc": processes, "nofile": _FILES, "core": 0}


_USUAL = Limits()
_ENVIRONMENT = {
    "PATH": "/usr/local/bin:/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}


class SandboxError(ValueError):
    """A program was not started, so nothing is known of it. Never to be read as a program that failed."""


@dataclass(frozen=True)
class ProgramOutcome:
    """What became of a program that was started.

    Attributes:
        exit_code: negative or above 128 for a signal, None where the time was up.
        output: the beginning of what it printed.
        report: the beginning of what it wrote to the descriptor `REPORT`.
        missing: the protections that this system did not permit: of the `network`, of the user's `files`, of the user's `processes`.
    """

    exit_code: int | None
    output: str
    report: str
    missing: tuple[str, ...]


def run(program: str, limits: Limits = _USUAL, unprotected: bool = False) -> ProgramOutcome:
    """Runs a program in this interpreter's version with its packages, in an empty folder that vanishes afterwards.

    It sees the file system without homes, temporary folders and terminals and cannot write to it, has no network, an empty
    environment and no input. Its time begins with its first line, not with the start of the interpreter.

    Args:
        program: Python source.
        limits: what it may use.
        unprotected: run it even where files or processes of the user cannot be kept from it.

    Raises:
        ValueError: this system cannot protect the user's files or processes, and `unprotected` is False.
        SandboxError: the program was not started.
    """
    if not sys.platform.startswith("linux"):
        raise ValueError(f"unit tests run in a sandbox of Linux, and this is {sys.platform}; use Linux or a container")
    executable = os.path.join(os.getcwd(), sys.executable or "")
    confinement = find_confinement(executable)
    if confinement.needs_consent and not unprotected:
        raise _no_sandbox(confinement)
    user = other_user() if confinement.changes_user else None
    command = [*confinement.command(limits.for_prlimit(), user), executable, "-I", "-c", _BOOT]
    with contextlib.ExitStack() as stack:
        folder = WORK
        if not confinement.box:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="draftsmith-", ignore_cleanup_errors=True))
            if user is not None:
                os.chown(folder, user, user)
        order = {
            "command": command,
            "program": program,
            "folder": None if folder == WORK else folder,
            "environment": _ENVIRONMENT | {"HOME": folder, "TMPDIR": folder},
            "seconds": limits.seconds,
            "output_bytes": limits.output_bytes,
        }
        outcome = _launched(executable, order)
    if not outcome["begun"]:
        raise _not_started(outcome, limits)
    return ProgramOutcome(outcome["exit_code"], outcome["output"], outcome["report"], confinement.missing)


def _launched(executable: str, order: dict[str, Any]) -> dict[str, Any]:
    """What the launcher reports. It is a fresh interpreter: a copy of this process could hold locks when it forks."""
    try:
        launcher = subprocess.Popen(
            [executable, "-I", "-S", sandbox_launcher.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            env={},
        )
    except OSError as error:
        raise SandboxError(
            f"the sandbox broke: {sys.executable!r} cannot be started ({error}); no verdict was given; repair this Python "
            "or run draftsmith with another one"
        ) from error
    longest = START_SECONDS + order["seconds"] + _TIDYING_SECONDS
    try:
        output, complaint = launcher.communicate(json.dumps(order).encode(), timeout=longest)
    except subprocess.TimeoutExpired as error:
        raise SandboxError(
            f"the sandbox broke: no word from it in {longest:g} seconds; no verdict was given; run again with less load"
        ) from error
    finally:
        if launcher.poll() is None:
            os.killpg(launcher.pid, signal.SIGKILL)
            launcher.wait()
    if launcher.returncode != 0:
        last = complaint.decode(errors="replace")[-500:].strip()
        raise SandboxError(f"the sandbox broke: {last}; no verdict was given; repair {sys.executable!r}")
    report: dict[str, Any] = json.loads(output)
    return report


def _no_sandbox(confinement: Confinement) -> ValueError:
    return ValueError(
        f"unit tests run code that nobody has read, and this system gives them no sandbox: {confinement.reason}. Install bubblewrap 0.7 or "
        "later (apt install bubblewrap). It needs user namespaces: set user.max_user_namespaces above 0, "
        "kernel.unprivileged_userns_clone to 1 (older Debian) and kernel.apparmor_restrict_unprivileged_userns to 0 (Ubuntu), or start the "
        "container with --security-opt seccomp=unconfined. Where nothing can be lost, add --unprotected true"
    )


def _not_started(outcome: dict[str, Any], limits: Limits) -> SandboxError:
    code = outcome["exit_code"]
    reason = f"not there after {START_SECONDS:g} seconds" if code is None else f"it ended with exit code {code}"
    lines = outcome["output"].strip().splitlines()
    last = f", and said {lines[-1][:200]!r}" if lines else ""
    return SandboxError(
        f"the sandbox did not start the program: {reason}{last}; no verdict was given. Interpreter {sys.executable!r} and "
        f"folder {sys.prefix!r} must be readable for every user, and {limits.memory_bytes >> 20} MiB of memory, "
        f"{limits.disk_bytes >> 20} MiB of disk and {limits.num_processes} processes must be enough for them"
    )

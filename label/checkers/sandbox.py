"""Runs a Python program that nobody has read: limited, cut off from the rest of the machine, and gone afterwards.

Owns what a caller sees: the limits, what became of a program, and the errors of a sandbox that did not start. How a program is kept
apart is the work of `sandbox_launcher`, a script of its own. Knows nothing of answers and tests. Linux only.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from typing import Any

from draftsmith.label.checkers import sandbox_launcher
from draftsmith.label.checkers.sandbox_launcher import REPORT, START_SECONDS, Limits

__all__ = ["REPORT", "Limits", "Ran", "SandboxError", "run"]

_TIDYING_SECONDS = 20  # for killing what a program left behind
_USUAL = Limits()


class SandboxError(ValueError):
    """A program was not started, so nothing is known of it. Never to be read as a program that failed."""


@dataclass(frozen=True)
class Ran:
    """What became of a program that was started.

    `exit_code` is negative or above 128 for a signal, None where the time was up. `output` is the beginning of what it printed, `report`
    that of what it wrote to the descriptor `REPORT`. `missing` names the protections that this system did not permit: of the
    `network`, of the user's `files`, of the user's `processes`.
    """

    exit_code: int | None
    output: str
    report: str
    missing: tuple[str, ...]


def run(program: str, limits: Limits = _USUAL, unprotected: bool = False) -> Ran:
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
    found = _launched({"program": program, "limits": asdict(limits), "unprotected": unprotected}, limits.seconds)
    if found["refused"] == ["machine"]:
        raise ValueError(
            "this root cannot become another user, and root's processes have no limit; run as a common user"
        )
    if found["refused"]:
        raise ValueError(
            f"this system does not let a sandbox protect the user's {' and '.join(found['refused'])}; permit user "
            "namespaces, run as root or in a container of its own, or, where nothing can be lost, add --unprotected true"
        )
    if not found["begun"]:
        raise _not_started(found["failed"], found["output"], limits)
    return Ran(found["exit_code"], found["output"], found["report"], tuple(found["missing"]))


def _launched(order: dict[str, Any], seconds: float) -> dict[str, Any]:
    """What the launcher tells. It is a fresh interpreter: a copy of this process could hold locks when it forks."""
    executable = os.path.join(os.getcwd(), sys.executable or "")
    prefixes = [sys.prefix, sys.exec_prefix, sys.base_prefix, sys.base_exec_prefix]
    order |= {"executable": executable, "keep": [*prefixes, executable], "home": os.path.expanduser("~")}
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
    longest = START_SECONDS + seconds + _TIDYING_SECONDS
    try:
        told, complaint = launcher.communicate(json.dumps(order).encode(), timeout=longest)
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
    found: dict[str, Any] = json.loads(told)
    return found


def _not_started(reason: str, output: str, limits: Limits) -> SandboxError:
    said = output.strip().splitlines()
    last = f", and said {said[-1][:200]!r}" if said else ""
    return SandboxError(
        f"the sandbox did not start the program: {reason}{last}; no verdict was given. Interpreter {sys.executable!r} and "
        f"folder {sys.prefix!r} must be readable for every user, and {limits.memory_bytes >> 20} MiB of memory, "
        f"{limits.disk_bytes >> 20} MiB of disk and {limits.num_processes} processes must be enough for them"
    )

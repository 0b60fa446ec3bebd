"""What keeps a program apart from the rest of the machine: the command line of `bwrap`, and what is left where bwrap cannot work.

Owns which files a program sees, as which user it runs, and why a protection is missing. Knows nothing of the program, its time or its
output. bwrap comes with Debian's package `bubblewrap`; the disk limit needs version 0.7 or later. `setpriv` and `prlimit` come
with `util-linux`.

bwrap alone would lose three promises, so this part is ours:
- A program of root becomes a user of its own. The kernel limits no process of root: endless forks would take the machine.
- Where a container permits no namespaces, that change of user alone still keeps root's files and processes safe.
- An interpreter in a hidden home stays reachable under all its names, links included.
"""

from __future__ import annotations

import itertools
import os
import resource
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

# Where a program runs inside bwrap: in a file system of its own, so nothing else there has the name.
WORK = os.path.join(os.path.realpath("/tmp"), "draftsmith-sandbox")

# Each program of root becomes a user that nobody has; in a container that has no such users, the usual one.
_OWN_USERS, _NOBODY = 2_000_000_000, 65534
# Sockets of other programs, what people keep for themselves, and devices: the user's own terminals among them, which a
# read-only file system does not keep from being written to.
_HIDDEN = ("/tmp", "/var/tmp", "/run", "/dev", "/home", "/root")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
_MAY_CHANGE_USER = ("--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID")
_PROBE_SECONDS = 20.0
_ABSENT = "bwrap is not installed"


@dataclass(frozen=True)
class Confinement:
    """What keeps a program apart on this system.

    Attributes:
        box: bwrap and its arguments up to the program's own folder; empty where bwrap cannot make a sandbox.
        changes_user: the program becomes another user, since root calls.
        user_makes_box: that user starts bwrap, because this root may make no namespaces.
        missing: which of the `network`, the user's `files` and the user's `processes` are not protected.
        reason: why bwrap makes no sandbox; empty where it does.
    """

    box: tuple[str, ...]
    changes_user: bool
    user_makes_box: bool = False
    missing: tuple[str, ...] = ()
    reason: str = ""

    @property
    def needs_consent(self) -> bool:
        """Whether the user must first say that nothing can be lost."""
        return self.reason == _ABSENT or bool({"files", "processes"} & set(self.missing))

    def command(self, limits: Mapping[str, int], user: int | None) -> list[str]:
        """What goes before the interpreter.

        Args:
            limits: what `prlimit` limits, by its names (`as`, `cpu`, `fsize`, ...); a lower limit of this process stays. `fsize` also
                bounds the program's own folder.
            user: the user that the program becomes; None stays.
        """
        box = [*self.box, "--perms", "0777", "--size", str(limits["fsize"]), "--tmpfs", WORK, "--chdir", WORK]
        limit = [_tool("prlimit"), *(f"--{name}={_at_most(name, most)}" for name, most in limits.items())]
        if not self.box:
            return [*_become(user), *limit]
        return [*_become(user), *box, *limit] if self.user_makes_box else [*box, *_become(user), *limit]


@cache
def find_confinement(executable: str) -> Confinement:
    """The best protection that this system permits for an interpreter.

    Raises:
        ValueError: this root cannot become another user, or `setpriv` or `prlimit` is absent.
    """
    is_root = os.getuid() == 0
    user = other_user() if is_root else None
    bwrap, reason = shutil.which("bwrap"), ""
    if bwrap is None:
        reason = _ABSENT
    else:
        for user_makes_box, proc in itertools.product((False, True) if is_root else (False,), ("--proc", "--tmpfs")):
            right = _MAY_CHANGE_USER if is_root and not user_makes_box else ("--unshare-user",)
            box = (bwrap, *right, *_visible([executable, bwrap]), proc, "/proc")
            confinement = Confinement(box, is_root, user_makes_box)
            problem = _problem([*confinement.command({"fsize": 1 << 20}, user), bwrap, "--version"])
            if not problem:
                return confinement
            reason = reason or problem
    missing = ("network",) if is_root else ("files", "network", "processes")
    return Confinement((), is_root, missing=missing, reason=reason)


def _visible(programs: list[str]) -> list[str]:
    """Arguments for what a program sees: all files, read-only. Of hidden folders it sees only Python, `programs` and harmless devices."""
    folders = {os.path.realpath(folder) for folder in (*_HIDDEN, os.path.expanduser("~")) if os.path.isdir(folder)}
    hidden = sorted(
        folder for folder in folders - {"/"} if not folders & {str(parent) for parent in Path(folder).parents[:-1]}
    )
    words = ["--die-with-parent", "--unshare-ipc", "--unshare-pid", "--unshare-net", "--ro-bind", "/", "/"]
    for folder in hidden:
        words += ["--size", str(1 << 20), "--tmpfs", folder]
    kept = [sys.prefix, sys.exec_prefix, sys.base_prefix, sys.base_exec_prefix, *programs]
    inside = tuple(f"{folder}/" for folder in hidden)
    steps = dict.fromkeys(step for path in kept for step in _steps(path) if step[-1].startswith(inside))
    for step in sorted(steps, key=lambda step: step[0] == "--ro-bind"):
        words += step
    for device in filter(os.path.exists, _DEVICES):
        words += ["--dev-bind", device, device]
    words += ["--dir", WORK]
    for folder in hidden:
        words += ["--remount-ro", folder]
    return words


def _steps(path: str) -> Iterator[tuple[str, ...]]:
    """How to make a path reachable: the folders and links that the kernel passes on the way, then the place where it ends.

    Interpreters go by names that nobody resolved: `/home/me/../you/venv`, a home that is a link, a link to a link.
    """
    place, waiting = "/", os.path.join(os.getcwd(), path).split("/")[::-1]
    while waiting:
        step = os.path.normpath(os.path.join(place, waiting.pop()))  # one part behind a place without links
        if os.path.islink(step):
            target = os.readlink(step)
            yield "--symlink", target, step
            waiting += target.split("/")[::-1]
            place = "/" if target.startswith("/") else place
        else:
            place = step
            if os.path.isdir(place):
                yield "--dir", place
    if os.path.exists(place):
        yield "--ro-bind", place, place


def other_user() -> int:
    """A user for one program of root.

    Raises:
        ValueError: this root cannot become one.
    """
    first = _first_user()
    return first if first == _NOBODY else first + secrets.randbelow(100_000_000)


@cache
def _first_user() -> int:
    for user in (_OWN_USERS, _NOBODY):
        if not _problem([*_become(user), _tool("setpriv"), "--version"]):
            return user
    raise ValueError("this root cannot become another user, and root's processes have no limit; run as a common user")


def _become(user: int | None) -> list[str]:
    change = [] if user is None else ["--reuid", str(user), "--regid", str(user), "--clear-groups"]
    return [_tool("setpriv"), "--no-new-privs", "--pdeathsig", "KILL", *change]


def _problem(command: list[str]) -> str:
    """Why a command fails; empty where it does not."""
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_PROBE_SECONDS)
    except subprocess.CalledProcessError as error:
        last = error.stderr.strip().splitlines()[-1:]
        return last[0] if last else f"{command[0]} ended with exit code {error.returncode}"
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return ""


def _tool(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise ValueError(f"unit tests need the command {name}, which is not installed; install the package util-linux")
    return path


def _at_most(name: str, most: int) -> int:
    highest = resource.getrlimit(getattr(resource, f"RLIMIT_{name.upper()}"))[1]
    return most if highest == resource.RLIM_INFINITY else min(most, highest)

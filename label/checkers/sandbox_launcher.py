"""The script between `sandbox.run` and the program: starts it apart from the rest of the machine, listens, and kills what is left.

Owns limits, namespaces, the empty folder, and the start and end of processes. Knows nothing of answers and tests. Linux only, and the
standard library only: it runs as a script of its own.

caller --JSON--> launcher --fork--> new session, new namespaces --fork--> first process in them --fork--> the program

The launcher adopts whatever the program leaves behind and kills it; where process namespaces are permitted the kernel does so
already when their first process ends. What a system does not permit is named in `Ran.missing`.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import resource
import selectors
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPORT = 3  # the file descriptor on which a program may say something beside its output
START_SECONDS = 20.0  # the longest that the interpreter may take until it reaches the program


_NEWNS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = 0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
_APART = _NEWNS | _NEWIPC | _NEWPID | _NEWNET
_MS_NOSUID, _MS_NODEV, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4, 0x1000, 0x4000, 0x40000
_MOUNT_SETATTR, _AT_FDCWD, _AT_RECURSIVE, _RDONLY = 442, -100, 0x8000, 1
_PDEATHSIG, _DUMPABLE, _SUBREAPER, _NO_NEW_PRIVS = 1, 4, 36, 38
_NOBODY = 65534
_FILES, _HIGH = 64, 60  # how many files a program may open; where the pipes wait while the low numbers are dealt out
_NEEDED = ("files", "processes")
# Sockets of other programs, what people keep for themselves, and devices: the user's own terminals among them, which a
# read-only file system does not keep from being written to.
_HIDDEN = ("/tmp", "/var/tmp", "/run", "/dev", "/home", "/root")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
_PROGRAM, _STATUS = "program.py", _HIGH + 2
_BEGUN = b'{"begun": true}'
_STATUS_BYTES = 1 << 16
# Only an interpreter that has come up can say so; what the program does from here on is its own. The program cannot say it: the
# descriptor is closed before its first line.
_BOOT = f"""\
import os
with open({_PROGRAM!r}, encoding="utf-8", errors="surrogatepass") as file:
    program = file.read()
os.write({_STATUS}, {_BEGUN!r})
os.close({_STATUS})
del os, file
__file__ = {_PROGRAM!r}
exec(compile(program, {_PROGRAM!r}, "exec"))
"""


@dataclass(frozen=True)
class Limits:
    """What a program may use. Time is of the clock; memory is each process's, disk and processes are all together.

    Raises ValueError: the time is not above 0 and finite.
    """

    seconds: float = 5.0
    memory_bytes: int = 1 << 30
    disk_bytes: int = 16 << 20
    num_processes: int = 8
    output_bytes: int = 1 << 16

    def __post_init__(self) -> None:
        if not (math.isfinite(self.seconds) and self.seconds > 0):
            raise ValueError(f"seconds is {self.seconds}; a program needs a finite time above 0; correct it")


def _launch(order: dict[str, Any]) -> dict[str, Any]:
    """The launcher's work: start, listen, kill, tidy up."""
    _prctl(_SUBREAPER, 1)
    _prctl(_PDEATHSIG, signal.SIGKILL)
    limits = Limits(**order["limits"])
    work = tempfile.mkdtemp(prefix="draftsmith-sandbox-")
    pipes = {name: os.pipe() for name in ("output", "report", "status")}
    outsider = _give_away(work)
    child = os.fork()
    if child == 0:
        _start(order, limits, work, outsider, {name: pair[1] for name, pair in pipes.items()})
    try:
        for _, write_end in pipes.values():
            os.close(write_end)
        timed_out, heard = _listen(child, {name: pair[0] for name, pair in pipes.items()}, limits)
        exit_code = _end(child)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    status = json.loads(b"[%s]" % heard["status"].replace(b"}{", b"},{"))
    status = {key: value for part in status for key, value in part.items()}
    ended = f"not there after {START_SECONDS:g} seconds" if timed_out else f"it ended with exit code {exit_code}"
    return {
        "begun": status.get("begun", False),
        "exit_code": None if timed_out else exit_code,
        "output": heard["output"].decode(errors="replace"),
        "report": heard["report"].decode(errors="replace"),
        "missing": status.get("missing", []),
        "refused": status.get("refused", []),
        "failed": status.get("failed", ended),
    }


def _listen(child: int, readers: dict[str, int], limits: Limits) -> tuple[bool, dict[str, bytes]]:
    """Reads until the child ends or the time is up, which begins anew where the program begins; whether it was up.

    Keeps the first bytes of each pipe and drops the rest.
    """
    most = {name: _STATUS_BYTES if name == "status" else limits.output_bytes for name in readers}
    heard = dict.fromkeys(readers, b"")
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
                if key.data is not None and not _read(key.data, key.fd, heard, most[key.data]):
                    selector.unregister(key.fd)
            if not begun and heard["status"].endswith(_BEGUN):
                begun, ends = True, time.monotonic() + limits.seconds
            if any(key.fd == ended for key, _ in ready):
                break
        else:
            return True, heard
    for name, reader in readers.items():
        while len(heard[name]) < most[name] and _read(name, reader, heard, most[name]):
            pass
    return False, heard


def _read(name: str, reader: int, heard: dict[str, bytes], most: int) -> bool:
    """Whether there may be more."""
    try:
        part = os.read(reader, 1 << 16)
    except BlockingIOError:
        return False
    heard[name] = (heard[name] + part)[:most]
    return bool(part)


def _end(child: int) -> int:
    """Kills the child's group and every process that descends from this one; gives the child's exit code."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    exit_code = 0
    while True:
        for process in _descendants():
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


def _descendants() -> list[int]:
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError, ValueError):
                # The name in parentheses may hold anything; the fields after the last one are state and parent.
                parent = int(Path(f"/proc/{entry}/stat").read_text(errors="replace").rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry))
    found, waiting = [], [os.getpid()]
    while waiting:
        new = children.get(waiting.pop(), [])
        found += new
        waiting += new
    return found


def _start(order: dict[str, Any], limits: Limits, work: str, outsider: int | None, pipes: dict[str, int]) -> None:
    """The child's way to the program; never returns.

    `outsider` is the user that a program started by root becomes; None where it stays the user who started it.
    """
    try:
        os.setsid()
        if os.getuid() == 0 and outsider is None:
            # The kernel does not limit root's processes: a program that forks without end would take the machine.
            os.write(pipes["status"], json.dumps({"refused": ["machine"]}).encode())
            os._exit(0)
        missing = _part(outsider)
        if "processes" not in missing:
            _pass_on()  # the next one is the first process of the new namespaces
            if not _close_files(order, limits, work, outsider):
                missing = {*missing, "files"}
            _pass_on()  # a first process ignores signals, which the program should not
        if outsider is not None:
            # Another user's files and processes are out of reach by permissions, even where no namespace is.
            missing = missing - set(_NEEDED)
        refused = sorted(missing & set(_NEEDED))
        if refused and not order["unprotected"]:
            os.write(pipes["status"], json.dumps({"refused": refused}).encode())
            os._exit(0)
        _become(order, limits, work, pipes, sorted(missing), outsider)
    except BaseException as error:  # noqa: BLE001 - a fork must never return into its parent's code
        os.write(pipes["status"], json.dumps({"failed": f"{type(error).__name__}: {error}"}).encode())
    os._exit(1)


def _part(outsider: int | None) -> set[str]:
    """Enters namespaces of its own; gives what could not be had."""
    if outsider is not None:
        with contextlib.suppress(OSError):
            _call("unshare", _APART)
            return set()
        _drop(outsider)  # root of a container, say, may not; its users sometimes may
    user, group = os.getuid(), os.getgid()
    try:
        _call("unshare", _NEWUSER | _APART)
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    except OSError:
        return {"network", "files", "processes"}
    return set()


def _pass_on() -> None:
    """Forks; only the child returns. The parent waits for it and ends as it does."""
    child = os.fork()
    if child == 0:
        _prctl(_PDEATHSIG, signal.SIGKILL)
        return
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os._exit(code if code >= 0 else 128 - code)


def _close_files(order: dict[str, Any], limits: Limits, work: str, outsider: int | None) -> bool:
    """Makes all that is mounted read-only, but for a new and bounded `work`; whether that was permitted."""
    try:
        _mount(None, "/", None, _MS_REC | _MS_PRIVATE)
        hidden = {os.path.realpath(folder) for folder in (*_HIDDEN, order["home"]) if os.path.isdir(folder)} - {"/"}
        ways = [Way.to(path) for path in (*order["keep"], *_DEVICES) if os.path.exists(path)]
        for folder in sorted(hidden):
            if not any(folder.startswith(f"{other}/") for other in hidden):
                _hide(folder, ways)
        os.makedirs(work, exist_ok=True)
        _mount("tmpfs", work, "tmpfs", _MS_NOSUID | _MS_NODEV, f"size={limits.disk_bytes},mode=0700")
        if outsider is not None and os.getuid() == 0:
            os.chown(work, outsider, outsider)
        _set_mount("/", _AT_RECURSIVE, _RDONLY | _MS_NOSUID, 0)
        _set_mount(work, 0, 0, _RDONLY)
    except OSError:
        return False
    return True


@dataclass(frozen=True)
class Way:
    """How the kernel reaches a path: the folders and links that it passes, and the place where it ends.

    Interpreters go by names that nobody resolved: `/home/me/../you/venv`, a home that is a link, a link to a link.
    """

    place: str
    folders: tuple[str, ...]
    links: dict[str, str]

    @classmethod
    def to(cls, path: str) -> Way:
        """The way to an absolute path that is there."""
        folders, links = [], {}
        place, waiting = "/", path.split("/")[::-1]
        while waiting:
            part = waiting.pop()
            step = os.path.normpath(os.path.join(place, part))  # one part behind a place without links
            if os.path.islink(step):
                links[step] = os.readlink(step)
                waiting += links[step].split("/")[::-1]
                place = "/" if links[step].startswith("/") else place
                continue
            place = step
            if os.path.isdir(place):
                folders.append(place)
        return cls(place, tuple(folders), links)


def _hide(folder: str, ways: list[Way]) -> None:
    """Covers a folder with an empty one, in which only the places at the end of `ways` are still there, under all their names."""
    inside = f"{folder}/"
    handles = {way.place: os.open(way.place, os.O_PATH) for way in ways if way.place.startswith(inside)}
    _mount("tmpfs", folder, "tmpfs", _MS_NOSUID | _MS_NODEV, "size=1m,mode=0755")
    for way in ways:
        for passed in way.folders:
            if passed.startswith(inside):
                os.makedirs(passed, exist_ok=True)
    for place, handle in handles.items():
        is_folder = os.path.isdir(f"/proc/self/fd/{handle}")
        if is_folder or not os.path.exists(place):
            if not is_folder:
                Path(place).touch()
            _mount(f"/proc/self/fd/{handle}", place, None, _MS_BIND | _MS_REC)
        os.close(handle)
    for way in ways:
        for link, target in way.links.items():
            if link.startswith(inside) and not os.path.lexists(link):
                os.symlink(target, link)


def _become(
    order: dict[str, Any], limits: Limits, work: str, pipes: dict[str, int], missing: list[str], outsider: int | None
) -> None:
    """Turns this process into the program."""
    if outsider is not None and os.getuid() == 0:
        _drop(outsider)
    _prctl(_NO_NEW_PRIVS, 1)
    _prctl(_PDEATHSIG, signal.SIGKILL)  # a change of user has taken it back
    os.chdir(work)
    Path(_PROGRAM).write_text(order["program"], encoding="utf-8", errors="surrogatepass")
    seconds = math.ceil(limits.seconds) + 1
    for kind, most in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, limits.memory_bytes),
        (resource.RLIMIT_FSIZE, limits.disk_bytes),
        (resource.RLIMIT_NPROC, limits.num_processes),
        (resource.RLIMIT_NOFILE, _FILES),
        (resource.RLIMIT_CORE, 0),
    ):
        most = min(most, resource.getrlimit(kind)[1]) if resource.getrlimit(kind)[1] >= 0 else most
        resource.setrlimit(kind, (most, most))
    ends = {name: os.dup2(end, _HIGH + number) for number, (name, end) in enumerate(pipes.items())}
    assert ends["status"] == _STATUS
    nothing = os.open(os.devnull, os.O_RDONLY)
    for end, place in ((nothing, 0), (ends["output"], 1), (ends["output"], 2), (ends["report"], REPORT)):
        os.dup2(end, place)
    environment = {"PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": work, "TMPDIR": work}
    environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    os.closerange(REPORT + 1, _HIGH)
    os.write(ends["status"], json.dumps({"missing": missing}).encode())
    os.execve(order["executable"], [order["executable"], "-I", "-c", _BOOT], environment)


def _drop(user: int) -> None:
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
    _prctl(_DUMPABLE, 1)  # else its own /proc files belong to root, and the maps of a namespace cannot be written


def _give_away(work: str) -> int | None:
    """The user that a program of root becomes, who from now on owns `work`: one of its own, or nobody."""
    if os.getuid() != 0:
        return None
    for user in (2_000_000_000 + os.getpid(), _NOBODY):
        with contextlib.suppress(OSError):
            os.chown(work, user, user)
            return user
    return None


def _prctl(option: int, value: int) -> None:
    _call("prctl", option, value, 0, 0, 0)


def _mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    words = [None if word is None else word.encode() for word in (source, target, kind, data)]
    _call("mount", words[0], words[1], words[2], ctypes.c_ulong(flags), words[3])


def _set_mount(path: str, flags: int, turn_on: int, turn_off: int) -> None:
    """mount_setattr(2); its struct is four u64: what to set, what to clear, propagation, a file descriptor."""
    attributes = (ctypes.c_uint64 * 4)(turn_on, turn_off, 0, 0)
    number, folder, size = (ctypes.c_long(value) for value in (_MOUNT_SETATTR, _AT_FDCWD, 32))
    _call("syscall", number, folder, path.encode(), ctypes.c_ulong(flags), ctypes.byref(attributes), size)


def _call(name: str, *arguments: Any) -> None:
    """One call of the C library. Raises OSError."""
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


if __name__ == "__main__":
    json.dump(_launch(json.load(sys.stdin)), sys.stdout)

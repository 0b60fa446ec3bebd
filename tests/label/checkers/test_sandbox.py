import ast
import os
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
import venv
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from draftsmith.label.checkers import sandbox_launcher
from draftsmith.label.checkers.bubblewrap import find_confinement
from draftsmith.label.checkers.sandbox import Limits, ProgramOutcome, SandboxError, run

pytestmark = pytest.mark.usefixtures("sandbox")


def try_to(act: str, **limits: float) -> ProgramOutcome:
    """Runs `act` and prints what came of it."""
    return run(
        f"try:\n    {act}\n    print('done')\nexcept OSError as error:\n    print(type(error).__name__)",
        Limits(**limits),
    )  # type: ignore[arg-type]


def processes_with(word: str) -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                found += [entry.name] if word.encode() in (entry / "cmdline").read_bytes() else []
            except OSError:
                continue
    return found


def test_what_a_program_prints_reports_and_ends_with_comes_back() -> None:
    ran = run("import os, sys\nprint('out')\nprint('err', file=sys.stderr)\nos.write(3, b'told')\nsys.exit(7)")
    assert ran.exit_code == 7
    assert sorted(ran.output.split()) == ["err", "out"]
    assert ran.report == "told"


def test_an_endless_loop_ends_with_its_time() -> None:
    begun = time.monotonic()
    assert run("while True: pass", Limits(seconds=1)).exit_code is None
    assert time.monotonic() - begun < 15


def test_a_flood_of_output_is_cut_without_stopping_the_program() -> None:
    ran = run(
        "for _ in range(300): print('x' * 10000)\nimport os; os.write(3, b'end')", Limits(seconds=30, output_bytes=500)
    )
    assert ran.output == "x" * 500
    assert (ran.exit_code, ran.report) == (0, "end")


def test_a_memory_bomb_is_a_memory_error() -> None:
    ran = run("x = bytearray(1 << 30)", Limits(memory_bytes=256 << 20))
    assert ran.exit_code == 1
    assert "MemoryError" in ran.output


def test_forks_are_counted_and_all_of_them_die() -> None:
    # 60 at most, so that a sandbox that did not limit them would do no harm here either.
    program = (
        "import os, time\nnumber = 0\ntry:\n    while number < 60:\n        if os.fork() == 0:\n"
        "            time.sleep(60)\n            os._exit(0)\n        number += 1\nexcept OSError: pass\nprint(number)"
    )
    begun = time.monotonic()
    ran = run(program, Limits(seconds=30, num_processes=8))
    assert 1 <= int(ran.output) <= 8
    assert time.monotonic() - begun < 30


def test_what_a_program_leaves_behind_in_a_session_of_its_own_dies_too() -> None:
    marker = f"left-behind-{os.getpid()}"
    sleeper = f"[sys.executable, '-c', 'import time; time.sleep(60)', {marker!r}]"
    program = f"import subprocess, sys\nsubprocess.Popen({sleeper}, start_new_session=True)"
    assert run(program, Limits(seconds=30)).exit_code == 0
    assert processes_with(marker) == []


def test_files_outside_can_be_neither_deleted_nor_written(tmp_path: Path) -> None:
    kept = Path(__file__).parent / f".kept-{os.getpid()}"
    mine = tmp_path / "mine"
    try:
        for path in (kept, mine):
            path.write_text("here")
            path.chmod(0o666)
            path.parent.chmod(0o777 if path is mine else path.parent.stat().st_mode)
            assert try_to(f"import os; os.remove({str(path)!r})").output.strip() in (
                "OSError", "PermissionError", "FileNotFoundError",
            )  # fmt: skip
            assert "done" not in try_to(f"open({str(path)!r}, 'r+').write('gone')").output
            assert path.read_text() == "here"
    finally:
        kept.unlink()


def test_the_terminals_of_its_user_are_out_of_reach_and_harmless_devices_are_there() -> None:
    ends = os.openpty()
    try:
        terminal = os.ttyname(ends[1])
        os.chmod(terminal, 0o666)
        ran = try_to(f"import os; os.open({terminal!r}, os.O_RDWR | os.O_NOCTTY)")
        assert ran.output.strip() == "FileNotFoundError"
    finally:
        for end in ends:
            os.close(end)
    program = "import os\nopen('/dev/null', 'w').write('x')\nprint(len(open('/dev/urandom', 'rb').read(4)), os.listdir('/dev'))"
    number, listed = run(program).output.split(maxsplit=1)
    assert number == "4"
    assert {"null", "urandom"} <= set(ast.literal_eval(listed)) <= {"null", "zero", "full", "random", "urandom"}


def test_its_own_folder_is_empty_bounded_and_gone_afterwards() -> None:
    ran = run("import os; print(os.getcwd(), os.listdir())\nopen('a', 'w').write('x')")
    folder, listed = ran.output.split(maxsplit=1)
    assert (ran.exit_code, listed.strip()) == (0, "['program.py']")
    assert not Path(folder).exists()
    assert try_to("open('a', 'wb').write(bytes(2_000_000))", disk_bytes=1_000_000).output.strip() == "OSError"


def test_there_is_no_network_where_that_is_permitted_and_it_is_told_where_not() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ran = try_to(f"import socket; socket.create_connection({listener.getsockname()!r}, 1)")
    assert (ran.output == "done\n") == ("network" in ran.missing)


def test_it_cannot_signal_the_processes_of_its_user() -> None:
    assert try_to(f"import os; os.kill({os.getpid()}, 0)").output.strip() in ("PermissionError", "ProcessLookupError")


def test_the_environment_of_the_caller_stays_with_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_SECRET", "word")
    assert run("import os; print('A_SECRET' in os.environ)").output.strip() == "False"


def test_a_crash_is_an_exit_code() -> None:
    assert run("import ctypes; ctypes.string_at(0)").exit_code in (139, -11)


def test_a_program_that_cannot_start_is_not_a_failed_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox_launcher, "__file__", str(Path(__file__).parent / "no-such-launcher.py"))
    with pytest.raises(SandboxError, match="the sandbox broke"):
        run("pass")


@pytest.mark.parametrize("limits", [Limits(memory_bytes=1 << 20), Limits(disk_bytes=1)])
def test_limits_too_low_to_start_under_are_an_error_and_no_result(limits: Limits) -> None:
    with pytest.raises(SandboxError, match="the sandbox did not start the program"):
        run("pass\n" * 2000, limits)


def test_an_interpreter_that_is_gone_is_an_error_and_no_result(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(SandboxError, match="cannot be started"):
        run("pass")


def test_the_start_of_the_interpreter_takes_nothing_from_the_programs_time() -> None:
    # An interpreter needs some ten milliseconds to come up, more than this program is given.
    assert run("pass", Limits(seconds=0.005)).exit_code in (0, None)


def test_where_nothing_can_be_protected_it_refuses() -> None:
    unshare = shutil.which("unshare")
    if unshare is None:
        pytest.skip("there is no unshare command")
    order = f"import sys; sys.path[:0] = {sys.path!r}\nfrom draftsmith.label.checkers.sandbox import run\nrun('pass', unprotected=True)"
    script = 'for f in user mnt; do echo 0 > /proc/sys/user/max_${f}_namespaces; done; exec "$@"'
    done = subprocess.run(
        [unshare, "-Ur", "sh", "-c", script, "-", sys.executable, "-c", order],
        capture_output=True,
        text=True,
        check=False,
    )
    if "unshare failed" in done.stderr or "Permission denied" in done.stderr:
        pytest.skip("user namespaces are not permitted here")
    # Root inside a namespace that holds no other user: its processes have no limit.
    assert "cannot become another user" in done.stderr


@pytest.fixture
def bwrap_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[str | None], None]]:
    """Puts a bwrap on the path that only says a sentence and fails; None leaves it out."""

    def put(sentence: str | None) -> None:
        for name in ("setpriv", "prlimit"):
            (tmp_path / name).symlink_to(shutil.which(name) or name)
        if sentence is not None:
            (tmp_path / "bwrap").write_text(f"#!/bin/sh\necho '{sentence}' >&2\nexit 1\n")
            (tmp_path / "bwrap").chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        find_confinement.cache_clear()

    yield put
    find_confinement.cache_clear()


def test_without_bwrap_nothing_runs_and_the_package_is_named(bwrap_says: Callable[[str | None], None]) -> None:
    bwrap_says(None)
    with pytest.raises(ValueError, match=r"bwrap is not installed\. .*apt install bubblewrap.*--unprotected true"):
        run("pass")


def test_a_bwrap_that_cannot_make_a_sandbox_is_told_with_its_words_unless_another_user_protects(
    bwrap_says: Callable[[str | None], None],
) -> None:
    bwrap_says("bwrap: no namespaces here")
    if os.getuid() == 0:
        confinement = find_confinement(sys.executable)
        assert (confinement.missing, confinement.needs_consent) == (("network",), False)
    else:
        with pytest.raises(ValueError, match=r"bwrap: no namespaces here\. .*kernel\.unprivileged_userns_clone"):
            run("pass")


def test_without_bwrap_limits_hold_and_what_is_left_behind_dies_too(
    bwrap_says: Callable[[str | None], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    bwrap_says(None)
    if os.getuid() == 0:
        if not os.path.exists("/usr/bin/python3"):
            pytest.skip("there is no Python that other users can surely read")
        monkeypatch.setattr(sys, "executable", "/usr/bin/python3")
    marker = f"left-without-bwrap-{os.getpid()}"
    sleeper = f"[sys.executable, '-c', 'import time; time.sleep(60)', {marker!r}]"
    program = (
        "import os, subprocess, sys\n"
        f"subprocess.Popen({sleeper}, start_new_session=True)\n"
        "print(os.listdir(), flush=True)\n"
        "bytearray(1 << 30)"
    )
    ran = run(program, Limits(seconds=30, memory_bytes=256 << 20), unprotected=True)
    assert "network" in ran.missing
    assert ran.output.startswith("['program.py']")
    assert "MemoryError" in ran.output
    assert processes_with(marker) == []


@pytest.fixture(scope="module")
def linked_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `venv`, an environment whose home is a link to it, and whose Python stands behind a link as well."""
    folder = tmp_path_factory.mktemp("linked")
    (folder / "disk").mkdir()
    (folder / "home").symlink_to("disk")
    (folder / "python").symlink_to(sys.base_prefix)
    venv.create(folder / "disk" / "venv", symlinks=True)
    written = folder / "disk" / "venv" / "pyvenv.cfg"
    written.write_text(re.sub("(?m)^home = .*", f"home = {folder}/python/bin", written.read_text()))
    for path in (folder, *folder.parents):
        if path.stat().st_uid == os.getuid():
            path.chmod(path.stat().st_mode | 0o055)
    return folder


@pytest.mark.parametrize("way", ["home/venv/bin/python", "disk/../home/venv/bin/python", "disk/venv/bin/python"])
def test_the_right_answer_is_right_under_a_linked_home_and_a_relative_interpreter(
    linked_python: Path, way: str
) -> None:
    program = (
        f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\nfrom draftsmith.label.checkers.unit_tests import check_tests\n"
        "row = {'tests': 'assert f() == 1'}\n"
        "print([check_tests(row, f'def f(): return {n}', 20, False).passed for n in (1, 2)])"
    )
    done = subprocess.run(
        [way, "-c", program],
        cwd=linked_python,
        env={"HOME": str(linked_python / "home")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout.strip(), done.stderr) == ("[True, False]", "")

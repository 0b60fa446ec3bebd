"""Unit tests as a checker: the code of an answer, and the tests of its row, run in the sandbox.

Owns finding the code in an answer and the tests in a row, and the small program that runs both. Knows nothing of how a program is
kept from doing harm.
"""

from __future__ import annotations

import ast
import json
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from draftsmith.label.checkers.sandbox import REPORT, Limits, SandboxError, run

_BLOCK = re.compile(r"^[ \t]*```[ \t]*([\w+-]*)[^\n]*\n(.*?)^[ \t]*```", re.MULTILINE | re.DOTALL)
_PYTHON = ("python", "py", "python3")
_LONGEST_NOTE = 200
_KNOWN_TEST = {"tests": "assert double(21) == 42"}
_KNOWN_GOOD, _KNOWN_BAD = "def double(x):\n    return 2 * x", "def double(x):\n    return 3 * x"

# The answer is run as a module, not as a script, so that what it would do only as a script stays undone. Ending early
# (sys.exit) is no way to pass: only this program's last line says the word that the caller waits for. What it says before
# the answer's first line tells a program that came to nothing from an answer that did.
_PROGRAM = """\
import json, os, sys, traceback
stages, word = json.loads({stages!r}), {word!r}
space = {{"__name__": "answer"}}
def say(**told):
    os.write({report}, json.dumps(told).encode() + b"\\n")
say(ready=True)
for stage, code in stages:
    try:
        exec(compile(code, stage, "exec"), space)
    except BaseException as error:
        places = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == stage]
        line = places[-1] if places else getattr(error, "lineno", None)
        lines = code.splitlines()
        text = lines[line - 1].strip() if line and line <= len(lines) else ""
        say(stage=stage, error=type(error).__name__, message=str(error)[:120], line=text[:120])
        sys.exit(1)
say(word=word)
"""


@dataclass(frozen=True)
class Tested:
    """Whether the tests passed, and why not, or under which protections not."""

    passed: bool
    note: str


def check_tests(row: Mapping[str, Any], response: str, seconds: float, unprotected: bool) -> Tested:
    """Runs the tests of a row on the code of a response.

    Raises:
        ValueError: the row has no tests, or this system has no sandbox (see `sandbox.run`).
        SandboxError: the program did not reach the answer, so nothing is known of it.
    """
    tests = row_tests(row)
    code = code_of(response)
    if code is None:
        return Tested(False, "no Python code was found")
    word = secrets.token_hex(16)
    stages = json.dumps([["answer", code], ["tests", tests]])
    ran = run(_PROGRAM.format(stages=stages, word=word, report=REPORT), Limits(seconds=seconds), unprotected)
    ready, told = _told(ran.report)
    if not ready:
        raise SandboxError(
            f"the sandbox ended before the answer began (exit code {ran.exit_code}, output {ran.output[-200:]!r}); no verdict was "
            "given; give the tests more time, and the machine less load"
        )
    open_note = f"; run without protection of {', '.join(ran.missing)}" if ran.missing else ""
    if told.get("word") == word:
        return Tested(True, open_note.removeprefix("; "))
    return Tested(False, f"{_reason(told, ran.exit_code, seconds)}{open_note}")


def prove_tests(seconds: float, unprotected: bool) -> None:
    """Runs one answer that is right and one that is wrong, so that a sandbox that cannot tell them apart judges nothing.

    Raises:
        ValueError: this system has no sandbox (see `sandbox.run`).
        SandboxError: a program did not start, or got the wrong verdict.
    """
    for answer, right in ((_KNOWN_GOOD, True), (_KNOWN_BAD, False)):
        tested = check_tests(_KNOWN_TEST, answer, seconds, unprotected)
        if tested.passed != right or (not right and "AssertionError" not in tested.note):
            raise SandboxError(
                f"the sandbox says {'right' if tested.passed else 'wrong'} of an answer known to be {'right' if right else 'wrong'} "
                f"({tested.note}); no answer was judged; give more than {seconds:g} seconds, or run on a machine with less load"
            )


def code_of(response: str) -> str | None:
    """The Python code of a response: its blocks marked as Python, else its unmarked blocks, else all of it if that is code."""
    blocks = [(language.lower(), code) for language, code in _BLOCK.findall(response)]
    chosen = [code for language, code in blocks if language in _PYTHON] or [
        code for language, code in blocks if not language
    ]
    if chosen:
        return "\n".join(chosen)
    try:
        parsed = ast.parse(response)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    defines = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Assign)
    return response if any(isinstance(statement, defines) for statement in parsed.body) else None


def row_tests(row: Mapping[str, Any]) -> str:
    """The tests of a row as Python code: `tests` (text, or a list of texts), `test_list`, or `test` with `entry_point`.

    Raises ValueError: the row has none of these.
    """
    for field in ("tests", "test_list"):
        found = row.get(field)
        if isinstance(found, str) and found.strip():
            return found
        if isinstance(found, list) and found and all(isinstance(one, str) for one in found):
            return "\n".join(found)
    test, entry_point = row.get("test"), row.get("entry_point")
    if isinstance(test, str) and isinstance(entry_point, str) and entry_point.isidentifier():
        return f"{test}\ncheck({entry_point})"
    raise ValueError(
        f"the row has no tests (its fields are {', '.join(sorted(row))}); unit-tests runs Python code; add it as tests (a text or "
        "a list of texts), or as test with entry_point"
    )


def _told(report: str) -> tuple[bool, dict[str, Any]]:
    """Whether the program reached the answer, and what it said of it."""
    first, _, rest = report.partition("\n")
    try:
        told = json.loads(rest)
    except (ValueError, RecursionError):  # the answer can write here too
        told = {}
    return first == '{"ready": true}', told if isinstance(told, dict) else {}


def _reason(told: dict[str, Any], exit_code: int | None, seconds: float) -> str:
    if exit_code is None:
        return f"not done after {seconds:g} seconds"
    if "stage" not in told:
        return f"the code ended itself (exit code {exit_code})"
    where = "the tests" if told["stage"] == "tests" else "the code"
    message = f": {told.get('message')}" if told.get("message") else ""
    line = f" at {told.get('line')!r}" if told.get("line") else ""
    return f"{where} failed with {told.get('error')}{message}{line}"[:_LONGEST_NOTE]

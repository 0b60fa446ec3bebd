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
class UnitTestOutcome:
    """What became of unit tests.

    Attributes:
        passed: whether all passed.
        note: why not, or which protections were missing.
    """

    passed: bool
    note: str


def check_tests(row: Mapping[str, Any], response: str, seconds: float, unprotected: bool) -> UnitTestOutcome:
    """Runs the tests of a row on the code of a response.

    Args:
        row: with tests; see `row_tests`.
        response: an answer with code.
        seconds: the longest that the program may take.
        unprotected: run it even without a full sandbox.

    Raises:
        ValueError: the row has no tests, or this system has no sandbox (see `sandbox.run`).
        SandboxError: the program did not reach the answer, so nothing is known of it.
    """
    tests = row_tests(row)
    code = code_of(response)
    if code is None:
        return UnitTestOutcome(False, "no Python code was found")
    word = secrets.token_hex(16)
    stages = json.dumps([["answer", code], ["tests", tests]])
    ran = run(_PROGRAM.format(stages=stages, word=word, report=REPORT), Limits(seconds=seconds), unprotected)
    ready, report = _parsed_report(ran.report)
    if not ready:
        raise SandboxError(
            f"the sandbox ended before the answer began (exit code {ran.exit_code}, output {ran.output[-200:]!r}); no verdict was "
            "given; give the tests more time, and the machine less load"
        )
    open_note = f"; run without protection of {', '.join(ran.missing)}" if ran.missing else ""
    if report.get("word") == word:
        return UnitTestOutcome(True, open_note.removeprefix("; "))
    return UnitTestOutcome(False, f"{_reason(report, ran.exit_code, seconds)}{open_note}")


def prove_tests(seconds: float, unprotected: bool) -> None:
    """Runs one answer that is right and one that is wrong. So a sandbox that confuses them judges nothing.

    Args:
        seconds: the longest that a program may take.
        unprotected: run them even without a full sandbox.

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
    """The Python code of a response: its blocks marked as Python, else its unmarked blocks, else all of it if that is code.

    Args:
        response: an answer.
    """
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

    Args:
        row: of a prompt file.

    Raises:
        ValueError: the row has none of these.
    """
    for field in ("tests", "test_list"):
        tests = row.get(field)
        if isinstance(tests, str) and tests.strip():
            return tests
        if isinstance(tests, list) and tests and all(isinstance(test, str) for test in tests):
            return "\n".join(tests)
    test, entry_point = row.get("test"), row.get("entry_point")
    if isinstance(test, str) and isinstance(entry_point, str) and entry_point.isidentifier():
        return f"{test}\ncheck({entry_point})"
    raise ValueError(
        f"the row has no tests (its fields are {', '.join(sorted(row))}); unit-tests runs Python code; add it as tests (a text or "
        "a list of texts), or as test with entry_point"
    )


def _parsed_report(report: str) -> tuple[bool, dict[str, Any]]:
    """Whether the program reached the answer, and its report on it."""
    first, _, rest = report.partition("\n")
    try:
        said = json.loads(rest)
    except (ValueError, RecursionError):  # the answer can write here too
        said = {}
    return first == '{"ready": true}', said if isinstance(said, dict) else {}


def _reason(report: dict[str, Any], exit_code: int | None, seconds: float) -> str:
    if exit_code is None:
        return f"not done after {seconds:g} seconds"
    if "stage" not in report:
        return f"the code ended itself (exit code {exit_code})"
    where = "the tests" if report["stage"] == "tests" else "the code"
    message = f": {report.get('message')}" if report.get("message") else ""
    line = f" at {report.get('line')!r}" if report.get("line") else ""
    return f"{where} failed with {report.get('error')}{message}{line}"[:_LONGEST_NOTE]

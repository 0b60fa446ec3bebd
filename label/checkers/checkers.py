"""Checkers: what says of an answer to a question whether it is right, and where it goes wrong.

Owns the protocol, the checkers that come with the package, and how a user's own function becomes one. Knows nothing of models,
stores or files of prompts; a row is a prompt's JSON object with whatever the checker needs to know of it.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import string
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_args

from draftsmith import __version__
from draftsmith.embedded import checker as embedded_checker
from draftsmith.files import sha256_file
from draftsmith.label.checkers import sums_answers
from draftsmith.label.checkers.final_answers import chosen_letter, final_number
from draftsmith.label.checkers.unit_tests import check_tests, prove_tests
from draftsmith.label.schema import Span, Verdict, refusal

Row = Mapping[str, Any]
BuiltIn = Literal["final-number", "multiple-choice", "unit-tests", "embedded"]

__all__ = ["BuiltIn", "Checked", "Checker", "Row", "chosen_letter", "final_number", "load_checker"]


@dataclass(frozen=True)
class Checked:
    """A checker's verdict on an answer.

    An answer in which the checker can read nothing right or wrong is "unplaced", with a note, never "correct".

    Attributes:
        verdict: "correct", "wrong" or "unplaced".
        error: the span of the first error, where the checker can place it.
        note: a word on why.
    """

    verdict: Verdict
    error: Span | None = None
    note: str = ""


@dataclass(frozen=True)
class Checker:
    """One way of checking.

    Attributes:
        name: signs the checker's labels.
        check: gives the verdict on a row and a response; a ValueError for a row that it cannot judge by (no reference, say).
        code: changes with whatever the verdicts depend on beside row and response.
        probed: whether an empty response may be checked to find out whether a row is fit.
    """

    name: str
    check: Callable[[Row, str], Checked]
    code: str
    probed: bool = True


def load_checker(spec: str, timeout_s: float = 5.0, unprotected: bool = False) -> Checker:
    """The checker of a name, or of a function: `package.module:function` or `file.py:function`.

    Unit tests are proved first: one right and one wrong answer are run, and each must get its verdict.

    Args:
        spec: `final-number`, `multiple-choice`, `unit-tests`, `embedded`, or a function `(row, response) -> Checked`, whose code runs
            here, in this process.
        timeout_s: seconds, the longest that unit tests may take.
        unprotected: run unit tests even where this system cannot keep them from the user's files and processes.

    Raises:
        ValueError: there is no such checker, the function cannot be loaded, or the sandbox does not work here.
    """
    if ":" in spec:
        function, code = load_function(spec, "checker", "(row, response)")
        return Checker(spec, _guarded(spec, function), code, probed=False)
    checks: dict[str, Callable[[Row, str], Checked]] = {
        "final-number": _check_number,
        "multiple-choice": _check_letter,
        "embedded": _check_sums,
        "unit-tests": lambda row, response: _check_tests(row, response, timeout_s, unprotected),
    }
    if spec not in checks:
        raise ValueError(
            f"checker {spec!r} is not known; use one of {', '.join(get_args(BuiltIn))}, or your own function as "
            "package.module:function or file.py:function"
        )
    timeout = ""
    if spec == "unit-tests":
        prove_tests(timeout_s, unprotected)
        timeout = f" timeout {timeout_s}"
    return Checker(spec, checks[spec], f"{spec} {_own_code()}{timeout}")


@cache
def _own_code() -> str:
    """What changes with any of the package's own checkers, also between two versions of it."""
    folder = Path(__file__).parent
    files = [folder / f"{name}.py" for name in ("checkers", "final_answers", "sums_answers", "unit_tests")]
    files += [folder / f"{name}.py" for name in ("sandbox", "sandbox_launcher", "bubblewrap")]
    files.append(Path(str(embedded_checker.__file__)))
    return " ".join([__version__, *(sha256_file(path)[:12] for path in files)])


def _check_number(row: Row, response: str) -> Checked:
    expected = final_number(_reference(row))
    if expected is None:
        raise refusal(
            "the row", "its reference", _reference(row), "final-number needs a number in it", "correct the row"
        )
    return _compared(final_number(response), expected, "number")


def _check_letter(row: Row, response: str) -> Checked:
    letters = _letters(row)
    reference = _reference(row).strip()
    expected = reference if reference in letters else chosen_letter(reference, letters)
    if expected is None:
        rule = f"multiple-choice needs one of the letters {', '.join(letters)}"
        raise refusal("the row", "its reference", reference, rule, "correct the row, or its choices")
    return _compared(chosen_letter(response, letters), expected, "letter")


def _check_sums(row: Row, response: str) -> Checked:
    problem = sums_answers.problem_of(_question(row))
    if problem is None:
        remedy = "make prompts with draftsmith embedded prompts, or use another checker"
        raise refusal("the row", "its question", _question(row), "embedded judges problems of the sums corpus", remedy)
    verdict = sums_answers.judge(problem, response)
    if verdict.error_span is not None:
        note = "the number answered is right all the same" if verdict.correct else ""
        return Checked("wrong", verdict.error_span, note)
    if verdict.answer is None:
        return Checked("unplaced", None, "no answer line was found")
    return Checked("correct")


def _check_tests(row: Row, response: str, timeout_s: float, unprotected: bool) -> Checked:
    tested = check_tests(row, response, timeout_s, unprotected)
    return Checked("correct" if tested.passed else "unplaced", None, tested.note)


def _compared(given: str | None, expected: str, kind: str) -> Checked:
    if given is None:
        return Checked("unplaced", None, f"no {kind} was found")
    if given == expected:
        return Checked("correct")
    return Checked("unplaced", None, f"the {kind} is {given}, the reference {expected}")


def _reference(row: Row) -> str:
    """The row's own answer: `answer`, or the last of `reference`, which answers the last turn."""
    answer = row.get("answer")
    if answer is None:
        given = row.get("reference")
        turns = [
            message
            for message in row.get("messages") or ()
            if isinstance(message, Mapping) and message.get("role") == "user"
        ]
        if isinstance(given, Sequence) and not isinstance(given, str) and given and len(given) >= len(turns):
            answer = given[len(turns) - 1] if turns else given[-1]
    if isinstance(answer, bool) or not isinstance(answer, str | int | float) or answer == "":
        raise ValueError(
            f"the row has no reference answer (answer is {row.get('answer')!r}, reference {str(row.get('reference'))[:60]}); "
            "a checker compares with one; add it as a text or number named answer"
        )
    if isinstance(answer, float) and not math.isfinite(answer):
        raise refusal("the row", "answer", str(answer), "a reference is finite", "correct it")
    return str(answer)


def _letters(row: Row) -> str:
    """The letters that can be chosen: as many as the row has `choices`, else A to E."""
    choices = row.get("choices")
    if choices is None:
        return "ABCDE"
    if isinstance(choices, Mapping):
        choices = choices.get("text")
    if not isinstance(choices, Sequence) or isinstance(choices, str) or not 2 <= len(choices) <= 26:
        raise refusal("the row", "choices", row["choices"], "it is a list of 2 to 26 choices", "correct or remove it")
    return string.ascii_uppercase[: len(choices)]


def _question(row: Row) -> str:
    for message in reversed(row.get("messages") or ()):
        if isinstance(message, Mapping) and message.get("role") == "user":
            return str(message.get("content"))
    return ""


def load_function(spec: str, role: str, arguments: str) -> tuple[Callable[..., Any], str]:
    """A user's function, and what identifies its code.

    Args:
        spec: `package.module:function` or `file.py:function`.
        role: what errors call it.
        arguments: what it takes, for errors.

    Raises:
        ValueError: there is no such file, module or function, or it fails at import.
    """
    where, _, name = spec.rpartition(":")
    if where.endswith(".py") and not Path(where).is_file():
        raise ValueError(f"{role} {spec!r}: {where} is not a file; give the path of a Python file")
    try:
        module = _from_file(Path(where)) if where.endswith(".py") else importlib.import_module(where)
    except Exception as error:
        raise ValueError(
            f"{role} {spec!r} cannot be loaded ({type(error).__name__}: {error}); check the name, or correct the code"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"{role} {spec!r}: {where} has no function {name!r}; name one that takes {arguments}")
    source = getattr(module, "__file__", None)
    code = sha256_file(Path(source)) if source is not None else __version__
    return function, f"{spec} {code}"


def _from_file(path: Path) -> ModuleType:
    name = f"draftsmith_checker_{sha256_file(path)[:16]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


def _guarded(spec: str, function: Callable[[Row, str], Any]) -> Callable[[Row, str], Checked]:
    """A user's function. An error in it becomes an error that names the function."""

    def check(row: Row, response: str) -> Checked:
        try:
            checked = function(row, response)
        except Exception as error:
            raise ValueError(
                f"the checker {spec} failed with {type(error).__name__}: {error}; correct its code, or the row"
            ) from error
        if not isinstance(checked, Checked):
            remedy = "return draftsmith.label.checkers.checkers.Checked(verdict, error, note)"
            raise refusal("the checker", spec, checked, "a checker returns a Checked", remedy)
        return checked

    return check

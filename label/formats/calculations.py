"""The first wrong calculation in a solution with calculator marks: `3 + 4 = <<3+4=8>>8`.

Owns the marks: taking them out, and doing their sums again. Knows nothing of answers or files.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from fractions import Fraction

from draftsmith.label.schema import Span

_MARK = re.compile(r"<<([^<>]*)>>")
_SUM = re.compile(r"([^=]+)=([^=]+)")
_WRITTEN = re.compile(r"-?\d{1,3}(?: \d{3})+(?!\d)|-?\d(?:[\d,]*\d)?(?:\.\d+)?|\.\d+")
_PLAIN = re.compile(r"-?(?:\d{1,30}(?:\.\d{0,30})?|\.\d{1,30})")  # 1e999999999 would fill the memory
_LONGEST = 200  # characters of an expression: deeper ones are no sums of a school book


def without_marks(solution: str) -> str:
    """The text a reader sees: the solution without its `<<...>>`.

    Args:
        solution: with marks.
    """
    return _MARK.sub("", solution)


def first_wrong(solution: str) -> Span | None:
    """The span of the first result that is not what its calculation gives, in `without_marks(solution)`.

    A result is wrong in two cases. First, the mark's own sum does not come out (a broken value may be rounded or cut in its last digit).
    Second, the number written behind the mark differs from the mark's by 1 or more. There the sign does not count ("120 less"), and
    neither does a factor of 100 ("<<1/4=0.25>>25%"). Sums with unknowns are passed over.

    Example: "3 + 4 = <<3+4=8>>8 eggs" gives (8, 9), the 8 of "3 + 4 = 8 eggs".

    Args:
        solution: with marks.

    Returns:
        the span, or None when every sum comes out, which does not make the solution right.
    """
    return next(_wrong_results(solution), None)


def _wrong_results(solution: str) -> Iterator[Span]:
    removed = 0
    for mark in _MARK.finditer(solution):
        removed += len(mark.group())
        written = _WRITTEN.match(solution, mark.end())
        parts = _SUM.fullmatch(mark.group(1))
        if parts is None or written is None:
            continue
        value, result = _value(parts.group(1)), _number(parts.group(2))
        if value is None or result is None:
            continue
        if _differ(value, result, parts.group(2)) or _another(result, _number(written.group())):
            yield (written.start() - removed, written.end() - removed)


def _differ(value: Fraction, result: Fraction, written: str) -> bool:
    apart = abs(value - result)
    if apart <= max(Fraction(1), abs(value)) / 10**6:  # the calculator was one of floats
        return False
    last_digit = Fraction(1, 10 ** len(written.strip().partition(".")[2]))
    return value.denominator == 1 or apart >= last_digit


def _another(result: Fraction, written: Fraction | None) -> bool:
    if written is None:
        return False
    return all(abs(abs(written) - abs(scale * result)) >= 1 for scale in (1, 100))


def _number(text: str) -> Fraction | None:
    plain = text.strip().replace(",", "").replace(" ", "")
    return Fraction(plain) if _PLAIN.fullmatch(plain) else None


def _value(expression: str) -> Fraction | None:
    """What a sum of plain numbers comes to; None for anything else. Nothing is executed."""
    if len(expression) > _LONGEST:
        return None
    # School books write 007 and 1,000; Python's grammar takes neither.
    text = re.sub(r"(?<![\d.])0+(?=\d)", "", expression.replace(",", "")).strip()
    try:
        return _of_node(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError):
        return None


def _of_node(node: ast.expr) -> Fraction | None:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return Fraction(str(node.value))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = _of_node(node.operand)
        return None if value is None else -value
    if not isinstance(node, ast.BinOp):
        return None
    left, right = _of_node(node.left), _of_node(node.right)
    if left is None or right is None:
        return None
    match node.op:
        case ast.Add():
            return left + right
        case ast.Sub():
            return left - right
        case ast.Mult():
            return left * right
        case ast.Div():
            return left / right
    return None

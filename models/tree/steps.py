"""Work that is done in steps, between which something else can be done.

Owns how such work is run to its end. Knows nothing of the work.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TypeVar

Result = TypeVar("Result")


def result_of(steps: Generator[None, None, Result]) -> Result:
    """Run work to its end.

    Args:
        steps: the work; it gives control back between two steps.

    Returns:
        What it returns.
    """
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value

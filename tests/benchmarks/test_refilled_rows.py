"""The benchmark of refilled rows runs at a tiny scale, and compares arms that emit the same tokens."""

import re

import pytest

from benchmarks.decode import refilled_rows
from draftsmith.decode import Generation


def test_a_page_names_its_command_and_compares_refilled_rows_with_fixed_batches() -> None:
    given = ["--prompts", "3", "--tokens", "4", "--rounds", "1", "--rows", "2", "--shapes", "1x2"]
    page = "\n".join(refilled_rows.report(refilled_rows.parse(given)))
    assert page.startswith(f"`python -m benchmarks.decode.refilled_rows {' '.join(given)}`")
    assert re.search(r"\d cores, \d+ threads?, torch", page)
    assert re.search(r"\| embedded:target \| 3 \| 2 \| \d tokens \| \d+ \(\d+%\) \| \d+ \(\d+%\) \| \d\.\d\d \|", page)
    assert re.search(r"\| embedded:target \| 2 \| plain \| \d+ \| \d+% \| 1.00 \|", page)
    assert re.search(r"\| embedded:target \| 2 \| 1x2 \| \d+ \| \d+% \| \d\.\d\d \|", page)


def test_cycles_are_counted_from_the_lengths_of_replies() -> None:
    """Two rows: batches of (10, 2) and (4, 4) take 10 + 4 cycles less the first tokens; refilled, 2, 4 and 4 fit beside 10."""
    assert refilled_rows.counted_cycles([10, 2, 4, 4], 2) == (9 + 3, 9)


def test_arms_that_differ_in_a_token_are_not_compared() -> None:
    def emits(token: int) -> list[list[Generation]]:
        return [[Generation([token])]]

    with pytest.raises(RuntimeError, match="different tokens"):
        refilled_rows.in_turns({"a": lambda: emits(5), "b": lambda: emits(6)}, 1, 1)

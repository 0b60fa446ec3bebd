"""The benchmark of compiled cycles compares engines that emit the same tokens."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks.decode import compiled
from draftsmith.decode import Generation


class Emits:
    """An engine that emits one token, whatever it is asked."""

    def __init__(self, token: int) -> None:
        self.token = token

    def generate(self, *arguments: Any) -> list[Generation]:
        return [Generation([self.token], accepted=[0])]


def test_a_page_names_its_command_and_has_a_row_for_plain_decoding_and_each_drafter(
    target: Path, drafter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = compiled.Engine
    monkeypatch.setattr(compiled, "Engine", lambda *given, compile: made(*given))
    given = ["--target", str(target), "--drafters", f"{drafter}@1x2", "--tokens", "4", "--rounds", "1"]
    page = list(compiled.report(compiled.parse(given)))
    assert page[0] == f"`python -m benchmarks.decode.compiled {' '.join(given)}`"
    assert page[-2].startswith("| plain | ")
    assert page[-1].startswith(f"| {drafter}@1x2 | ")


def test_engines_that_differ_in_a_token_are_not_compared() -> None:
    with pytest.raises(RuntimeError, match="different tokens"):
        compiled.paces({"off": Emits(5), "on": Emits(6)}, [1], 4, 1)  # type: ignore[dict-item]

"""Elements of a JSON list, wherever the pieces end in which the file is read."""

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from draftsmith.data.json_list import list_elements

PARTS = (
    b'"',
    b"\\",
    b"[",
    b"]",
    b"{",
    b"}",
    b",",
    b" ",
    b"\n",
    b"a",
    b'"ab"',
    b'{"a":1}',
    b'\\"',
    b"\xc3\xa9",
    b"\xef\xbb\xbf",
)


def outcome(path: Path, piece: int) -> list[bytes | str]:
    """The elements, and the error behind them if there is one."""
    seen: list[bytes | str] = []
    try:
        seen += list_elements(path, piece)
    except ValueError as error:
        seen.append(str(error))
    return seen


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
@given(st.lists(st.sampled_from(PARTS), max_size=25).map(b"".join), st.booleans(), st.integers(8, 20))
def test_where_the_pieces_end_changes_nothing(tmp_path: Path, content: bytes, is_list: bool, piece: int) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"[" + content + b"]" if is_list else content)
    assert outcome(path, piece) == outcome(path, 2**20)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.dictionaries(st.text(), st.text() | st.lists(st.integers())), max_size=8), st.integers(8, 40))
def test_the_elements_of_a_list_are_those_that_were_written(
    tmp_path: Path, rows: list[dict[str, object]], piece: int
) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    assert [json.loads(element) for element in list_elements(path, piece)] == rows


def test_no_more_is_read_than_the_elements_that_are_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"[" + b'{"a": 1},\n' * 1000 + b"never closed")
    elements = list_elements(path, 64)
    assert [next(elements) for _ in range(3)] == [b'{"a": 1}', b'\n{"a": 1}', b'\n{"a": 1}']
    with pytest.raises(ValueError, match=r"a\.json:1001: not valid JSON: the list is never closed"):
        list(elements)

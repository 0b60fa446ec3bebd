"""JSON as text: what is none is an error with its file, and what is written every encoder takes."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from draftsmith.json_text import json_text, parse_json, parse_json_object


@given(st.text() | st.text(alphabet='\x1b\u202e\ud800"\\/a'))
def test_every_text_is_written_so_that_it_can_be_read_back(text: str) -> None:
    assert json.loads(json_text({"name": text}).encode("utf-8")) == {"name": text}


@pytest.mark.parametrize("text", [b"{", b"", b"\xff", b"[" * 100_000, b'{"a":' * 100_000, b"1" * 5000])
def test_what_is_no_json_is_told_with_its_file(text: bytes) -> None:
    with pytest.raises(ValueError, match=r"a.json is not valid JSON \(.*\); copy it again"):
        parse_json(text, "a.json", "copy it again")


def test_an_object_is_an_object() -> None:
    assert parse_json_object(b'{"a": [1]}', "a.json", "") == {"a": [1]}
    with pytest.raises(ValueError, match=r"a.json is not a JSON object but list; copy it again"):
        parse_json_object("[]", "a.json", "copy it again")

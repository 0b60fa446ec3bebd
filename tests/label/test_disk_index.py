"""What is counted in little memory, and where its index goes."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from draftsmith.label.distinct import Distinct


@given(st.lists(st.text(st.characters(), max_size=3)))
def test_different_texts_are_counted_as_if_all_were_held(texts: list[str]) -> None:
    seen: set[str] = set()
    with Distinct() as distinct:
        for text in texts:
            assert distinct.add(text) == (text not in seen)
            seen.add(text)
        assert distinct.count == len(seen)


def test_a_full_temporary_folder_is_named_with_what_is_kept_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SQLITE_TMPDIR", str(tmp_path))
    with Distinct() as distinct:
        distinct.execute("PRAGMA max_page_count = 2")
        with pytest.raises(ValueError, match=f"the index of different texts cannot be kept in {tmp_path}: .* is full"):
            list(map(distinct.add, map(str, range(10_000))))

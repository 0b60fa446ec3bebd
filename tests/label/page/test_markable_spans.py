import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from draftsmith.data.chats.messages import Message
from draftsmith.label.page.markable_spans import Cutter, merged, segments, words
from draftsmith.label.schema import Answer, Span, Tokens


def cut(text: str) -> list[str]:
    return [text[start:end] for start, end in words(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x=3, 好的", ["x", "=", "3", ",", "好", "的"]),
        ("cafe\u0301 au", ["cafe\u0301", "au"]),
        ("a 👩\u200d👧 b", ["a", "👩\u200d👧", "b"]),
        ("नमस्ते", ["नमस्ते"]),
        ("\u0301a", ["\u0301", "a"]),
        ("a\n\n  b\t", ["a", "b"]),
        ("", []),
    ],
)
def test_words_are_what_a_person_would_point_at(text: str, expected: list[str]) -> None:
    assert cut(text) == expected


@given(st.text())
def test_words_and_what_is_between_them_are_the_text(text: str) -> None:
    spans = words(text)
    assert all(start < end for start, end in spans)
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans))
    found = segments(text, spans)
    assert "".join(one.text for one in found) == text
    assert all(one.text.isspace() for one in found if one.span is None)


def test_the_bytes_of_one_character_are_one_piece_and_empty_tokens_none() -> None:
    assert merged([(0, 1), (0, 1), (0, 1), (1, 1), (1, 4)]) == ((0, 1), (1, 4))
    assert merged([(0, 2), (1, 3), (3, 4)]) == ((0, 3), (3, 4))


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), max_size=20))
def test_merged_tokens_cover_the_same_characters_without_overlap(steps: list[tuple[int, int]]) -> None:
    offsets: list[Span] = []
    for step, length in steps:
        start = (offsets[-1][0] if offsets else 0) + step
        offsets.append((start, max(start + length, offsets[-1][1] if offsets else 0)))
    pieces = merged(offsets)
    assert {index for span in pieces for index in range(*span)} == {index for span in offsets for index in range(*span)}
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(pieces))


def test_a_target_goes_before_the_stored_tokens_and_these_before_words() -> None:
    answer = Answer("a", (Message(role="user", content="?"),), "1+1=3", "m", "MIT", "tests")
    stored = Answer(**{**vars(answer), "tokens": Tokens("t", ((0, 2), (2, 5)))})
    asked: list[str] = []

    def tokenize(text: str) -> Tokens:
        asked.append(text)
        return Tokens("other", ((0, 5),))

    assert Cutter().pieces(answer) == (((0, 1), (1, 2), (2, 3), (3, 4), (4, 5)), "words")
    assert Cutter().pieces(stored) == (((0, 2), (2, 5)), "tokens")
    cutter = Cutter(tokenize, "tokens of x")
    assert [cutter.pieces(stored), cutter.pieces(stored)] == [(((0, 5),), "tokens of x")] * 2
    assert asked == ["1+1=3"], "the same response is cut once"

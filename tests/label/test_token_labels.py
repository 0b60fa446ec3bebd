import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from draftsmith.data.chats.messages import Message
from draftsmith.label.schema import Answer, Label
from draftsmith.label.token_labels import CORRECT, IGNORED, WRONG, token_labels, tokenize
from draftsmith.models.files.loading import load_tokenizer

OFFSETS = ((0, 1), (1, 2), (2, 3), (3, 5), (5, 9), (9, 11))  # "1", "+", "1", "=3", ", so", " 3"


def labelled(make: Callable[..., Answer], label: Label | None, response: str = "1+1=3, so 3") -> Answer:
    return make("a", response, label)


def test_tokens_are_right_up_to_the_error_then_wrong_then_ignored(make: Callable[..., Answer], wrong: Label) -> None:
    assert (CORRECT, WRONG, IGNORED) == (1, 0, -100)
    assert token_labels(labelled(make, wrong), OFFSETS) == [1, 1, 1, 0, -100, -100]


def test_what_follows_the_error_may_count_as_wrong(make: Callable[..., Answer], wrong: Label) -> None:
    assert token_labels(labelled(make, wrong), OFFSETS, after="wrong") == [1, 1, 1, 0, 0, 0]


def test_all_of_a_correct_answer_is_right(make: Callable[..., Answer]) -> None:
    assert token_labels(labelled(make, Label("correct", "a", "rule")), OFFSETS) == [1] * 6


def test_nothing_is_said_of_an_answer_without_a_label_or_a_place(make: Callable[..., Answer]) -> None:
    assert token_labels(labelled(make, None), OFFSETS) == [IGNORED] * 6
    assert token_labels(labelled(make, Label("unplaced", "a", "rule")), OFFSETS, after="wrong") == [IGNORED] * 6


def test_an_error_over_several_tokens_makes_each_of_them_wrong(make: Callable[..., Answer]) -> None:
    answer = labelled(make, Label("wrong", "a", "person", (2, 6)))
    assert token_labels(answer, OFFSETS) == [1, 1, 0, 0, 0, -100]


def test_only_tokens_within_what_was_checked_are_right(make: Callable[..., Answer]) -> None:
    answer = labelled(make, Label("correct", "a", "person", None, (1, 5)))
    assert token_labels(answer, OFFSETS) == [-100, 1, 1, 1, -100, -100]
    mined = labelled(make, Label("wrong", "a", "mined", (4, 5), (4, 5)))
    assert token_labels(mined, OFFSETS) == [-100, -100, -100, 0, -100, -100]


def test_an_empty_token_takes_the_side_it_stands_on(make: Callable[..., Answer], wrong: Label) -> None:
    offsets = ((0, 4), (4, 4), (4, 5), (5, 5), (5, 11))
    assert token_labels(labelled(make, wrong), offsets) == [1, 1, 0, -100, -100]


def test_pieces_of_one_character_share_its_label(make: Callable[..., Answer]) -> None:
    answer = labelled(make, Label("wrong", "a", "person", (1, 2)), "a😀b")
    assert token_labels(answer, ((0, 1), (1, 2), (1, 2), (2, 3))) == [1, 0, 0, -100]


def test_an_error_that_no_token_touches_is_refused_with_its_place(make: Callable[..., Answer]) -> None:
    answer = labelled(make, Label("wrong", "a", "person", (1, 2)), "a\nb")
    with pytest.raises(ValueError, match=r"no token touches the error '\\n' at characters \[1, 2\]"):
        token_labels(answer, ((0, 1), (2, 3)))


def test_another_word_for_what_follows_is_refused(make: Callable[..., Answer], wrong: Label) -> None:
    with pytest.raises(ValueError, match="after is 'right'"):
        token_labels(labelled(make, wrong), OFFSETS, after="right")  # type: ignore[arg-type]


@given(st.lists(st.integers(1, 4), min_size=1, max_size=20), st.data())
def test_every_cut_of_the_text_has_right_then_wrong_then_ignored_tokens(widths: list[int], data: st.DataObject) -> None:
    length = sum(widths)
    start = data.draw(st.integers(0, length - 1))
    end = data.draw(st.integers(start + 1, length))
    offsets = [(sum(widths[:index]), sum(widths[: index + 1])) for index in range(len(widths))]
    label = Label("wrong", "a", "person", (start, end))
    answer = Answer("a", (Message(role="user", content="?"),), "x" * length, "m", "MIT", "s", label)
    found = token_labels(answer, offsets)
    assert [label for label, (_, stop) in zip(found, offsets, strict=True) if stop <= start] == [
        1 for _, stop in offsets if stop <= start
    ]
    assert found == sorted(found, reverse=True)
    characters = [label for label, (first, stop) in zip(found, offsets, strict=True) for _ in range(first, stop)]
    assert set(characters[start:end]) == {WRONG}


def test_a_label_holds_for_another_tokenizers_tokens(target: Path, make: Callable[..., Answer], wrong: Label) -> None:
    answer = labelled(make, wrong)
    tiny = tokenize(answer.response, load_tokenizer(str(target)))
    embedded = tokenize(answer.response, load_tokenizer("embedded:target"))
    assert tiny.tokenizer != embedded.tokenizer
    for tokens in (tiny, embedded):
        labels = token_labels(answer, tokens.offsets)
        spans = [span for span, label in zip(tokens.offsets, labels, strict=True) if label == WRONG]
        assert any(start <= 4 < end for start, end in spans)
        assert all(start < 5 and end > 4 for start, end in spans)


def test_a_tokenizer_without_offsets_is_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="Slow does not tell its tokens' offsets"):
        tokenize("a", Slow())  # type: ignore[arg-type]


STEPS = "Take 3 pens.\nSo 3 + 4 = 8 now.\nThat is all."


def by_words(error: tuple[int, int], step: str) -> list[tuple[str, int]]:
    """Each word of STEPS with its label."""
    offsets = [match.span() for match in re.finditer(r"\S+", STEPS)]
    messages = (Message(role="user", content="?"),)
    label = Label("wrong", "me", "person", error)
    labels = token_labels(Answer("a", messages, STEPS, "m", "MIT", "s", label), offsets, step=step)  # type: ignore[arg-type]
    return [(STEPS[slice(*span)], label) for span, label in zip(offsets, labels, strict=True)]


@pytest.mark.parametrize(
    ("step", "wrong"),
    [("whole", ["So", "3", "+", "4", "=", "8", "now."]), ("first-number", ["3"]), ("last-token", ["now."])],
)
def test_of_a_wrong_step_only_what_the_rule_says_is_wrong_and_the_rest_unknown(step: str, wrong: list[str]) -> None:
    start = STEPS.index("So")
    found = by_words((start, STEPS.index("\nThat")), step)
    assert found[:3] == [("Take", 1), ("3", 1), ("pens.", 1)]
    assert [word for word, label in found if label == 0] == wrong
    assert all(label != 1 for _, label in found[3:])


def test_an_error_within_a_line_is_no_step() -> None:
    at = STEPS.index("8")
    for step in ("whole", "first-number", "last-token"):
        assert [word for word, label in by_words((at, at + 1), step) if label == 0] == ["8"]


def test_a_step_without_a_number_teaches_nothing_by_its_first_number() -> None:
    start = STEPS.index("That")
    found = by_words((start, len(STEPS)), "first-number")
    assert not [word for word, label in found if label == 0]


@pytest.mark.parametrize("step", ["Step 2: 5 and 4 are 8.", "2. So 5 and 4 are 8.", "STEP 2 gives 5."])
def test_the_first_number_of_a_step_is_not_the_one_that_counts_it(make: Callable[..., Answer], step: str) -> None:
    text = f"Take 3 pens.\n{step}"
    start = text.index(step)
    answer = make("a", text, Label("wrong", "me", "person", (start, len(text))))
    offsets = [match.span() for match in re.finditer(r"\S+", text)]
    labels = token_labels(answer, offsets, step="first-number")
    assert [text[slice(*span)].strip(".") for span, label in zip(offsets, labels, strict=True) if label == 0] == ["5"]


def test_another_word_for_the_rule_of_steps_is_an_error() -> None:
    with pytest.raises(ValueError, match="step is 'all'"):
        by_words((0, 4), "all")


def test_the_last_token_of_a_step_is_its_last_word_and_no_full_stop_or_line_break(make: Callable[..., Answer]) -> None:
    text = "Take 3.\nSo it is 8 .\n\nAnd."
    label = Label("wrong", "me", "person", (8, 20))
    offsets = [match.span() for match in re.finditer(r"\w+|[.\n]", text)]
    labels = token_labels(make("a", text, label), offsets, step="last-token")
    assert [text[slice(*span)] for span, label in zip(offsets, labels, strict=True) if label == 0] == ["8"]

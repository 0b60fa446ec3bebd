import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from draftsmith.data.chats.messages import Message
from draftsmith.label.answer_rows import from_row, read_answers, to_row, write_answers
from draftsmith.label.schema import Answer, Label, Tokens, answer_id

ROW: dict[str, Any] = {
    "id": "a",
    "messages": [{"role": "user", "content": "1+1?"}],
    "response": "1+1=3, so 3",
    "model": "m",
    "licence": "MIT",
    "source": "tests",
    "verdict": "wrong",
    "error": [4, 5],
    "labelled_by": "alice",
    "how": "person",
}


def refused(tmp_path: Path, **changes: Any) -> str:
    """The message for ROW with changes, in line 2 of a file."""
    row = {key: value for key, value in (ROW | changes).items() if value != "ABSENT"}
    (tmp_path / "in.jsonl").write_text(f"{json.dumps(ROW)}\n{json.dumps(row)}\n")
    with pytest.raises(ValueError) as refusal:
        list(read_answers(tmp_path / "in.jsonl"))
    assert str(refusal.value).startswith(f"{tmp_path / 'in.jsonl'}:2: ")
    return str(refusal.value)


def test_a_line_becomes_an_answer() -> None:
    answer = from_row(ROW, "here")
    assert answer == Answer(
        "a",
        (Message(role="user", content="1+1?"),),
        "1+1=3, so 3",
        "m",
        "MIT",
        "tests",
        Label("wrong", "alice", "person", (4, 5)),
    )


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"error": [4, 12]},
            "error is [4, 12]; 0 <= start < end <= 11, the characters of the response; count characters",
        ),
        ({"error": [5, 5]}, "error is [5, 5]; 0 <= start < end"),
        ({"error": [-1, 5]}, "error is [-1, 5]; 0 <= start"),
        ({"error": [4.0, 5]}, "error is [4.0, 5]; a span is two whole numbers"),
        ({"error": [True, 5]}, "error is [true, 5]; a span is two whole numbers"),
        ({"error": "4-5"}, 'error is "4-5"; a span is two whole numbers'),
        ({"error": None}, 'error is null; the verdict "wrong" needs the place of the first error; give the span'),
        ({"verdict": "correct"}, "error is [4, 5]; the verdict 'correct' has no error span"),
        ({"verdict": "unplaced"}, "error is [4, 5]; the verdict 'unplaced' has no error span"),
        ({"verdict": 1}, "verdict is 1; it is one of correct, wrong, unplaced"),
        ({"verdict": "ABSENT"}, "verdict is missing; every line has it; write null for an answer without a label"),
        ({"verdict": None}, "error is [4, 5]; an answer without a verdict has no label"),
        ({"licence": "ABSENT"}, "licence is missing"),
        ({"licence": " "}, 'licence is " "; it is text, and not empty'),
        ({"response": ""}, 'response is ""; it is text, and not empty'),
        ({"response": 3}, "response is 3; it is text"),
        ({"id": 7}, "id is 7; it is text"),
        ({"how": "guessed"}, 'how is "guessed"; it is one of person, rule, mined'),
        ({"how": None}, "how is missing"),
        ({"labelled_by": "ABSENT"}, "labelled_by is missing; every verdict says who gave it"),
        ({"note": 3}, "note is 3; a note is text"),
        ({"checked": [0, 4]}, "checked is [0, 4]; what was checked includes the error that was found; widen"),
        ({"checked": [0, 99]}, "checked is [0, 99]; 0 <= start"),
        ({"verdict": "unplaced", "error": None, "checked": [0, 4]}, 'checked is [0, 4]; the verdict "unplaced" speaks'),
        ({"respnse": "x"}, 'respnse is "x"; the fields are'),
        ({"errors": [4, 5]}, "did you mean error?"),
        ({"messages": []}, "messages is []; the prompt is a list of at least one message"),
        ({"messages": "1+1?"}, 'messages is "1+1?"; the prompt is a list'),
        ({"messages": [{"role": "user"}]}, 'messages[0] is {"role": "user"}; a message has role and content'),
        ({"messages": [{"role": "human", "content": "?"}]}, 'messages[0].role is "human"; it is one of system, user'),
        ({"messages": [{"role": "assistant", "content": "?"}]}, 'messages[0].role is "assistant"; a user asks last'),
        ({"tokens": [[0, 1]]}, "tokens is [[0, 1]]; it is an object of tokenizer and offsets"),
        (
            {"tokens": {"tokenizer": "t", "offsets": [[0, 12]]}},
            "tokens.offsets[0] is [0, 12]; offsets do not step back",
        ),
        (
            {"tokens": {"tokenizer": "t", "offsets": [[0, 4], [3, 5], [2, 6]]}},
            "tokens.offsets[2] is [2, 6]; offsets do",
        ),
        ({"tokens": {"tokenizer": "t", "offsets": [None]}}, "tokens.offsets[0] is null"),
    ],
)
def test_a_bad_line_is_refused_with_place_field_value_rule_and_remedy(
    tmp_path: Path, changes: dict[str, Any], told: str
) -> None:
    assert told in refused(tmp_path, **changes)


def test_a_long_value_is_shortened_in_the_message(tmp_path: Path) -> None:
    assert len(refused(tmp_path, verdict="x" * 5000)) < 400


def test_what_is_written_is_read_back(tmp_path: Path, make: Callable[..., Answer], wrong: Label) -> None:
    answers = [
        make("plain"),
        make("😀 wrong", "😀1+1=3", Label("wrong", "alice", "mined", (5, 6), (5, 6), "the sum")),
        make("twice", label=wrong),
        make("twice", label=Label("unplaced", "bob", "rule")),
        from_row(ROW | {"tokens": {"tokenizer": "t", "offsets": [[0, 4], [4, 11], [11, 11]]}}, "here"),
    ]
    write_answers(tmp_path / "out.jsonl", answers)
    assert list(read_answers(tmp_path / "out.jsonl")) == answers
    assert answers[-1].tokens == Tokens("t", ((0, 4), (4, 11), (11, 11)))


def test_an_answer_without_an_id_gets_the_same_one_every_time() -> None:
    bare = {key: value for key, value in ROW.items() if key != "id"}
    first = from_row(bare, "here")
    assert first.id == from_row(bare, "elsewhere").id == answer_id("tests", first.messages, first.response, "m")
    assert first.id != from_row(bare | {"model": "other"}, "here").id


def test_answers_to_one_prompt_share_a_question(make: Callable[..., Answer]) -> None:
    assert make("a", "2").question() == make("a", "3").question()
    assert make("a").question() != make("b").question()


@given(
    st.text(min_size=1).filter(str.strip).filter(lambda text: text.isprintable()),
    st.data(),
)
def test_any_span_within_the_text_survives_the_way_through_json(response: str, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(response) - 1))
    end = data.draw(st.integers(start + 1, len(response)))
    answer = from_row(ROW | {"response": response, "error": [start, end]}, "here")
    assert from_row(json.loads(json.dumps(to_row(answer))), "there") == answer

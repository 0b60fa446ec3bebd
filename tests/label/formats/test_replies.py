"""Chats that end with the model's turn come in as answers that wait for a label."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from labelled_files import Imported, read_labelled

from draftsmith.label.store.label_source import LabelSource

ASKED = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "What is 3 + 4?"}]
CHAT = {"id": "a", "messages": [*ASKED, {"role": "assistant", "content": "It is 7."}], "turns": [], "split": "train"}


def read(tmp_path: Path, *rows: Any) -> Imported:
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_labelled(tmp_path / "in.jsonl", "auto", LabelSource("in", "them", "MIT", "org/model"))


def replied(**fields: Any) -> dict[str, Any]:
    """The chat with another last turn."""
    return CHAT | {"messages": [*ASKED, {"role": "assistant", "content": "It is 7."} | fields]}


def test_a_reply_is_an_answer_without_a_label_to_the_turns_before_it(tmp_path: Path) -> None:
    given = read(tmp_path, CHAT)
    [answer] = given.answers
    assert given.format == "replies"
    assert (answer.response, answer.label, answer.model) == ("It is 7.", None, "org/model")
    assert [dict(message) for message in answer.messages] == ASKED


def test_all_turns_but_the_last_are_the_prompt(tmp_path: Path) -> None:
    talk = [*CHAT["messages"], {"role": "user", "content": "And 5?"}, {"role": "assistant", "content": "12."}]
    [answer] = read(tmp_path, CHAT | {"messages": talk}).answers
    assert answer.response == "12."
    assert [message["content"] for message in answer.messages][-2:] == ["It is 7.", "And 5?"]


def test_empty_fields_of_a_table_are_no_obstacle_and_messages_may_be_packed(tmp_path: Path) -> None:
    empty = {"tool_calls": None, "reasoning_content": "", "name": None}
    messages = [message | empty for message in CHAT["messages"]]
    for written in (messages, json.dumps(messages)):
        [answer] = read(tmp_path, {"messages": written, "answer": "7"}).answers
        assert (answer.response, answer.reference) == ("It is 7.", "7")
        assert [dict(message) for message in answer.messages] == ASKED


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            replied(reasoning_content="3 and 4 ..."),
            r"messages\[2\].reasoning_content is .* a label marks a place of the text",
        ),
        (
            replied(content=None, tool_calls=[{"id": "1"}]),
            r"messages\[2\].tool_calls is .* remove the field, or the row",
        ),
        (replied(content=[{"type": "text", "text": "7"}]), r"messages\[2\].content is .* a reply is text"),
        (CHAT | {"messages": ASKED}, "a chat ends with the model's turn"),
        (CHAT | {"messages": [*ASKED[:1], CHAT["messages"][-1]]}, "a user asks last"),
    ],
)
def test_a_row_that_is_no_text_reply_to_a_question_is_left_out_with_the_reason(
    row: dict[str, Any], said: str, tmp_path: Path
) -> None:
    given = read(tmp_path, CHAT, row)
    assert len(given.answers) == 1
    [reason] = given.left_out
    assert "in.jsonl:2" in reason
    assert re.search(said, reason)


def test_a_labelled_line_with_messages_is_not_taken_for_a_reply(tmp_path: Path) -> None:
    line = {"messages": ASKED, "response": "7", "verdict": None, "model": "m", "licence": "MIT", "source": "s"}
    assert read(tmp_path, line).format == "answers"

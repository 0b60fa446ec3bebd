"""Fields that only look like those of another API or of a call leave a row as it is, and no item's mark is lost."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from chat_rows import NO, reason, text
from tool_chats import ASKED, CALL, TOOL_ROW, WEATHER

from draftsmith.data.formats import detect_format, to_conversation

WriteRows = Callable[..., Path]
WHOLE = "<|user|>Is it warm?<|assistant|>«No.<|end|>»"
REPLY_ITEM = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "No."}]}
THOUGHT_ITEM = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "9 is cold."}]}
MODEL_CONTENT = {"role": "model", "parts": [{"text": "No."}]}
PEOPLE = json.dumps([{"name": "Anna", "role": "CEO"}])
CHAT = json.dumps([{"role": "user", "content": "hi"}])


@pytest.mark.parametrize(
    ("row", "expected", "words"),
    [
        ({"instruction": "List them.", "input": "Anna is CEO", "output": PEOPLE}, "alpaca", [PEOPLE]),
        ({"instruction": "In French.", "input": CHAT, "output": "Salut."}, "alpaca", ["Salut."]),
        ({"instruction": "In French.", "input": CHAT, "response": "Salut."}, "alpaca", ["Salut."]),
        ({"input": "List them.", "output": PEOPLE}, "responses", [PEOPLE]),
        ({"input": "List them.", "output": '[{"name": "anna", "role": "user"}]'}, "responses", None),
        ({"turns": ["a"], "input": [ASKED]}, "specbench", []),
        ({"prompt": "a", "completion": "b", "input": [ASKED]}, "prompt", ["b"]),
        ({"question": "a", "answer": "b", "input": CHAT}, "gsm8k", ["b"]),
    ],
)
def test_json_text_and_items_beside_an_older_format_are_no_request(
    row: dict[str, Any], expected: str, words: list[str] | None
) -> None:
    assert detect_format(row) == expected
    chat = to_conversation(row, detect_format(row))
    assert list(chat.reference) == ([row["output"]] if words is None else words)
    if "instruction" in row:
        assert chat.turns[0]["content"] == f"{row['instruction']}\n\n{row['input']}"


def test_a_document_beside_json_text_of_messages_is_a_document() -> None:
    row = {
        "text": "doc",
        "input": "x",
        "output": json.dumps([{"type": "message", "role": "assistant", "content": "a"}]),
    }
    assert to_conversation(row, detect_format(row)).text == "doc"


@pytest.mark.parametrize(
    "extra", [{"text": {"format": {"type": "text"}}}, {"prompt": {"id": "p"}}, {"output": json.dumps([REPLY_ITEM])}]
)
def test_the_settings_of_a_request_leave_its_items_a_conversation(
    extra: dict[str, Any], write_jsonl: WriteRows
) -> None:
    assert text({"input": [ASKED], "output": [REPLY_ITEM]} | extra, write_jsonl) == WHOLE


def test_json_text_with_an_item_that_is_not_read_is_dropped(write_jsonl: WriteRows) -> None:
    output = json.dumps([{"type": "web_search_call", "id": "w"}, REPLY_ITEM])
    assert "'web_search_call'" in reason({"input": "Is it warm?", "output": output}, write_jsonl)


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}, {"loss": False}])
@pytest.mark.parametrize("thoughts", [[], [THOUGHT_ITEM]])
def test_an_item_with_weight_0_is_read_and_not_learned(
    mark: dict[str, Any], thoughts: list[dict[str, Any]], write_jsonl: WriteRows
) -> None:
    items = [ASKED, *thoughts, NO | {"content": "Yes."} | mark, ASKED]
    # This template leaves out the thoughts before a later question.
    expected = "<|user|>Is it warm?<|assistant|>Yes.<|end|>" + WHOLE
    assert text({"input": items, "output": "No."}, write_jsonl) == expected


def test_items_of_one_reply_with_different_weights_are_dropped_and_measured_losses_are_not(
    write_jsonl: WriteRows,
) -> None:
    def row(name: str, first: object, second: object) -> dict[str, Any]:
        return {"input": [ASKED, THOUGHT_ITEM | {name: first}, REPLY_ITEM | {name: second}]}

    assert "item 2 has another weight" in reason(row("weight", 1, 0), write_jsonl)
    assert text(row("loss", 2.5, 1.5), write_jsonl) == WHOLE.replace("«", "«<think>9 is cold.</think>")


def test_a_message_item_keeps_its_thought_and_its_calls_and_a_hidden_channel_is_dropped(write_jsonl: WriteRows) -> None:
    asks = {"role": "assistant", "reasoning_content": "I ask.", "tool_calls": [CALL]}
    expected = text(TOOL_ROW, write_jsonl)
    thought = NO | {"reasoning_content": "9 is cold."}
    for content in ("", None):
        items = [ASKED, asks | {"content": content}, {"role": "tool", "tool_call_id": "c1", "content": "9 C"}, thought]
        assert text({"tools": [WEATHER], "input": items}, write_jsonl) == expected
    hidden = NO | {"channel": "analysis"}
    assert "in the channel 'analysis'" in reason({"input": [ASKED, hidden]}, write_jsonl)
    words = to_conversation({"input": [ASKED, NO | {"tool_calls": [CALL]}]}, "responses").turns[1]
    assert (words["content"], words["tool_calls"][0]["id"]) == ("No.", "c1")


@pytest.mark.parametrize(
    "row",
    [
        *[{"prompt": "a", "completion": "b", "label": mark} for mark in (False, 0, 0.0, "False", "false", "0")],
        *[{"messages": [ASKED, NO], "kto_tag": mark} for mark in (0, "False", "FALSE", "0")],
    ],
)
def test_an_answer_that_a_table_marks_as_unwanted_is_dropped(row: dict[str, Any], write_jsonl: WriteRows) -> None:
    assert "people did not want" in reason(row, write_jsonl)


@pytest.mark.parametrize(
    "row",
    [
        *[{"prompt": "Is it warm?", "completion": "No.", "label": mark} for mark in (True, 1, "True", "1", None, "")],
        {"input": [ASKED | {"status": "sent"}], "output": "No."},
        {"input": "Is it warm?", "output": "No.", "status": "approved"},
        {"input": [ASKED], "output": [REPLY_ITEM], "incomplete_details": {"reason": None}, "status": "completed"},
        {"contents": [ASKED | {"parts": [{"text": "Is it warm?"}]}, MODEL_CONTENT]},
        {
            "contents": [{"parts": [{"text": "Is it warm?"}]}],
            "candidates": [{"content": MODEL_CONTENT, "finish_reason": 1}],
        },
        {"request": {"input": [ASKED]}, "response": {"output": [REPLY_ITEM]}, "conversation": "c1", "status": "failed"},
        {"request": {"input": [ASKED]}, "response": "No.", "conversation": "c1"},
        {"request": {"input": [ASKED]}, "output": [REPLY_ITEM], "conversation": "c1"},
        {"messages": [ASKED | {"function_calls": "{}"}, NO | {"function_calls": "{}"}], "tools": "{}"},
    ],
)
def test_what_says_nothing_of_a_whole_reply_leaves_it_whole(row: dict[str, Any], write_jsonl: WriteRows) -> None:
    assert text(row, write_jsonl) == WHOLE


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            {
                "input": [ASKED],
                "output_text": "No",
                "status": "incomplete",
                "incomplete_details": {"reason": "max_output_tokens"},
            },
            "the reply was cut (status 'incomplete', max_output_tokens)",
        ),
        ({"input": "Is it", "output": "No", "incomplete_details": {"reason": "x"}}, "the reply was cut (x)"),
        (
            {"request": {"input": [ASKED]}, "output_text": "No", "status": "incomplete"},
            "the reply was cut (status 'incomplete')",
        ),
        ({"input": [ASKED, REPLY_ITEM | {"status": "incomplete"}]}, "the reply was cut (status 'incomplete')"),
        (
            {"request": {"input": [ASKED]}, "response": {"status": "failed", "output": [REPLY_ITEM]}},
            "the reply was cut (status 'failed')",
        ),
        ({"input": [ASKED], "conversation": {"id": "c1"}, "output": "No."}, "continues an earlier response"),
        ({"request": {"input": [ASKED], "conversation": "c1"}, "response": "No."}, "continues an earlier response"),
    ],
)
def test_a_cut_or_continued_response_is_dropped_wherever_it_says_so(
    row: dict[str, Any], expected: str, write_jsonl: WriteRows
) -> None:
    assert expected in reason(row, write_jsonl)


def test_an_object_that_a_table_fills_with_null_is_no_chosen_answer() -> None:
    asked = [{"from": "human", "value": "Is it warm?"}]
    row = {"conversations": asked, "chosen": {"from": None, "value": None}}
    chat = to_conversation(row, detect_format(row))
    assert (chat.messages[0]["content"], chat.reference) == ("Is it warm?", ())


def test_calls_and_tools_in_two_fields_may_repeat_each_other(write_jsonl: WriteRows) -> None:
    expected = text(TOOL_ROW, write_jsonl)
    asked, call, *others = TOOL_ROW["messages"]
    repeated = json.dumps([{"name": "weather", "arguments": {"city": "Oslo"}}])
    row = TOOL_ROW | {
        "functions": json.dumps([WEATHER]),
        "messages": [asked, call | {"function_calls": repeated}, *others],
    }
    assert text(row, write_jsonl) == expected
    assert to_conversation(row, "openai").turns[1]["tool_calls"][0]["id"] == "c1"


def test_a_systems_tools_that_are_an_empty_object_as_text_are_none(write_jsonl: WriteRows) -> None:
    system = {"role": "system", "content": "Be brief.", "tools": "{}", "functions": "{}"}
    assert text({"messages": [system, ASKED, NO]}, write_jsonl) == "<|system|>Be brief." + WHOLE

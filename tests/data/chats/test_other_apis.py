"""Rows of OpenAI's Responses API, of Gemini's, and of conversations in pairs give the samples that chat turns give."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from chat_rows import NO, reason, text
from tool_chats import ASKED, TOOL_ROW, WEATHER

from draftsmith.data.chats.token_kinds import EVERYTHING
from draftsmith.data.formats import detect_format, to_conversation
from draftsmith.data.prompts import prompts, read_prompts

WriteRows = Callable[..., Path]
BRIEF = "<|system|>Be brief."
WHOLE = "<|user|>Is it warm?<|assistant|>«No.<|end|>»"
USER_ITEM = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Is it warm?"}]}
REPLY_ITEM = {
    "type": "message",
    "role": "assistant",
    "status": "completed",
    "content": [{"type": "output_text", "text": "No.", "annotations": []}],
}
FLAT_TOOL = {"type": "function", "name": "weather", "parameters": {"type": "object"}}
THOUGHT_ITEMS = [
    {"type": "reasoning", "id": "r1", "summary": [], "content": [{"type": "reasoning_text", "text": "I ask."}]},
    {"type": "reasoning", "id": "r2", "summary": [{"type": "summary_text", "text": "9 is cold."}]},
]
CALL_ITEM = {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": '{"city": "Oslo"}'}
RESULT_ITEM = {"type": "function_call_output", "call_id": "c1", "output": "9 C"}
ITEMS = [THOUGHT_ITEMS[0], CALL_ITEM, RESULT_ITEM, THOUGHT_ITEMS[1], REPLY_ITEM]

USER_CONTENT = {"role": "user", "parts": [{"text": "Is it warm?"}]}
MODEL_CONTENT = {"role": "model", "parts": [{"text": "No."}]}
GEMINI_TOOLS = [{"functionDeclarations": [{"name": "weather", "parameters": {"type": "OBJECT"}}]}]
GEMINI_TURNS = [
    USER_CONTENT,
    {
        "role": "model",
        "parts": [
            {"text": "I ask.", "thought": True},
            {"functionCall": {"name": "weather", "args": {"city": "Oslo"}}, "thoughtSignature": "x"},
        ],
    },
    {"role": "user", "parts": [{"functionResponse": {"name": "weather", "response": {"result": "9 C"}}}]},
    {"role": "model", "parts": [{"text": "9 is cold.", "thought": True}, {"text": "No."}]},
]


def snake(value: Any) -> Any:
    """As Python's client of Gemini names fields."""
    names = {
        "functionDeclarations": "function_declarations",
        "functionCall": "function_call",
        "functionResponse": "function_response",
        "systemInstruction": "system_instruction",
    }
    if isinstance(value, dict):
        return {names.get(name, name): snake(entry) for name, entry in value.items()}
    return [snake(entry) for entry in value] if isinstance(value, list) else value


@pytest.mark.parametrize(
    "row",
    [
        {"input": "Is it warm?", "output": "No."},
        {"input": "Is it warm?", "output_text": "No.", "output": [REPLY_ITEM]},
        {"input": [USER_ITEM, REPLY_ITEM]},
        {"input": json.dumps([USER_ITEM]), "output": json.dumps([REPLY_ITEM])},
        {"input": [{"role": "user", "content": "Is it warm?"}], "output": "No.", "reasoning": "off"},
        {"input": [USER_ITEM], "output": [{"type": "reasoning", "summary": [], "encrypted_content": "x"}, REPLY_ITEM]},
        {
            "request": {"model": "m", "input": "Is it warm?"},
            "response": {"status": "completed", "output": [REPLY_ITEM]},
        },
        {"body": {"input": [USER_ITEM]}, "response": {"status_code": 200, "body": {"output": [REPLY_ITEM]}}},
        {"request": {"input": [USER_ITEM]}, "response": "No."},
        {"request": {"input": [USER_ITEM]}, "response": {"choices": [{"message": NO}]}},
        {"contents": [USER_CONTENT, MODEL_CONTENT]},
        {"contents": [{"parts": [{"text": "Is it warm?", "functionCall": {"name": None}}]}, MODEL_CONTENT]},
        {"contents": json.dumps([USER_CONTENT, MODEL_CONTENT]), "tools": None},
        {"contents": [USER_CONTENT], "candidates": [{"content": MODEL_CONTENT, "finishReason": "STOP"}]},
        {"request": {"contents": [USER_CONTENT]}, "response": {"candidates": [{"content": MODEL_CONTENT}]}},
        {"conversation": [{"input": "Is it warm?", "output": "No."}]},
        {"conversation": [{"human": "Is it warm?", "assistant": "No."}], "category": "Brainstorming"},
        {"conversations": [{"from": "human", "value": "Is it warm?"}], "chosen": {"from": "gpt", "value": "No."}},
        *[
            {"messages": [{"role": asks, "content": "Is it warm?"}, {"role": says, "content": "No."}]}
            for asks, says in (("User", "Assistant"), ("HUMAN", "AI"), ("prompter", "bot"), ("USER", "CHATBOT"))
        ],
    ],
)
def test_every_api_and_pair_gives_the_sample_of_its_question_and_answer(
    row: dict[str, Any], write_jsonl: WriteRows
) -> None:
    assert text(row, write_jsonl) == WHOLE
    assert to_conversation(row, detect_format(row)).reference == ("No.",)


@pytest.mark.parametrize(
    "row",
    [
        {"input": [USER_ITEM], "output": [REPLY_ITEM], "instructions": "Be brief."},
        {"input": [{"role": "developer", "content": "Be brief."}, USER_ITEM], "output": [REPLY_ITEM]},
        {"request": {"input": "Is it warm?", "instructions": "Be brief."}, "response": {"output": [REPLY_ITEM]}},
        {"contents": [USER_CONTENT, MODEL_CONTENT], "systemInstruction": {"parts": [{"text": "Be brief."}]}},
        {"contents": [USER_CONTENT, MODEL_CONTENT], "config": {"system_instruction": "Be brief."}},
        {"conversation": [{"system": "Be brief.", "input": "Is it warm?", "output": "No."}]},
        {"input": "Is it warm?", "output": "No.", "system": "Be brief."},
        {"messages": [{"role": "system", "content": " "}, ASKED, NO], "system": "Be brief."},
    ],
)
def test_the_systems_words_come_first_wherever_an_api_puts_them(row: dict[str, Any], write_jsonl: WriteRows) -> None:
    assert text(row, write_jsonl) == BRIEF + WHOLE


@pytest.mark.parametrize(
    ("row", "result"),
    [
        ({"tools": [FLAT_TOOL], "input": [USER_ITEM, *ITEMS]}, "9 C"),
        ({"tools": [FLAT_TOOL], "input": [USER_ITEM, *ITEMS[:3]], "output": ITEMS[3:]}, "9 C"),
        (
            {"request": {"tools": [FLAT_TOOL], "input": [USER_ITEM, *ITEMS[:3]]}, "response": {"output": ITEMS[3:]}},
            "9 C",
        ),
        ({"tools": GEMINI_TOOLS, "contents": GEMINI_TURNS}, '{"result": "9 C"}'),
        (snake({"tools": GEMINI_TOOLS, "contents": GEMINI_TURNS}), '{"result": "9 C"}'),
        ({"tools": [WEATHER], "contents": GEMINI_TURNS}, '{"result": "9 C"}'),
        ({"messages": [{"role": "system", "content": "", "tools": [WEATHER]}, *TOOL_ROW["messages"]]}, "9 C"),
        (
            {
                "messages": [
                    {"role": "system", "content": None, "functions": json.dumps([WEATHER]), "tools": "[]"},
                    ASKED,
                    {
                        "role": "assistant",
                        "content": None,
                        "reasoning_content": "I ask.",
                        "function_calls": json.dumps([{"name": "weather", "arguments": {"city": "Oslo"}}]),
                    },
                    {"role": "environment", "content": "9 C"},
                    TOOL_ROW["messages"][-1],
                ]
            },
            "9 C",
        ),
    ],
    ids=["items", "two lists", "a log", "Gemini", "Gemini in Python", "mixed", "GLM", "environment"],
)
def test_thoughts_calls_and_results_of_every_api_are_learned_and_read(
    row: dict[str, Any], result: str, write_jsonl: WriteRows
) -> None:
    assert text(row, write_jsonl) == (
        '<tools>{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}</tools>'
        '<|user|>Is it warm?<|assistant|>«<think>I ask.</think><call>weather {"city": "Oslo"}</call><|end|>»'
        f"<|tool|>{result}<|assistant|>«<think>9 is cold.</think>No.<|end|>»"
    )


def test_a_thought_that_a_server_has_encrypted_is_none(write_jsonl: WriteRows) -> None:
    hidden = [{"type": "reasoning.encrypted", "data": "x"}]
    assert text({"messages": [ASKED, NO | {"reasoning": None, "reasoning_details": hidden}]}, write_jsonl) == WHOLE


def test_parallel_calls_of_items_are_one_reply_with_their_ids(write_jsonl: WriteRows) -> None:
    second = CALL_ITEM | {"call_id": "c2", "arguments": '{"city": "Rome"}'}
    row = {"input": [USER_ITEM, CALL_ITEM, second, RESULT_ITEM, RESULT_ITEM | {"call_id": "c2"}, REPLY_ITEM]}
    asked, reply, first, other, last = to_conversation(row, detect_format(row)).turns
    assert [call["id"] for call in reply["tool_calls"]] == ["c1", "c2"]
    assert (first["tool_call_id"], other["tool_call_id"], last["content"]) == ("c1", "c2", "No.")
    assert asked["role"] == "user"


def test_the_name_of_a_gemini_function_reaches_its_result() -> None:
    row = {"contents": GEMINI_TURNS, "tools": GEMINI_TOOLS}
    assert to_conversation(row, detect_format(row)).turns[2].get("name") == "weather"


@pytest.mark.parametrize(
    "row",
    [
        {"input": [USER_ITEM | {"content": [*USER_ITEM["content"], {"type": "input_image", "image_url": "a.png"}]}]},
        {
            "contents": [
                {
                    "role": "user",
                    "parts": [{"text": "Is it warm?"}, {"inlineData": {"mimeType": "image/png", "data": "x"}}],
                }
            ]
        },
        {
            "contents": [
                {"parts": [{"text": "Is it warm?"}, {"file_data": {"mime_type": "image/png", "file_uri": "a.png"}}]}
            ]
        },
        {"conversations": [{"from": "human", "value": "Is it warm?<image>"}], "image": "a.png"},
        {"conversations": [{"from": "human", "value": "Is it warm?<image>"}], "images": [{"bytes": None, "path": "a"}]},
    ],
    ids=["items", "inline", "file", "a mark", "a mark for a table's picture"],
)
def test_a_picture_is_shown_by_a_template_that_shows_pictures_and_refused_by_one_that_does_not(
    row: dict[str, Any], write_jsonl: WriteRows
) -> None:
    name = next(iter(row))
    reply = {"input": REPLY_ITEM, "contents": MODEL_CONTENT, "conversations": {"from": "gpt", "value": "No."}}[name]
    row = row | {name: [*row[name], reply]}
    assert text(row, write_jsonl) == "<|user|>Is it warm?<|image|><|assistant|>«No.<|end|>»"
    words = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert "this target reads text alone" in reason(row, write_jsonl, EVERYTHING, words)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"input": [USER_ITEM], "output": [REPLY_ITEM], "previous_response_id": "r"}, "continues an earlier response"),
        ({"input": [USER_ITEM, {"type": "web_search_call", "id": "w"}, REPLY_ITEM]}, "item 1 .* 'web_search_call'"),
        ({"input": [USER_ITEM, REPLY_ITEM, REPLY_ITEM]}, "turn 2 is the assistant's where the user's belongs"),
        ({"input": [USER_ITEM, REPLY_ITEM, CALL_ITEM, THOUGHT_ITEMS[0]]}, "another order than a thought, words, calls"),
        ({"input": [USER_ITEM, THOUGHT_ITEMS[0]]}, "a thought without words or a call behind it"),
        (
            {
                "input": [USER_ITEM],
                "output": [REPLY_ITEM | {"content": [{"type": "refusal", "refusal": "I may not."}]}],
            },
            "turn 1 is a refusal",
        ),
        (
            {
                "input": [USER_ITEM],
                "output": [REPLY_ITEM],
                "status": "incomplete",
                "incomplete_details": {"reason": "max_output_tokens"},
            },
            "the reply was cut .status 'incomplete', max_output_tokens",
        ),
        ({"response": {"output": [REPLY_ITEM]}}, "a response without its request"),
        (
            {"request": {"input": [USER_ITEM]}, "response": {"error": {"message": "busy"}, "output": []}},
            "the response is an error of the server",
        ),
        (
            {"contents": [USER_CONTENT], "candidates": [{"content": MODEL_CONTENT, "finishReason": "MAX_TOKENS"}]},
            "the reply was cut .finishReason 'MAX_TOKENS'",
        ),
        ({"contents": [USER_CONTENT], "candidates": [{"content": MODEL_CONTENT}] * 2}, "has 2 candidates"),
        ({"contents": [USER_CONTENT, {"role": "model", "parts": [{"executableCode": {"code": "1"}}]}]}, "a part holds"),
        ({"contents": [USER_CONTENT, MODEL_CONTENT], "tools": [{"googleSearch": {}}]}, "no functionDeclarations"),
        ({"contents": [USER_CONTENT, MODEL_CONTENT], "tools": 7}, "tools is int, not a list"),
        (
            {"contents": [USER_CONTENT, MODEL_CONTENT], "tools": [{"functionDeclarations": 7}]},
            "tools.0..functionDeclarations is int, not a list",
        ),
        (
            {"contents": [{"parts": [{"inlineData": {"mimeType": "text/csv", "data": "x"}}]}]},
            "of the mimeType 'text/csv'",
        ),
        (
            {
                "conversations": [{"from": "human", "value": "Is it warm?"}, {"from": "gpt", "value": "No."}],
                "image": "a",
            },
            "the row has image, and no turn has a part for them; there are 1 of them, and the mark <image> is",
        ),
        ({"prompt": "Is it warm?", "completion": "Yes.", "label": False}, "people did not want .label false"),
        ({"messages": [ASKED, NO], "kto_tag": False}, "people did not want .kto_tag false"),
        ({"messages": [ASKED, {"role": "assistant", "content": "", "reasoning_content": "9 is"}]}, "a thought without"),
        ({"messages": [ASKED | {"tools": [WEATHER]}, NO]}, "turn 0 is the user's and has tools"),
        (
            {
                "tools": [{"name": "other"}],
                "messages": [{"role": "system", "content": "", "tools": [WEATHER]}, ASKED, NO],
            },
            "the row has tools, and others in the system's turn",
        ),
        (
            {"messages": [ASKED, NO | {"reasoning_details": [{"type": "reasoning.text", "text": "9 is cold."}]}]},
            "turn 1 has reasoning_details",
        ),
        ({"messages": [ASKED, NO | {"function_calls": "weather(city='Oslo')"}]}, "function_calls is no JSON"),
    ],
)
def test_what_an_api_holds_and_no_sample_may_have_is_dropped_with_its_reason(
    row: dict[str, Any], expected: str, write_jsonl: WriteRows
) -> None:
    with pytest.raises(ValueError, match=expected):
        raise ValueError(reason(row, write_jsonl))


def test_a_question_whose_answer_nobody_wanted_is_still_a_prompt(tmp_path: Path, write_jsonl: WriteRows) -> None:
    source = write_jsonl([{"prompt": "Is it warm?", "completion": "Yes.", "label": False}])
    prompts(str(source), tmp_path / "out")
    [prompt] = read_prompts(tmp_path / "out")
    assert (prompt.messages[0]["content"], prompt.reference) == ("Is it warm?", ())


def test_an_answer_of_a_pair_without_loss_is_read_only(write_jsonl: WriteRows) -> None:
    pair = {"input": "Is it warm?", "output": "Yes.", "output_with_loss": False}
    row = {"conversation": [pair, pair | {"output": "No.", "output_with_loss": True}]}
    assert text(row, write_jsonl) == "<|user|>Is it warm?<|assistant|>Yes.<|end|>" + WHOLE


def test_calls_beside_blocks_that_a_table_fills_with_json_text_say_nothing(write_jsonl: WriteRows) -> None:
    blocks = [{"type": "tool_use", "id": "c1", "name": "weather", "input": {"city": "Oslo"}}]
    turns = [ASKED, {"role": "assistant", "content": blocks, "tool_calls": "[]"}]
    assert text({"messages": turns}, write_jsonl).endswith('«<call>weather {"city": "Oslo"}</call><|end|>»')


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"instruction": "Count.", "input": "a a", "output": "2"}, "alpaca"),
        ({"messages": [ASKED, NO], "input": [USER_ITEM]}, "openai"),
        ({"text": "doc", "input": "a", "output": "b"}, "text"),
        ({"question": "Is it warm?", "answer": "No.", "contents": ["a"]}, "gsm8k"),
        ({"input": "a", "output": [{"label": 1}], "text": "doc"}, "text"),
    ],
)
def test_a_row_with_a_field_of_an_apis_name_is_no_row_of_that_api(row: dict[str, Any], expected: str) -> None:
    assert detect_format(row) == expected


def test_the_page_on_chats_shows_one_chat_in_three_forms() -> None:
    page = (Path(__file__).parents[3] / "docs" / "how-to" / "data" / "chats.md").read_text(encoding="utf-8")
    rows = [json.loads(block.split("```")[0]) for block in page.split("```json\n")[1:]]
    chats = [to_conversation(row, detect_format(row)) for row in rows]
    assert [detect_format(row) for row in rows] == ["openai", "responses", "gemini"]
    for chat in chats:
        assert chat.tools == chats[0].tools
        assert [turn["role"] for turn in chat.turns] == ["user", "assistant", "tool", "assistant"]
        asked, call, result, last = chat.turns
        assert (call["reasoning_content"], call["tool_calls"][0]["function"]["arguments"]) == (
            "I ask.",
            {"city": "Oslo"},
        )
        assert "9 C" in result["content"]
        assert (asked["content"], last["content"]) == ("Is it warm in Oslo?", "No, 9 C.")

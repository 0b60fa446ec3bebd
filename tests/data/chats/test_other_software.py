"""Rows as other software writes them: dumps of agents' messages, logs and traces, answers that people compared, spans to train on."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from chat_rows import NO, reason, text
from tool_chats import ASKED, TOOL_ROW, WEATHER

from draftsmith.data.formats import detect_format, to_conversation
from draftsmith.data.prompts import prompts, read_prompts

WriteRows = Callable[..., Path]
Row = dict[str, Any]
YES = NO | {"content": "Yes."}
SYSTEM, WHOLE = "<|system|>Be brief.", "<|user|>Is it warm?<|assistant|>«No.<|end|>»"
BRIEF = {"role": "system", "content": "Be brief."}
CHOICES = {"choices": [{"index": 0, "message": NO, "finish_reason": "stop"}]}
BEDROCK_ASKED = {"role": "user", "content": [{"text": "Is it warm?"}]}
BEDROCK_REPLY = {"message": {"role": "assistant", "content": [{"text": "No."}]}}
ANTHROPIC_REPLY = {**NO, "content": [{"type": "text", "text": "No."}], "stop_reason": "end_turn"}
SPAN = {
    "gen_ai.system_instructions": '[{"type": "text", "content": "Be brief."}]',
    "gen_ai.input.messages": '[{"role": "user", "parts": [{"type": "text", "content": "Is it warm?"}]}]',
    "gen_ai.output.messages": '[{"role": "assistant", "parts": [{"type": "text", "content": "No."}], "finish_reason": "stop"}]',
}
CUT = {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}, "output": []}


def constructor(kind: str, **fields: Any) -> Row:
    """A message as `dumpd` of LangChain writes it."""
    return {"lc": 1, "type": "constructor", "id": ["langchain", "schema", "messages", kind], "kwargs": fields}


def human(content: str) -> Row:
    return {"type": "human", "data": {"content": content, "additional_kwargs": {}, "type": "human"}}


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [human("Is it warm?"), {"type": "ai", "data": {"content": "No.", "tool_calls": []}}]},
        {"messages": [constructor("HumanMessage", content="Is it warm?"), constructor("AIMessage", content="No.")]},
        {"messages": [{"type": "human", "content": "Is it warm?"}, {"type": "AIMessageChunk", "content": "No."}]},
        {
            "inputs": {"messages": [[constructor("HumanMessage", content="Is it warm?")]]},
            "outputs": {"generations": [[{"text": "No.", "message": constructor("AIMessage", content="No.")}]]},
        },
        {"inputs": {"messages": [ASKED]}, "outputs": {"messages": [ASKED, NO]}},
        {"inputs": {"messages": [ASKED], "model": "m"}, "outputs": CHOICES},
        {"inputs": {"question": "Is it warm?"}, "outputs": {"answer": "No."}},
        {"input": {"messages": [ASKED]}, "preferred_output": [NO], "non_preferred_output": [YES]},
        {"messages": [BEDROCK_ASKED, BEDROCK_REPLY["message"]], "schemaVersion": "bedrock-conversation-2024"},
        {"request": {"messages": [BEDROCK_ASKED]}, "response": {"output": BEDROCK_REPLY, "stopReason": "end_turn"}},
        {
            "input": {"inputBodyJson": {"messages": [BEDROCK_ASKED]}},
            "output": {"outputBodyJson": {"output": BEDROCK_REPLY, "stopReason": "end_turn"}},
        },
        {"recordId": "1", "modelInput": {"messages": [ASKED]}, "modelOutput": ANTHROPIC_REPLY},
        {
            "custom_id": "1",
            "params": {"messages": [ASKED]},
            "result": {"type": "succeeded", "message": ANTHROPIC_REPLY},
        },
        {"chat_history": [], "message": "Is it warm?", "text": "No."},
        {
            "request": {"chat_history": [], "message": "Is it warm?"},
            "response": {"text": "No.", "finish_reason": "COMPLETE"},
        },
        {"request": {"messages": [ASKED]}, "response": {"message": ANTHROPIC_REPLY, "finish_reason": "COMPLETE"}},
        {"request": {"messages": [ASKED]}, "response": {"message": NO, "done_reason": "stop"}},
        {"input": {"messages": [ASKED]}, "output": NO, "type": "GENERATION"},
        {"input": [ASKED], "output": NO, "type": "GENERATION"},
        {"input": [ASKED], "output": [{"message": NO, "finish_reason": "stop"}]},
        {"request_body": {"messages": [ASKED]}, "response_body": CHOICES},
        {"messages": {}, "proxy_server_request": {"messages": [ASKED]}, "response": CHOICES},
        {"messages": [ASKED], "response": "No."},
        {name: value for name, value in SPAN.items() if "system" not in name},
        {
            "attributes": {
                "gen_ai.prompt.0.role": "user",
                "gen_ai.prompt.0.content": "Is it warm?",
                "gen_ai.completion.0.role": "assistant",
                "gen_ai.completion.0.content": "No.",
            }
        },
        {"attributes": {"llm": {"input_messages": [{"message": ASKED}], "output_messages": [{"message": NO}]}}},
        {"winner": "model_b", "conversation_a": [ASKED, YES], "conversation_b": [ASKED, NO]},
        {"winner": "tie", "conversation_a": [ASKED, NO], "conversation_b": [ASKED, YES]},
        {"prompt": '["Is it warm?"]', "response_a": '["No."]', "response_b": '["Yes."]', "winner_model_a": 1},
        {"prompt": "Is it warm?", "response_1": "Yes.", "response_2": "No.", "preference_strength": 2},
        {"context": [ASKED], "response1": "No.", "response2": "Yes.", "overall_preference": -3},
        {"prompt": "Is it warm?", "response_0": "Yes.", "response_1": "No.", "better_response_id": 1},
        {"instruction": "Is it warm?", "input": "", "chosen": "No.", "rejected": "Yes."},
        {"question": "Is it warm?", "chosen": "No.", "rejected": "Yes."},
        {"chosen": "\n\nHuman: Is it warm?\n\nAssistant: No.", "rejected": "\n\nHuman: Is it warm?\n\nAssistant: Yes."},
        {"prompt": "\n\nHuman: Is it warm?\n\nAssistant:", "completion": " No."},
        {
            "contents": [{"role": "user", "parts": [{"text": "Is it warm?"}]}],
            "completions": [
                {"score": 0.0, "completion": {"role": "model", "parts": [{"text": "Yes."}]}},
                {"score": 1.0, "completion": {"role": "model", "parts": [{"text": "No."}]}},
            ],
        },
        {"id": "0", "data": ["Is it warm?", "No."]},
        {"dialogue": [{"speaker": "user", "text": "Is it warm?"}, {"speaker": "assistant", "text": "No."}]},
        {"chat_messages": [{"sender": "human", "text": "Is it warm?"}, {"sender": "assistant", "text": "No."}]},
        {"chat": {"messages": [ASKED, NO]}, "title": "t"},
        {"messages": [{"author": "user", "content": "Is it warm?"}, {"author": "assistant", "content": "No."}]},
        {"query": "Is it warm?", "response": "No.", "type": "x"},
        {"inputs": "Is it warm?", "targets": "No."},
        {"input": "Is it warm?", "target": "No."},
        {"text_input": "Is it warm?", "output": "No."},
        {"problem": "Is it warm?", "generated_solution": "No."},
        {"messages": [ASKED, NO | {"training": True}]},
        {
            "conversations": [
                {"from": "human", "value": "Is it warm?"},
                {
                    "from": "gpt",
                    "value": "No.",
                    "train_detail": [{"begin_offset": 0, "end_offset": 2, "train": True}],
                },
            ]
        },
    ],
)
def test_every_software_gives_the_sample_of_its_question_and_answer(row: Row, write_jsonl: WriteRows) -> None:
    assert text(row, write_jsonl) == WHOLE
    assert to_conversation(row, detect_format(row)).reference == ("No.",)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [constructor("SystemMessage", content="Be brief."), human("Is it warm?"), NO]},
        {"system": [{"text": "Be brief."}], "messages": [BEDROCK_ASKED, BEDROCK_REPLY["message"]]},
        {"preamble": "Be brief.", "chat_history": [], "message": "Is it warm?", "text": "No."},
        {"attributes": SPAN},
        {"attributes": [{"key": name, "value": {"stringValue": value}} for name, value in SPAN.items()]},
        {"system": "Be brief.", "query": "Is it warm?", "response": "No.", "history": []},
        {"params": {"system": "Be brief.", "messages": [ASKED]}, "result": {"message": ANTHROPIC_REPLY}},
        {"input": {"messages": [BRIEF, ASKED]}, "preferred_output": [NO]},
    ],
)
def test_the_systems_words_are_kept_wherever_the_software_puts_them(row: Row, write_jsonl: WriteRows) -> None:
    assert text(row, write_jsonl) == SYSTEM + WHOLE


CALL = {"name": "weather", "args": {"city": "Oslo"}, "id": "c1", "type": "tool_call"}
THOUGHTS = {name: {"additional_kwargs": {"reasoning_content": name}} for name in ("I ask.", "9 is cold.")}


@pytest.mark.parametrize(
    "row",
    [
        {
            "messages": [
                human("Is it warm?"),
                {"type": "ai", "data": {"content": "", "tool_calls": [CALL], **THOUGHTS["I ask."]}},
                {"type": "tool", "data": {"content": "9 C", "tool_call_id": "c1"}},
                {"type": "ai", "data": {"content": "No.", **THOUGHTS["9 is cold."]}},
            ]
        },
        {
            "messages": [
                constructor("HumanMessage", content="Is it warm?", type="human"),
                constructor(
                    "AIMessage",
                    content=[{"type": "tool_use", "id": "c1", "name": "weather", "input": {"city": "Oslo"}}],
                    tool_calls=[CALL],
                    **THOUGHTS["I ask."],
                ),
                constructor("ToolMessage", content="9 C", tool_call_id="c1", status="success"),
                constructor("AIMessage", content="No.", **THOUGHTS["9 is cold."]),
            ]
        },
        {
            "messages": [
                BEDROCK_ASKED,
                {
                    "role": "assistant",
                    "content": [
                        {"reasoningContent": {"reasoningText": {"text": "I ask.", "signature": "x"}}},
                        {"toolUse": {"toolUseId": "c1", "name": "weather", "input": {"city": "Oslo"}}},
                    ],
                },
                {"role": "user", "content": [{"toolResult": {"toolUseId": "c1", "content": [{"text": "9 C"}]}}]},
                {
                    "role": "assistant",
                    "content": [{"reasoningContent": {"reasoningText": {"text": "9 is cold."}}}, {"text": "No."}],
                },
            ],
            "toolConfig": {"tools": [{"toolSpec": {"name": "weather", "inputSchema": {"json": {"type": "object"}}}}]},
        },
        {
            "gen_ai.input.messages": [
                {"role": "user", "parts": [{"type": "text", "content": "Is it warm?"}]},
                {
                    "role": "assistant",
                    "parts": [
                        {"type": "reasoning", "content": "I ask."},
                        {"type": "tool_call", "id": "c1", "name": "weather", "arguments": {"city": "Oslo"}},
                    ],
                },
                {"role": "tool", "parts": [{"type": "tool_call_response", "id": "c1", "response": "9 C"}]},
            ],
            "gen_ai.output.messages": [
                {
                    "role": "assistant",
                    "parts": [{"type": "reasoning", "content": "9 is cold."}, {"type": "text", "content": "No."}],
                }
            ],
            "gen_ai.tool.definitions": json.dumps([WEATHER]),
        },
        {
            "messages": [
                {"role": "user", "parts": [{"type": "text", "text": "Is it warm?"}]},
                {
                    "role": "assistant",
                    "content": "No.",
                    "parts": [
                        {"type": "step-start"},
                        {"type": "reasoning", "text": "I ask."},
                        {
                            "type": "tool-weather",
                            "toolCallId": "c1",
                            "state": "output-available",
                            "input": {"city": "Oslo"},
                            "output": "9 C",
                        },
                        {"type": "step-start"},
                        {"type": "reasoning", "text": "9 is cold."},
                        {"type": "text", "text": "No."},
                    ],
                },
            ]
        },
        {
            "messages": [
                {"info": {"role": "user"}, "parts": [{"type": "text", "text": "Is it warm?"}]},
                {
                    "info": {"role": "assistant"},
                    "parts": [
                        {"type": "reasoning", "text": "I ask."},
                        {
                            "type": "tool",
                            "callID": "c1",
                            "tool": "weather",
                            "state": {"input": {"city": "Oslo"}, "output": "9 C"},
                        },
                        {"type": "reasoning", "text": "9 is cold."},
                        {"type": "text", "text": "No."},
                    ],
                },
            ]
        },
        {
            "messages": [
                ASKED,
                {
                    "role": "assistant",
                    "content": [
                        {"type": "reasoning", "text": "I ask."},
                        {
                            "type": "tool-call",
                            "toolCallId": "c1",
                            "toolName": "weather",
                            "input": {"city": "Oslo"},
                        },
                    ],
                },
                {
                    "role": "tool",
                    "content": [
                        {
                            "type": "tool-result",
                            "toolCallId": "c1",
                            "toolName": "weather",
                            "output": {"type": "text", "value": "9 C"},
                        }
                    ],
                },
                {
                    "role": "assistant",
                    "content": [{"type": "reasoning", "text": "9 is cold."}, {"type": "text", "text": "No."}],
                },
            ]
        },
        {
            "messages": [
                {"kind": "request", "parts": [{"part_kind": "user-prompt", "content": "Is it warm?"}]},
                {
                    "kind": "response",
                    "parts": [
                        {"part_kind": "thinking", "content": "I ask."},
                        {
                            "part_kind": "tool-call",
                            "tool_name": "weather",
                            "args": '{"city": "Oslo"}',
                            "tool_call_id": "c1",
                        },
                    ],
                },
                {
                    "kind": "request",
                    "parts": [
                        {
                            "part_kind": "tool-return",
                            "tool_name": "weather",
                            "content": "9 C",
                            "tool_call_id": "c1",
                        }
                    ],
                },
                {
                    "kind": "response",
                    "parts": [
                        {"part_kind": "thinking", "content": "9 is cold."},
                        {"part_kind": "text", "content": "No."},
                    ],
                },
            ]
        },
        {
            "messages": [
                BEDROCK_ASKED,
                {
                    "role": "assistant",
                    "content": [
                        {"reasoning": {"reasoning_text": "I ask."}},
                        {"tool_call": {"tool_name": "weather", "arguments": {"city": "Oslo"}, "id": "c1"}},
                    ],
                },
                {
                    "role": "tool",
                    "content": [
                        {"tool_call_result": {"result": "9 C", "origin": {"tool_name": "weather", "id": "c1"}}}
                    ],
                },
                {"role": "assistant", "content": [{"reasoning": {"reasoning_text": "9 is cold."}}, {"text": "No."}]},
            ]
        },
    ],
    ids=[
        *("messages_to_dict", "dumpd", "Bedrock", "OpenTelemetry", "AI SDK", "OpenCode", "AI SDK's core"),
        *("Pydantic AI", "Haystack"),
    ],
)
def test_thoughts_calls_and_results_of_every_software_are_learned_and_read(row: Row, write_jsonl: WriteRows) -> None:
    expected = TOOL_ROW if {"toolConfig", "gen_ai.tool.definitions"} & row.keys() else TOOL_ROW | {"tools": None}
    assert text(row, write_jsonl) == text(expected, write_jsonl)
    ids = [turn.get("tool_call_id") for turn in to_conversation(row, detect_format(row)).turns]
    assert ids == [None, None, "c1", None]


def test_an_object_that_a_tool_gave_back_is_shown_as_json() -> None:
    call = {"toolUse": {"toolUseId": "c1", "name": "weather", "input": {}}}
    result = {"toolResult": {"toolUseId": "c1", "content": [{"json": {"degrees": 9}}]}}
    turns = [BEDROCK_ASKED, {"role": "assistant", "content": [call]}, {"role": "user", "content": [result]}, NO]
    assert to_conversation({"messages": turns}, "openai").turns[2]["content"] == '{"degrees": 9}'


def test_parallel_calls_of_a_client_that_writes_each_with_its_result_are_one_reply() -> None:
    calls = [
        {"type": "tool-weather", "toolCallId": name, "input": {"city": name}, "output": {"degrees": 9}}
        for name in ("Oslo", "Rome")
    ]
    row = {"messages": [ASKED, {"role": "assistant", "parts": [*calls, {"type": "text", "text": "No."}]}]}
    turns = to_conversation(row, detect_format(row)).turns
    assert [turn["role"] for turn in turns] == ["user", "assistant", "tool", "tool", "assistant"]
    assert [call["id"] for call in turns[1]["tool_calls"]] == ["Oslo", "Rome"]
    assert [turn["tool_call_id"] for turn in turns[2:4]] == ["Oslo", "Rome"]


@pytest.mark.parametrize(
    ("row", "thought"),
    [
        ({"prompt": "Is it warm?", "reasoning": "9 is cold.", "response": "No."}, True),
        ({"question": "Is it warm?", "reasoning_content": "9 is cold.", "answer": "No."}, True),
        ({"messages": [ASKED], "reasoning": "9 is cold.", "answer": "No."}, True),
        ({"input": [ASKED], "output": "No.", "reasoning": "off"}, False),
    ],
)
def test_a_thought_beside_an_answer_is_learned_and_a_setting_is_none(
    row: Row, thought: bool, write_jsonl: WriteRows
) -> None:
    assert text(row, write_jsonl) == (WHOLE.replace("No.", "<think>9 is cold.</think>No.") if thought else WHOLE)


@pytest.mark.parametrize(
    ("spans", "is_trained"), [([(0, 2, False)], False), ([(0, 0, True), (1, 2, True)], True), ([], True)]
)
def test_spans_that_agree_train_on_the_whole_turn_or_none_of_it(
    spans: list[tuple[int, int, bool]], is_trained: bool, write_jsonl: WriteRows
) -> None:
    detail = [{"begin_offset": first, "end_offset": last, "train": train} for first, last, train in spans]
    row = {"messages": [ASKED, NO | {"train_detail": detail}, ASKED, YES]}
    assert text(row, write_jsonl).startswith(WHOLE if is_trained else WHOLE.replace("«", "").replace("»", ""))


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            {"messages": [ASKED, NO | {"train_detail": [{"begin_offset": 0, "end_offset": 1, "train": True}]}]},
            "train_detail, which trains on a part of it .not on character 2",
        ),
        (
            {"messages": [ASKED, NO | {"train_detail": [{"begin_offset": 0, "train": True}]}]},
            "lacks a begin_offset, an end_offset or a train",
        ),
        ({"messages": [ASKED, NO | {"training": False}]}, "no assistant turn is to be learned from"),
        ({"messages": [ASKED, NO], "weight": 0}, "the row has weight 0"),
        ({"messages": [ASKED, NO | {"invalid_tool_calls": [{"args": "{"}]}]}, "invalid_tool_calls"),
        ({"request": {"input": "Is it warm?"}, "response": CUT}, "the reply was cut .status 'incomplete', max_out"),
        ({"request": {"input": "Is it warm?"}, "response": CUT | {"output": None}}, "the reply was cut .status 'incom"),
        ({"request": {"messages": [ASKED]}, "response": CUT}, "has no reply .status 'incomplete'."),
        ({"object": "response", **CUT}, "a response without its request"),
        (
            {"request": {"input": "Is it warm?"}, "response": {"status": "completed", "output": []}},
            "the response has no items in output",
        ),
        (
            {
                "messages": [
                    human("Is it warm?"),
                    {"type": "ai", "data": {"content": "No", "response_metadata": {"finish_reason": "length"}}},
                ]
            },
            "the reply was cut .finish_reason 'length'",
        ),
        ({"input": "Is it warm?", **CUT}, "the reply was cut .status 'incomplete', max_output_tokens"),
        (
            {
                "request": {"input": "Is it warm?"},
                "response": {"status": "failed", "error": {"message": "busy"}, "output": []},
            },
            "an error of the server: ..message': 'busy'",
        ),
        ({"request": {"messages": [ASKED]}, "response": {"message": NO, "done_reason": "length"}}, "cut .* 'length'"),
        (
            {**SPAN, "gen_ai.output.messages": [{**NO, "finish_reason": "length"}]},
            "the reply was cut .finish_reason 'length'",
        ),
        ({**SPAN, "gen_ai.output.messages": [NO, YES]}, "gen_ai.output.messages has 2 replies"),
        ({"request": {"messages": [ASKED]}, "response": {"model": "m"}}, "has no reply; its fields are ..model"),
        (
            {"winner": "tie (bothbad)", "conversation_a": [ASKED, NO], "conversation_b": [ASKED, YES]},
            "both answers are ones that people did not want",
        ),
        (
            {"parentUuid": None, "sessionId": "s", "type": "user", "message": ASKED},
            "one event of a session's log .Claude Code., by its parentUuid and sessionId; write each conversation as",
        ),
        (
            {"timestamp": "t", "type": "response_item", "payload": {"type": "message", **ASKED}},
            "one event of a session's log .Codex., by its payload and type",
        ),
        (
            {"message_id": "a", "parent_id": "t", "text": "No.", "role": "assistant"},
            "one message of a tree .OpenAssistant., by its parent_id and message_id",
        ),
        (
            {"prompt": '["Is it warm?", "Sure?"]', "response_a": '["No."]', "response_b": '["Yes."]', "winner_tie": 1},
            "a list of questions and a list of answers that do not pair",
        ),
        ({"role": "assistant", "text": "No."}, "a single turn, by its role"),
        ({"mapping": {}, "current_node": "c"}, "an export of ChatGPT., by its mapping and current_node"),
        ({"messages": [ASKED, NO | {"content": [{"searchResult": {}}]}]}, "has no type, and the fields"),
    ],
)
def test_a_row_that_cannot_be_read_names_its_field_and_what_to_do(
    row: Row, expected: str, write_jsonl: WriteRows
) -> None:
    with pytest.raises(ValueError, match=expected):
        raise ValueError(reason(row, write_jsonl))


def test_the_question_of_a_response_that_was_cut_before_its_first_word_is_a_prompt(
    tmp_path: Path, write_jsonl: WriteRows
) -> None:
    prompts(str(write_jsonl([{"request": {"input": "Is it warm?"}, "response": CUT}])), tmp_path / "out")
    [prompt] = read_prompts(tmp_path / "out")
    assert (prompt.messages[0]["content"], prompt.reference) == ("Is it warm?", ())


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"question": "Is it warm?", "answer": "No.", "solution": "9 is cold."}, "gsm8k"),
        ({"query": "a", "response": "b", "text": "doc"}, "text"),
        (
            {"instruction": "Sum up.", "input": '{"messages": [{"role": "user", "content": "x"}]}', "output": "x"},
            "alpaca",
        ),
        ({"messages": [ASKED], "answer": "9"}, "openai"),
        ({"prompt": "Is it warm?", "payload": {}, "type": "x"}, "prompt"),
        ({"text": "doc", "attributes": {"lang": "en"}}, "text"),
    ],
)
def test_a_field_that_only_has_a_name_of_other_software_changes_nothing(row: Row, expected: str) -> None:
    assert detect_format(row) == expected
    if expected == "openai":
        assert to_conversation(row, "openai").reference == ()

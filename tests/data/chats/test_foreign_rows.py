"""Rows of other people's files: each is read as it was meant or dropped with a reason; no field changes the text in silence."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from chat_rows import NO, RESULT, outcomes, reason, text
from tool_chats import ASKED, CALL, TOOL_TEMPLATE, WEATHER

from draftsmith.data.chats.token_kinds import EVERYTHING, TrainedOn
from draftsmith.data.chats.tokenized_samples import TokenizedSample
from draftsmith.data.formats import detect_format, to_conversation

WriteRows = Callable[..., Path]
BRIEF = {"role": "system", "content": "Be brief."}
ASKED_TEXT, NO_TEXT = "<|user|>Is it warm?", "<|assistant|>«No.<|end|>»"
CALLS = {"role": "assistant", "content": None, "tool_calls": [CALL]}
# What a table of turns fills in where a turn has no call and no sound.
FILLED = {"function_call": {"name": None, "arguments": None}, "audio": {"id": None}}
# As DeepSeek-R1 and Qwen3 write replies: the first removes thoughts everywhere, the second behind a later question.
CUTS_THOUGHTS = TOOL_TEMPLATE.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}").replace(
    "reasoning_content", "nothing"
)
WANTS_TEXT = TOOL_TEMPLATE.replace("call.function.arguments | tojson", "'' + call.function.arguments")
HIDES_WORDS = TOOL_TEMPLATE.replace("{{ m.content }}{% for call", "{{ '' if m.tool_calls else m.content }}{% for call")


@pytest.mark.parametrize(
    "row",
    [
        {"request": {"model": "m", "messages": [ASKED]}, "response": {"choices": [{"message": NO}]}},
        {"body": {"messages": [ASKED]}, "response": {"status_code": 200, "body": {"choices": [{"message": NO}]}}},
        {"messages": [ASKED], "choices": [{"index": 0, "message": NO, "finish_reason": "stop"}]},
        {"request": json.dumps({"messages": [ASKED]}), "response": json.dumps({"choices": [{"message": NO}]})},
        {"prompt": "Is it warm?", "chosen": "No.", "rejected": "Yes."},
        {"prompt": [ASKED], "chosen": [NO], "rejected": [NO | {"content": "Yes."}]},
        {"prompt": "Is it warm?", "chosen": [ASKED, NO], "rejected": [ASKED, NO]},
        {"chosen": [ASKED, NO], "rejected": [ASKED, NO]},
        {"prompt": "Is it warm?", "response": "No."},
        {"question": "Is it warm?", "response": "No."},
        {"instruction": "Is it warm?", "context": "", "response": "No.", "category": "closed_qa"},
        {"messages": json.dumps([ASKED, NO])},
        {"messages": json.dumps([ASKED]), "choices": [{"message": NO}]},
        {"request": {"messages": [ASKED]}, "response": "No."},
        {"request": {"messages": [ASKED]}, "response": NO | {"content": [{"type": "text", "text": "No."}]}},
        *[
            {"messages": [ASKED], "choices": [{"message": NO, "finish_reason": reason}]}
            for reason in ("eos_token", "stop_sequence", "end_turn")
        ],
        {"request": {"messages": [ASKED]}, "response": {**NO, "id": "m", "type": "message", "stop_reason": "end_turn"}},
        {"instruction": "Is it warm?", "output": "No.", "history": ""},
        {"instruction": "Is it warm?", "output": "No.", "history": "[]"},
        {"instruction": "Is it warm?", "output": "No.", "context": ["9 C"]},
        {"messages": [ASKED, NO], "system": False},
        {"messages": [ASKED, NO], "system": {}, "system_prompt": True},
        {"messages": [ASKED | {"channel": "email"}, NO | {"channel": "email", "loss": 2.31}]},
        {"prompt": "Is it warm?", "completion": "No.", "request": {"id": 7}},
        {"instruction": "Is it warm?", "output": "No.", "body": '{"a": 1}'},
        {"prompt": "Is it warm?", "response": ["No."]},
        {"conversations": [{"from": "human", "value": "Is it warm?"}, {"from": "bing", "value": "No."}]},
        {"messages": [ASKED, NO | {"channel": "final", "weight": 1.0, "loss": True, "refusal": None, "audio": None}]},
        *[{"messages": [ASKED, NO], "tools": nothing} for nothing in ("null", {})],
        {"messages": [ASKED | FILLED, NO | FILLED | {"tool_calls": "[]"}], "image": {"bytes": None, "path": None}},
        {
            "messages": [
                {"role": "user", "content": [{"type": "input_text", "text": "Is it warm?"}]},
                {"role": "assistant", "content": [{"type": "output_text", "text": "No.", "annotations": []}]},
            ]
        },
    ],
)
def test_every_spelling_of_a_question_and_its_answer_gives_the_same_sample(
    row: dict[str, Any], write_jsonl: WriteRows
) -> None:
    assert text(row, write_jsonl) == ASKED_TEXT + NO_TEXT
    assert to_conversation(row, detect_format(row)).reference == ("No.",)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [ASKED, NO], "system": "Be brief."}, "<|system|>Be brief." + ASKED_TEXT),
        (
            {"system_prompt": "Be brief.", "question": "Is it warm?", "response": "No."},
            "<|system|>Be brief." + ASKED_TEXT,
        ),
        ({"messages": [{**BRIEF, "role": "developer"}, ASKED, NO]}, "<|system|>Be brief." + ASKED_TEXT),
        ({"messages": [{**BRIEF, "content": ""}, ASKED, NO]}, "<|system|>" + ASKED_TEXT),
        (
            {"messages": [ASKED, NO], "system": [{"type": "text", "text": "Be brief."}]},
            "<|system|>Be brief." + ASKED_TEXT,
        ),
        ({"messages": [BRIEF, ASKED, NO], "system": "Be brief."}, "<|system|>Be brief." + ASKED_TEXT),
        ({"instruction": "Is it warm?", "context": "9 C", "response": "No."}, ASKED_TEXT + "\n\n9 C"),
        ({"instruction": "Is it warm?", "input": " ", "context": "9 C", "output": "No."}, ASKED_TEXT + "\n\n9 C"),
        (
            {"prompt": [ASKED, NO | {"content": "Yes."}, ASKED], "response": "No."},
            ASKED_TEXT + "<|assistant|>«Yes.<|end|>»" + ASKED_TEXT,
        ),
        (
            {"messages": [ASKED, NO], "system": "Be brief.", "system_prompt": "Be brief. "},
            "<|system|>Be brief." + ASKED_TEXT,
        ),
        (
            {"instruction": "Is it warm?", "output": "No.", "history": [["Oslo?", "Yes."]]},
            "<|user|>Oslo?<|assistant|>«Yes.<|end|>»" + ASKED_TEXT,
        ),
    ],
)
def test_what_lies_beside_a_question_is_asked_with_it(
    row: dict[str, Any], expected: str, write_jsonl: WriteRows
) -> None:
    assert text(row, write_jsonl) == expected + NO_TEXT


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"custom_id": "a", "response": {"body": {"choices": [{"message": NO}]}}}, "a response without its request"),
        ({"messages": [ASKED], "choices": [{"message": NO}, {"message": NO}]}, "the response has 2 choices"),
        ({"messages": [ASKED], "choices": [{"message": NO, "finish_reason": "length"}]}, "cut .finish_reason 'length'"),
        ({"chosen": "Human: Is it warm?", "rejected": ""}, "chosen is a text without a prompt"),
        ({"messages": [BRIEF, ASKED, NO], "system": "Be long."}, "system and another system turn"),
        ({"messages": [ASKED, {"role": "assistant", "content": None, "refusal": "I may not."}]}, "turn 1 is a refusal"),
        ({"messages": [ASKED, NO | {"content": [{"type": "refusal", "refusal": "No"}]}]}, "turn 1 is a refusal"),
        ({"messages": [ASKED, NO | {"channel": "analysis"}]}, "turn 1 is in the channel 'analysis'"),
        ({"messages": [ASKED, NO | {"channel": "commentary"}]}, "turn 1 is in the channel 'commentary'"),
        (
            {"messages": [ASKED, NO], "system": "Be brief.", "system_prompt": "Be long."},
            "two different texts in system and system_prompt",
        ),
        (
            {"messages": [ASKED, NO], "system": [{"type": "image", "image": "a.png"}]},
            "system has a part of the type 'image'",
        ),
        ({"request": {"messages": [ASKED]}, "response": 7}, "the response is int, neither an object nor text"),
        (
            {"request": {"messages": [ASKED]}, "response": NO | {"stop_reason": "max_tokens"}},
            "cut .finish_reason 'max_tokens'",
        ),
        ({"prompt": "Is it warm?", "response": ["No.", "Yes."]}, "'response' has 2 answers to 1 user turns"),
        ({"messages": [ASKED, NO | {"loss": False}]}, "no assistant turn is to be learned from"),
        ({"messages": [ASKED, NO | {"loss": 1}]}, "turn 1 has loss 1; it is true or false"),
        ({"messages": '[{"role": "user"'}, "the list of turns is no JSON"),
        ({"instruction": "Is it warm?", "output": "No.", "history": ["Oslo?"]}, "history is no list of pairs"),
    ],
)
def test_rows_that_say_too_little_or_too_much_are_dropped_with_their_reason(
    row: dict[str, Any], expected: str, write_jsonl: WriteRows
) -> None:
    with pytest.raises(ValueError, match=expected):
        raise ValueError(reason(row, write_jsonl))


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"question": "Is it warm?", "choices": ["No.", "Yes."], "answer": "No."}, "gsm8k"),
        ({"prompt": "Make a quiz", "completion": '{"question":"?","choices":["A","B"]}'}, "prompt"),
        ({"prompt": "Make a reply", "completion": '{"choices":[{"message":{"role":"assistant"}}]}'}, "prompt"),
        ({"prompt": "Is it warm?", "completion": "No.", "request": {"id": 7}}, "prompt"),
        ({"text": "doc", "request": {"url": "x"}}, "text"),
        ({"instruction": "Is it warm?", "output": "No.", "body": '{"a": 1}'}, "alpaca"),
    ],
)
def test_a_row_with_a_field_of_a_logs_name_is_no_log_of_a_server(row: dict[str, Any], expected: str) -> None:
    assert detect_format(row) == expected
    assert to_conversation(row, detect_format(row)).flaw is None


def test_of_a_prompt_with_two_answers_the_question_is_kept() -> None:
    for name in ("response", "chosen"):
        row = {"prompt": "Is it warm?", name: ["No.", "Yes."]}
        conversation = to_conversation(row, detect_format(row))
        assert [turn["content"] for turn in conversation.messages] == ["Is it warm?"]
        assert conversation.reference == ()


@pytest.mark.parametrize("field", [None, "", " ", "T"])
def test_a_thought_in_a_block_is_learned_whatever_an_empty_field_says(
    field: str | None, write_jsonl: WriteRows
) -> None:
    blocks = [{"type": "thinking", "thinking": "T"}, {"type": "text", "text": "No."}]
    row = {"messages": [ASKED, {"role": "assistant", "reasoning_content": field, "content": blocks}]}
    assert text(row, write_jsonl) == ASKED_TEXT + "<|assistant|>«<think>T</think>No.<|end|>»"
    row["messages"][1]["reasoning_content"] = "other"  # type: ignore[index]
    assert "turn 1 has two different thoughts, reasoning_content and a part" in reason(row, write_jsonl)


def test_words_beside_a_result_of_a_tool_are_dropped_with_the_reason(write_jsonl: WriteRows) -> None:
    result = {"type": "tool_result", "tool_use_id": "c1", "content": "9 C"}
    row = {"messages": [ASKED, CALLS, {"role": "user", "content": [result, {"type": "text", "text": "And?"}]}, NO]}
    assert "turn 2 has words beside results of a tool, and the assistant speaks next" in reason(row, write_jsonl)
    row["messages"][2] = {"role": "user", "content": [result, {"type": "text", "text": " "}]}
    assert text(row, write_jsonl).endswith("<|tool|>9 C" + NO_TEXT)


def test_blocks_of_thoughts_calls_and_results_are_turns_with_fields(write_jsonl: WriteRows) -> None:
    row = {
        "tools": [{"name": "weather", "input_schema": {"type": "object"}}],
        "messages": [
            {
                "role": "user",
                "content": [{"type": "text", "text": "Is it warm?", "cache_control": {"type": "ephemeral"}}],
            },
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "I ask.", "signature": "x"},
                    {"type": "text", "text": "Wait."},
                    {"type": "tool_use", "id": "c1", "name": "weather", "input": {"city": "Oslo"}},
                ],
            },
            {
                "role": "user",
                "content": [{"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "9 C"}]}],
            },
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": [{"type": "text", "text": "9 is cold."}]},
                    {"type": "text", "text": "No."},
                ],
            },
        ],
    }
    assert text(row, write_jsonl) == (
        '<tools>{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}</tools>'
        + ASKED_TEXT
        + '<|assistant|>«<think>I ask.</think>Wait.<call>weather {"city": "Oslo"}</call><|end|>»'
        "<|tool|>9 C<|assistant|>«<think>9 is cold.</think>No.<|end|>»"
    )


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [
        (
            [{"type": "text", "text": "No."}, {"type": "thinking", "thinking": "9"}],
            "another order than a thought, words, calls",
        ),
        ([{"type": "tool_use", "name": "w", "input": {}}, {"type": "text", "text": "No."}], "another order than"),
        ([{"type": "thinking"}, {"type": "text", "text": "No."}], "'thinking' has no text"),
        (
            [{"type": "redacted_thinking", "data": "x"}, {"type": "text", "text": "No."}],
            "of the type 'redacted_thinking'",
        ),
        (
            [{"type": "tool_result", "content": "9"}, {"type": "thinking", "thinking": "9"}],
            "beside a thought or a call",
        ),
    ],
)
def test_blocks_that_no_template_shows_are_dropped_with_their_reason(
    blocks: list[dict[str, Any]], expected: str, write_jsonl: WriteRows
) -> None:
    assert expected in reason({"messages": [ASKED, {"role": "assistant", "content": blocks}]}, write_jsonl)


def test_a_thought_or_a_call_inside_the_words_is_of_its_own_kind(write_jsonl: WriteRows) -> None:
    thinks = {"messages": [ASKED, NO | {"content": "<think>9 is cold.</think>No."}]}
    assert text(thinks, write_jsonl) == ASKED_TEXT + "<|assistant|>«<think>9 is cold.</think>No.<|end|>»"
    quiet = text(thinks, write_jsonl, TrainedOn(train_thoughts=False))
    assert quiet == ASKED_TEXT + "<|assistant|><think>9 is cold.</think>«No.<|end|>»"
    calls = {"tools": [WEATHER], "messages": [ASKED, NO | {"content": 'Wait.<call>weather {"city": "Oslo"}</call>'}]}
    words = text(calls, write_jsonl, TrainedOn(train_tool_calls=False))
    assert words.endswith(ASKED_TEXT + '<|assistant|>«Wait.»<call>weather {"city": "Oslo"}</call><|end|>')


@pytest.mark.parametrize(
    ("turns", "template", "expected"),
    [
        (
            [NO | {"content": "<think>9.</think>No."}],
            CUTS_THOUGHTS,
            "turn 1 has a thought in its words, which the chat template removes",
        ),
        (
            [NO | {"reasoning_content": "9 is cold."}],
            TOOL_TEMPLATE.replace("{% if m.reasoning_content and", "{% if m.reasoning_content == 1 and"),
            "turn 1 has a thought, which the chat template does not show",
        ),
        (
            [CALLS | {"content": "Wait."}, RESULT, NO],
            HIDES_WORDS,
            "turn 1 has words beside its tool calls, which the chat template does",
        ),
        (
            [CALLS, RESULT, NO],
            TOOL_TEMPLATE.replace("call.function.name", "''"),
            "turn 1 calls 'weather', which the chat template does not",
        ),
    ],
)
def test_a_reply_of_which_the_template_leaves_a_part_out_is_dropped(
    turns: list[dict[str, Any]], template: str, expected: str, write_jsonl: WriteRows
) -> None:
    assert expected in reason({"messages": [ASKED, *turns]}, write_jsonl, EVERYTHING, template)


def test_calls_that_are_turns_of_their_own_belong_to_the_reply_before_them(write_jsonl: WriteRows) -> None:
    call = {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Oslo"}}'}
    results = [{"from": "observation", "value": value} for value in ("9 C", "8 C")]
    words, last = {"from": "gpt", "value": "Wait."}, {"from": "gpt", "value": "No."}
    asked, shown = {"from": "human", "value": "Is it warm?"}, '<call>weather {"city": "Oslo"}</call>'
    behind = "<|end|>»<|tool|>9 C<|tool|>8 C" + NO_TEXT
    rows = {
        f"{shown}{shown}": [call, call],
        f"Wait.{shown}{shown}": [words, call, call],
        f"Wait.{shown}": [words, call],
    }
    for reply, turns in rows.items():
        row = {"conversations": [asked, *turns, *results, last]}
        assert text(row, write_jsonl) == ASKED_TEXT + "<|assistant|>«" + reply + behind
    row = {"conversations": [asked, words | {"loss": False}, call, *results, last]}
    assert "turn 2 is the assistant's where the user's belongs" in reason(row, write_jsonl)


@pytest.mark.parametrize(("only", "hidden"), [("[:1]", 1), ("[-1:]", 0)])
@pytest.mark.parametrize("cities", [("Oslo", "Rome"), ("Oslo", "Oslo")])
@pytest.mark.parametrize("words", ["", "I ask weather."])
def test_a_template_that_shows_a_single_call_of_several_with_the_same_name_is_named(
    only: str, hidden: int, cities: tuple[str, str], words: str, write_jsonl: WriteRows
) -> None:
    calls = [
        {"from": "function_call", "value": json.dumps({"name": "weather", "arguments": {"city": city}})}
        for city in cities
    ]
    results = [{"from": "observation", "value": value} for value in ("9 C", "15 C")]
    said = [{"from": "gpt", "value": words}] if words else []
    turns = [{"from": "human", "value": "Is it warm?"}, *said, *calls, *results, {"from": "gpt", "value": "No."}]
    template = TOOL_TEMPLATE.replace("m.tool_calls or []", f"(m.tool_calls or []){only}")
    block = template.replace("'assistant' %}<|assistant|>", "'assistant' %}<|assistant|>{% generation %}").replace(
        "<|end|>{% else", "<|end|>{% endgeneration %}{% else"
    )
    number = 0 if len(set(cities)) == 1 else hidden  # of two that are the same, nobody can tell which is left out
    expected = f"turn 1 has 2 calls, and the chat template does not show call {number}, of 'weather'"
    for given in (template, block):
        assert expected in reason({"conversations": turns}, write_jsonl, EVERYTHING, given)
    shown = text({"conversations": turns}, write_jsonl)
    assert all(shown.count(json.dumps({"city": city})) == cities.count(city) for city in cities)


def test_a_template_that_adds_arguments_to_a_text_gets_them_as_text(write_jsonl: WriteRows) -> None:
    row = {"messages": [ASKED, CALLS, RESULT, NO]}
    assert text(row, write_jsonl, EVERYTHING, WANTS_TEXT) == text(row, write_jsonl)


def test_of_a_last_turn_with_weight_0_nothing_is_learned_where_only_the_last_counts(write_jsonl: WriteRows) -> None:
    row = {"messages": [ASKED, NO, ASKED, NO | {"weight": 0}]}
    [sample] = outcomes(row, write_jsonl, TrainedOn(last_turn_only=True))
    assert isinstance(sample, TokenizedSample)
    assert not sample.num_labelled


def test_what_a_table_fills_in_for_other_tools_is_no_part_of_a_call_or_a_definition(write_jsonl: WriteRows) -> None:
    own = {"city": {"type": "string", "enum": None, "default": None}, "symbol": None}
    filled = {"name": "weather", "description": None, "parameters": {"type": "object", "properties": own}}
    call = {"id": None, "function": {"name": "weather", "arguments": {"city": None, "symbol": None}}}
    row = {
        "tools": [{"type": "function", "function": filled}],
        "messages": [
            ASKED | {"tool_calls": None, "name": None},
            {"role": "assistant", "content": None, "tool_calls": [call]},
        ],
    }
    shown = text(row, write_jsonl)
    assert '"properties": {"city": {"type": "string", "default": null}}' in shown
    assert shown.endswith('«<call>weather {"city": null}</call><|end|>»')  # it has no city, but it could have one
    row["tools"] = [WEATHER]  # says nothing of its arguments, so every one may be its own
    assert '{"city": null, "symbol": null}' in text(row, write_jsonl)

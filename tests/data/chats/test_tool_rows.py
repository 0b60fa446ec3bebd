"""Rows with tools, calls and thoughts, as data sets spell them, are rendered by the target's own template."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tool_chats import ASKED, CALL, TOOL_ROW, TOOL_TEMPLATE, WEATHER, tool_tokenizer

from draftsmith.data.cache.show import render
from draftsmith.data.chat_template import ChatTemplate
from draftsmith.data.chats.token_kinds import EVERYTHING, TrainedOn
from draftsmith.data.chats.tokenized_samples import TokenizedSample
from draftsmith.data.chats.tool_calls import read_calls, read_tools
from draftsmith.data.corpus import Corpus
from draftsmith.json_rows import Dropped

WriteRows = Callable[..., Path]
TOOLS = '<tools>{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}</tools>'
RENDERED = (
    TOOLS + "<|user|>Is it warm?"
    '<|assistant|>«<think>I ask.</think><call>weather {"city": "Oslo"}</call><|end|>»'
    "<|tool|>9 C<|assistant|>«<think>9 is cold.</think>No.<|end|>»"
)
RESULT = {"role": "tool", "content": "9 C", "tool_call_id": "c1"}


def outcomes(
    row: dict[str, Any], write_jsonl: WriteRows, trained_on: TrainedOn = EVERYTHING
) -> list[TokenizedSample | Dropped]:
    tokenizer = tool_tokenizer()
    corpus = Corpus(write_jsonl([row]), lambda: ChatTemplate(tokenizer), None, 1000, trained_on=trained_on)
    return list(corpus.read())


def view(sample: TokenizedSample | Dropped) -> tuple[str, str]:
    assert isinstance(sample, TokenizedSample), sample
    title, text = render(sample, tool_tokenizer(), marks=True).plain.split("\n", 1)
    return title, text.rstrip("\n")


def reason(row: dict[str, Any], write_jsonl: WriteRows) -> str:
    [dropped] = outcomes(row, write_jsonl)
    assert isinstance(dropped, Dropped)
    assert dropped.place.endswith("rows.jsonl:1")
    return dropped.reason


def test_tools_calls_their_results_and_thoughts_are_rendered_and_learned(write_jsonl: WriteRows) -> None:
    title, text = view(*outcomes(TOOL_ROW, write_jsonl))
    assert text == RENDERED
    assert "replies 4, tool calls 27, thoughts 19" in title


BARE = {"name": "weather", "parameters": {"type": "object"}}
CALL_TEXT = '{"name": "weather", "arguments": {"city": "Oslo"}}'
IPYTHON = {"role": "ipython", "content": "9 C"}
LAST = TOOL_ROW["messages"][-1]


def calling(call: dict[str, Any]) -> dict[str, Any]:
    return {"role": "assistant", "reasoning_content": "I ask.", "tool_calls": [call]}


@pytest.mark.parametrize(
    "row",
    [
        TOOL_ROW | {"tools": json.dumps([BARE])},
        {"functions": [BARE], "messages": TOOL_ROW["messages"]},
        {
            "tools": [json.dumps(WEATHER)],
            "messages": [
                ASKED,
                {"role": "assistant", "thinking": "I ask.", "function_call": json.loads(CALL_TEXT)},
                {"role": "function", "name": "weather", "content": "9 C"},
                {"role": "assistant", "content": [{"type": "text", "text": "No."}], "reasoning": "9 is cold."},
            ],
        },
        {
            "tools": json.dumps([WEATHER]),
            "conversations": [
                {"from": "human", "value": "Is it warm?"},
                {"from": "function_call", "value": CALL_TEXT, "reasoning_content": "I ask."},
                {"from": "observation", "value": "9 C"},
                {"from": "gpt", "value": "No.", "reasoning_content": "9 is cold."},
            ],
        },
        {
            "tools": [WEATHER],
            "prompt": [ASKED],
            "completion": [{**turn} for turn in TOOL_ROW["messages"][1:]],
        },
        {
            "tools": [{"name": "weather", "parameters": '{"type": "object"}'}],
            "messages": [ASKED, calling({"name": "weather", "parameters": {"city": "Oslo"}}), IPYTHON, LAST],
        },
        {
            "tools": [WEATHER],
            "messages": [
                ASKED,
                calling({"name": "weather", "args": {"city": "Oslo"}, "type": "tool_call"}),
                RESULT,
                LAST,
            ],
        },
        {"chat_template_kwargs": {"tools": json.dumps([BARE])}, "messages": TOOL_ROW["messages"]},
    ],
    ids=[
        "tools as text",
        "bare functions",
        "earlier OpenAI",
        "ShareGPT",
        "prompt and completion",
        "Llama",
        "LangChain",
        "tools among the variables",
    ],
)
def test_every_spelling_of_a_tool_conversation_gives_the_same_sample(
    row: dict[str, Any], write_jsonl: WriteRows
) -> None:
    assert view(*outcomes(row, write_jsonl))[1] == RENDERED


@pytest.mark.parametrize("arguments", [None, "", " null ", "{}", {}])
def test_a_call_without_arguments_has_none(arguments: object) -> None:
    [call] = read_calls({"tool_calls": [{"name": "now", "arguments": arguments}]}, "turn 1")
    assert call["function"] == {"name": "now", "arguments": {}}


OSLO = {"city": "Oslo"}


@pytest.mark.parametrize(
    "fields",
    [
        {"arguments": "", "parameters": OSLO},
        {"arguments": "{}", "input": OSLO},
        {"arguments": {"city": None}, "args": OSLO},
        {"arguments": OSLO, "input": json.dumps(OSLO)},
        {"arguments": OSLO, "args": [], "parameters": " "},
    ],
)
def test_the_arguments_of_a_call_are_those_of_the_field_that_says_something(fields: dict[str, object]) -> None:
    [call] = read_calls({"tool_calls": [{"name": "weather", **fields}]}, "turn 1")
    assert call["function"] == {"name": "weather", "arguments": OSLO}


def test_an_argument_that_is_null_is_kept_where_no_other_field_says_something() -> None:
    [call] = read_calls({"tool_calls": [{"name": "weather", "arguments": '{"city": null}', "args": {}}]}, "turn 1")
    assert call["function"]["arguments"] == {"city": None}


@pytest.mark.parametrize("parameters", ["none", '[{"type": "object"}]', '{"type": "object"', "{'type': 'object'}", "7"])
def test_parameters_that_are_text_and_no_object_stay_as_they_are(parameters: str, write_jsonl: WriteRows) -> None:
    [tool] = read_tools({"tools": [{"name": "weather", "parameters": parameters}]})
    assert tool == {"type": "function", "function": {"name": "weather", "parameters": parameters}}
    row = TOOL_ROW | {"tools": [{"name": "weather", "parameters": parameters}]}
    title, shown = view(*outcomes(row, write_jsonl))
    assert "tool calls 27" in title
    assert shown.startswith('<tools>{"type": "function", "function": {"name": "weather", "parameters": "')


@pytest.mark.parametrize("parameters", ["", "null", "None"])
def test_parameters_that_are_text_and_say_nothing_are_an_empty_object(parameters: str) -> None:
    [tool] = read_tools({"tools": [{"name": "weather", "parameters": parameters}]})
    assert tool["function"]["parameters"] == {}


def test_a_rows_own_variables_reach_its_template_alone(write_jsonl: WriteRows) -> None:
    row = {"messages": [ASKED, {"role": "assistant", "content": "<think></think>No."}]}
    assert view(*outcomes(row, write_jsonl))[1].endswith("<|assistant|>«<think></think>No.<|end|>»")
    row["chat_template_kwargs"] = {"enable_thinking": False}  # type: ignore[assignment]
    assert view(*outcomes(row, write_jsonl))[1].endswith("<|assistant|><think></think>«No.<|end|>»")


def test_pictures_reach_a_template_that_shows_them_and_are_refused_by_one_that_does_not(write_jsonl: WriteRows) -> None:
    def row(kind: str) -> dict[str, Any]:
        parts = [{"type": "text", "text": "Is it warm?"}, {"type": kind, kind: "a.png"}]
        return {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "No."}]}

    assert view(*outcomes(row("image"), write_jsonl))[1].startswith("<|user|>Is it warm?<|image|><|assistant|>")
    assert "turn 0 has a part of the type 'video', and the chat template does not show it: this target reads text" in (
        reason(row("video"), write_jsonl)
    )


@pytest.mark.parametrize(("given", "read"), [("image_url", "image"), ("image", "image_url")])
def test_a_picture_is_given_to_a_template_by_the_name_that_it_reads(
    given: str, read: str, write_jsonl: WriteRows
) -> None:
    parts = [{"type": "text", "text": "Is it warm?"}, {"type": given, given: {"url": "a.png"}}]
    row = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "No."}]}
    tokenizer = tool_tokenizer(TOOL_TEMPLATE.replace("part.type == 'image'", f"part.type == '{read}' and part.{read}"))
    [sample] = Corpus(write_jsonl([row]), lambda: ChatTemplate(tokenizer), None, 1000).read()
    assert view(sample)[1] == "<|user|>Is it warm?<|image|><|assistant|>«No.<|end|>»"


def test_a_picture_beside_the_words_of_a_tool_is_shown(write_jsonl: WriteRows) -> None:
    parts = [{"type": "text", "text": "9 C"}, {"type": "image", "image": "a.png"}]
    turns = [ASKED, {"role": "assistant", "tool_calls": [CALL]}, RESULT | {"content": parts}]
    row = {"messages": [*turns, {"role": "assistant", "content": "No."}]}
    assert view(*outcomes(row, write_jsonl))[1].endswith("<|tool|>9 C<|image|><|assistant|>«No.<|end|>»")


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        ([ASKED, {"role": "assistant", "tool_calls": [CALL]}, ASKED], "turn 2 is the user's where the tool's belongs"),
        ([ASKED, RESULT], "turn 1 is the tool's where the assistant's belongs"),
        ([ASKED | {"tool_calls": [CALL]}], "turn 0 is the user's and has tool_calls"),
        ([ASKED, {"role": "assistant", "tool_calls": [{"function": {"arguments": "{}"}}]}], "names no function"),
        (
            [ASKED, {"role": "assistant", "tool_calls": [{"name": "w", "arguments": "Oslo"}]}],
            r"turn 1: tool_calls\[0\]: the arguments is no JSON",
        ),
        ([ASKED, {"role": "assistant", "tool_calls": [{"name": "w", "arguments": "[1], 2"}]}], "is no JSON"),
        (
            [ASKED, {"role": "assistant", "tool_calls": [CALL], "function_call": {"name": "w"}}],
            "tool_calls and other function_call",
        ),
        ([ASKED, {"role": "assistant", "tool_calls": [CALL | {"type": "custom"}]}], "of the type 'custom'"),
        ([ASKED, {"from": "function_call", "value": "[]"}], "a list without a call"),
        (
            [
                ASKED,
                {
                    "role": "assistant",
                    "tool_calls": [CALL | {"name": "w", "arguments": {"a": 1}, "function": None, "input": {"a": 2}}],
                },
            ],
            r"tool_calls\[0\] has two different objects in arguments and input; one of them is enough",
        ),
    ],
)
def test_a_broken_tool_conversation_is_dropped_with_its_reason(
    turns: list[dict[str, Any]], expected: str, write_jsonl: WriteRows
) -> None:
    with pytest.raises(ValueError, match=expected):
        raise ValueError(reason({"messages": turns}, write_jsonl))


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ({"tools": 7}, "tools is int, not a list"),
        ({"tools": [{"type": "function", "function": {}}]}, r"tools\[0\] names no function"),
        ({"tools": [WEATHER], "functions": [{"name": "stock"}]}, "tools and other functions"),
        ({"images": ["a.png"]}, "the row has images, and no turn has a part for them"),
        ({"chat_template_kwargs": {"colour": 1}}, "'colour' in chat_template_kwargs, and the chat template"),
        ({"chat_template_kwargs": 7}, "chat_template_kwargs is int"),
        ({"chat_template_kwargs": {"tools": "weather"}}, "tools is no JSON"),
        (
            {"tools": [WEATHER], "chat_template_kwargs": {"tools": [{"name": "stock"}]}},
            "the row has tools, and others in chat_template_kwargs",
        ),
    ],
)
def test_what_a_row_says_beside_its_turns_is_read_or_the_row_is_dropped(
    extra: dict[str, Any], expected: str, write_jsonl: WriteRows
) -> None:
    row = {"messages": [ASKED, {"role": "assistant", "content": "No."}]} | extra
    with pytest.raises(ValueError, match=expected):
        raise ValueError(reason(row, write_jsonl))


HIDES_TURNS = TOOL_TEMPLATE.replace("{% else %}<|{{ m.role }}|>", "{% elif m.role != 'tool' %}<|{{ m.role }}|>")


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (HIDES_TURNS, "does not show the turns of a tool"),
        (TOOL_TEMPLATE.replace("tools", "x"), "the row has tools, and the chat template does not read tools"),
    ],
)
def test_a_template_that_hides_tools_or_their_turns_is_named(
    template: str, expected: str, write_jsonl: WriteRows
) -> None:
    tokenizer = tool_tokenizer(template)
    [dropped] = Corpus(write_jsonl([TOOL_ROW]), lambda: ChatTemplate(tokenizer), None, 1000).read()
    assert isinstance(dropped, Dropped)
    assert expected in dropped.reason

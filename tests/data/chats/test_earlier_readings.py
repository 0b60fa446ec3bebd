"""Rows of the usual formats whose further fields only look like those of other software: each keeps its reading, and loses nothing."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from chat_rows import NO, reason, text
from tool_chats import ASKED, TOOL_ROW

from draftsmith.data.formats import detect_format, to_conversation
from draftsmith.data.prompts import read_prompts
from draftsmith.json_rows import UnusableRow

WriteRows = Callable[..., Path]
Row = dict[str, Any]
YES = NO | {"content": "Yes."}
WHOLE = "<|user|>Is it warm?<|assistant|>«No.<|end|>»"
EARLIER = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]
AFTER_EARLIER = "<|user|>Hi.<|assistant|>«Hello.<|end|>»" + WHOLE
OPEN = "\n\nHuman: Is it warm?\n\nAssistant:"
TWO = {"response_1": "A.", "response_2": "B."}
CHOICES = {"choices": [{"message": NO, "finish_reason": "stop"}]}


def words(row: Row) -> list[str]:
    """The words of the turns of a row, or its text."""
    chat = to_conversation(row, detect_format(row))
    return [turn["content"] for turn in chat.turns] if chat.text is None else [chat.text]


@pytest.mark.parametrize(
    "extra",
    [
        {"data": ["a.csv", "b.csv"]},
        {"data": EARLIER},
        {"history": EARLIER},
        {"thread": ["x", "y"]},
        {"segments": [{"start": 0, "end": 1, "text": "doc"}], "language": "en"},
        {"message_id": "<1@x>", "parent_id": None},
        {"payload": {"a": 1}, "type": "article"},
        {"role": "Developer"},
        {"role": "tool"},
        {"inputs": {"text": "i"}, "outputs": {"text": "o"}},
        {"attributes": {"gen_ai.prompt.0.role": "user", "gen_ai.prompt.0.content": "q"}},
        {"attributes": [{"key": ["x"], "value": 1}]},
        {"chosen": OPEN + " No."},
        {"author": "human", "source": "model", "kind": "user", "weight": 0, "score": 0.5},
    ],
)
def test_a_document_stays_one_whatever_lies_beside_it(extra: Row) -> None:
    assert words({"text": "doc"} | extra) == ["doc"]


@pytest.mark.parametrize("row", [{"question": "a", "answer": "b"}, {"input": "a", "output": "b"}])
@pytest.mark.parametrize(
    "extra",
    [
        {"data": ["x", "y"]},
        {"data": EARLIER},
        {"dialogue": EARLIER},
        {"response": "c"},
        {"target": "c"},
        {"query": "c"},
    ],
)
def test_a_question_with_its_answer_stays_one_whatever_lies_beside_it(row: Row, extra: Row) -> None:
    assert words(row | extra) == ["a", "b"]


@pytest.mark.parametrize(
    "row", [{"question": "Is it warm?", "response": "No."}, {"query": "Is it warm?", "output": "No."}]
)
@pytest.mark.parametrize("history", [EARLIER, [["Hi.", "Hello."]], '[["Hi.", "Hello."]]'])
def test_a_question_behind_a_history_keeps_both(row: Row, history: Any, write_jsonl: WriteRows) -> None:
    assert text(row | {"history": history}, write_jsonl) == AFTER_EARLIER


@pytest.mark.parametrize("name", ["context", "passage", "definition", "history"])
def test_a_question_that_may_need_a_further_text_is_dropped_rather_than_asked_without_it(
    name: str, write_jsonl: WriteRows
) -> None:
    row = {"query": "Is it warm?", "response": "No.", name: "It is 9 C."}
    assert f"the row has {name} beside query" in reason(row, write_jsonl)
    assert words({"question": "a", "response": "b", "context": "c"}) == ["a", "b"]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [ASKED], "completion": "No.", "label": False},
        {"prompt": OPEN, "completion": " No.", "label": False},
    ],
)
def test_an_answer_that_people_did_not_want_stays_unwanted_under_another_name(row: Row, write_jsonl: WriteRows) -> None:
    assert "people did not want" in reason(row, write_jsonl)


@pytest.mark.parametrize(
    "answer",
    [
        {"chosen": " No.", "rejected": " Yes."},
        {"chosen": [NO], "rejected": [YES]},
        {"chosen": OPEN + " No.", "rejected": OPEN + " Yes."},
        {"response": "No."},
        {"completion": " No.", "label": True},
    ],
)
def test_a_transcript_is_answered_by_every_kind_of_answer(answer: Row, write_jsonl: WriteRows) -> None:
    assert text({"prompt": OPEN} | answer, write_jsonl) == WHOLE
    earlier = "\n\nHuman: Hi.\n\nAssistant: Hello." + OPEN
    if not str(answer.get("chosen")).startswith("\n\nHuman"):
        assert text({"prompt": earlier} | answer, write_jsonl) == AFTER_EARLIER


@pytest.mark.parametrize(
    "prompt",
    [
        "Human: Hi.\n\nAssistant: Hello.\n\nSum this up.",
        "Human: Hi.\n\nAssistant: Hello.\n\nHuman: Bye.",
        "Human: Hi.\n\nHuman: Bye.\n\nAssistant:",
        "Continue:\n\nHuman: Hi.\n\nAssistant:",
        "Human: Hi.",
    ],
)
def test_a_text_that_only_shows_turns_is_asked_as_it_is(prompt: str) -> None:
    assert words({"prompt": prompt}) == [prompt]
    assert words({"prompt": prompt, "completion": "No."}) == [prompt, "No."]
    assert words({"instruction": "Rate it.", "chosen": prompt}) == ["Rate it.", prompt]


@pytest.mark.parametrize("benchmark", [{"question_id": 1}, {"id": "a", "split": "test", "source": "s"}])
def test_prompts_with_a_response_of_some_model_stay_prompts(benchmark: Row) -> None:
    row = {"messages": [ASKED, ASKED], "response": "No."} | benchmark
    assert words(row) == ["Is it warm?", "Is it warm?"]


def test_a_prompt_file_may_hold_a_response_of_some_model(write_jsonl: WriteRows) -> None:
    path = write_jsonl([{"id": "a", "messages": [ASKED], "split": "test", "source": "s", "response": "No."}])
    assert [len(prompt.messages) for prompt in read_prompts(path)] == [1]


def test_a_response_comes_before_a_gold_answer_and_loses_no_thought(write_jsonl: WriteRows) -> None:
    row = {"messages": [ASKED], "answer": "B", "response": "No."}
    assert text(row, write_jsonl) == WHOLE
    assert "two different thoughts" in reason(row | {"thinking": "It is 9.", "reasoning": "It is 8."}, write_jsonl)
    apart = {"prompt": "Is it warm?", "response": "No.", "thinking": "It is 9.", "reasoning": "It is 8."}
    assert "two different thoughts, thinking and reasoning" in reason(apart, write_jsonl)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Is it warm?", "response": "No.", "reasoning": "math"},
        {"prompt": "Is it warm?", "response": "No.", "reasoning": "enabled"},
        {"prompt": "Is it warm?", "response": "No.", "reasoning": '{"effort": "high"}'},
        {"prompt": "Is it warm?", "chosen": "No.", "rejected": "Yes.", "reasoning": "The first is better."},
        {"prompt": "Is it warm?", "response_a": "No.", "response_b": "Yes.", "winner": "a", "reasoning": "a is better"},
    ],
)
def test_a_label_and_the_judges_words_are_no_thought(row: Row, write_jsonl: WriteRows) -> None:
    assert text(row, write_jsonl) == WHOLE


@pytest.mark.parametrize("answer", [{"chosen": "C."}, {"response": "C."}, {"completion": "C."}])
def test_a_verdict_on_two_answers_leaves_an_answer_of_its_own(answer: Row) -> None:
    assert words({"prompt": "a", **TWO, "preference_strength": 2} | answer) == ["a", "C."]


def test_two_answers_are_told_apart_as_turns_and_as_words_that_begin_a_list(write_jsonl: WriteRows) -> None:
    turns = {"prompt": [ASKED], "response_a": [NO], "response_b": [YES], "winner": "a"}
    assert text(turns, write_jsonl) == WHOLE
    assert words({"prompt": "[INST] a", "response_a": "[x] b", "response_b": "c", "winner": "a"}) == [
        "[INST] a",
        "[x] b",
    ]
    assert words({"messages": [ASKED], "response_a": "b", "response_b": "No.", "winner": "b"}) == ["Is it warm?", "No."]
    assert words({"prompt": "a", **TWO, "preference_strength": float("nan")}) == ["a"]
    assert words({"instruction": "a", "context": "b", "response1": "c", "response2": "d", "winner": "a"}) == [
        "a\n\nb",
        "c",
    ]
    with pytest.raises(UnusableRow, match="the row has context beside question"):
        words({"context": "c", "question": "a", **TWO, "preference_strength": 1})


@pytest.mark.parametrize(
    "extra",
    [
        {"input": {"messages": [ASKED]}},
        {"params": {"messages": [ASKED]}},
        {"inputs": {"query": "a", "response": "b", "context": "c"}},
        {"response": NO},
        {"output": CHOICES},
        {"result": {"error": "none of the tests ran"}},
        {"data": ["x", "y"], "thinking": "It is 9.", "reasoning": "It is 8."},
        {"message": "a", "chat_history": []},
    ],
)
def test_fields_beside_whole_turns_change_nothing(extra: Row) -> None:
    assert words({"messages": [ASKED, NO]} | extra) == ["Is it warm?", "No."]


@pytest.mark.parametrize(
    "extra",
    [
        {"result": {"score": 1}},
        {"result": {"error": "none of the tests ran"}},
        {"output": {"tokens": 2}},
        {"params": {"messages": [ASKED, ASKED]}},
        {"chat": {"messages": [ASKED, YES]}},
        {"inputs": {"text": "i"}, "outputs": {"text": "o"}},
    ],
)
def test_fields_beside_a_request_and_its_response_change_nothing(extra: Row, write_jsonl: WriteRows) -> None:
    assert text({"request": {"messages": [ASKED]}, "response": CHOICES} | extra, write_jsonl) == WHOLE


def test_a_response_that_is_json_text_is_still_taken_apart(write_jsonl: WriteRows) -> None:
    assert text({"messages": [ASKED], "completion": json.dumps(CHOICES)}, write_jsonl) == WHOLE
    assert words({"messages": [ASKED], "response": '{"warm": false}'}) == ["Is it warm?", '{"warm": false}']


@pytest.mark.parametrize(
    "extra", [{"parts": [{"type": "noun", "text": "z"}]}, {"author": "human"}, {"kind": "request"}]
)
def test_the_fields_of_a_turn_with_words_change_nothing(extra: Row, write_jsonl: WriteRows) -> None:
    assert text({"messages": [ASKED | extra, NO | extra]}, write_jsonl) == WHOLE


def test_parts_that_say_other_words_than_their_turn_are_no_content_in_silence(write_jsonl: WriteRows) -> None:
    parts = [{"type": "text", "text": "No."}]
    assert text({"messages": [ASKED, NO | {"parts": parts}]}, write_jsonl) == WHOLE
    assert "a content with other words" in reason({"messages": [ASKED, YES | {"parts": parts}]}, write_jsonl)
    reply = {"from": "gpt", "value": "No.", "parts": parts}
    assert text({"conversations": [{"from": "human", "value": "Is it warm?"}, reply]}, write_jsonl) == WHOLE


@pytest.mark.parametrize("extra", [{"data": ["x", "y"]}, {"history": EARLIER}, {"message": "a", "chat_history": []}])
def test_items_stay_items_whatever_lies_beside_them(extra: Row, write_jsonl: WriteRows) -> None:
    item = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "No."}]}
    assert text({"input": [ASKED], "output": [item]} | extra, write_jsonl) == WHOLE


def test_a_text_beside_a_call_without_words_is_none_of_the_reply(write_jsonl: WriteRows) -> None:
    asked, call, *others = TOOL_ROW["messages"]
    row = TOOL_ROW | {"messages": [asked, call | {"content": None, "text": "a summary"}, *others]}
    assert text(row, write_jsonl) == text(TOOL_ROW, write_jsonl)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"inputs": {"question": "Is it warm?"}, "outputs": {"text": "No."}}, ["Is it warm?", "No."]),
        ({"inputs": {"text": "Is it warm?"}, "outputs": {"text": "No."}}, ["Is it warm?", "No."]),
        ({"message": "Is it warm?", "chat_history": [], "response": "No."}, ["Is it warm?", "No."]),
        ({"gen_ai.prompt": [ASKED], "gen_ai.completion": "No."}, ["Is it warm?", "No."]),
        ({"gen_ai.prompt": [ASKED], "gen_ai.completion": "[x] No."}, ["Is it warm?", "[x] No."]),
    ],
)
def test_no_question_and_no_answer_of_other_software_is_lost(row: Row, expected: list[str]) -> None:
    assert words(row) == expected


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [ASKED, NO], "toolConfig": {"tools": 5}},
        {"llm.input_messages": {"²": {"message": ASKED}}},
        {"gen_ai.prompt": [ASKED], "gen_ai.completion": 5},
        {"messages": [ASKED, NO], "attributes": [{"key": ["x"], "value": 1}], "toolConfig": {"tools": "x"}},
    ],
)
def test_a_broken_value_drops_its_row_alone(row: Row) -> None:
    with pytest.raises(UnusableRow):
        words(row)

"""The modes of prompts, replies and samples."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tool_chats import ASKED, TOOL_ROW, WEATHER, tool_tokenizer

from draftsmith.data.chat_template import ChatTemplate
from draftsmith.data.chats.messages import read_turns
from draftsmith.data.chats.modes import LONG_TOKENS, modes
from draftsmith.data.chats.reply_marks import marks_of
from draftsmith.data.prompts import Prompt
from draftsmith.data.replies.dialogues import Dialogue
from draftsmith.data.replies.reply_sources import Reply
from draftsmith.decode.sampling import GenerationSettings
from draftsmith.evaluate.samples import read_samples


def test_a_conversation_thinks_or_does_not_and_may_have_tools_and_be_long() -> None:
    assert modes(True, False, LONG_TOKENS - 1) == ("thinking",)
    assert modes(False, True, LONG_TOKENS) == ("not thinking", "tools", "long")


@pytest.mark.parametrize(
    ("end", "asks"), [("<|assistant|>", True), ("<|assistant|><think></think>", False), ("<|assistant|><think>", True)]
)
def test_a_prompt_asks_for_a_thought_unless_it_supplies_an_empty_one(end: str, asks: bool) -> None:
    tokenizer = tool_tokenizer()
    assert marks_of(tokenizer).asks_for_thought(tokenizer.encode(end)) is asks
    assert not marks_of(tool_tokenizer(None)).asks_for_thought(tokenizer.encode(end))


def test_a_template_that_takes_thoughts_out_of_the_words_has_the_usual_marks() -> None:
    tokenizer = tool_tokenizer("{% for m in messages %}{{ m.content.split('</think>')[-1] }}{% endfor %}<think>")
    marks = marks_of(tokenizer)
    assert (marks.thought_start, marks.thought_end) == ("<think>", "</think>")


def test_the_prompts_of_an_evaluation_know_the_modes_that_they_ask_for(write_jsonl: Callable[..., Path]) -> None:
    own = {"split": "test", "source": "s"}
    rows = [
        {"id": "a", "messages": [ASKED], "tools": [WEATHER], **own},
        {"id": "b", "messages": [ASKED], "chat_template_kwargs": {"enable_thinking": False}, **own},
    ]
    found = read_samples(write_jsonl(rows), tool_tokenizer())
    assert [sample.modes for sample in found] == [("thinking", "tools"), ("not thinking",)]
    ids = [{"id": "c", "prompt_ids": list(found[1].prompt_ids), "reply_ids": [4]}]
    assert read_samples(write_jsonl(ids), tool_tokenizer())[0].modes == ("not thinking",)


def test_a_tool_conversation_is_played_with_the_data_sets_own_calls(write_jsonl: Callable[..., Path]) -> None:
    tokenizer = tool_tokenizer()
    asked, call, result = read_turns(TOOL_ROW["messages"][:3])
    prompt = Prompt("p", (asked, call, result), "train", "s", tools=(WEATHER,))
    dialogue, chat = Dialogue(prompt, tokenizer.encode("<|user|>Is it warm?<|assistant|>")), ChatTemplate(tokenizer)
    dialogue.take(Reply(tokenizer.encode("<think>Hm</think>Yes.<|end|>"), "eos"), chat, None)
    assert dialogue.next_ids is not None
    shown = tokenizer.decode(dialogue.next_ids)
    assert shown.endswith("</call><|end|><|tool|>9 C<|assistant|>")
    assert "Yes." not in shown
    dialogue.take(Reply(tokenizer.encode("No.<|end|>"), "eos"), chat, None)
    row = json.loads(json.dumps(dialogue.row(GenerationSettings(max_new_tokens=4))))
    assert row["begun_anew"] == [1]
    assert row["modes"] == ["thinking", "not thinking", "tools"]
    assert row["tools"] == [WEATHER]
    assert [turn["role"] for turn in row["messages"]] == ["user", "assistant", "tool", "assistant"]

"""What of an assistant's turns is trained on is chosen by kind, in conversations and in replies of token ids alike."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tool_chats import ASKED, TOOL_ROW, TOOL_TEMPLATE, WEATHER, tool_tokenizer

from draftsmith.data.chat_template import ChatTemplate
from draftsmith.data.chats.modes import modes_of_sample
from draftsmith.data.chats.reply_marks import ReplyMarks
from draftsmith.data.chats.token_kinds import Kind, TrainedOn
from draftsmith.data.chats.tokenized_samples import TokenizedSample
from draftsmith.data.corpus import Corpus

WriteRows = Callable[..., Path]
WORDS_ALONE = TrainedOn(train_tool_calls=False, train_thoughts=False)
CHOICES = [
    (
        TrainedOn(),
        [
            "<think>I ask.</think>",
            '<call>weather {"city": "Oslo"}</call><|end|>',
            "<think>9 is cold.</think>",
            "No.<|end|>",
        ],
    ),
    (WORDS_ALONE, ["No.<|end|>"]),
    (TrainedOn(train_replies=False, train_thoughts=False), ['<call>weather {"city": "Oslo"}</call><|end|>']),
    (TrainedOn(train_tool_calls=False, last_turn_only=True), ["<think>9 is cold.</think>", "No.<|end|>"]),
]


WITHOUT_CALLS = TrainedOn(train_tool_calls=False)
OWN_CALL = "<call>{{ call.function.name }} {{ call.function.arguments | tojson }}</call>"
# As Llama 4 and Llama 3.1 write calls.
PYTHONIC = TOOL_TEMPLATE.replace(
    OWN_CALL,
    "[{{ call.function.name }}({% for name, value in call.function.arguments.items() %}{{ name }}={{ value | tojson }}{% endfor %})]",
)
JSON_CALLS = TOOL_TEMPLATE.replace(
    OWN_CALL, '{"name": "{{ call.function.name }}", "parameters": {{ call.function.arguments | tojson }}}'
)
LINK, JSON_ANSWER = "See [this](u) now.", '{"name": "Bob"}'


def samples(
    row: dict[str, Any], write_jsonl: WriteRows, trained_on: TrainedOn, template: str = TOOL_TEMPLATE
) -> list[TokenizedSample]:
    tokenizer = tool_tokenizer(template)
    corpus = Corpus(write_jsonl([row]), lambda: ChatTemplate(tokenizer), None, 1000, trained_on=trained_on)
    return list(corpus.all_samples([]))


def learned(sample: TokenizedSample) -> str:
    kept = [token for token, kept in zip(sample.input_ids, sample.loss_mask, strict=True) if kept]
    return str(tool_tokenizer().decode(kept))


def as_ids() -> dict[str, Any]:
    """The tool conversation as replies in token ids, generated exactly as the template shows them."""
    tokenizer = tool_tokenizer()
    call = '<think>I ask.</think><call>weather {"city": "Oslo"}</call><|end|>'
    first = tokenizer.encode("<|user|>Is it warm?<|assistant|>")
    second = [*first, *tokenizer.encode(call), *tokenizer.encode("<|tool|>9 C<|assistant|>")]
    return {
        "id": "a",
        "turns": [
            {"prompt_ids": first, "reply_ids": tokenizer.encode(call)},
            {"prompt_ids": second, "reply_ids": tokenizer.encode("<think>9 is cold.</think>No.<|end|>")},
        ],
    }


@pytest.mark.parametrize(("trained_on", "expected"), CHOICES)
@pytest.mark.parametrize("in_ids", [False, True], ids=["words", "ids"])
def test_the_kinds_that_are_asked_for_are_trained_on(
    in_ids: bool, trained_on: TrainedOn, expected: list[str], write_jsonl: WriteRows
) -> None:
    [sample] = samples(as_ids() if in_ids else TOOL_ROW, write_jsonl, trained_on)
    assert learned(sample) == "".join(expected)
    assert "tools" in modes_of_sample(sample)
    assert "thinking" in modes_of_sample(sample)


def test_what_is_not_trained_on_is_counted_as_read(write_jsonl: WriteRows) -> None:
    [sample] = samples(TOOL_ROW, write_jsonl, WORDS_ALONE)
    assert sample.counts.trained == {"replies": 4}
    assert sample.counts.words == "replies 4, tool calls 27 (read only), thoughts 19 (read only)"


def test_nothing_to_train_on_is_an_error() -> None:
    with pytest.raises(ValueError, match="all false, so nothing is trained on"):
        TrainedOn(train_replies=False, train_tool_calls=False, train_thoughts=False)


@pytest.mark.parametrize("tools", [{}, {"tools": [WEATHER]}], ids=["no tools", "tools"])
@pytest.mark.parametrize(
    ("template", "words"), [(PYTHONIC, LINK), (JSON_CALLS, JSON_ANSWER), (PYTHONIC, "[1, 2]"), (JSON_CALLS, LINK)]
)
def test_words_that_only_begin_like_a_call_are_words(
    template: str, words: str, tools: dict[str, Any], write_jsonl: WriteRows
) -> None:
    row = {"messages": [ASKED, {"role": "assistant", "content": words}], **tools}
    for choice in (TrainedOn(), WITHOUT_CALLS):
        [sample] = samples(row, write_jsonl, choice, template)
        assert learned(sample) == words + "<|end|>"
        assert sample.counts.trained.keys() == {"replies"}


@pytest.mark.parametrize(
    ("template", "words", "call"),
    [
        (PYTHONIC, "Wait. ", '[weather(city="Oslo")]'),
        (JSON_CALLS, "", '{"name": "weather", "parameters": {"city": "Oslo"}}'),
        (TOOL_TEMPLATE, "Wait.", '<call>weather {"city": "Oslo"}</call>'),
    ],
)
def test_a_call_in_the_words_is_a_call_where_there_are_tools(
    template: str, words: str, call: str, write_jsonl: WriteRows
) -> None:
    row = {"messages": [ASKED, {"role": "assistant", "content": words + call}], "tools": [WEATHER]}
    [sample] = samples(row, write_jsonl, WITHOUT_CALLS, template)
    assert learned(sample) == words
    tokenizer = tool_tokenizer(template)
    kinds = ReplyMarks(ChatTemplate(tokenizer)).kinds([], tokenizer.encode(words + call))
    assert kinds.count(Kind.REPLY) == len(tokenizer.encode(words))
    [sample] = samples({"messages": row["messages"]}, write_jsonl, WITHOUT_CALLS, template)
    assert learned(sample) == words + call + "<|end|>"


def test_a_mark_that_the_system_turn_explains_tells_calls_in_the_words(write_jsonl: WriteRows) -> None:
    system = {"role": "system", "content": "Call tools between <call> and </call>."}
    row = {"messages": [system, ASKED, {"role": "assistant", "content": "Wait.<call>weather {}</call>"}]}
    [sample] = samples(row, write_jsonl, WITHOUT_CALLS)
    assert learned(sample) == "Wait."


@pytest.mark.parametrize(("template", "reply"), [(PYTHONIC, LINK), (JSON_CALLS, JSON_ANSWER)], ids=["brackets", "json"])
def test_generated_words_that_only_begin_like_a_call_are_words(template: str, reply: str) -> None:
    tokenizer = tool_tokenizer(template)
    assert set(ReplyMarks(ChatTemplate(tokenizer)).kinds([], tokenizer.encode(reply))) == {Kind.REPLY}


def test_the_marks_of_a_template_are_found_in_it() -> None:
    marks = ReplyMarks(ChatTemplate(tool_tokenizer()))
    assert (marks.thought_start, marks.thought_end, marks.call_start) == ("<think>", "</think>", "<call>")


@pytest.mark.parametrize(
    ("prompt", "reply", "kinds"),
    [
        ("<|assistant|>", "No.", "RRR"),
        ("<|assistant|>", "<think>a</think>No", "TTTRR"),
        ("<|assistant|>", "<think>ab", "TTT"),
        ("<|assistant|><think>", "a</think>No", "TTRR"),
        ("<|assistant|><think></think>", "No", "RR"),
        ("<|assistant|>", "<think></think>No", "RRRR"),
        ("<|assistant|>", "No<call>a</call>", "RRCCC"),
        ("<|assistant|>", "<think>a</think><call>a</call><|end|>", "TTTCCCC"),
    ],
)
def test_the_kind_of_each_generated_token_follows_from_the_marks(prompt: str, reply: str, kinds: str) -> None:
    tokenizer = tool_tokenizer()
    found = ReplyMarks(ChatTemplate(tokenizer)).kinds(tokenizer.encode(prompt), tokenizer.encode(reply))
    letters = {Kind.REPLY: "R", Kind.TOOL_CALL: "C", Kind.THOUGHT: "T"}
    assert "".join(letters[Kind(kind)] for kind in found) == kinds


def test_a_tokenizer_without_a_template_has_no_kinds_and_says_so_where_they_are_asked_for(
    write_jsonl: WriteRows,
) -> None:
    def chat() -> ChatTemplate:
        return ChatTemplate(tool_tokenizer(None))

    source = write_jsonl([as_ids()])
    assert next(iter(Corpus(source, chat, None, 1000))).counts.trained.keys() == {"replies"}
    with pytest.raises(ValueError, match="no chat template"):
        list(Corpus(source, chat, None, 1000, trained_on=WORDS_ALONE))

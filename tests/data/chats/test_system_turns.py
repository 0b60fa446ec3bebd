"""System turns in the middle of a chat, and thoughts that are parts of the content: shown by the template, or named."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from chat_rows import NO, RESULT, reason, text
from tool_chats import ASKED, CALL, TOOL_TEMPLATE, WEATHER, tool_tokenizer

from draftsmith.data.between_turns import check_turns
from draftsmith.data.chat_template import ChatTemplate
from draftsmith.data.chats.token_kinds import EVERYTHING
from draftsmith.data.formats import detect_format, to_conversation
from draftsmith.data.prompts import Prompt, prompts, read_prompts
from draftsmith.models.target.prompt_template import TemplateOptions
from draftsmith.models.target.template_fields import TemplateRefusal

WriteRows = Callable[..., Path]
BRIEF = {"role": "system", "content": "Be brief."}
BEGIN = "<|user|>Is it warm?<|assistant|>«No.<|end|>»"
SYSTEM_AT_FIRST = TOOL_TEMPLATE.replace(
    "{% else %}<|{{ m.role }}|>", "{% elif m.role != 'system' or loop.first %}<|{{ m.role }}|>"
)
RAISES = TOOL_TEMPLATE.replace(
    "{% else %}<|{{ m.role }}|>",
    "{% else %}{{ raise_exception('system comes first') if m.role == 'system' and not loop.first }}<|{{ m.role }}|>",
)
# As Magistral's: a thought is a part of the content, a text or a list of texts.
PART = "{% for p in m.content %}{{ '<think>' + p.thinking + '</think>' if p['type'] == 'thinking' else p.text }}{% endfor %}"
PART_OF_TEXTS = PART.replace("p.thinking +", "p.thinking | map(attribute='text') | join +")


def with_thought_parts(shown: str) -> str:
    content = "{% if m.content is string %}{{ m.content }}{% else %}" + shown + "{% endif %}"
    start = "{% if m.reasoning_content and loop.index0 > ns.last %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    return TOOL_TEMPLATE.replace(start + "{{ m.content }}", content).replace(
        "{% else %}<|{{ m.role }}|>", "{% elif m.role == 'system' %}<|system|>" + content + "{% else %}<|{{ m.role }}|>"
    )


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        ([ASKED, NO, BRIEF, ASKED, NO], BEGIN + "<|system|>Be brief." + BEGIN),
        ([BRIEF, {**BRIEF, "role": "developer"}, ASKED, NO], "<|system|>Be brief." * 2 + BEGIN),
        ([ASKED, BRIEF, NO], "<|user|>Is it warm?<|system|>Be brief.<|assistant|>«No.<|end|>»"),
        (
            [ASKED, {"role": "assistant", "tool_calls": [CALL]}, RESULT, BRIEF, NO],
            '<|user|>Is it warm?<|assistant|>«<call>weather {"city": "Oslo"}</call><|end|>»<|tool|>9 C<|system|>Be brief.'
            "<|assistant|>«No.<|end|>»",
        ),
    ],
)
def test_a_system_turn_in_the_middle_is_shown_where_it_is(
    turns: list[dict[str, Any]], expected: str, write_jsonl: WriteRows
) -> None:
    assert text({"messages": turns}, write_jsonl) == expected


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (SYSTEM_AT_FIRST, "turn 2 is the system's, and the chat template does not show it there"),
        (RAISES, "the chat template fails on turns .*: system comes first"),
    ],
)
def test_a_system_turn_that_the_template_does_not_show_there_is_named(
    template: str, expected: str, write_jsonl: WriteRows
) -> None:
    row = {"messages": [ASKED, NO, BRIEF, ASKED, NO]}
    with pytest.raises(ValueError, match=expected):
        raise ValueError(reason(row, write_jsonl, EVERYTHING, template))
    prompt = Prompt("a", to_conversation(row, "openai").messages, "train", "a")
    with pytest.raises(TemplateRefusal, match=expected):
        check_turns(ChatTemplate(tool_tokenizer(template)), prompt.user_turns())
    first = {"messages": [BRIEF, ASKED, NO]}
    assert text(first, write_jsonl, EVERYTHING, template) == "<|system|>Be brief." + BEGIN


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        (
            [ASKED, {"role": "assistant", "tool_calls": [CALL]}, BRIEF, RESULT, NO],
            "turn 2 is the system's where the tool's belongs",
        ),
        (
            [ASKED, {"role": "assistant", "tool_calls": [CALL, CALL]}, RESULT, BRIEF, RESULT, NO],
            "turn 3 is the system's between turns of tools",
        ),
        ([ASKED, NO, BRIEF], "turn 2 is the system's, and no question or reply follows it"),
    ],
)
def test_a_system_turn_where_nobody_may_speak_is_dropped_with_the_reason(
    turns: list[dict[str, Any]], expected: str, write_jsonl: WriteRows
) -> None:
    assert expected in reason({"messages": turns}, write_jsonl)


def test_of_a_prompt_every_system_turn_comes_before_the_reply_that_it_came_before(
    tmp_path: Path, write_jsonl: WriteRows
) -> None:
    later = {"role": "user", "content": "Sure?"}
    rows = [
        {"messages": [ASKED, NO, BRIEF, later, NO]},
        {"messages": [later, BRIEF, NO]},
        {"messages": [later, BRIEF, NO, ASKED, NO]},
    ]
    prompts(str(write_jsonl(rows)), tmp_path / "out")
    shown = [[[turn["role"] for turn in turns] for turns in p.user_turns()] for p in read_prompts(tmp_path / "out")]
    assert shown == [[["user"], ["system", "user"]], [["user", "system"]]]
    assert "turn 1 is the system's between a question and its reply" in (tmp_path / "out" / "dropped.jsonl").read_text()
    [first, second] = read_prompts(tmp_path / "out")
    assert (first.reference, second.reference) == (("No.", "No."), ("No.",))


def test_a_prompts_own_row_gives_its_answers_behind_the_systems_turns(write_jsonl: WriteRows) -> None:
    row = {"messages": [ASKED, BRIEF, ASKED, BRIEF], "reference": ["No.", "No."]}
    asked = "<|user|>Is it warm?"
    assert (
        text(row, write_jsonl) == BEGIN + "<|system|>Be brief." + asked + "<|system|>Be brief.<|assistant|>«No.<|end|>»"
    )


@pytest.mark.parametrize("shown", [PART, PART_OF_TEXTS], ids=["a text", "texts"])
def test_a_thought_is_given_as_a_part_to_a_template_that_shows_it_there_alone(
    shown: str, write_jsonl: WriteRows
) -> None:
    template, whole = with_thought_parts(shown), "<|user|>Is it warm?<|assistant|>«<think>9 is cold.</think>No.<|end|>»"
    parts = [
        {"type": "thinking", "thinking": [{"type": "text", "text": "9 is cold."}]},
        {"type": "text", "text": "No."},
    ]
    for reply in (NO | {"reasoning_content": "9 is cold."}, {"role": "assistant", "content": parts}):
        assert text({"messages": [ASKED, reply]}, write_jsonl, EVERYTHING, template) == whole
    calls = {"role": "assistant", "content": parts[:1], "tool_calls": [CALL]}
    assert text({"messages": [ASKED, calls, RESULT, NO]}, write_jsonl, EVERYTHING, template).startswith(
        '<|user|>Is it warm?<|assistant|>«<think>9 is cold.</think><call>weather {"city": "Oslo"}</call><|end|>»'
    )


def test_a_thought_in_the_systems_words_is_kept_at_its_place(write_jsonl: WriteRows) -> None:
    content = [
        {"type": "text", "text": "First "},
        {"type": "thinking", "thinking": [{"type": "text", "text": "think"}]},
        {"type": "text", "text": " then speak."},
    ]
    row = {"messages": [{"role": "system", "content": content}, ASKED, NO]}
    shown = text(row, write_jsonl, EVERYTHING, with_thought_parts(PART))
    assert shown == "<|system|>First <think>think</think> then speak." + BEGIN
    assert "turn 0 is the system's and has a part of the type 'thinking'" in reason(row, write_jsonl)


@pytest.mark.parametrize(
    ("tools", "expected"),
    [
        ("weather", r"template_args.tools is 'weather', which is no list"),
        ({"name": "weather"}, r"template_args.tools is .*, which is no list"),
        (["weather"], r"template_args.tools\[0\] is 'weather', which is no function"),
        ([WEATHER, {"type": "function", "function": {}}], r"template_args.tools\[1\] is .* no function"),
        ([{"type": "function", "function": "weather"}], r"template_args.tools\[0\] is .* no function"),
        (7, r"template_args.tools is 7, which is no list"),
    ],
)
def test_tools_of_the_command_that_are_no_list_of_functions_are_named(tools: object, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        TemplateOptions(template_args={"tools": tools})


def test_a_bare_function_of_the_command_is_shown_as_a_rows_own(write_jsonl: WriteRows) -> None:
    row, options = {"messages": [ASKED, NO]}, TemplateOptions(template_args={"tools": [WEATHER["function"]]})
    shown = text(row, write_jsonl, EVERYTHING, TOOL_TEMPLATE, options)
    assert shown == text(row | {"tools": [WEATHER]}, write_jsonl)
    assert detect_format(row) == "openai"

"""Between a reply and the next turn: the template's own tokens, and one end mark."""

import pytest
from chat_styles import KINDS, STYLES, conversation, styled_tokenizer
from tiny import EOS, make_tokenizer

from draftsmith.data import between_turns
from draftsmith.data.between_turns import BetweenTurns, History
from draftsmith.data.chat_template import ChatTemplate
from draftsmith.data.chats.messages import Message
from draftsmith.models.target.template_fields import TemplateRefusal

CHAINED = [
    "turn marks",
    "end mark, then an end of text",
    "spaces around",
    "block with a newline behind the mark",
    "last turn left open",
]
NEXT = [Message(role="user", content="Sure?")]


def next_turn_ids(chat: ChatTemplate, messages: list[Message], reply_ids: list[int]) -> list[int]:
    return BetweenTurns(chat).ids([Message(role="user", content="-")], reply_ids, messages)


@pytest.mark.parametrize("kind", ["byte-level", "metaspace"])
@pytest.mark.parametrize("name", CHAINED)
def test_one_end_mark_whichever_token_ended_the_reply(name: str, kind: str) -> None:
    tokenizer, ends = styled_tokenizer(name, kind)
    chat = ChatTemplate(tokenizer, None, ends)
    asked = conversation(1)
    whole = chat.rendered_ids(chat.render([*asked, *NEXT], add_generation_prompt=True))
    marks = [place for place, token in enumerate(whole) if token in ends]
    prompt = chat.first_prompt_ids(asked[:1])
    behind = whole[next(place for place in marks if place > len(prompt)) + 1 :]
    for end in ends:
        reply = [*chat.rendered_ids(" Nine pears are left."), end]
        assert next_turn_ids(chat, NEXT, reply) == behind
    unfinished = next_turn_ids(chat, NEXT, reply[:-1])
    assert unfinished[-len(behind) :] == behind
    assert len(unfinished) > len(behind)


def test_an_end_mark_that_the_template_writes_between_turns_only_is_left_out_too() -> None:
    tokenizer, ends = styled_tokenizer("another mark between turns", "byte-level")
    chat = ChatTemplate(tokenizer, None, ends)
    for end in ends:
        assert tokenizer.decode(next_turn_ids(chat, NEXT, [end])) == "<T>user<M>Sure?<E><T>assistant"
    assert tokenizer.decode(next_turn_ids(chat, NEXT, [])) == "<E><T>user<M>Sure?<E><T>assistant"


def test_an_end_token_that_opens_the_next_turn_is_left_out_only_where_the_reply_ended_with_it() -> None:
    tokenizer, (other, opening) = styled_tokenizer("the next turn's opening ends replies", "byte-level")
    chat = ChatTemplate(tokenizer, None, (other, opening))
    assert tokenizer.decode(next_turn_ids(chat, NEXT, [opening])) == "\nSure?<A>\n"
    assert tokenizer.decode(next_turn_ids(chat, NEXT, [other])) == "<U>\nSure?<A>\n"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", STYLES)
def test_an_empty_reply_keeps_its_ids_and_one_end_mark(name: str, kind: str) -> None:
    """A reply of its end token alone: the shortest that a target gives."""
    if name in ("thought opened by the prompt", "block with header and empty thought"):
        return  # what their prompts end with is not shown of earlier turns
    tokenizer, ends = styled_tokenizer(name, kind)
    chat = ChatTemplate(tokenizer, None, ends)
    asked = conversation(1)[:1]
    prompt = chat.first_prompt_ids(asked)
    for end in ends:
        found = History(chat, asked).next_prompt_ids(prompt, [end], NEXT)
        assert found == [*prompt, end, *next_turn_ids(chat, NEXT, [end])]


@pytest.mark.parametrize(
    ("name", "reply", "begins_anew"),
    [
        ("turn marks", "Nine pears.", False),
        ("turn marks", " Nine pears.", True),  # the template trims it
        ("spaces around", " Nine pears.", False),
        ("spaces around", "Nine pears.", False),
        ("another mark between turns", "Nine pears.", False),
        ("thought opened by the prompt", "Ten less one.\n</think>Nine.", True),
        ("empty thought before the last reply", "Nine pears.", False),
        ("another mark between turns", "<C>final<M>Nine pears.", False),
    ],
)
def test_a_conversation_begins_anew_where_the_template_rewrites_it(name: str, reply: str, begins_anew: bool) -> None:
    tokenizer, ends = styled_tokenizer(name, "byte-level")
    chat = ChatTemplate(tokenizer, None, ends)
    asked = conversation(1)[:1]
    prompt = chat.first_prompt_ids(asked)
    ids = [*chat.rendered_ids(reply), ends[0]]
    found = History(chat, asked).next_prompt_ids(prompt, ids, NEXT)
    assert (found[: len(prompt) + len(ids)] != [*prompt, *ids]) == begins_anew
    if begins_anew:
        content = reply.split("</think>")[-1]
        told = [*asked, Message(role="assistant", content=content), *NEXT]
        assert found == chat.rendered_ids(chat.render(told, add_generation_prompt=True))


def test_system_text_that_moves_to_the_last_question_begins_the_conversation_anew() -> None:
    tokenizer, ends = styled_tokenizer("system text at the last question", "metaspace")
    chat = ChatTemplate(tokenizer, None, ends)
    asked = conversation(1, system=True)[:2]
    prompt = chat.first_prompt_ids(asked)
    found = History(chat, asked).next_prompt_ids(prompt, [*chat.rendered_ids(" Nine."), *ends], NEXT)
    assert found[: len(prompt)] != prompt
    assert "[Q] Be kind.\n\nSure?[/Q]" in tokenizer.decode(found)


@pytest.mark.parametrize("name", ["turn marks", "last turn left open"])
def test_white_space_that_the_tokenizer_drops_is_no_rewriting(name: str) -> None:
    """Decoding puts a space before each word; the template's trimming takes the first one away."""
    tokenizer, ends = styled_tokenizer(name, "words")
    chat = ChatTemplate(tokenizer, None, ends)
    asked = conversation(1)[:1]
    history, prompt = History(chat, asked), chat.first_prompt_ids(asked)
    for end in ends:  # the second reply follows a first one with another end token
        read = [*prompt, *chat.rendered_ids("Nine pears."), end]
        prompt = history.next_prompt_ids(prompt, read[len(prompt) :], NEXT)
        assert prompt[: len(read)] == read


def test_a_conversation_about_the_reply_marker_is_continued_and_masked_like_another() -> None:
    tokenizer, ends = styled_tokenizer("turn marks", "byte-level")
    chat = ChatTemplate(tokenizer, None, ends)
    marker = between_turns._SENTINEL
    asked = [Message(role="user", content=f"What is {marker}?")]
    assert tokenizer.decode(next_turn_ids(chat, asked, ends)).count(marker) == 1
    said = Message(role="assistant", content=f"{marker.upper()} is {marker}.")
    sample = chat.conversation("c", [*asked, said, *asked, Message(role="assistant", content="Yes.")])
    learned = [token for token, own in zip(sample.input_ids, sample.loss_mask, strict=True) if own]
    assert tokenizer.decode(learned) == f"{marker.upper()} is {marker}.<E>Yes.<E>"


# Fails on a reply with capitals, wherever it is in the conversation.
CHOOSY = (
    "{% for m in messages %}"
    "{% if m.role == 'assistant' and m.content != m.content.lower() %}{{ raise_exception('too loud') }}{% endif %}"
    "<|{{ m.role }}|>{{ m.content }}{{ '<|end|>' if m.role == 'assistant' }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.mark.parametrize("replies", [("NINE", "nine", "nine"), ("nine", "NINE", "nine"), ("nine", "nine", "NINE")])
def test_a_conversation_with_a_reply_that_the_template_refuses_continues_behind_the_targets_own_ids(
    replies: tuple[str, ...],
) -> None:
    tokenizer = make_tokenizer(CHOOSY)
    chat = ChatTemplate(tokenizer)
    asked = [Message(role="user", content="How many?")]
    history, prompt = History(chat, asked), chat.first_prompt_ids(asked)
    for reply in replies:
        read = [*prompt, *chat.rendered_ids(reply), EOS]
        prompt = history.next_prompt_ids(prompt, read[len(prompt) :], NEXT)
        assert prompt[: len(read)] == read
        assert tokenizer.decode(prompt[len(read) :]) == "<|user|>Sure?<|assistant|>"


def test_turns_that_a_template_refuses_together_are_found_before_any_reply() -> None:
    short = make_tokenizer(
        CHOOSY.replace("{% for", "{% if messages | length > 4 %}{{ raise_exception('long') }}{% endif %}{% for", 1)
    )
    chat = ChatTemplate(short)
    turns = [[Message(role="user", content=text)] for text in ("How many?", "Sure?", "Really?")]
    between_turns.check_turns(chat, turns[:2])
    with pytest.raises(TemplateRefusal, match="long"):
        between_turns.check_turns(chat, turns)

from pathlib import Path

import pytest
from tiny import TEMPLATE, make_tokenizer
from transformers import PreTrainedTokenizerBase

from draftsmith.data.between_turns import BetweenTurns
from draftsmith.data.chat_template import ChatTemplate
from draftsmith.data.chats.messages import Message
from draftsmith.data.chats.tokenized_samples import TokenizedSample, Turn, cut, from_turns

# Jinja eats the newline after a block's end, not the one after plain text.
PREFIX_TEMPLATE = TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}\n", "")
CONVERSATION = [
    Message(role="user", content="How many apples?"),
    Message(role="assistant", content="He has seven."),
    Message(role="user", content="Sure?"),
    Message(role="assistant", content="Yes."),
]


def next_turn_ids(chat: ChatTemplate, messages: list[Message], reply_ids: list[int]) -> list[int]:
    return BetweenTurns(chat).ids([Message(role="user", content="-")], reply_ids, messages)


def labelled_text(tokenizer: PreTrainedTokenizerBase, sample: TokenizedSample) -> str:
    return str(tokenizer.decode([t for t, kept in zip(sample.input_ids, sample.loss_mask, strict=True) if kept]))


@pytest.mark.parametrize("template", [TEMPLATE, PREFIX_TEMPLATE])
def test_only_replies_and_their_end_tokens_are_trained_on(template: str) -> None:
    tokenizer = make_tokenizer(template)
    sample = ChatTemplate(tokenizer).conversation("a", CONVERSATION)
    assert labelled_text(tokenizer, sample) == "He has seven.<|end|>Yes.<|end|>"


def test_both_ways_to_find_the_mask_agree() -> None:
    block = ChatTemplate(make_tokenizer(TEMPLATE)).conversation("a", CONVERSATION)
    prefixes = ChatTemplate(make_tokenizer(PREFIX_TEMPLATE)).conversation("a", CONVERSATION)
    assert block == prefixes


def test_an_end_token_outside_the_generation_block_is_trained_on() -> None:
    template = TEMPLATE.replace("<|end|>{% endgeneration %}", "{% endgeneration %}<|end|>")
    tokenizer = make_tokenizer(template)
    sample = ChatTemplate(tokenizer).conversation("a", CONVERSATION)
    assert labelled_text(tokenizer, sample) == "He has seven.<|end|>Yes.<|end|>"


def test_turns_in_ids_are_masked_as_they_were_generated() -> None:
    sample = from_turns("a", [Turn([1, 2], [3], "eos"), Turn([1, 2, 3, 4], [5, 6], "length")])
    assert sample == TokenizedSample("a", [1, 2, 3, 4, 5, 6], [False, False, True, False, True, True])


def test_a_turn_that_rewrites_the_turns_before_it_is_refused() -> None:
    with pytest.raises(ValueError, match="turn 1 does not begin"):
        from_turns("a", [Turn([1, 2], [3], "eos"), Turn([1, 9, 3, 4], [5], "eos")])


@pytest.mark.parametrize("template", [TEMPLATE, PREFIX_TEMPLATE])
def test_later_turns_continue_the_rendered_conversation(template: str) -> None:
    tokenizer = make_tokenizer(template)
    chat = ChatTemplate(tokenizer)
    reply = tokenizer.encode("He has seven.<|end|>")
    ids = chat.first_prompt_ids(CONVERSATION[:1]) + reply + next_turn_ids(chat, CONVERSATION[2:3], reply)
    whole = tokenizer.apply_chat_template(CONVERSATION[:3], tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(ids) == whole


def test_a_reply_that_ran_out_of_budget_is_closed_by_the_template() -> None:
    tokenizer = make_tokenizer()
    chat = ChatTemplate(tokenizer)
    unfinished = tokenizer.encode("He has")
    assert next_turn_ids(chat, CONVERSATION[2:3], unfinished)[0] == tokenizer.eos_token_id
    assert next_turn_ids(chat, CONVERSATION[2:3], [tokenizer.eos_token_id])[0] != tokenizer.eos_token_id


def test_plain_text_needs_no_template() -> None:
    tokenizer = make_tokenizer(None)
    chat = ChatTemplate(tokenizer, "none")
    assert tokenizer.decode(chat.first_prompt_ids(CONVERSATION[:1])) == "How many apples?"
    sample = chat.conversation("a", CONVERSATION)
    assert tokenizer.decode(sample.input_ids) == "How many apples?\nHe has seven.\nSure?\nYes."
    assert labelled_text(tokenizer, sample) == "He has seven.Yes."


@pytest.mark.parametrize("blank", ["", " \n"])
def test_plain_text_leaves_an_empty_system_turn_out(blank: str) -> None:
    tokenizer = make_tokenizer(None)
    chat, system = ChatTemplate(tokenizer, "none"), Message(role="system", content=blank)
    assert chat.first_prompt_ids([system, *CONVERSATION[:1]]) == chat.first_prompt_ids(CONVERSATION[:1])
    assert chat.conversation("a", [system, *CONVERSATION]) == chat.conversation("a", CONVERSATION)
    brief = Message(role="system", content="Be brief.")
    assert tokenizer.decode(chat.first_prompt_ids([brief, *CONVERSATION[:1]])) == "Be brief.\nHow many apples?"
    sample = chat.conversation("a", [brief, *CONVERSATION])
    assert str(tokenizer.decode(sample.input_ids)).startswith("Be brief.\nHow many apples?\nHe has")
    assert labelled_text(tokenizer, sample) == "He has seven.Yes."


def test_a_template_file_replaces_the_tokenizers_own(tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text("{% for m in messages %}[{{ m['content'] }}]{% endfor %}>")
    tokenizer = make_tokenizer(None)
    chat = ChatTemplate(tokenizer, str(tmp_path / "t.jinja"))
    assert tokenizer.decode(chat.first_prompt_ids(CONVERSATION[:1])) == "[How many apples?]>"


def test_a_missing_template_says_how_to_give_one() -> None:
    with pytest.raises(ValueError, match=r"no chat template; give one with --template FILE.jinja, or --template none"):
        ChatTemplate(make_tokenizer(None))
    with pytest.raises(ValueError, match="is no file"):
        ChatTemplate(make_tokenizer(None), "gone.jinja")


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('only one turn') }}", "{% for m in %}", "{{ messages[9].role.x }}"]
)
def test_a_template_that_raises_is_named(template: str) -> None:
    with pytest.raises(ValueError, match="the chat template fails on turns"):
        ChatTemplate(make_tokenizer(template)).first_prompt_ids(CONVERSATION[:1])


def test_a_template_that_rewrites_history_gives_a_sample_for_each_reply() -> None:
    tokenizer = make_tokenizer("{{ messages | length }}" + PREFIX_TEMPLATE)
    samples = ChatTemplate(tokenizer).samples("a", CONVERSATION)
    assert [labelled_text(tokenizer, sample) for sample in samples] == ["He has seven.<|end|>", "Yes.<|end|>"]
    assert [str(tokenizer.decode(sample.input_ids))[:1] for sample in samples] == ["2", "4"]


def test_cutting_keeps_ids_and_mask_together() -> None:
    sample = TokenizedSample("a", [1, 2, 3], [False, True, True])
    assert cut(sample, 2) == TokenizedSample("a", [1, 2], [False, True])
    assert cut(sample, 3) is sample

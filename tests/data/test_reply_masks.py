"""Whatever the chat format and the tokenizer: the labels are the replies with their end marks, and nothing else."""

import itertools

import pytest
from chat_styles import KINDS, SAID, STYLES, conversation, styled_tokenizer
from transformers import PreTrainedTokenizerBase

from draftsmith.data.chat_template import ChatTemplate
from draftsmith.data.chats.messages import Message
from draftsmith.data.chats.tokenized_samples import TokenizedSample
from draftsmith.data.reply_mask import Encoded, Span, reply_mask
from draftsmith.models.target.prompt_template import TemplateOptions

# These formats close the last turn by nothing.
LEAVE_LAST_OPEN = ("the next turn's opening ends replies", "last turn left open")


def labelled(tokenizer: PreTrainedTokenizerBase, sample: TokenizedSample) -> list[list[int]]:
    """The ids of each labelled stretch."""
    marked = zip(sample.loss_mask, sample.input_ids, strict=True)
    return [
        [token for _, token in group] for kept, group in itertools.groupby(marked, key=lambda pair: pair[0]) if kept
    ]


def text_of(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """Decoded, without white space and case, which some tokenizers do not keep."""
    return "".join(str(tokenizer.decode(ids)).split()).lower()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", STYLES)
def test_labels_are_the_replies_and_their_end_marks_exactly(name: str, kind: str) -> None:
    style = STYLES[name]
    tokenizer, ends = styled_tokenizer(name, kind)
    chat = ChatTemplate(tokenizer, None, ends)
    for turns, system in itertools.product((1, 2, 3), (False, style.rewrites)):
        samples = chat.samples("a", conversation(turns, system))
        spans = [span for sample in samples for span in labelled(tokenizer, sample)]
        assert len(spans) == turns
        for number, (span, said) in enumerate(zip(spans, SAID, strict=False)):
            ended = span[-1] in ends
            assert text_of(tokenizer, span[:-1] if ended else span) == "".join(said.split()).lower(), (turns, system)
            assert not set(span[:-1]) & set(ends)
            assert ended != (name in LEAVE_LAST_OPEN and number == turns - 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [name for name, style in STYLES.items() if style.rewrites])
def test_where_the_template_rewrites_history_each_reply_gets_a_sample_with_its_own_prompt(name: str, kind: str) -> None:
    tokenizer, ends = styled_tokenizer(name, kind)
    chat = ChatTemplate(tokenizer, None, ends)
    asked = conversation(2, system=True)
    first, second = chat.samples("a", asked)
    assert (first.id, second.id) == ("a", "a#1")
    assert chat.conversation("a", asked) == second.__class__("a#1", second.input_ids, second.loss_mask)
    for sample, until in ((first, asked[:2]), (second, asked[:4])):
        prompt = chat.first_prompt_ids(until)
        assert sample.input_ids[: len(prompt)] == prompt
        assert not any(sample.loss_mask[: len(prompt)])


def test_a_thought_that_the_row_holds_is_learned_and_one_that_the_template_supplies_is_not() -> None:
    name = "empty thought before the last reply"
    tokenizer, ends = styled_tokenizer(name, "byte-level")
    template = STYLES[name].template.replace(
        "<think>\n\n</think>\n\n{% endif %}{{ m.content }}",
        "<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}{{ m.content }}",
    )
    tokenizer.chat_template = template
    chat = ChatTemplate(tokenizer, None, ends)
    asked, said = conversation(1)
    for thought, expected in (
        ("Ten less one.", "<think>\nTen less one.\n</think>\n\nNine pears are left.<E>"),
        (None, "Nine pears are left.<E>"),
    ):
        told = Message(role="assistant", content=said["content"])
        if thought is not None:
            told["reasoning_content"] = thought
        [span] = labelled(tokenizer, chat.conversation("a", [asked, told]))
        assert tokenizer.decode(span) == expected


@pytest.mark.parametrize("said", ["Nine.", "<think>\n\n</think>\n\nNine."])
def test_an_empty_thought_is_not_learned_where_the_prompt_supplies_it_and_the_row_repeats_it(said: str) -> None:
    tokenizer, ends = styled_tokenizer("empty thought before the last reply", "byte-level")
    tokenizer.chat_template = STYLES["empty thought before the last reply"].template.replace("loop.last", "false")
    turns = [*conversation(1)[:1], Message(role="assistant", content=said)]
    for options, learned in (
        (TemplateOptions(), said + "<E>"),
        (TemplateOptions(template_args={"think": False}), "Nine.<E>"),
    ):
        [span] = labelled(tokenizer, ChatTemplate(tokenizer, None, ends, options).conversation("a", turns))
        assert tokenizer.decode(span) == learned


def test_a_conversation_that_the_assistant_begins_is_learned() -> None:
    tokenizer, ends = styled_tokenizer("turn marks", "byte-level")
    tokenizer.chat_template = "{{ raise_exception('empty') if not messages }}" + tokenizer.chat_template
    [span] = labelled(tokenizer, ChatTemplate(tokenizer, None, ends).conversation("a", conversation(1)[1:]))
    assert tokenizer.decode(span) == "Nine pears are left.<E>"


def test_an_end_token_that_the_tokenizer_lacks_is_no_word_of_a_reply() -> None:
    tokenizer, ends = styled_tokenizer("turn marks", "byte-level")
    turns = [*conversation(1)[:1], Message(role="assistant", content="None.")]
    [span] = labelled(tokenizer, ChatTemplate(tokenizer, None, [*ends, 10**6]).conversation("a", turns))
    assert tokenizer.decode(span) == "None.<E>"


def test_variables_reach_the_template() -> None:
    tokenizer, ends = styled_tokenizer("empty thought before the last reply", "byte-level")
    asked = conversation(1)[:1]
    plain = ChatTemplate(tokenizer, None, ends)
    quick = ChatTemplate(tokenizer, None, ends, TemplateOptions(template_args={"think": False}))
    assert tokenizer.decode(quick.first_prompt_ids(asked)).endswith("<T>assistant\n<think>\n\n</think>\n\n")
    assert tokenizer.decode(plain.first_prompt_ids(asked)).endswith("<T>assistant\n")
    assert plain.digest != quick.digest


def test_a_turn_that_is_not_to_be_learned_is_read_only() -> None:
    tokenizer, ends = styled_tokenizer("turn marks", "byte-level")
    turns = conversation(2)
    turns[1] = {**turns[1], "train": False}
    [sample] = ChatTemplate(tokenizer, None, ends).samples("a", turns)
    assert [tokenizer.decode(span) for span in labelled(tokenizer, sample)] == ["Yes, nine.<E>"]


def test_a_token_over_the_edge_is_the_replys_only_if_the_rest_is_white_space() -> None:
    text = "a:He is.\nb"
    parts = [(0, 1), (1, 4), (4, 7), (7, 9), (9, 10)]
    assert reply_mask(Encoded(text, [0] * 5, parts), [Span(2, 8)], {9}) == [False, False, True, True, False]
    spaced = text.replace(":", " ")
    assert reply_mask(Encoded(spaced, [0] * 5, parts), [Span(2, 8)], {9}) == [False, True, True, True, False]

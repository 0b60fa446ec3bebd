from pathlib import Path

import pytest
from tiny import EOS, make_tokenizer

from draftsmith.decode.decode_command import prompt_ids
from draftsmith.models.target.prompt_template import (
    PromptTemplate,
    TemplateOptions,
    TemplateRefusal,
    first_words,
    rendering_fingerprint,
    template_in_use,
)

ASKED = [{"role": "user", "content": "How many?"}]
SEVERAL = {"default": "D{{ messages[0].content }}{{ 'short' if brief }}", "tool_use": "T{{ messages[0].content }}"}


def test_of_several_templates_the_default_one_is_used_or_the_one_that_is_named() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = SEVERAL
    read = {
        name: tokenizer.decode(PromptTemplate(tokenizer, options=TemplateOptions(name)).first_prompt_ids(ASKED))
        for name in (None, "tool_use")
    }
    assert read == {None: "DHow many?", "tool_use": "THow many?"}
    with pytest.raises(
        ValueError, match=r"no chat template called 'rag'; choose one of default, tool_use with --template_name"
    ):
        PromptTemplate(tokenizer, options=TemplateOptions("rag"))
    tokenizer.chat_template = {"tool_use": "T"}
    with pytest.raises(ValueError, match="no chat template called 'default'; choose one of tool_use"):
        PromptTemplate(tokenizer)


def test_a_name_goes_with_a_tokenizer_of_several_templates_only(tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text("x")
    with pytest.raises(ValueError, match="has one chat template, without a name"):
        PromptTemplate(make_tokenizer(), options=TemplateOptions("default"))
    with pytest.raises(ValueError, match="give one of the two"):
        PromptTemplate(make_tokenizer(), str(tmp_path / "t.jinja"), options=TemplateOptions("default"))


def test_variables_change_the_prompt_and_every_fingerprint() -> None:
    tokenizer = make_tokenizer("{{ messages[0].content }}{{ ' shortly' if brief }}{{ depth }}")
    kinds = [
        TemplateOptions(),
        TemplateOptions(None, {"brief": True}),
        TemplateOptions(None, {"brief": True, "depth": 2}),
    ]
    read = [tokenizer.decode(PromptTemplate(tokenizer, options=one).first_prompt_ids(ASKED)) for one in kinds]
    assert read == ["How many?", "How many? shortly", "How many? shortly2"]
    assert len({rendering_fingerprint(tokenizer, None, one) for one in kinds}) == 3
    assert len({template_in_use(tokenizer, None, one).digest for one in kinds}) == 3
    assert kinds[2].as_text == '{"brief": true, "depth": 2}'
    assert kinds[0].as_text is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"messages": []}, "names 'messages', which is no variable"),
        ({"tokenize": False}, "names 'tokenize', which is no variable"),
        ({"not a name": 1}, "no variable"),
        ({"brief": {1, 2}}, "JSON cannot hold"),
        ({"brief": float("nan")}, "JSON cannot hold"),
    ],
)
def test_what_is_no_variable_is_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TemplateOptions(None, values)


def test_a_variable_that_the_template_does_not_read_is_refused() -> None:
    with pytest.raises(ValueError, match="'enabel_thinking', which does not occur in the chat template"):
        PromptTemplate(make_tokenizer(), options=TemplateOptions(None, {"enabel_thinking": False}))
    with pytest.raises(ValueError, match="plain text has no template"):
        PromptTemplate(make_tokenizer(), "none", options=TemplateOptions(None, {"brief": True}))


@pytest.mark.parametrize(
    "template", ["{{ 1 / 0 }}", "{{ 'a' + 1 }}", "{{ messages.x.y }}", "{{ raise_exception('no') }}"]
)
def test_whatever_a_template_raises_is_a_refusal_of_the_messages(template: str) -> None:
    with pytest.raises(TemplateRefusal, match=r"fails on turns \['user'\]"):
        PromptTemplate(make_tokenizer(template)).first_prompt_ids(ASKED)


def test_the_first_words_of_a_document_keep_their_spacing() -> None:
    assert first_words("  a\n\tb c ", 2) == "  a\n\tb"
    assert first_words(" a b ", None) == " a b "
    assert first_words("a", 5) == "a"


def test_plain_text_gets_no_newline() -> None:
    tokenizer = make_tokenizer(None)
    plain = PromptTemplate(tokenizer, "none")
    text = "Once there was"
    expected = tokenizer.encode(text)
    assert plain.first_prompt_ids([{"role": "user", "content": text}]) == expected
    assert plain.document_prompt_ids(text) == expected
    for chat, template in ((None, None), (None, "none"), (False, None)):
        assert prompt_ids(tokenizer, text, chat, template, (EOS,)) == expected


def test_decode_takes_the_template_where_there_is_one() -> None:
    tokenizer = make_tokenizer()
    asked = PromptTemplate(tokenizer).first_prompt_ids([{"role": "user", "content": "Hi"}])
    assert prompt_ids(tokenizer, "Hi") == prompt_ids(tokenizer, "Hi", True) == asked
    with pytest.raises(ValueError, match="has no chat template; give one"):
        prompt_ids(make_tokenizer(None), "Hi", chat=True)
    with pytest.raises(ValueError, match="leave one of the two out"):
        prompt_ids(tokenizer, "Hi", chat=True, template="none")

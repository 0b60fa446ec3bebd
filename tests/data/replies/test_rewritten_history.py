"""Targets whose templates rewrite history, and templates with variables, through the commands."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from tiny import EOS, make_tokenizer, save_target

from draftsmith.data.cache.extract import extract
from draftsmith.data.cache.reader import HiddenStateCache
from draftsmith.data.chat_template import ChatTemplate
from draftsmith.data.chats.messages import Message
from draftsmith.data.corpus import Corpus
from draftsmith.data.prompt_ids import chat_for, first_prompt_ids
from draftsmith.data.prompts import Prompt, prompts
from draftsmith.data.replies.dialogues import answer_batch
from draftsmith.data.replies.reply_sources import Reply
from draftsmith.data.replies.respond import respond
from draftsmith.data.shards.manifest import Manifest
from draftsmith.decode.decode_command import prompt_ids
from draftsmith.decode.sampling import GenerationSettings, ReplyOptions
from draftsmith.evaluate.samples import read_samples
from draftsmith.models.files.loading import load_tokenizer
from draftsmith.models.target.prompt_template import TemplateChoice, TemplateOptions

# The thought of an earlier turn is dropped; `quiet` has the prompt supply an empty one.
THOUGHTFUL = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>\n{{ m.content if loop.last else m.content.split('~')[-1] }}"
    "<|end|>\n{% else %}<|user|>\n{{ m.content }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{{ '~' if quiet }}{% endif %}"
)
TALK = [
    {"role": "user", "content": "How many?"},
    {"role": "assistant", "content": "three and four~seven"},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "yes"},
]


@pytest.fixture(scope="module")
def thoughtful(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_target(tmp_path_factory.mktemp("thoughtful"), template=THOUGHTFUL)


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class Thinker:
    """Thinks aloud before every reply, or says the same without a thought."""

    def __init__(self, chat: ChatTemplate, text: str) -> None:
        self.ids = chat.tokenizer.encode(text)

    def reply(self, asked: list[list[int]], settings: GenerationSettings, request_ids: list[int]) -> list[Reply]:
        return [Reply([*self.ids, EOS], "eos") for _ in asked]


@pytest.mark.parametrize(("text", "anew"), [("three and four~seven", [1]), ("seven", [])])
def test_a_dialogue_whose_thoughts_the_template_drops_begins_anew_and_says_so(text: str, anew: list[int]) -> None:
    chat = ChatTemplate(make_tokenizer(THOUGHTFUL))
    asked = Prompt(
        "p", (Message(role="user", content="How many?"), Message(role="user", content="Sure?")), "train", "t"
    )
    [row] = answer_batch(
        [(asked, first_prompt_ids(asked, chat))],
        GenerationSettings(8, eos_token_ids=(EOS,)),
        None,
        chat,
        Thinker(chat, text),
    )
    first, second = row["turns"]
    assert row.get("begun_anew", []) == anew
    assert (
        chat.tokenizer.decode(second["prompt_ids"])
        == "<|user|>\nHow many?\n<|assistant|>\nseven<|end|>\n<|user|>\nSure?\n<|assistant|>\n"
    )
    whole = first["prompt_ids"] + first["reply_ids"]
    assert (second["prompt_ids"][: len(whole)] == whole) == (not anew)


def test_each_reply_of_a_rewritten_conversation_is_cached_with_its_own_prompt(
    thoughtful: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = [TALK[0], {"role": "assistant", "content": "seven"}, *TALK[2:]]
    source = write(tmp_path / "own.jsonl", {"id": "a", "messages": TALK}, {"id": "b", "messages": plain})
    extract(str(thoughtful), source, tmp_path / "cache")
    assert "1 conversations were begun anew" in capsys.readouterr().out
    cache = HiddenStateCache(tmp_path / "cache")
    tokenizer = load_tokenizer(str(thoughtful))
    read = {}
    for index in range(len(cache)):
        sample = cache[index]
        read[sample.id] = [tokenizer.decode(sample.input_ids[kept]) for kept in (sample.loss_mask, ~sample.loss_mask)]
    assert read["a"][0] == "three and four~seven<|end|>"
    assert read["a#1"] == [
        "yes<|end|>",
        "<|user|>\nHow many?\n<|assistant|>\nseven<|end|>\n<|user|>\nSure?\n<|assistant|>\n\n",
    ]
    assert read["b"][0] == "seven<|end|>yes<|end|>"
    assert set(read) == {"a", "a#1", "b"}


def test_replies_that_began_anew_are_samples_of_their_own_and_others_must_continue(tmp_path: Path) -> None:
    turns = [
        {"prompt_ids": [5, 6], "reply_ids": [7], "finish": "eos"},
        {"prompt_ids": [5, 9], "reply_ids": [8], "finish": "eos"},
    ]
    rows = [
        {"id": "good", "turns": turns, "begun_anew": [1]},
        {"id": "bad", "turns": turns},
        {"id": "odd", "turns": turns, "begun_anew": "1"},
    ]
    corpus = Corpus(write(tmp_path / "r.jsonl", *rows), lambda: ChatTemplate(make_tokenizer()), None, 64)
    found = list(corpus.read())
    assert [one.id for one in found] == ["good", "good#1", "bad", "odd"]
    assert found[1].input_ids == [5, 9, 8]
    assert [getattr(one, "reason", "") for one in found[2:]] == [
        "sample bad: the prompt of turn 1 does not begin with the turns before it",
        "begun_anew is '1'; it is a list of turn numbers",
    ]
    survey = corpus.survey()
    assert (survey.num_begun_anew, list(survey.numbers)) == (1, [0, 1])
    assert [one.id for one in corpus.samples(survey, 0, 2)] == ["good", "good#1"]


def test_replies_and_caches_name_the_variables_and_refuse_others(thoughtful: Path, tmp_path: Path) -> None:
    asked = write(tmp_path / "asked.jsonl", {"prompt": "How many?"})
    prompts(str(asked), tmp_path / "p", validation=0.0, test=0.0)
    quiet = TemplateChoice(None, {"quiet": True})
    run = {
        "target": str(thoughtful),
        "prompts": tmp_path / "p",
        "out": tmp_path / "r",
        "reply": ReplyOptions(max_new_tokens=4),
    }
    respond(**run, rendering=quiet)  # type: ignore[arg-type]
    told = json.loads((tmp_path / "r" / "settings.json").read_text())
    assert told["template_args"] == {"quiet": True}
    with pytest.raises(ValueError, match="template"):
        respond(**run)  # type: ignore[arg-type]
    source = write(tmp_path / "own.jsonl", {"id": "a", "messages": TALK[:2]})
    extract(str(thoughtful), source, tmp_path / "c", rendering=quiet)
    own = Manifest.load(tmp_path / "c").identity
    assert own.template_args == '{"quiet": true}'
    with pytest.raises(ValueError, match="template_args"):
        extract(str(thoughtful), source, tmp_path / "c")
    extract(str(thoughtful), source, tmp_path / "plain")
    assert Manifest.load(tmp_path / "plain").identity.template_fingerprint != own.template_fingerprint


def test_a_prompt_that_the_template_refuses_is_dropped_with_the_reason(tmp_path: Path) -> None:
    template = "{% if 'No' in messages[0].content %}{{ raise_exception('not that') }}{% endif %}" + THOUGHTFUL
    folder = save_target(tmp_path / "t", template=template)
    asked = write(tmp_path / "asked.jsonl", {"prompt": "Yes?"}, {"prompt": "No?"})
    prompts(str(asked), tmp_path / "p", validation=0.0, test=0.0)
    respond(str(folder), tmp_path / "p", tmp_path / "r", reply=ReplyOptions(max_new_tokens=2))
    assert len((tmp_path / "r" / "responses.jsonl").read_text().splitlines()) == 1
    assert "not that" in (tmp_path / "r" / "dropped.jsonl").read_text()


@pytest.mark.parametrize(
    ("row", "template"),
    [
        ({"text": "Once  there was a\npear tree"}, None),
        ({"prompt": "Once  there was"}, "none"),
        ({"prompt": "Once  there was"}, None),
    ],
)
def test_evaluate_respond_and_decode_ask_the_same_prompt(
    thoughtful: Path, tmp_path: Path, row: dict[str, str], template: str | None
) -> None:
    prompts(str(write(tmp_path / "in.jsonl", row)), tmp_path / "p", validation=0.0, test=0.0, prefix_words=3)
    tokenizer = load_tokenizer(str(thoughtful))
    respond(
        str(thoughtful),
        tmp_path / "p",
        tmp_path / "r",
        reply=ReplyOptions(max_new_tokens=2),
        rendering=TemplateChoice(template=template),
    )
    [answered] = [json.loads(line) for line in (tmp_path / "r" / "responses.jsonl").read_text().splitlines()]
    [sample] = read_samples(tmp_path / "p", tokenizer, template)
    decoded = prompt_ids(tokenizer, "Once  there was", template="none" if "text" in row else template)
    assert answered["turns"][0]["prompt_ids"] == list(sample.prompt_ids) == decoded


def test_documents_and_questions_in_one_file_are_each_read_in_their_own_way() -> None:
    tokenizer = make_tokenizer()
    document = Prompt("d", (), "train", "t", text="Once there was", prefix_words=2)
    question = Prompt("q", (Message(role="user", content="How many?"),), "train", "t")
    chat = chat_for([document, question], tokenizer)
    assert tokenizer.decode(first_prompt_ids(document, chat)) == "Once there"
    assert tokenizer.decode(first_prompt_ids(question, chat)) == "<|user|>\nHow many?\n<|assistant|>\n"
    with pytest.raises(ValueError, match="all prompts are plain documents"):
        chat_for([document], tokenizer, options=TemplateOptions(None, {"brief": True}))
    assert asdict(TemplateOptions()) == {"template_name": None, "template_args": None}

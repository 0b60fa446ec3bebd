"""Rows of every format, spoilt in every way: each is read word for word or left out, by every reader, and none ends in a traceback."""

import copy
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from tiny import make_tokenizer
from transformers import PreTrainedTokenizerBase

from draftsmith.data.chat_template import ChatTemplate
from draftsmith.data.corpus import Corpus
from draftsmith.data.formats import Format
from draftsmith.data.prompts import prompts, read_prompts
from draftsmith.json_rows import Dropped, parse_object
from draftsmith.label.mine.questions import read_questions

SEED, NUM_ROWS = 11, 1500
SYSTEM, USER = {"role": "system", "content": "Kurz bitte."}, {"role": "user", "content": "How many äpfel?"}
REPLY = {"role": "assistant", "content": "Seven, \U0001f600.", "weight": 1}
ITEM = {
    "type": "message",
    "role": "assistant",
    "status": "completed",
    "content": [{"type": "output_text", "text": "Ten."}],
}
ROWS: list[dict[str, Any]] = [
    {"id": "a", "messages": [SYSTEM, USER, REPLY, USER, REPLY], "split": "train"},
    {"id": "b", "messages": [{"role": "user", "content": [{"type": "text", "text": "Parts?"}]}, REPLY]},
    {"id": "c", "messages": [USER], "reference": ["Eight."], "split": "train", "source": "s"},
    {"conversations": [{"from": "human", "value": "Well?"}, {"from": "gpt", "value": "Nine."}]},
    {"instruction": "Count.", "input": "a b", "output": "Two."},
    {"question": "1 + 1?", "answer": "It is <<1+1=2>>2."},
    {"turns": ["One?", "Two?"], "reference": ["Yes.", "No."], "category": "c"},
    {"prompt": "Say it.", "id": 7},
    {"id": "d", "text": "Once upon a time.", "messages": [], "split": "train", "source": "s", "prefix_words": 2},
    {"id": "e", "prompt_ids": [5, 6], "reply_ids": [7, 4], "finish": "eos"},
    {"id": "f", "turns": [{"prompt_ids": [5], "reply_ids": [6, 4], "finish": "eos"}], "messages": [USER, REPLY]},
    {"messages": [USER, REPLY, SYSTEM, USER, REPLY]},
    {"input": [{"role": "user", "content": [{"type": "input_text", "text": "Items?"}]}], "output": [ITEM]},
    {"request": {"input": "A log?", "instructions": "Kurz bitte."}, "response": {"output": [ITEM], "error": None}},
    {
        "contents": [
            {"role": "user", "parts": [{"text": "Parts?"}]},
            {"role": "model", "parts": [{"text": "Eleven."}]},
        ],
        "systemInstruction": {"parts": [{"text": "Kurz bitte."}]},
        "tools": None,
    },
    {"conversation": [{"system": "Kurz bitte.", "input": "Pairs?", "output": "Twelve."}]},
]
VALUES: list[Any] = [
    None,
    True,
    0,
    -1,
    7,
    2.5,
    10**30,
    "",
    " ",
    "x",
    [],
    ["x"],
    [[]],
    {},
    {"text": "x"},
    [None],
    [1, True],
]
RAW = [
    "NaN",
    "-Infinity",
    "1" * 5000,
    "[" * 2000 + "]" * 2000,
    '"\\ud83d"',
    '"a\\u0000b"',
    '{"a": 1, "a": 2}',
    "{",
    '"\x01"',
]


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) inside a value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items):
        yield value, key
        yield from _places(inner)


def _mutated(rng: random.Random) -> bytes:
    row = copy.deepcopy(rng.choice(ROWS))
    raw = None
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        places = list(_places(row))
        if not places:
            break
        container, key = rng.choice(places)
        kind = rng.randrange(5)
        if kind == 0:
            del container[key]
        elif kind == 1 and isinstance(container, list):
            container.insert(key, copy.deepcopy(rng.choice([container[key], rng.choice(VALUES)])))
        elif kind == 2 and isinstance(container, dict):
            new = rng.choice(
                ["role", "content", "tool_calls", "weight", "train", "thinking", "text", "messages", "id", key]
            )
            container[new] = copy.deepcopy(rng.choice(VALUES))
        elif kind == 3 and raw is None:
            container[key], raw = "@raw@", rng.choice(RAW)
        else:
            container[key] = copy.deepcopy(rng.choice(VALUES))
    line = json.dumps(row, ensure_ascii=rng.random() < 0.5)
    content = (line if raw is None else line.replace('"@raw@"', raw, 1)).encode()
    if rng.random() < 0.05:
        place = rng.randrange(len(content))
        content = content[:place] + rng.choice([b"\xff", b"\x00", b"\xed\xa0\xbd", b'"', b""]) + content[place + 1 :]
    return content.replace(b"\n", b" ")


def _words(value: Any) -> Iterator[str]:
    """The texts that a row gives for content, in the fields where a reader looks for them."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for inner in value:
            yield from _words(inner)
    elif isinstance(value, dict):
        for name in ("content", "value", "text", "parts", "input", "output"):
            yield from _words(value.get(name))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return make_tokenizer()


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = random.Random(SEED)
    path = tmp_path_factory.mktemp("rows") / "spoilt.jsonl"
    path.write_bytes(b"\n".join(_mutated(rng) for _ in range(NUM_ROWS)) + b"\n")
    return path


def test_every_row_of_a_corpus_is_a_sample_of_its_own_words_or_left_out(
    spoilt: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    corpus = Corpus(spoilt, lambda: ChatTemplate(tokenizer), None, 1000, vocab_size=300)
    lines = spoilt.read_bytes().split(b"\n")
    survey = corpus.survey()
    assert len(survey.lines) + len(survey.dropped) == NUM_ROWS
    assert len(survey.lines) > NUM_ROWS / 7
    assert len(survey.dropped) > NUM_ROWS / 6
    for line, sample in zip(survey.lines, corpus.samples(survey, 0, len(survey.lines)), strict=True):
        row = parse_object(lines[line - 1], any_text=True)
        text = tokenizer.decode(sample.input_ids)
        assert "None" not in text
        assert "{'" not in text
        if "_ids" in json.dumps(row):
            continue  # token ids are the words
        reply = tokenizer.decode([t for t, kept in zip(sample.input_ids, sample.loss_mask, strict=True) if kept])
        assert reply.replace("<|end|>", "").strip(), row
        given = "\n".join(_words([row.get(name) for name in row if name not in ("id", "split", "source", "category")]))
        assert all(word in given for word in reply.replace("<|end|>", " ").replace("It is 2.", "").split()), (
            row,
            reply,
        )


def test_prompts_are_made_of_the_rows_that_can_be_asked(spoilt: Path, tmp_path: Path) -> None:
    for row_format in get_args(Format)[1:]:
        prompts(str(spoilt), tmp_path / row_format, format=row_format)
        found = read_prompts(tmp_path / row_format)
        dropped = (tmp_path / row_format / "dropped.jsonl").read_text(encoding="utf-8").splitlines()
        assert len(found) + len(dropped) == NUM_ROWS
        assert all(isinstance(text, str) for prompt in found for text in prompt.reference)


def test_the_same_rows_in_a_list_give_the_same_prompts(spoilt: Path, tmp_path: Path) -> None:
    pairs = (b"{}", b"[]")
    lines = spoilt.read_bytes().splitlines()
    whole = [line for line in lines if all(line.count(pair[:1]) == line.count(pair[1:]) for pair in pairs)]
    whole = [line for line in whole if line.count(b'"') % 2 == 0][:400]  # others end the list too early or never
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(whole))
    (tmp_path / "rows.json").write_bytes(b"\xef\xbb\xbf[" + b",\n".join(whole) + b"]")
    for name in ("rows.jsonl", "rows.json"):
        prompts(str(tmp_path / name), tmp_path / name[-5:])
    found = [
        [prompt.fields() | {"source": ""} for prompt in read_prompts(tmp_path / name)] for name in ("jsonl", ".json")
    ]
    assert found[0] == found[1]


def test_prompt_files_and_questions_leave_out_what_they_cannot_ask(
    spoilt: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    dropped: list[Dropped] = []
    found = read_prompts(spoilt, None, dropped)
    assert len(found) + len(dropped) == NUM_ROWS
    asked = read_questions(spoilt, ChatTemplate(tokenizer), lambda text: text, 300)
    assert asked

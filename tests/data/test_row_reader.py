"""What a row means is the same for every command, and nothing that is no text is made into text."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from tiny import make_tokenizer

from draftsmith.data.cache.show import render
from draftsmith.data.chat_template import ChatTemplate
from draftsmith.data.chats.tokenized_samples import TokenizedSample
from draftsmith.data.corpus import Corpus
from draftsmith.data.formats import detect_format, to_conversation
from draftsmith.data.prompts import prompts, read_prompts
from draftsmith.json_rows import Dropped, UnusableRow

WriteRows = Callable[..., Path]
USER: dict[str, Any] = {"role": "user", "content": "How many?"}
REPLY: dict[str, Any] = {"role": "assistant", "content": "Seven."}
CALL = {"id": "1", "type": "function", "function": {"name": "w", "arguments": "{}"}}


def corpus_of(source: Path, vocab_size: int | None = None, split: str | None = None) -> Corpus:
    tokenizer = make_tokenizer()
    return Corpus(source, lambda: ChatTemplate(tokenizer), split, 1000, vocab_size)


def outcome(row: object, write_jsonl: WriteRows) -> TokenizedSample | Dropped:
    [found] = corpus_of(write_jsonl([row])).read()
    return found


def marked(sample: TokenizedSample | Dropped) -> str:
    assert isinstance(sample, TokenizedSample), sample
    return render(sample, make_tokenizer(), marks=True).plain.split("\n", 1)[1]


def with_reply(**fields: object) -> dict[str, Any]:
    return {"messages": [USER, REPLY | fields]}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (with_reply(content=None, tool_calls=[CALL]), "turn 1 has tool_calls"),
        (with_reply(content=None), "turn 1 has no content"),
        (with_reply(content=7), "turn 1: the content is int, not text"),
        (with_reply(content=[{"type": "image_url", "image_url": {"url": "x"}}]), "a part is of the type 'image_url'"),
        (with_reply(content=["Seven."]), "a part is str, not an object"),
        (with_reply(content=" \n"), "an empty turn"),
        (with_reply(content=[]), "an empty turn"),
        (with_reply(weight=2), "turn 1 has the weight 2"),
        (with_reply(weight=True), "turn 1 has the weight True"),
        (with_reply(weight=0), "no assistant turn is to be learned from"),
        (with_reply(reasoning_content=["x"]), "'reasoning_content' is list, not text"),
        (with_reply(reasoning_content="3 + 4 is 7"), "turn 1 has a thought, and the chat template"),
        (with_reply(content="I write <|end|> and then nothing more."), "turn 1 has the end token '<|end|>'"),
        ({"messages": [USER, REPLY, {"role": "critic", "content": "sun"}]}, "turn 2 has the role 'critic'"),
        ({"messages": [{"role": "Users", "content": "x"}, REPLY]}, "turn 0 has the role 'Users'"),
        ({"messages": [{"role": ["user"], "content": "x"}, REPLY]}, r"turn 0 has the role \['user'\]"),
        ({"messages": [USER, REPLY, REPLY]}, "turn 2 is the assistant's where the user's belongs"),
        ({"messages": [REPLY, USER, REPLY]}, "turn 0 is the assistant's where the user's belongs"),
        ({"messages": [{"role": "system", "content": "Be brief."}]}, "no user turn"),
        ({"messages": [USER | {"weight": 1}, REPLY]}, "turn 0 is the user's and has a weight"),
        ({"messages": [USER, "Seven."]}, "turn 1 is str, not an object"),
        ({"messages": [USER, REPLY | {"from": "gpt"}]}, "turn 1 has role and from"),
        ({"messages": [USER, REPLY], "id": ["a"]}, r"id is \['a'\], which is neither text nor a whole number"),
        ({"messages": [USER], "reference": 7}, "field 'reference' is neither text nor a list of texts"),
        ({"messages": [USER], "reference": ["Seven.", "Eight."]}, "field 'reference' has 2 answers to 1 user turns"),
        ({"instruction": "Count.", "input": 3, "output": "2"}, "field 'input' is int, not text"),
        ({"instruction": "Count.", "output": 2}, "field 'output' is neither text"),
        ({"text": 7}, "field 'text' is int, not text"),
        ({"prompt_ids": [1, True], "reply_ids": [2]}, "prompt_ids is no list of whole numbers"),
        ({"prompt_ids": [1], "reply_ids": [2.0]}, "reply_ids is no list of whole numbers"),
        ({"prompt_ids": [1], "reply_ids": [-2]}, "reply_ids has the token id -2"),
        ({"prompt_ids": [1], "reply_ids": [2**40]}, "reply_ids has the token id 1099511627776"),
        ({"prompt_ids": [1], "reply_ids": [2], "finish": 3}, "finish is 3, not text"),
        ({"turns": [{"prompt_ids": [1]}, {"reply_ids": [1]}]}, "turn 0: reply_ids is no list"),
    ],
)
def test_what_is_no_text_or_no_conversation_is_left_out_with_its_reason(
    row: dict[str, Any], reason: str, write_jsonl: WriteRows
) -> None:
    found = outcome(row, write_jsonl)
    assert isinstance(found, Dropped), marked(found)
    assert found.place.endswith("rows.jsonl:1")
    with pytest.raises(ValueError, match=reason):
        raise ValueError(found.reason)


@pytest.mark.parametrize(
    "row",
    [
        with_reply(content=[{"type": "text", "text": "Sev"}, {"type": "text", "text": "en."}]),
        with_reply(weight=1, name="bot", tool_calls=None, reasoning_content=""),
        {"conversations": [{"from": "human", "value": "How many?"}, {"from": "gpt", "value": "Seven."}]},
        {"messages": [USER], "reference": "Seven."},
        {"turns": ["How many?"], "reference": ["Seven."]},
        {"instruction": "How many?", "input": None, "output": "Seven.", "score": 7},
        {"question": "How many?", "answer": "Seven."},
    ],
)
def test_every_spelling_of_a_conversation_gives_the_same_sample(row: dict[str, Any], write_jsonl: WriteRows) -> None:
    assert marked(outcome(row, write_jsonl)) == "<|user|>\nHow many?\n<|assistant|>\n«Seven.<|end|>»\n\n"


def test_a_turn_of_weight_0_is_read_and_not_learned_from(write_jsonl: WriteRows) -> None:
    row = {"messages": [USER, REPLY | {"content": "Nine.", "weight": 0}, USER, REPLY | {"weight": 1}]}
    text = marked(outcome(row, write_jsonl))
    assert "«Seven.<|end|>»" in text
    assert "Nine.<|end|>" in text
    assert "«Nine." not in text


def test_prompts_keep_what_is_asked_and_leave_answers_out_that_are_more_or_less_than_words(
    tmp_path: Path, write_jsonl: WriteRows, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"turns": ["Name a fruit."], "reference": "Apple is one."},
        {"turns": ["Name a nut."], "reference": [["Hazel", "Almond"]]},
        {"messages": [{"role": "user", "content": "a?"}, REPLY | {"content": ""}]},
        {"messages": [{"role": "user", "content": "b?"}, REPLY | {"thinking": "hm"}]},
        {"messages": [{"role": "user", "content": "c?"}, REPLY | {"weight": 0}]},
    ]
    for number, row in enumerate(rows):
        prompts(str(write_jsonl([row])), tmp_path / str(number), validation=0.0, test=0.0)
    found = [read_prompts(tmp_path / str(number))[0].reference for number in range(len(rows))]
    assert found == [("Apple is one.",), (), (), (), ()]
    told = capsys.readouterr().out
    assert told.count("1 row kept as a prompt, without its answers") == 4
    assert "rows.jsonl:1: an answer has a thought" in told


def test_documents_among_a_projects_own_prompts_are_read_back(tmp_path: Path, write_jsonl: WriteRows) -> None:
    prompts(str(write_jsonl([{"text": "Once upon a time."}])), tmp_path / "one")
    prompts(str(tmp_path / "one" / "prompts.jsonl"), tmp_path / "two")
    assert read_prompts(tmp_path / "two")[0].text == "Once upon a time."


def test_a_row_is_left_out_of_every_pass_alike(tmp_path: Path, write_jsonl: WriteRows) -> None:
    rows: Sequence[object] = [
        with_reply(),
        with_reply(content=7),
        {"prompt_ids": [5], "reply_ids": [6, 900]},
        with_reply(),
    ]
    source = write_jsonl(rows)
    source.write_text(source.read_text() + '{"messages": [\n')
    corpus = corpus_of(source, vocab_size=300)
    survey = corpus.survey()
    assert list(survey.lines) == [1, 4]
    assert [row.place.rpartition(":")[2] for row in survey.dropped] == ["2", "3", "5"]
    assert corpus.samples(survey, 0, 2) == list(corpus.all_samples([]))
    dropped: list[Dropped] = []
    assert [sample.id for sample in corpus.all_samples(dropped)] == ["rows-1", "rows-4"]
    assert dropped == list(survey.dropped)


def test_a_file_of_which_nothing_is_left_is_refused_with_the_reasons(write_jsonl: WriteRows) -> None:
    source = write_jsonl([with_reply(content=None), with_reply(content=None), {"foo": 1}])
    with pytest.raises(
        ValueError, match=r"no sample is left .*rows.jsonl:1: turn 1 has no content \(2 such\).*:3: no known format"
    ):
        corpus_of(source).survey()


def test_a_row_that_the_template_refuses_is_left_out(tmp_path: Path, write_jsonl: WriteRows) -> None:
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + str(
        make_tokenizer().chat_template
    )
    tokenizer = make_tokenizer(refusing)
    source = write_jsonl([{"messages": [{"role": "system", "content": "Be brief."}, USER, REPLY]}, with_reply()])
    first, second = Corpus(source, lambda: ChatTemplate(tokenizer), None, 1000).read()
    assert isinstance(first, Dropped)
    assert "no system turn" in first.reason
    assert isinstance(second, TokenizedSample)


def test_formats_are_told_by_fields_that_are_not_null() -> None:
    row = {"messages": None, "conversations": None, "instruction": "Count.", "input": None, "output": None}
    assert detect_format(row) == "alpaca"
    with pytest.raises(UnusableRow, match="'prompt' is dict, not text"):
        to_conversation({"prompt": {}}, "prompt")


def test_the_record_of_a_row_names_its_place_reason_and_beginning(tmp_path: Path, write_jsonl: WriteRows) -> None:
    source = write_jsonl([{"prompt": "One?"}])
    source.write_text(source.read_text() + '{"prompt": "Nice \\ud83d day?"}\n')
    prompts(str(source), tmp_path / "out")
    [line] = (tmp_path / "out" / "dropped.jsonl").read_text().splitlines()
    assert json.loads(line) == {
        "place": f"{source}:2",
        "reason": "half a surrogate pair (\\ud83d)",
        "row": '{"prompt": "Nice \\ud83d day?"}',
    }


def test_a_file_beside_the_rows_that_only_has_their_name_says_nothing_of_them(tmp_path: Path) -> None:
    source = tmp_path / "own.jsonl"
    source.write_text(json.dumps(with_reply()) + "\n")
    (tmp_path / "own.json").write_text("[]")
    corpus_of(source).check_tokenizer("any")


def test_a_reply_in_token_ids_may_hold_any_character_as_text(write_jsonl: WriteRows) -> None:
    turn = {"prompt_ids": [5, 6], "reply_ids": [7], "finish": "length"}
    row = {"id": "a", "turns": [turn], "messages": [USER, REPLY | {"content": "\0"}]}
    found = outcome(row, write_jsonl)
    assert isinstance(found, TokenizedSample)
    assert found.input_ids == [5, 6, 7]
    [bad] = corpus_of(write_jsonl([row | {"id": "\ud83d"}])).read()
    assert isinstance(bad, Dropped)

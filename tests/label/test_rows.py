"""Labelled answers as token rows: prompts, labels, disagreement, what is left out, and that a cache can be made of them."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from tiny import make_tokenizer

from draftsmith import cli
from draftsmith.data.cache.reader import HiddenStateCache
from draftsmith.data.chat_template import ChatTemplate
from draftsmith.data.chats.messages import Message
from draftsmith.label.answer_rows import write_answers
from draftsmith.label.commands.rows_command import make_rows, merged_labels
from draftsmith.label.row_checks import REFUSED, UNPLACED, UNTOUCHED
from draftsmith.label.schema import Answer, Label, Tokens
from draftsmith.label.store.store import Store
from draftsmith.label.token_labels import CORRECT, IGNORED, WRONG, token_labels, tokenize
from draftsmith.label.token_rows import read_rows, write_rows

Make = Callable[..., Answer]
CORRECT_LABEL = Label("correct", "bob", "rule")
TEXT = "Tom has three apples. He buys nine, so he has seven apples now."
ERROR = (TEXT.index("nine"), TEXT.index("nine") + 4)


@pytest.fixture
def answers(make: Make) -> list[Answer]:
    return [
        make("good", "Tom has seven apples.", CORRECT_LABEL),
        make("bad", TEXT, Label("wrong", "alice", "person", ERROR)),
        make("lost", "Tom has nine apples.", Label("unplaced", "alice", "person")),
        make("open", "Tom has no apples."),
    ]


@pytest.fixture
def file(answers: list[Answer], tmp_path: Path) -> Path:
    path = tmp_path / "answers.jsonl"
    write_answers(path, answers)
    return path


def run(*words: object) -> int:
    return cli.main(["label", "rows", *map(str, words)])


def test_rows_hold_what_the_target_reads(
    answers: list[Answer], file: Path, target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rows.jsonl"
    assert run("--answers", file, "--target", target, "--out", out) == 0
    good, bad = read_rows(out)
    tokenizer = make_tokenizer()
    assert tokenizer.decode(bad.prompt_ids) == "<|user|>\nHow many? (bad)\n<|assistant|>\n"
    assert tokenizer.decode(bad.reply_ids) == TEXT
    assert set(good.labels) == {CORRECT}
    assert (good.id, good.how, good.source) == ("good", "rule", "tests")
    assert bad.question == answers[1].question() != good.question
    wrong = [token for token, label in zip(bad.reply_ids, bad.labels, strict=True) if label == WRONG]
    assert "nine" in tokenizer.decode(wrong)
    first = bad.labels.index(WRONG)
    assert set(bad.labels[:first]) == {CORRECT}
    assert set(bad.labels[first + len(wrong) :]) == {IGNORED}
    told = capsys.readouterr().out
    assert "2 rows of 2 questions" in told
    assert f"1 answers left out: 1 {UNPLACED} (first: lost" in told


def test_what_follows_the_error_may_count_as_wrong(file: Path, target: Path, tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    assert run("--answers", file, "--target", target, "--out", out, "--after", "wrong") == 0
    _, bad = read_rows(out)
    assert set(bad.labels[bad.labels.index(WRONG) :]) == {WRONG}


def test_a_store_gives_the_same_rows_each_time(answers: list[Answer], file: Path, target: Path, tmp_path: Path) -> None:
    place = tmp_path / "labels.db"
    with Store(str(place), create=True) as store:
        store.add(answers, "me")
    for name in ("one", "two"):
        assert run("--store", place, "--target", target, "--out", tmp_path / name) == 0
    assert run("--answers", file, "--target", target, "--out", tmp_path / "three") == 0
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes() == (tmp_path / "three").read_bytes()


def test_a_cache_is_made_of_rows_as_they_are(file: Path, target: Path, tmp_path: Path) -> None:
    out, cache = tmp_path / "rows.jsonl", tmp_path / "cache"
    assert run("--answers", file, "--target", target, "--out", out) == 0
    assert cli.main(["data", "extract", "--target", str(target), "--source", str(out), "--out", str(cache)]) == 0
    samples = {sample.id: sample for sample in HiddenStateCache(cache)}
    for row in read_rows(out):
        sample = samples.pop(row.id)
        assert sample.input_ids.tolist() == row.prompt_ids + row.reply_ids
        assert sample.loss_mask.tolist() == [False] * len(row.prompt_ids) + [True] * len(row.reply_ids)
    assert not samples


def test_a_label_made_on_another_tokenizers_tokens_is_placed_by_characters(
    answers: list[Answer], target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    letters = Tokens("f" * 64, tuple((index, index + 1) for index in range(len(TEXT))))
    write_answers(tmp_path / "a.jsonl", [answers[0], replace(answers[1], tokens=letters)])
    write_answers(tmp_path / "b.jsonl", answers[:2])
    for name in "ab":
        assert run("--answers", tmp_path / f"{name}.jsonl", "--target", target, "--out", tmp_path / name) == 0
        assert ("1 answers were labelled on another tokenizer's tokens" in capsys.readouterr().out) == (name == "a")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_several_labels_of_one_answer_are_one_row(answers: list[Answer]) -> None:
    tokenizer = make_tokenizer()
    bad = answers[1]
    offsets = tokenize(TEXT, tokenizer).offsets
    agreed = replace(bad, label=replace(bad.label, labelled_by="carol", how="mined"))  # type: ignore[type-var]
    [row] = make_rows([bad, agreed], tokenizer, ChatTemplate(tokenizer)).rows
    assert row.labels == token_labels(bad, offsets)
    assert row.how == "mined+person"
    made = make_rows([bad, replace(bad, label=CORRECT_LABEL)], tokenizer, ChatTemplate(tokenizer))
    [row] = made.rows
    assert made.num_disputed == 1
    first = token_labels(bad, offsets).index(WRONG)
    assert row.labels == [CORRECT] * first + [IGNORED] * (len(offsets) - first)


def test_merging_by_hand() -> None:
    _ = IGNORED
    assert merged_labels([[1, 1, 0, _, _], [1, 1, 1, 1, _]]) == ([1, 1, _, _, _], True)
    assert merged_labels([[1, _, _], [_, _, 0]]) == ([1, _, 0], False)


def test_too_long_rows_and_errors_on_no_token_are_left_out_and_told(
    answers: list[Answer], target: Path, tmp_path: Path, make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    write_answers(tmp_path / "a.jsonl", [*answers[:2], make("long", "Tom " * 300, CORRECT_LABEL)])
    assert run("--answers", tmp_path / "a.jsonl", "--target", target, "--out", tmp_path / "rows") == 0
    told = capsys.readouterr().out
    assert "1 longer than the target's context" in told
    assert "of 256 tokens" in told
    assert [row.id for row in read_rows(tmp_path / "rows")] == ["good", "bad"]


def test_a_prompt_that_the_template_refuses_is_left_out(answers: list[Answer]) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% if 'tiger' in messages[0].content %}{{ raise_exception('no tigers') }}{% endif %}{{ messages[0].content }}"
    )
    tiger = replace(answers[0], id="tiger", messages=(Message(role="user", content="A tiger?"),))
    made = make_rows([tiger, answers[0]], tokenizer, ChatTemplate(tokenizer))
    assert [row.id for row in made.rows] == [answers[0].id]
    [(name, reason)] = made.left_out
    assert reason == REFUSED
    assert "no tigers" in name


def test_an_error_that_the_tokenizer_leaves_out_is_told(answers: list[Answer], monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = make_tokenizer()
    short = Tokens("x", ((0, 3),))
    monkeypatch.setattr("draftsmith.label.commands.rows_command.tokenize", lambda *_: short)
    made = make_rows([answers[1]], tokenizer, ChatTemplate(tokenizer))
    assert made.rows == []
    assert [reason for _, reason in made.left_out] == [UNTOUCHED]


@pytest.mark.parametrize("chosen", [[0], [2], [0, 2, 3]])
def test_one_class_alone_is_refused(
    answers: list[Answer], target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], chosen: list[int]
) -> None:
    write_answers(tmp_path / "a.jsonl", [answers[index] for index in chosen])
    assert run("--answers", tmp_path / "a.jsonl", "--target", target, "--out", tmp_path / "rows") == 1
    assert "0 wrong tokens" in capsys.readouterr().err
    assert not (tmp_path / "rows").exists()


def test_a_span_outside_the_text_is_refused_with_its_line(
    file: Path, target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    lines[1]["error"] = [4, 999]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run("--answers", file, "--target", target, "--out", tmp_path / "rows") == 1
    assert f"{file}:2: error is [4, 999]" in capsys.readouterr().err


def test_one_id_for_two_answers_is_refused(answers: list[Answer]) -> None:
    tokenizer = make_tokenizer()
    with pytest.raises(ValueError, match="good: two answers have this id"):
        make_rows([answers[0], replace(answers[1], id="good")], tokenizer, ChatTemplate(tokenizer))


def test_who_finds_no_error_does_not_place_the_error_of_another(answers: list[Answer]) -> None:
    tokenizer = make_tokenizer()
    lost, bad = answers[2], answers[1]
    made = make_rows([lost, replace(lost, label=CORRECT_LABEL)], tokenizer, ChatTemplate(tokenizer))
    assert made.rows == []
    assert made.left_out == [("lost", UNPLACED)]
    # Where somebody has placed it, one who only saw that there is one adds nothing.
    unsure = replace(bad, label=Label("unplaced", "carol", "person"))
    [row] = make_rows([bad, unsure], tokenizer, ChatTemplate(tokenizer)).rows
    assert row.labels == token_labels(bad, tokenize(TEXT, tokenizer).offsets)


def test_a_length_without_room_is_refused(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--answers", file, "--target", "embedded:target", "--out", tmp_path / "rows", "--max-length", 0]
    assert run(*words) == 1
    assert "max_length is 0; it counts tokens" in capsys.readouterr().err


ROW = {
    "id": "a",
    "question": "q",
    "source": "tests",
    "how": "rule",
    "prompt_ids": [5, 6],
    "reply_ids": [7, 8, 9],
    "labels": [1, 0, -100],
}


def save(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    [row] = read_rows(save(tmp_path / "rows", ROW))
    write_rows(tmp_path / "again", [row])
    assert list(read_rows(tmp_path / "again")) == [row]
    assert asdict(row) == ROW


@pytest.mark.parametrize("field", sorted(ROW))
def test_a_row_without_a_field_is_refused_with_its_line(tmp_path: Path, field: str) -> None:
    short = {name: value for name, value in ROW.items() if name != field}
    path = save(tmp_path / "rows", ROW, short | ({} if field == "id" else {"id": "b"}))
    with pytest.raises(ValueError, match=f"{path}:2: {field} is missing"):
        list(read_rows(path))


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("id", "", "a text that is not empty"),
        ("id", 3, "a text that is not empty"),
        ("question", None, "a text that is not empty"),
        ("prompt_ids", "5 6", "a list of integers"),
        ("reply_ids", [7, 8.0, 9], "a list of integers"),
        ("reply_ids", [7, 8], "one label for each of the 2 reply tokens"),
        ("labels", [True, False, -100], "a list of integers"),
        ("labels", [1, 0], "one label for each of the 3 reply tokens"),
        ("labels", [1, 0, 2], r"a label is 1 \(correct\), 0 \(wrong\) or -100"),
    ],
)
def test_a_field_that_breaks_its_rule_is_refused_with_its_line(
    tmp_path: Path, field: str, value: object, rule: str
) -> None:
    path = save(tmp_path / "rows", ROW, {**ROW, "id": "b", field: value})
    with pytest.raises(ValueError, match=rule) as refused:
        list(read_rows(path))
    assert f"{path}:2: {'labels' if 'label' in rule else field} is" in str(refused.value)


def test_a_repeated_id_is_refused_with_both_lines(tmp_path: Path) -> None:
    path = save(tmp_path / "rows", ROW, {**ROW, "id": "b"}, ROW)
    with pytest.raises(ValueError, match=f'{path}:3: id is "a"; line 1 has it already'):
        list(read_rows(path))


@pytest.mark.parametrize("words", [[], ["--store", "a.db", "--answers", "b.jsonl"]])
def test_a_store_or_a_file_is_needed(words: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run("--target", "embedded:target", "--out", tmp_path / "rows", *words) == 1
    assert "either a store" in capsys.readouterr().err

import json
from pathlib import Path

import pytest

from draftsmith.evaluate.records import Sample
from draftsmith.evaluate.samples import read_samples, readable_by
from draftsmith.models.files.loading import load_tokenizer
from draftsmith.models.target.target import Target


def write_rows(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def prompt_row(text: str, split: str = "test") -> dict:
    return {"id": text, "messages": [{"role": "user", "content": text}], "split": split, "source": "mine"}


def test_prompts_are_rendered_by_the_targets_template(tmp_path: Path, target: Path) -> None:
    tokenizer = load_tokenizer(str(target))
    file = write_rows(tmp_path / "p.jsonl", prompt_row("ab"), prompt_row("cd", "train"))
    (sample,) = read_samples(file, tokenizer, split="test")
    assert tokenizer.decode(list(sample.prompt_ids)) == "<|user|>\nab\n<|assistant|>\n"
    assert (sample.id, sample.source) == ("ab", "mine")


def test_rows_with_ids_are_taken_as_they_are(tmp_path: Path, target: Path) -> None:
    tokenizer = load_tokenizer(str(target))
    file = write_rows(tmp_path / "p.jsonl", {"prompt_ids": [4, 5], "kind": "gsm"}, {"prompt_ids": [6], "id": "x"})
    assert read_samples(file, tokenizer) == [Sample("line-1", "gsm", (4, 5)), Sample("x", "prompts", (6,))]
    assert len(read_samples(file, tokenizer, limit=1)) == 1


def test_replies_give_the_prompt_of_their_first_turn(tmp_path: Path, target: Path) -> None:
    turns = [{"prompt_ids": [4, 5], "reply_ids": [6], "finish": "eos"}]
    file = write_rows(tmp_path / "r.jsonl", {"id": "r", "source": "s", "turns": turns})
    assert read_samples(file, load_tokenizer(str(target))) == [Sample("r", "s", (4, 5))]


def test_bad_files_are_refused_by_name_and_line(tmp_path: Path, target: Path) -> None:
    tokenizer = load_tokenizer(str(target))
    with pytest.raises(ValueError, match="does not exist"):
        read_samples(tmp_path / "nowhere.jsonl", tokenizer)
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match="is empty"):
        read_samples(tmp_path / "empty.jsonl", tokenizer)
    file = write_rows(tmp_path / "text.jsonl", {"prompt_ids": "one"}, {"prompt_ids": [True]})
    with pytest.raises(ValueError, match=r"text.jsonl:1: prompt_ids is no list of whole numbers \(2 such\)"):
        read_samples(file, tokenizer)


def test_rows_that_are_no_prompt_are_left_out_and_counted(
    tmp_path: Path, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = load_tokenizer(str(target))
    (tmp_path / "ids.jsonl").write_text('{"prompt_ids": [1]}\n{"prompt_ids": [1}\n')
    assert len(read_samples(tmp_path / "ids.jsonl", tokenizer)) == 1
    assert "1 row dropped" in (told := capsys.readouterr().err)
    assert "ids.jsonl:2: not valid JSON" in told
    file = write_rows(tmp_path / "p.jsonl", prompt_row("ab"), prompt_row("cd") | {"messages": "cd"}, prompt_row("ab"))
    assert [sample.id for sample in read_samples(file, tokenizer)] == ["ab"]
    assert "p.jsonl:2: the list of turns" in (told := capsys.readouterr().err)
    assert "p.jsonl:3: the id 'ab' as in" in told


@pytest.mark.parametrize("broken", [{}, {"prompt_ids": None}, {"turns": ["How many?"]}])
def test_a_broken_first_row_does_not_decide_what_the_others_are(tmp_path: Path, target: Path, broken: dict) -> None:
    tokenizer = load_tokenizer(str(target))
    for good in ({"id": "ab", "prompt_ids": [4]}, prompt_row("ab")):
        file = write_rows(tmp_path / "p.jsonl", broken, good)
        assert [sample.id for sample in read_samples(file, tokenizer)] == ["ab"]


@pytest.mark.parametrize("field", ["turns", "messages", "prompt"])
def test_a_published_question_is_read_as_it_is_in_whatever_field_its_turns_are(
    field: str, tmp_path: Path, target: Path
) -> None:
    tokenizer = load_tokenizer(str(target))
    turns = ["ab", "cd"] if field == "turns" else [{"role": "user", "content": text} for text in ("ab", "cd")]
    row = {"question_id": "7a", "category": "coding", "multiturn": True, "source": "ours", field: turns}
    (sample,) = read_samples(write_rows(tmp_path / "q.jsonl", row), tokenizer)
    assert tokenizer.decode(list(sample.prompt_ids)) == "<|user|>\nab\n<|assistant|>\n"
    assert sample.category == "coding"
    own = write_rows(tmp_path / "p.jsonl", prompt_row("ab") | {"question_id": "7a"})
    assert [sample.id for sample in read_samples(own, tokenizer)] == ["ab"]


def test_prompts_that_the_target_cannot_read_are_left_out_and_counted(
    target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Target.load(str(target))
    assert model.max_positions is not None
    short, full = Sample("a", "s", (1, 2)), Sample("b", "s", (1,) * model.max_positions)
    foreign = Sample("c", "s", (1, model.ends.vocab_size))
    assert readable_by(model, [short, full, foreign]) == [short]
    assert f"2 of 3 prompts left out; the first is b: fills the context of {model.max_positions}" in (
        capsys.readouterr().err
    )
    with pytest.raises(ValueError, match=r"no prompt is left: 1 of 1 .* c: a token id that is not below"):
        readable_by(model, [foreign])

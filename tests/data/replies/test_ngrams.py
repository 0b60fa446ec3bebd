"""`draftsmith data ngrams`: which tokens are counted, what is written, and what is no text."""

import json
from pathlib import Path

import pytest
import torch

from draftsmith.data.replies.ngrams_command import ngrams
from draftsmith.models.files.loading import load_tokenizer
from draftsmith.models.ngrams.table import load_ngrams


def write(path: Path, *answers: str) -> Path:
    rows = [
        {"messages": [{"role": "user", "content": "one two three"}, {"role": "assistant", "content": answer}]}
        for answer in answers
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_replies_are_counted_and_prompts_are_not(
    target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ngrams(write(tmp_path / "chats.jsonl", "four five", "four five six"), str(target), tmp_path / "table", order=2)
    table = load_ngrams(tmp_path / "table")
    assert "2-grams in" in capsys.readouterr().out
    tokenizer = load_tokenizer(str(target))
    prompt, reply = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("one two three", "four five"))
    unigrams = set((table.keys_G[table.orders_C[1:] == 1] % table.vocab_size).tolist())
    assert set(reply) <= unigrams
    assert not {token for token in prompt if token not in reply} <= unigrams
    context = table.context_of(torch.tensor([reply[:-1][-1:]]))
    assert float(table.log_prob(context, torch.tensor(reply[-1])).exp()) > 0.3
    record = json.loads((tmp_path / "table" / "provenance.json").read_text())
    assert record["config"]["order"] == 2


def test_the_same_command_replaces_its_own_folder_and_no_other(target: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "chats.jsonl", "four five")
    for order in (2, 3):
        ngrams(source, str(target), tmp_path / "table", order=order)
    assert load_ngrams(tmp_path / "table").order == 3
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="mine"):
        ngrams(source, str(target), tmp_path / "mine")
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"


def test_bad_numbers_and_texts_without_replies_are_errors(target: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="both must be at least 1"):
        ngrams(write(tmp_path / "a.jsonl", "four"), str(target), tmp_path / "table", order=0)
    (tmp_path / "b.jsonl").write_text('{"messages": [{"role": "user", "content": "one"}]}\n')
    with pytest.raises(ValueError, match=r"no tokens to count|no row|nothing"):
        ngrams(tmp_path / "b.jsonl", str(target), tmp_path / "table")
    assert not (tmp_path / "table").exists()

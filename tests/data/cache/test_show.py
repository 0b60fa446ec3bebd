from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from draftsmith.data.cache.extract import extract
from draftsmith.data.cache.show import render, show
from draftsmith.data.chat_template import ChatTemplate
from draftsmith.data.chats.tokenized_samples import TokenizedSample

CONVERSATION = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "Seven 🍎"}]


def test_masked_text_is_dimmed_and_the_rest_is_not(tokenizer: PreTrainedTokenizerBase) -> None:
    sample = ChatTemplate(tokenizer).conversation("a", CONVERSATION)  # type: ignore[arg-type]
    text = render(sample, tokenizer)
    styles = {text.plain[span.start : span.end]: str(span.style) for span in text.spans}
    assert styles["Seven 🍎<|end|>"] == "not bold green"
    assert styles["<|user|>\nHow many?\n<|assistant|>\n"] == "not bold dim"
    assert f"{len(sample.input_ids)} tokens, {sample.num_labelled} trained on" in text.plain


def test_token_boundaries_are_shown_on_request(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = tokenizer.encode("He has seven")
    text = render(TokenizedSample("a", ids, [True] * len(ids)), tokenizer, tokens=True).plain
    assert text.count("│") == len(ids)


def test_files_and_caches_show_the_same_sample(
    tmp_path: Path, target: Path, write_jsonl: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_jsonl([{"id": "a", "messages": CONVERSATION}, {"id": "b", "messages": CONVERSATION}])
    extract(str(target), source, tmp_path / "cache")
    capsys.readouterr()
    show(source, str(target), index=1)
    from_file = capsys.readouterr().out
    assert from_file.startswith("b: ")
    assert "«Seven 🍎<|end|>»" in from_file
    show(tmp_path / "cache", index=1)
    assert capsys.readouterr().out == from_file


def test_what_cannot_be_shown_is_said(tmp_path: Path, target: Path, write_jsonl: Callable[..., Path]) -> None:
    source = write_jsonl([{"id": "a", "messages": CONVERSATION}])
    with pytest.raises(ValueError, match="no sample 7"):
        show(source, str(target), index=7)
    with pytest.raises(ValueError, match="give the target with --target"):
        show(source)
    with pytest.raises(ValueError, match="samples count from 0"):
        show(source, str(target), index=-1)

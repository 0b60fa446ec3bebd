"""The tokenizer of the tiny target, and files of rows."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from draftsmith.models.loading import load_tokenizer


@pytest.fixture(scope="session")
def tokenizer(target: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(str(target))


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., Path]:
    def write(rows: list[dict[str, object]], name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture
def reply_file(write_jsonl: Callable[..., Path]) -> Path:
    """Twelve samples of different lengths in token ids."""
    rows = [
        {
            "id": f"s{n}",
            "split": "train",
            "prompt_ids": list(range(5, 8 + n % 5)),
            "reply_ids": [20 + n] * (3 + n) + [4],
        }
        for n in range(12)
    ]
    return write_jsonl(rows, "replies.jsonl")

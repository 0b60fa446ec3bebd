"""The tokenizer of the tiny target, and files of rows."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from draftsmith.models.files import loading
from draftsmith.models.files.loading import load_tokenizer
from draftsmith.models.files.pretrained import read_model


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
def few_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for bitsandbytes, which a CPU has not: `--quantization` rounds the weights to sixteenths."""

    def rounded(*arguments: Any, quantization_config: object = None, **options: Any) -> PreTrainedModel:
        model: PreTrainedModel = read_model(*arguments, **options)
        if quantization_config is not None:
            with torch.no_grad():
                for weight in model.parameters():
                    weight.copy_((weight * 16).round() / 16)
        return model

    monkeypatch.setattr(loading, "_quantization", lambda kind: kind)
    monkeypatch.setattr(loading, "read_model", rounded)


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

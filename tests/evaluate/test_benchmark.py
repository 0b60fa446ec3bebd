import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from draftsmith.models.target import load_tokenizer

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "chat6m.py"


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("chat6m", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["chat6m"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_without_its_data_the_benchmark_says_so_and_ends(
    tmp_path: Path, script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["chat6m.py", "--data", str(tmp_path), "--work", str(tmp_path / "work")])
    assert script.main() == 0
    assert "skipped:" in capsys.readouterr().out
    assert not (tmp_path / "work").exists()


def test_the_data_sets_own_answers_are_found_and_cleaned(tmp_path: Path, script: ModuleType, target: Path) -> None:
    (tmp_path / "prompts").mkdir()
    (tmp_path / "text").mkdir()
    question = {"question": "How many?", "answer": "3+4 = <<3+4=7>>7\n#### 7"}
    (tmp_path / "prompts" / "gsm8k_train.jsonl").write_text(json.dumps(question) + "\n")
    (tmp_path / "text" / "tinystories_valid.txt").write_text("A cat sat. It ran.\n<|endoftext|>\nA dog.\n")
    asked = ["How many?", "Please tell a story that begins: A cat sat.", "Nobody knows this one"]
    rows = [{"messages": [{"role": "user", "content": text}], "prompt_ids": [4], "reply_ids": [5]} for text in asked]
    replies = tmp_path / "replies.jsonl"
    replies.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = list(script.dataset_rows(tmp_path, replies, str(target)))
    tokenizer = load_tokenizer(str(target))
    ends = [row["reply_ids"][-1] for row in found]
    expected = [tokenizer.encode(text, add_special_tokens=False) for text in ("3+4 = 7\n#### 7", "A cat sat. It ran.")]
    assert [row["reply_ids"][:-1] for row in found] == expected
    assert ends == [tokenizer.eos_token_id] * 2

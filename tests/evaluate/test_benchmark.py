import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from draftsmith.models.files.loading import load_tokenizer


@pytest.fixture
def script() -> ModuleType:
    return importlib.import_module("benchmarks.drafters.chat6m")


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


def row(drafter: str, speedup: float, shape: str = "1x4") -> dict[str, object]:
    return {
        "drafter": drafter, "shape": shape, "speedup": speedup, "tokens_per_step": 2.5, "exact_share": 1.0,
        "tokens_per_step_interval": [2.4, 2.6], "speedup_interval": [1.0, 2.0], "speedup_over_transformers": None,
    }  # fmt: skip


def test_the_summary_takes_each_familys_fastest_shape_of_the_same_training_time(tmp_path: Path) -> None:
    families = importlib.import_module("benchmarks.drafters.families")
    timed = [row("plain", 1.0, ""), row("redrafter", 1.5), row("redrafter", 1.7, "4x5n15"), row("eagle", 1.2)]
    table = families.summary({"embedded": {"seconds": timed, "steps": [row("redrafter", 9.9)]}})
    assert "| embedded | redrafter | 4x5n15 | 2.50 | 1.70 | all |" in table
    assert "9.9" not in table
    page = tmp_path / "results.md"
    page.write_text("before\n<!-- families -->\nold\n<!-- /families -->\nafter\n")
    families.update_results(page, table)
    assert page.read_text() == f"before\n<!-- families -->\n{table}\n<!-- /families -->\nafter\n"


def test_a_sampled_shape_is_not_called_identical_and_a_static_one_is_told_by_its_nodes() -> None:
    families = importlib.import_module("benchmarks.drafters.families")
    table = families.decoding_table(
        [row("hass", 1.1, "s3.2.1.1"), row("eagle", 1.1, "paths:0.0.0+0.1+1+2+3+4+5+6+7+8")]
    )
    assert "| in distribution |" in table
    assert "static, 12 nodes" in table

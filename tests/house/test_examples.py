"""The commands that the README and the pages to start with show do run, in their order, on the embedded target at a small size."""

import json
import os
import shlex
from pathlib import Path

import pytest
from pages import ROOT, make_recipes, make_suggestions, shell_lines
from public_heads import official_eagle

from draftsmith import cli, embedded
from draftsmith.models import TargetEnds

FIRST_RUN, OWN_MODEL = ROOT / "docs" / "start" / "first-run.md", ROOT / "docs" / "start" / "your-model.md"
CHAT_LOGS, OWN_HEAD = (
    ROOT / "docs" / "start" / "chat-logs.md",
    ROOT / "docs" / "how-to" / "drafters" / "your-own-head.md",
)
# What keeps each command short. A page's own options come first, so these win.
SMALL = {
    "data respond": "--max-new-tokens 32",
    "train": "--trainer.max_steps 3 --trainer.accelerator cpu --data.init_args.tokens_per_batch 512 --trainer.enable_progress_bar false",
    "evaluate": "--max-new-tokens 16 --limit 2 --transformers-prompts 1 --ledger-prompts 1",
    "tune": "--max-new-tokens 16 --limit 2 --widths 1 2 --depths 2 --nodes 3 --rounds 1 --rows 1 2",
    "doctor": "--samples 4 --show 0 --skip overfit overlap acceptance train-serve",
    "decode": "--max-new-tokens 16",
}
NOT_OURS = ("make", "source", "tensorboard", "vllm", "python")


def run(line: str) -> None:
    """One command of a page, in this process, in small.

    Raises:
        AssertionError: it fails. `doctor` may find faults: so short a training has some.
    """
    command = line.partition(" > ")[0].replace("org/name", "embedded:target")
    words = [word.removeprefix(".venv/bin/") for word in shlex.split(command)]
    if words[0] in NOT_OURS:
        return
    assert words[0] == "draftsmith", f"no test runs {words[0]!r}"
    name = " ".join(words[1:3]) if words[1] in cli.GROUPS else words[1]
    code = cli.main([*words[1:], *SMALL.get(name, "").split()])
    assert code == 0 or (name == "doctor" and code == 1), line


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder like a checkout that has run nothing, with questions of one's own."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    questions = [problem.question for problem in embedded.distinct_problems("train", 40, seed=5)]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in questions))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_commands_for_ones_own_model_run(folder: Path) -> None:
    for line in shell_lines(OWN_MODEL):
        run(line)
    assert "tokens per step" in (folder / "runs/mine/report/report.md").read_text()


def test_the_commands_from_chat_logs_to_a_served_drafter_run(folder: Path) -> None:
    problems = embedded.distinct_problems("train", 40, seed=5)
    turns = [[("user", problem.question), ("assistant", "I do not know.")] for problem in problems]
    chats = [{"messages": [{"role": role, "content": text} for role, text in chat]} for chat in turns]
    (folder / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    for line in shell_lines(CHAT_LOGS):
        run(line)
    fields = json.loads((folder / "runs/chats/served/config.json").read_text())
    assert fields["architectures"] == ["LlamaForCausalLMEagle", "EagleLlamaForCausalLM"]


def test_the_commands_for_a_head_of_ones_own_run(folder: Path) -> None:
    before = [line for line in shell_lines(OWN_MODEL) if line.startswith("draftsmith data")]
    official_eagle(folder / "heads/public", TargetEnds.load("embedded:target"))
    for line in [*before, *shell_lines(OWN_HEAD)]:
        run(line)
    assert "| public 4x4n8 |" in (folder / "runs/heads/report/report.md").read_text()
    assert (folder / "runs/heads/adapted/model.safetensors").is_file()


def test_the_quickstart_and_what_to_try_next_run(folder: Path) -> None:
    for line in make_recipes("TRAIN_PROMPTS=24", "TEST_PROMPTS=3", "quickstart"):
        run(line)
    for line in shell_lines(FIRST_RUN):
        run(line)
    assert os.listdir(folder / "runs/quickstart/drafter")


def test_the_page_on_the_first_run_shows_what_the_quickstart_says_to_try_next() -> None:
    shown = [shlex.split(line) for line in shell_lines(FIRST_RUN)]
    printed = [shlex.split(line) for line in make_suggestions()]
    assert len(printed) == 3
    assert [words for words in printed if words not in shown] == []


def test_the_readme_shows_what_the_pages_to_start_with_show() -> None:
    shown = [shlex.split(line) for page in (FIRST_RUN, OWN_MODEL) for line in shell_lines(page)]
    commands = [shlex.split(line.removeprefix(".venv/bin/")) for line in shell_lines(ROOT / "README.md")]
    assert [words for words in commands if words not in shown] == []

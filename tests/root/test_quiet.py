"""What a command prints: our own words, and nothing that a library says by itself; in a terminal and in a log file."""

import json
import logging
import os
import pty
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from draftsmith.quiet import SHOW_ALL, is_noise, quiet_libraries

FOREIGN = re.compile(
    r"Loading weights|Writing model shards|it/s|GPU available|TPU available|Tip:|litlogger|weights_only|Seed set to|Checkpoint directory"
    r"|deprecat|FutureWarning|UserWarning|site-packages|real_accelerator|warning of |estimate number of stepping batches"
    r"|`Trainer.fit` stopped|Total params|Restoring states|Fetching|Map:|huggingface",
    re.IGNORECASE,
)
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
CONFIG = """
seed_everything: 0
trainer:
  accelerator: cpu
  devices: 1
  max_epochs: 2
  default_root_dir: {folder}/run
  num_sanity_val_steps: 0
  logger:
    class_path: pytorch_lightning.loggers.TensorBoardLogger
    init_args: {{save_dir: {folder}/run, name: null, version: ""}}
  callbacks:
    - class_path: TreeDecodeValidation
      init_args: {{num_prompts: 2, max_new_tokens: 4}}
    - class_path: KeepBestDrafter
    - class_path: pytorch_lightning.callbacks.ModelCheckpoint
      init_args: {{dirpath: {folder}/run/checkpoints, save_top_k: 0, save_last: true}}
model:
  class_path: DraftModule
  init_args:
    target: {target}
    drafter: {{class_path: draftsmith.train.ReDrafterFamily}}
    num_steps: 2
data:
  class_path: CacheDataModule
  init_args: {{cache: {folder}/cache, val_fraction: 0.2, tokens_per_batch: 40}}
"""


def run(words: list[str], terminal: bool) -> str:
    """All that `draftsmith WORDS` prints, on both streams, without colours and what a bar has drawn over."""
    command = [sys.executable, "-m", "draftsmith.cli", *words]
    variables = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "120"}
    if not terminal:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=variables)
        assert done.returncode == 0, done.stdout
        return done.stdout
    ours, theirs = pty.openpty()
    process = subprocess.Popen(command, stdout=theirs, stderr=theirs, env=variables | {"TERM": "xterm"})
    os.close(theirs)
    content = bytearray()
    while True:
        try:
            content += os.read(ours, 65536)
        except OSError:  # the other side is closed
            break
    os.close(ours)
    text = ESCAPES.sub("", content.decode())
    assert process.wait(60) == 0, text
    return text


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_no_library_speaks_while_commands_run(tmp_path: Path, target: Path) -> None:
    prompts, replies, cache, config = (tmp_path / name for name in ("prompts.jsonl", "replies", "cache", "run.yaml"))
    rows = [
        {"id": f"p{n}", "split": "train", "source": "s", "messages": [{"role": "user", "content": f"how many {n}"}]}
        for n in range(12)
    ]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config.write_text(CONFIG.format(folder=tmp_path, target=target))
    commands = {
        "respond": f"data respond --target {target} --prompts {prompts} --out {replies} --max-new-tokens 8",
        "extract": f"data extract --target {target} --source {replies} --out {cache}",
        "fit": f"train fit --config {config} --ckpt_path last",
        "evaluate": f"evaluate --target {target} --prompts {prompts} --limit 2 --drafters {tmp_path}/run/drafter "
        f"--max-new-tokens 6 --out {tmp_path}/report",
    }
    for name, words in commands.items():
        check(name, run(words.split(), terminal=True), terminal=True)
    again = {"fit": f"{commands['fit']} --trainer.max_epochs=4", "evaluate": f"{commands['evaluate']}-again"}
    for name, words in again.items():
        check(name, run(words.split(), terminal=False), terminal=False)


def check(name: str, text: str, terminal: bool) -> None:
    foreign = [line for line in text.splitlines() if FOREIGN.search(line)]
    assert foreign == [], f"{name} prints {foreign}"
    assert ("━" in text) is terminal, f"{name}: a bar belongs in a terminal, and nowhere else"
    if name == "fit":
        assert re.search(r"this run has \d+ optimiser steps", text)
        assert "validation at step" in text


def test_everything_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRANSFORMERS_VERBOSITY", raising=False)
    monkeypatch.setenv("DATASETS_VERBOSITY", "debug")
    before = dict(os.environ), warnings.showwarning, list(logging.getLogger().handlers)
    with quiet_libraries():
        assert os.environ["TRANSFORMERS_VERBOSITY"] == "error"
        assert os.environ["DATASETS_VERBOSITY"] == "debug", "the user's own setting stays"
        assert warnings.showwarning is not before[1]
    assert before == (dict(os.environ), warnings.showwarning, list(logging.getLogger().handlers))


def test_on_request_nothing_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SHOW_ALL, "1")
    before = dict(os.environ), warnings.showwarning
    with quiet_libraries():
        assert before == (dict(os.environ), warnings.showwarning)


def test_our_own_warnings_and_unknown_ones_are_one_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    from draftsmith import files

    with quiet_libraries():
        warnings.showwarning("the disk is nearly full", UserWarning, str(files.__file__), 7)
        warnings.showwarning("the driver is too old", UserWarning, "/x/site-packages/torch/cuda/__init__.py", 7)
        warnings.showwarning("use new() instead", FutureWarning, "/x/site-packages/torch/cuda/__init__.py", 7)
        warnings.showwarning("use new() instead", DeprecationWarning, str(files.__file__), 7)
    assert capsys.readouterr().err.splitlines() == [
        "warning: the disk is nearly full",
        "warning of torch: the driver is too old",
    ]


def test_our_own_log_lines_come_through_and_a_librarys_only_from_warnings_on(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    from draftsmith import files

    def line(level: int, text: str, path: str) -> None:
        logging.getLogger().handle(logging.LogRecord("a_library.part", level, path, 1, text, (), None))

    with quiet_libraries():
        line(logging.INFO, "this run has 3 steps", str(files.__file__))
        line(logging.WARNING, "fetched again", str(files.__file__))
        line(logging.INFO, "GPU available: False", "/x/site-packages/a_library/part.py")
        line(logging.WARNING, "out of room", "/x/site-packages/a_library/part.py")
    assert capsys.readouterr().err.splitlines() == [
        "this run has 3 steps",
        "warning: fetched again",
        "warning of a_library: out of room",
    ]


def test_what_lightning_calls_possible_false_positives_is_noise() -> None:
    from pytorch_lightning.utilities.warnings import PossibleUserWarning

    assert is_noise("few workers", PossibleUserWarning)
    assert not is_noise("few workers", UserWarning)

"""The training command: shipped configs parse, the errors name mistakes, a run leaves what it should."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training import MakeCache, tiny_config

from draftsmith import configs
from draftsmith.cli import main

CONFIG_FOLDER = Path(configs.__file__).parent
CONFIGS = [*sorted(CONFIG_FOLDER.glob("*redrafter*.yaml")), CONFIG_FOLDER / "quickstart.yaml"]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_drafter_config_parses(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["train", "fit", f"--config={config}", "--print_config"])
    assert exit_info.value.code == 0
    assert "DraftModule" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("extra", "hint"),
    [("    horizon_decai: 0.9", "horizon_decay"), ("    distilation: path", "distillation")],
)
def test_a_misspelt_key_in_the_yaml_is_answered_with_the_key_that_was_meant(
    target_dir: Path, make_cache: MakeCache, tmp_path: Path, capsys: pytest.CaptureFixture[str], extra: str, hint: str
) -> None:
    config = tiny_config(tmp_path, target_dir, make_cache([9] * 10), extra)
    with pytest.raises(SystemExit) as exit_info:
        main(["train", "fit", f"--config={config}"])
    assert exit_info.value.code == 2
    message = capsys.readouterr().err
    assert f"Did you mean {hint}" in message or f".{hint}?" in message


EAGLE = "class_path: EagleFamily, init_args: {draft_vocab_size: null}"
DEEP_MISTAKES = [
    (
        "draft_vocab_size",
        "draft_vocabsize",
        "model.drafter.draft_vocabsize: unknown key of EagleFamily. Did you mean draft_vocab_size?",
    ),
    (
        "EagleFamily",
        "EagelFamily",
        "model.drafter: no class is named EagelFamily. Did you mean EagleFamily or Eagle3Family?",
    ),
    ("null", "many", "model.drafter.draft_vocab_size: expected int, got many"),
    ("EagleFamily", "no_such_heads.Family", "model.drafter: No module named 'no_such_heads'"),
    ("class_path", "class_pth", "model.drafter: Not a valid subclass of DrafterFamily."),
]


@pytest.mark.parametrize(("right", "wrong", "message"), DEEP_MISTAKES)
def test_a_mistake_in_a_family_is_one_line_with_key_and_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], right: str, wrong: str, message: str
) -> None:
    config = tmp_path / "mine.yaml"
    drafter = EAGLE.replace(right, wrong)
    config.write_text(f"base: base.yaml\nmodel: {{init_args: {{target: org/name, drafter: {{{drafter}}}}}}}\n")
    with pytest.raises(SystemExit) as exit_info:
        main(["train", "fit", f"--config={config}"])
    assert exit_info.value.code == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2, "the mistake, and where to read on"
    assert told[0].startswith(f"draftsmith train fit: error: {message}")
    assert told[0].endswith(f" (in {config})")


def test_a_mistake_on_the_command_line_names_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text(f"base: base.yaml\nmodel: {{init_args: {{target: org/name, drafter: {{{EAGLE}}}}}}}\n")
    with pytest.raises(SystemExit):
        main(["train", "fit", f"--config={config}", "--model.init_args.drafter.init_args.feature_nois", "1"])
    told = capsys.readouterr().err
    assert "feature_noise" in told
    assert str(config) not in told
    assert "Subtypes" not in told


def test_a_misspelt_flag_is_answered_with_the_flag_that_was_meant(
    target_dir: Path, make_cache: MakeCache, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(tmp_path, target_dir, make_cache([9] * 10))
    with pytest.raises(SystemExit) as exit_info:
        main(["train", "fit", f"--config={config}", "--trainer.max_epoch=3"])
    assert exit_info.value.code == 2
    told = capsys.readouterr().err
    assert "trainer.max_epochs" in told
    assert "Run 'draftsmith train fit --help'" in told


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device that must be missing")
def test_a_device_that_is_not_there_is_one_clear_message(
    target_dir: Path, make_cache: MakeCache, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(tmp_path, target_dir, make_cache([9] * 10))
    assert main(["train", "fit", f"--config={config}", "--trainer.accelerator=cuda"]) == 1
    assert "CUDA" in capsys.readouterr().err


def test_a_run_leaves_curves_the_resolved_config_and_a_drafter_that_loads(
    target_dir: Path, make_cache: MakeCache, tmp_path: Path
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from draftsmith.models.families.redrafter import ReDrafter

    config = tiny_config(tmp_path, target_dir, make_cache([9] * 10))
    assert main(["train", "fit", f"--config={config}"]) == 0
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    names = set(events.Tags()["scalars"])
    per_step = {
        f"{stage}/step{k}/{what}" for stage in ("train", "val") for k in range(3) for what in ("top1", "top5", "loss")
    }
    assert per_step | {"val/tokens_per_step", "val/proxy_tokens_per_step", "train/tokens_per_second"} <= names
    assert (tmp_path / "run" / "config.yaml").is_file()
    assert (tmp_path / "run" / "drafter" / "provenance.json").is_file()
    assert ReDrafter.from_pretrained(tmp_path / "run" / "drafter").config.num_draft_steps == 3


def test_train_py_is_the_same_command() -> None:
    script = Path(__file__).resolve().parents[2] / "train.py"
    done = subprocess.run([sys.executable, script, "fit", "--help"], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0
    assert "--config" in done.stdout

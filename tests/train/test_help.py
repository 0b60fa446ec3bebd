"""The help of the training command, which needs no Lightning: true to the classes that it describes."""

import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import pytorch_lightning as pl

from draftsmith import train
from draftsmith.outline import class_settings
from draftsmith.train.help import SUBCOMMANDS, early_answer, lightnings_words, overview, run_help
from draftsmith.train.key_check import TOP

CONFIGS = Path(__file__).parents[2] / "configs"
CLASSES = [
    "DraftModule",
    "JointDraftModule",
    "DraftLMModule",
    "JudgeModule",
    "CacheDataModule",
    "OnlineDataModule",
    "DistilDataModule",
    "JudgeDataModule",
]


@pytest.mark.parametrize("name", CLASSES)
def test_the_settings_of_a_class_are_its_parameters_and_each_is_explained(name: str) -> None:
    real = getattr(train, name)
    described = class_settings(real.__module__, name)
    assert [setting.name for setting in described.settings] == list(inspect.signature(real).parameters)
    assert [setting.name for setting in described.settings if not setting.text] == []
    assert importlib.import_module(real.__module__)
    assert f"class_path: draftsmith.train.{name}\n  {described.summary[:20]}" in run_help("fit")


def test_neither_torch_nor_lightning_is_imported_for_help_and_misspelt_keys() -> None:
    code = (
        "import sys; from draftsmith.cli import main; main(['train', 'fit', '--help'])\n"
        "try: main(['train', 'fit', '--trainer.max_epoch', '3'])\n"
        "except SystemExit: pass\n"
        "sys.exit('torch' in sys.modules or 'pytorch_lightning' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_help_says_where_the_rest_is() -> None:
    for words in ("--help_all", "--print_config", "--ckpt_path last", "--config FILE", "lr: 0.001", "adapter: null"):
        assert words in run_help("fit")
    assert "draftsmith train fit --help" in overview()


def test_an_unknown_subcommand_is_answered_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert early_answer(["fti"]) == 2
    assert "unknown subcommand 'fti'. Did you mean fit?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["--model.init_args.lrr", "3"], "unknown option --model.init_args.lrr. Did you mean --model.init_args.lr"),
        (["--trainer.max_epoch=3"], "unknown option --trainer.max_epoch. Did you mean --trainer.max_epochs"),
        (["--data.init_args.cash", "x"], "unknown option --data.init_args.cash. Did you mean --data.init_args.cache"),
        (["--ckpt_pth", "last"], "unknown option --ckpt_pth. Did you mean --ckpt_path?"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_misspelt_flag_is_answered_without_lightning(
    words: list[str], answer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        early_answer(["fit", "--config", str(CONFIGS / "quickstart.yaml"), *words])
    assert answer in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("trainer: {max_step: 3}", "trainer.max_step is an unknown key. Did you mean trainer.max_steps"),
        ("base: redrafter.yaml\nmodel: {init_args: {chunk_row: 3}}", "Did you mean model.init_args.chunk_rows"),
        (
            "base: lora/medusa2.yaml\nmodel: {init_args: {ends_dtype: float32}}",
            "model.init_args.ends_dtype is an unknown key",
        ),
        ("modle: {class_path: DraftModule}", "modle is an unknown key. Did you mean model?"),
    ],
)
def test_a_misspelt_key_of_a_file_is_answered_with_the_file(
    text: str, answer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(SystemExit, match="2"):
        early_answer(["fit", "--config", str(file)])
    message = capsys.readouterr().err
    assert f"error: {file}: " in message
    assert answer in message


@pytest.mark.parametrize(
    "words",
    [
        ["--model", "mine.DraftModule", "--model.init_args.lrr", "3"],  # a class of somebody else
        ["--trainer.callbacks+=LearningRateMonitor", "--trainer.callbacks.no_such_setting", "3"],
        ["--model.lr", "3", "--model.init_args.drafter.init_args.no_such_setting", "3"],
        ["--print_config"],
    ],
    ids=str,
)
def test_keys_that_only_lightning_can_check_are_left_to_it(words: list[str]) -> None:
    assert early_answer(["fit", "--config", str(CONFIGS / "quickstart.yaml"), *words]) is None


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_no_key_of_a_shipped_configuration_is_taken_for_a_mistake(file: Path) -> None:
    assert early_answer(["fit", "--config", str(file)]) is None


def test_every_key_at_the_top_and_of_the_trainer_is_known() -> None:
    settings = {setting.name for setting in class_settings("pytorch_lightning.trainer.trainer", "Trainer").settings}
    assert settings == set(inspect.signature(pl.Trainer).parameters)
    for subcommand in SUBCOMMANDS:
        run = getattr(pl.Trainer, subcommand)
        own = set(inspect.signature(run).parameters) - {"self", "model", "datamodule", "dataloaders"}
        assert own - {"train_dataloaders", "val_dataloaders"} <= TOP


def test_a_run_is_left_to_the_training_command() -> None:
    assert early_answer(["fit", "--config", "x.yaml"]) is None
    assert early_answer(["fit", "--help_all"]) is None
    assert lightnings_words(["fit", "--help-all"]) == ["fit", "--help"]

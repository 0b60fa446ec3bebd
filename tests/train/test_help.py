"""The help of the training command, which needs no Lightning: true to the classes that it describes."""

import importlib
import inspect

import pytest

from draftsmith import train
from draftsmith.outline import class_settings
from draftsmith.train.help import early_answer, lightnings_words, overview, run_help

CLASSES = [
    "DraftModule",
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


def test_help_says_where_the_rest_is() -> None:
    for words in ("--help_all", "--print_config", "--ckpt_path last", "--config FILE", "lr: 0.001", "adapter: null"):
        assert words in run_help("fit")
    assert "draftsmith train fit --help" in overview()


def test_an_unknown_subcommand_is_answered_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert early_answer(["fti"]) == 2
    assert "unknown subcommand 'fti'. Did you mean fit?" in capsys.readouterr().err


def test_a_run_is_left_to_the_training_command() -> None:
    assert early_answer(["fit", "--config", "x.yaml"]) is None
    assert early_answer(["fit", "--help_all"]) is None
    assert lightnings_words(["fit", "--help-all"]) == ["fit", "--help"]

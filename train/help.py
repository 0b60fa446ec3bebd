"""Help for the training command without Lightning: what a run's YAML holds, read from the source of the classes it names.

Owns: the words of `draftsmith train --help` and its mistakes in subcommands. Lightning's own help lists every option of every class and
takes seconds to build; `--help_all` shows it. Imports neither torch nor Lightning.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator, Sequence

from draftsmith.arguments import suggestion
from draftsmith.escapes import visible
from draftsmith.outline import Setting, class_settings
from draftsmith.train.config_files import with_bases
from draftsmith.train.key_check import unknown_key

PROG = "draftsmith train"
HELP_ALL = "--help_all"
SUBCOMMANDS = {
    "fit": "Train, validate, and keep the best weights.",
    "validate": "Run the validation of a checkpoint (--ckpt_path).",
    "test": "Run a module's test steps; the modules here have none.",
    "predict": "Run a module's predict steps; the modules here have none.",
}
_MODULES = {
    "DraftModule": ("draftsmith.train.drafter.module", "CacheDataModule or OnlineDataModule"),
    "JointDraftModule": ("draftsmith.train.drafter.joint_module", "CacheDataModule"),
    "DraftLMModule": ("draftsmith.train.draft_lm.module", "DistilDataModule"),
    "JudgeModule": ("draftsmith.train.judge.module", "JudgeDataModule"),
}
_DATA = {
    "CacheDataModule": "draftsmith.train.batches.data_module",
    "OnlineDataModule": "draftsmith.train.batches.online",
    "DistilDataModule": "draftsmith.train.draft_lm.data",
    "JudgeDataModule": "draftsmith.train.judge.data",
}
_FLAGS = {
    "--config FILE": "Read settings from this YAML file. Repeat it: later files win over earlier ones, flags over files.",
    "--ckpt_path last": "Resume an interrupted run.",
    "--recipe auto": "Choose epochs, rate and draft vocabulary by the size of the cache. Your own settings win.",
    "--replace_best true": "Replace the best weights that another run left in the same folder.",
    "--model.init_args.target NAME": "The frozen target: a directory, a hub id, or embedded:target.",
    "--data.init_args.cache FOLDER": "The hidden-state cache.",
    "--model.init_args.lr 5e-4": "The peak learning rate; any other setting below works the same way.",
    "--trainer.default_root_dir FOLDER": "Where the run leaves its weights, curves and checkpoints.",
    "--trainer.max_epochs 4": "How long to train; --trainer.max_steps counts steps.",
    "--trainer.devices 8": "How many devices to train on.",
    "--print_config": "Print the whole configuration and exit; behind --config, with what the files set.",
    "--help_all": "Print Lightning's own help with every option; takes some seconds.",
    "--model.help CLASS": "Print every option of one class; takes some seconds.",
}
_IN_YAML = {"None": "null", "True": "true", "False": "false"}
_WIDTH = 100


def early_answer(arguments: Sequence[str]) -> int | None:
    """Answers what needs no Lightning: help, a subcommand that does not exist, a misspelt key.

    Args:
        arguments: the words after `draftsmith train`.

    Returns:
        The exit code, or None where the training command itself must answer.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        print(overview())
        return 0
    command = arguments[0]
    if command.startswith("-"):
        return None
    if command not in SUBCOMMANDS:
        hint = suggestion(command, SUBCOMMANDS)
        print(f"{PROG}: error: unknown subcommand '{visible(command)}'.{hint}", file=sys.stderr)
        print(f"Run '{PROG} --help' to see every subcommand.", file=sys.stderr)
        return 2
    if any(word in ("-h", "--help") for word in arguments[1:]):
        print(run_help(command))
        return 0
    _check_keys(command, arguments[1:])
    return None


def with_base_files(arguments: Sequence[str]) -> list[str]:
    """The arguments with every configuration file that will be read, by its name of today.

    Args:
        arguments: the words after `draftsmith train`.

    Raises:
        ValueError: a base that does not exist, or files that are each other's base.
    """
    return with_bases(arguments, tell=lambda line: None)


def _check_keys(command: str, arguments: Sequence[str]) -> None:
    """Ends the process with code 2, as every parser of this package does, where a key is misspelt."""
    classes = {name: module for name, (module, _) in _MODULES.items()} | _DATA
    problem = unknown_key(lightnings_words(arguments), classes)
    if problem is not None:
        print(f"{PROG} {command}: error: {visible(problem)}", file=sys.stderr)
        print(f"Run '{PROG} {command} --help' to see what a YAML file holds.", file=sys.stderr)
        sys.exit(2)


def lightnings_words(arguments: Sequence[str]) -> list[str]:
    """The arguments for Lightning's parser, whose own help is `--help`."""
    return ["--help" if word.replace("-", "_") == HELP_ALL.replace("-", "_") else word for word in arguments]


def overview() -> str:
    """The subcommands, one line each."""
    lines = [f"usage: {PROG} COMMAND --config FILE [options]", "", "Train from a YAML file.", "", "commands:"]
    lines += [f"  {name:<9} {text}" for name, text in SUBCOMMANDS.items()]
    return "\n".join([*lines, "", f"'{PROG} fit --help' explains what a YAML file holds."])


def run_help(command: str) -> str:
    """What a run's YAML holds, with the settings of each class and the flags that are used most."""
    lines = [
        f"usage: {PROG} {command} --config FILE [--config FILE ...] [--KEY VALUE ...]",
        "",
        SUBCOMMANDS[command],
        "",
    ]
    lines += _wrapped(
        "A YAML file names three things: `trainer` (Lightning's Trainer: devices, precision, length, callbacks), `model` and `data`. "
        "`class_path` names a class of model and data, `init_args` its settings. Any key is also a flag, joined by dots. The files in "
        "configs/ are complete examples; start as docs/how-to/train/training.md shows.",
        "",
    )
    lines += ["", "flags that are used most:"]
    lines += [line for flag, text in _FLAGS.items() for line in _entry(flag, text)]
    for name, (module, data) in _MODULES.items():
        lines += ["", *_class_lines("model", name, module, f" Its data: {data}.")]
    for name, module in _DATA.items():
        lines += ["", *_class_lines("data", name, module, "")]
    return "\n".join(lines)


def _class_lines(part: str, name: str, module: str, more: str) -> Iterator[str]:
    described = class_settings(module, name)
    yield f"{part}: class_path: draftsmith.train.{name}"
    yield from _wrapped(f"{described.summary}{more}", "  ")
    for setting in described.settings:
        yield from _entry(_shown(setting), setting.text)


def _shown(setting: Setting) -> str:
    """The name and its default, as YAML writes it."""
    if setting.default is None:
        return setting.name
    return f"{setting.name}: {_IN_YAML.get(setting.default, setting.default)}"


def _entry(head: str, text: str) -> Iterator[str]:
    yield f"  {head}"
    yield from _wrapped(text, "      ")


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(" ".join(text.split()), _WIDTH, initial_indent=indent, subsequent_indent=indent)

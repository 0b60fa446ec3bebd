"""Misspelt keys of a training run, found without Lightning: in its configuration files and in its flags.

Owns: which keys are checked. These are the keys at the top, those of `trainer`, and the settings of this package's modules and data
modules. Lightning checks what lies deeper, such as a callback's settings, and takes seconds to import. Imports neither torch nor Lightning.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence

from draftsmith.arguments import suggestion
from draftsmith.outline import PACKAGE, class_settings
from draftsmith.train.config_files import KEY as BASE
from draftsmith.train.config_files import with_bases
from draftsmith.train.given_settings import Given, sources

TOP = frozenset(
    f"{BASE} config c help h help_all print_config seed_everything trainer model data optimizer lr_scheduler ckpt_path weights_only "
    "replace_best recipe verbose return_predictions".split()
)
"""Keys beside one another in a file: this command's and those of Lightning's subcommands."""
_TRAINER = ("pytorch_lightning.trainer.trainer", "Trainer")


def unknown_key(arguments: Sequence[str], classes: Mapping[str, str]) -> str | None:
    """What is wrong with the first key that nothing reads, and the nearest known one; None where no mistake is found.

    Args:
        arguments: the words after the subcommand.
        classes: the modules whose settings are checked, by the name of the class.

    Raises:
        ValueError: what `with_bases` raises.
    """
    chosen: dict[str, str] = {}
    for source in sources(with_bases(arguments, tell=lambda line: None)):
        # The settings of a file are those of the class that it names, or that a file before it has named.
        chosen |= _classes(source)
        for each in source:
            known = _known(each.key, chosen, classes)
            if known is not None and each.key.replace("+", "") not in known:
                return _told(each, known)
    return None


def _classes(source: Sequence[Given]) -> dict[str, str]:
    """The names of the classes of `model` and `data` that a file or the flags choose."""
    keys = ("model", "data", "model.class_path", "data.class_path")
    return {
        each.key.removesuffix(".class_path"): _own_class(each.value)
        for each in source
        if each.key in keys and isinstance(each.value, str)
    }


def _own_class(path: str) -> str:
    """The name of a class of this package; empty for a class of another one, which may have any settings."""
    module, _, name = path.rpartition(".")
    return name if module.partition(".")[0] in ("", PACKAGE) else ""


def _told(given: Given, known: Collection[str]) -> str:
    """The mistake in a line, with the known keys of the same place that are nearest."""
    prefix, dot, leaf = given.key.rpartition(".")
    hint = suggestion(leaf, {each.rpartition(".")[2] for each in known})
    place = f"{'' if given.file else '--'}{prefix}{dot}"
    hint = hint.replace("mean ", f"mean {place}").replace(" or ", f" or {place}")
    return (
        f"{given.file}: {given.key} is an unknown key.{hint}" if given.file else f"unknown option --{given.key}.{hint}"
    )


def _known(key: str, chosen: Mapping[str, str], classes: Mapping[str, str]) -> Collection[str] | None:
    """The keys that could be in the place of this one; None where Lightning must say."""
    top, *inner = key.replace("+", "").split(".")
    if not inner or top not in TOP:
        return TOP
    if top == "trainer" and len(inner) == 1:
        return {f"trainer.{name}" for name in (*_settings(*_TRAINER), "help")}
    name = chosen.get(top, "")
    if name in classes and len(inner) == 2 and inner[0] == "init_args":
        return {f"{top}.init_args.{setting}" for setting in _settings(classes[name], name)}
    return None


@functools.cache
def _settings(module: str, name: str) -> list[str]:
    return [setting.name for setting in class_settings(module, name).settings]

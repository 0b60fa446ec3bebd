"""From a typed function to a command-line parser, with help for whoever mistypes.

Owns the shape of options (lists, dashes, `--config`) and the wording of mistakes. Knows none of the commands.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import inspect
import json
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import docstring_parser
import jsonargparse

FLAT = "flat"  # marks a parameter in `Annotated`, see `parser_for`


def suggestion(word: str, known: Iterable[str]) -> str:
    """` Did you mean X?` for the known words nearest to `word`, or an empty string when none is near.

    A dotted word that resembles none as a whole is compared by its last part: `lr` finds `optimizer.lr`.
    """
    candidates = sorted(set(known))
    near = difflib.get_close_matches(word, candidates, n=2, cutoff=0.6)
    if not near:
        leaf = word.rpartition(".")[2]
        by_leaf = {candidate.rpartition(".")[2]: candidate for candidate in candidates}
        near = [by_leaf[match] for match in difflib.get_close_matches(leaf, by_leaf, n=2, cutoff=0.75)]
    return f" Did you mean {' or '.join(near)}?" if near else ""


class Suggesting:
    """Mixin for jsonargparse parsers: unknown flags and configuration keys are answered with the nearest known ones."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Prints one message and exits with code 2; a nested parser raises it to its parent instead."""
        parser = typing.cast(jsonargparse.ArgumentParser, self)
        at_fault = getattr(ex, "subcommand_parser", None) or parser
        message = explain(message, [action.dest for action in at_fault._actions])
        if not parser.exit_on_error:
            jsonargparse.ArgumentParser.error(parser, message, ex)
        prog = at_fault.prog.replace(" [options]", "")
        sys.stderr.write(f"{prog}: error: {message}\nRun '{prog} --help' to see every option.\n")
        sys.exit(2)


def explain(message: str, known: Iterable[str]) -> str:
    """Adds to jsonargparse's complaint about an unknown flag or key which known one may have been meant."""
    if "Did you mean" in message:
        return message
    if found := re.search(r"unrecognized arguments: (.*)", message, re.DOTALL):
        words = found[1].split()
        flags = [word for word in words if word.startswith("--")] or words[:1]
        hints = [suggestion(_key(flag), known).replace("mean ", "mean --").replace(" or ", " or --") for flag in flags]
        return f"unknown option {', '.join(flags)}.{''.join(dict.fromkeys(hints))}"
    found = re.search(r"(?P<group>Group '[^']*'|Subcommand '[^']*') does not accept option '(?P<key>[^']*)'", message)
    found = found or re.search(r"(?P<group>)Option '(?P<key>[^']*)' is not accepted", message)
    if found:
        group = found["group"].removeprefix("Group ").strip("'")
        key = f"{group}.{found['key']}" if found["group"].startswith("Group") else found["key"]
        return f"{message} (unknown key).{suggestion(key, known)}"
    return message


def _key(flag: str) -> str:
    return flag.lstrip("-").partition("=")[0].replace("-", "_")


class CommandParser(Suggesting, jsonargparse.ArgumentParser):
    """A jsonargparse parser whose help names types as people do."""

    def format_help(self, formatter: argparse.HelpFormatter | None = None) -> str:
        """The help text, with `Path` for `<class 'Path'>`."""
        text: str = super().format_help() if formatter is None else super().format_help(formatter)
        return re.sub(r"<class\s+'(?:\w+\.)*(\w+)'>", r"\1", text)


def parser_for(function: Callable[..., Any], prog: str) -> CommandParser:
    """A parser with one option for each parameter of `function`, its help taken from the docstring.

    A dataclass parameter becomes `--name.field` options, or `--field` ones where it is annotated
    `Annotated[ITS_TYPE, FLAT]`; `--config FILE` reads any of them from YAML and `--print_config` writes that YAML.
    """
    described = docstring_parser.parse(inspect.getdoc(function) or "")
    parts = [part for part in (described.short_description, described.long_description) if part]
    required = [
        f"--{parameter.name} {parameter.name.upper()}"
        for parameter in inspect.signature(function).parameters.values()
        if parameter.default is inspect.Parameter.empty
    ]
    parser = CommandParser(
        prog=prog, usage=" ".join([prog, *required, "[options]"]), description="\n\n".join(parts), allow_abbrev=False
    )
    parser.add_argument("--config", action="config", metavar="FILE", help="Read options from this YAML file.")
    flat = flat_parameters(function)
    parser.add_function_arguments(function, as_group=False, skip=set(flat))
    for kind in flat.values():
        parser.add_class_arguments(kind, as_group=False)
    for action in parser._actions:
        if action.dest in list_options(function):
            action.metavar = f"{action.dest.upper()}[,...]"
            action.option_strings = [option for option in action.option_strings if not option.endswith("+")]
    return parser


def call(function: Callable[..., Any], prog: str, arguments: Sequence[str]) -> Any:
    """Calls `function` with what `arguments` say; a mistake in them ends the process with code 2."""
    parser = parser_for(function, prog)
    parsed = parser.parse_args(gather_lists([with_underscores(word) for word in arguments], list_options(function)))
    values = parser.instantiate(parsed)
    flat = {
        name: kind(**{field.name: values[field.name] for field in dataclasses.fields(kind)})
        for name, kind in flat_parameters(function).items()
    }
    return function(
        **{name: flat[name] if name in flat else values[name] for name in inspect.signature(function).parameters}
    )


def flat_parameters(function: Callable[..., Any]) -> dict[str, type[Any]]:
    """The dataclasses whose fields are options under their own names, by parameter: options that commands share."""
    hints = typing.get_type_hints(function, include_extras=True)
    return {name: hint.__origin__ for name, hint in hints.items() if FLAT in getattr(hint, "__metadata__", ())}


def with_underscores(word: str) -> str:
    """`--max-new-tokens=8` and `--max_new_tokens=8` are one option."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return f"--{name[2:].replace('-', '_')}{equals}{value}"


def gather_lists(arguments: Sequence[str], lists: dict[str, bool]) -> list[str]:
    """Turns `--widths 1 2` and repeated `--widths 1 --widths 2` into the one JSON list that jsonargparse reads.

    Args:
        arguments: the words after the command.
        lists: names of the options that take several values; True where the values are text.
    """
    others: list[str] = []
    values: dict[str, list[str]] = {}
    open_list: str | None = None
    for word in arguments:
        name, equals, value = word.partition("=")
        if word.startswith("--"):
            open_list = name[2:] if name[2:] in lists else None
            if open_list is None:
                others.append(word)
            else:
                values.setdefault(open_list, []).extend([value] if equals else [])
        elif open_list is not None:
            values[open_list].append(word)
        else:
            others.append(word)
    return others + [f"--{name}={_json_list(found, lists[name])}" for name, found in values.items()]


def _json_list(values: list[str], text: bool) -> str:
    if len(values) == 1 and (values[0].startswith("[") or values[0] == "null"):
        return values[0]
    return f"[{', '.join(json.dumps(value) if text else value for value in values)}]"


def list_options(function: Callable[..., Any]) -> dict[str, bool]:
    """Names of the list and tuple parameters; True where the elements are text or paths."""
    found = {}
    for name, hint in typing.get_type_hints(function).items():
        options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
        for option in options:
            if typing.get_origin(option) in (list, tuple) and name != "return":
                found[name] = typing.get_args(option)[0] in (str, Path)
    return found

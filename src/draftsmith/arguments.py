"""From a typed function to a command-line parser, with help for whoever mistypes.

Owns the shape of options (lists, dashes, `--config`) and the wording of mistakes. Knows none of the commands.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import inspect
import json
import re
import sys
import types
import typing
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import docstring_parser
import jsonargparse
import yaml

from draftsmith.escapes import visible

# Marks in `Annotated`:
FLAT = "flat"  # a dataclass whose fields are options under their own names, see `parser_for`
WHOLE = "whole"  # a list whose values may hold commas, see `gather_lists`


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
    """Mixin for jsonargparse parsers: a mistake is one line with its key, its file, and the nearest known key.

    Attributes:
        class_names: short names that a ``class_path`` may hold.
    """

    class_names: Collection[str] = ()
    _config_files: Sequence[Path] = ()

    def parse_args(self, *args: Any, **kwargs: Any) -> Any:
        """See jsonargparse; remembers the configuration files for messages."""
        given = args[0] if args else kwargs.get("args")
        self._config_files = config_files(sys.argv[1:] if given is None else given)
        return super().parse_args(*args, **kwargs)  # type: ignore[misc]

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Prints one message and exits with code 2; a nested parser raises it to its parent instead."""
        parser = typing.cast(jsonargparse.ArgumentParser, self)
        at_fault = getattr(ex, "subcommand_parser", None) or parser
        message = explain(message, [action.dest for action in at_fault._actions])
        if not parser.exit_on_error:
            jsonargparse.ArgumentParser.error(parser, message, ex)
        message = cause(message, self.class_names, self._config_files)
        prog = at_fault.prog.replace(" [options]", "")
        sys.stderr.write(f"{prog}: error: {visible(message)}\nRun '{prog} --help' to see every option.\n")
        sys.exit(2)


def explain(message: str, known: Iterable[str]) -> str:
    """Adds to jsonargparse's complaint about an unknown flag or key which known one may have been meant."""
    if "Did you mean" in message:
        return message
    if match := re.search(r"unrecognized arguments: (.*)", message, re.DOTALL):
        words = match[1].split()
        flags = [word for word in words if word.startswith("--")] or words[:1]
        hints = [suggestion(_key(flag), known).replace("mean ", "mean --").replace(" or ", " or --") for flag in flags]
        return f"unknown option {', '.join(flags)}.{''.join(dict.fromkeys(hints))}"
    match = re.search(r"(?P<group>Group '[^']*'|Subcommand '[^']*') does not accept option '(?P<key>[^']*)'", message)
    match = match or re.search(r"(?P<group>)Option '(?P<key>[^']*)' is not accepted", message)
    if match:
        group = match["group"].removeprefix("Group ").strip("'")
        key = f"{group}.{match['key']}" if match["group"].startswith("Group") else match["key"]
        return f"{message} (unknown key).{suggestion(key, known)}"
    if re.search("Expected a <class '(list|tuple)'>", message):
        return f"{message}\nA list in YAML is [a, b], or one line `- a` for each value."
    return message


_AROUND_A_CAUSE = re.compile(
    r"Parser key |Problem with given class_path |Does not validate against |Subtypes: |Errors:$|Given value|Expected a <class 'NoneType'>"
    r"|Subclass types expect one of|a class path \(str\)|a dict with"
)


def cause(message: str, class_names: Collection[str] = (), files: Sequence[Path] = ()) -> str:
    """One line for jsonargparse's nested complaint about a key: the key from the top, what is wrong, and the file that says it.

    Messages of another form stay as they are.

    Args:
        message: from :func:`explain`.
        class_names: short names that a ``class_path`` may hold.
        files: the configuration files that were read.
    """
    keys = re.findall(r'Parser key "([^"]+)"', message)
    lines = [line.strip().removeprefix("- ") for line in message.splitlines()]
    causes = list(dict.fromkeys(line for line in lines if line and not _AROUND_A_CAUSE.match(line)))
    if not keys or len(causes) != 1:
        return message
    text = re.sub(r"Expected a <class '(?:\w+\.)*(\w+)'>", r"expected \1", causes[0])
    if unknown := re.match(r"Option '([^']*)' is not accepted \(unknown key\)\.(.*)", text):
        owners = re.findall(r"given class_path '(?:\w+\.)*(\w+)'", message)
        keys.append(unknown[1])
        text = f"unknown key{f' of {owners[-1]}' if owners else ''}.{unknown[2]}"
    elif misspelt := re.match(r"Expected a dot import path string: (.*)", text):
        text = f"no class is named {misspelt[1]}.{suggestion(misspelt[1], class_names)}"
    elif "Got value" not in text and (given := re.search("Given value: (.*)", message)):
        text += f", got {given[1]}"
    path = ".".join(keys)
    return f"{path}: {text}{_place(path.split('.'), files)}"


def _place(keys: Sequence[str], files: Sequence[Path]) -> str:
    """`` (in FILE)`` for the last configuration file that holds a key; empty where none does."""
    for file in reversed(files):
        try:
            content = yaml.safe_load(file.read_bytes())
        except (OSError, yaml.YAMLError, ValueError):
            continue
        for key in keys:
            content = content.get("init_args", content) if isinstance(content, dict) and key not in content else content
            content = content.get(key, _place) if isinstance(content, dict) else _place
        if content is not _place:
            return f" (in {file})"
    return ""


def config_files(arguments: Sequence[str]) -> list[Path]:
    """The files that ``--config`` names, in order."""
    words, files = list(arguments), []
    for number, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name in ("--config", "-c") and (equals or number + 1 < len(words)):
            files.append(Path(value if equals else words[number + 1]))
    return files


def _key(flag: str) -> str:
    return flag.lstrip("-").partition("=")[0].replace("-", "_")


class CommandParser(Suggesting, jsonargparse.ArgumentParser):
    """A jsonargparse parser whose help names types as people do."""

    def format_help(self, formatter: argparse.HelpFormatter | None = None) -> str:
        """The help text, with `Path` for `<class 'Path'>`."""
        text: str = super().format_help() if formatter is None else super().format_help(formatter)
        text = re.sub(rf"Annotated\[([^']*),\s+'{WHOLE}'\]", r"\1", text)
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
    for name, kind in flat.items():
        parser.add_class_arguments(kind, as_group=False)
        _describe(parser, kind, inspect.signature(function).parameters[name].default)
    whole = whole_options(function)
    for action in parser._actions:
        if action.dest in list_options(function):
            action.metavar = f"{action.dest.upper()} ..." if action.dest in whole else f"{action.dest.upper()}[,...]"
            how = how_to_list(action.dest, action.dest in whole)
            text = action.help or ""
            action.help = f"{text}{'' if text.endswith('.') else '.'} {how[0].upper()}{how[1:]}."
            action.option_strings = [option for option in action.option_strings if not option.endswith("+")]
    return parser


def _describe(parser: CommandParser, kind: type[Any], preset: Any) -> None:
    """Gives the options of a dataclass the values that `preset`, one of it, has, and the help that its parents' docstrings hold."""
    explained = field_help(kind)
    for action in parser._actions:
        if action.dest in explained:
            action.help = explained[action.dest]
    if isinstance(preset, kind):
        given = {field.name: getattr(preset, field.name) for field in dataclasses.fields(kind)}
        own = {field.name: field.default for field in dataclasses.fields(kind)}
        parser.set_defaults({name: value for name, value in given.items() if value != own[name]})


def field_help(kind: type[Any]) -> dict[str, str]:
    """The description of each field of a dataclass, from its own docstring or from that of the parent which defines it."""
    described = [
        docstring_parser.parse(owner.__doc__ or "").params for owner in kind.__mro__[::-1] if owner is not object
    ]
    texts = {param.arg_name: param.description for params in described for param in params}
    return {field.name: texts.get(field.name) or "" for field in dataclasses.fields(kind)}


def check_config_files(prog: str, arguments: Sequence[str]) -> None:
    """Ends the process with code 2 where a `--config` names no YAML file: for a parser that takes seconds to import."""
    parser = CommandParser(prog=prog, add_help=False)
    words = iter(arguments)
    for word in words:
        name, equals, value = word.partition("=")
        if name not in ("--config", "-c"):
            continue
        value = value if equals else next(words, "")
        if "://" in value or (":" in value and not Path(value).exists()):  # an address, or the YAML itself
            continue
        try:
            content = yaml.safe_load(Path(value).read_bytes())
        except (OSError, yaml.YAMLError, RecursionError, ValueError) as error:
            parser.error(f"--config {value} cannot be read: {error}")
        if not isinstance(content, dict | None):
            parser.error(f"--config {value} holds no options; a line of it reads `name: value`")


def call(function: Callable[..., Any], prog: str, arguments: Sequence[str]) -> Any:
    """Calls `function` with what `arguments` say; a mistake in them ends the process with code 2."""
    return call_parsed(function, prog, parse(function, prog, arguments))


def parse(function: Callable[..., Any], prog: str, arguments: Sequence[str]) -> jsonargparse.Namespace:
    """What `arguments` say, for `call_parsed`. Help, and a mistake in them, end the process here.

    Only the signature of `function` is read, so an outline of it serves as well.
    """
    parser = parser_for(function, prog)
    words = [with_underscores(word) for word in arguments]
    try:
        words = gather_lists(words, list_options(function), whole_options(function))
    except ValueError as error:
        parser.error(str(error))
    return parser.parse_args(words)


def call_parsed(function: Callable[..., Any], prog: str, parsed: jsonargparse.Namespace) -> Any:
    """Calls `function` with arguments that `parse` has read."""
    values = parser_for(function, prog).instantiate(parsed)
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


def gather_lists(arguments: Sequence[str], lists: dict[str, bool], whole: Collection[str] = ()) -> list[str]:
    """Turns `--widths 1 2`, `--widths 1,2`, repeats and a JSON or YAML list into the one JSON list that jsonargparse reads.

    Args:
        arguments: the words after the command.
        lists: names of the options that take several values; True where the values are text.
        whole: those of them whose values may hold commas and brackets: only a JSON list of texts is taken apart.

    Raises:
        ValueError: an option has no value, an empty one, or a list in its list.
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
    return others + [f"--{name}={_one_list(name, words, lists[name], name in whole)}" for name, words in values.items()]


def _one_list(name: str, words: list[str], text: bool, whole: bool) -> str:
    if not words:
        raise ValueError(f"option --{name} has no value; {how_to_list(name, whole)}")
    if words == ["null"] and not whole:
        return "null"
    values = [value for word in words for value in (_whole_values(word) if whole else _values(name, word))]
    return f"[{', '.join(json.dumps(value) if text else value for value in values)}]"


def _whole_values(word: str) -> list[str]:
    if word.startswith("["):
        with contextlib.suppress(ValueError, RecursionError):
            values = json.loads(word)
            if all(isinstance(value, str) for value in values):
                return list(values)
    return [word]


def _values(name: str, word: str) -> list[str]:
    bracketed = word if word.startswith("[") else f"[{word}]"
    try:
        # Numbers stay as they were written: jsonargparse reads them by the option's type.
        values = yaml.load(bracketed, yaml.BaseLoader)
    except (yaml.YAMLError, RecursionError):
        values = word.split(",")
    if not all(isinstance(value, str) and value.strip() for value in values) or (word.endswith(",")):
        raise ValueError(f"option --{name}: {word!r} holds an empty value or an inner list; {how_to_list(name, False)}")
    return [value.strip() for value in values]


def how_to_list(name: str, whole: bool) -> str:
    """How several values of an option are given: the sentence of its help and of its mistakes."""
    if whole:
        return f"give several as --{name} A B or as a JSON list; a comma belongs to the value"
    return f"give several as --{name} A B, as --{name} A,B or as a JSON list"


def list_options(function: Callable[..., Any]) -> dict[str, bool]:
    """Names of the options that are lists or tuples; True where the elements are text, paths or a choice of words."""
    return {
        name: element in (str, Path) or typing.get_origin(element) is typing.Literal
        for name, (element, _) in _lists(function, "").items()
    }


def whole_options(function: Callable[..., Any]) -> set[str]:
    """Names of those lists whose values may hold commas: their type is `Annotated[ITS_TYPE, WHOLE]`."""
    return {name for name, (_, whole) in _lists(function, "").items() if whole}


def _lists(owner: Callable[..., Any], prefix: str) -> dict[str, tuple[Any, bool]]:
    """The element type of each list parameter or field, dataclasses below `owner` included, and whether it is marked as whole."""
    lists: dict[str, tuple[Any, bool]] = {}
    for name, hint in typing.get_type_hints(owner, include_extras=True).items():
        marks = getattr(hint, "__metadata__", ())
        plain = hint.__origin__ if marks else hint
        options = typing.get_args(plain) if typing.get_origin(plain) in (typing.Union, types.UnionType) else (plain,)
        for option in options if name != "return" else ():
            if typing.get_origin(option) in (list, tuple):
                element = typing.get_args(option)[0]
                if typing.get_origin(element) in (None, typing.Literal):  # lists of lists are JSON
                    lists[f"{prefix}{name}"] = (element, WHOLE in marks)
            elif dataclasses.is_dataclass(option):
                lists |= _lists(
                    typing.cast(Callable[..., Any], option), prefix if FLAT in marks else f"{prefix}{name}."
                )
    return lists

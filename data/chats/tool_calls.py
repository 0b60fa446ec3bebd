"""Tool definitions and tool calls of a row, each made into the one form that chat templates read.

Owns: the spellings of a tool and of a call, and which ones are none. Does not know: turns, templates, tokens.
"""

import contextlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeVar, cast

from draftsmith.json_rows import UnusableRow, parse_object

TOOL_FIELDS = ("tools", "functions")
T = TypeVar("T", bound=Mapping[str, Any])
# What says nothing, as a value or as JSON text.
_NONE: tuple[object, ...] = (None, "", "null", "None", "[]", "{}", [], ())
# OpenAI's name of a call's arguments, and those of Llama, LangChain and Bedrock, which count where it says nothing.
_ARGUMENT_FIELDS = ("arguments", "parameters", "args", "input")
# Where the function lies in an entry: OpenAI's name, Bedrock's and OpenInference's.
_WRAPPERS = ("function", "toolSpec", "tool_call")
_CALL_TYPES = (None, "function", "tool_call")
CALL_FIELDS = ("tool_calls", "function_call", "function_calls")
# Where null is a value of a schema; elsewhere a table has filled it in.
_NULLABLE = ("default", "const", "examples")


def read_tools(row: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    """Read the tools that a row defines: a list of them, or its JSON text.

    A bare function (`name`, `parameters`) becomes `{"type": "function", "function": ...}`, as servers give it to the template.

    Args:
        row: of a data set.

    Returns:
        The definitions; none where the row has no tools.

    Raises:
        UnusableRow: different `tools` and `functions`, anything but a list, or an entry without a function's name.
    """
    config = row.get("toolConfig")
    if isinstance(config, Mapping) and says_nothing(row.get("tools")):  # Bedrock's
        tools: Any = config.get("tools")
        is_list = isinstance(tools, list | tuple)
        row = {**row, "tools": [tool for tool in tools if not _is_mark(tool)] if is_list else tools}
    given = {name: _tools(row[name], name) for name in TOOL_FIELDS if not says_nothing(row.get(name))}
    for name, tools in given.items():
        if tools != next(iter(given.values())):
            raise UnusableRow(f"the row has {next(iter(given))} and other {name}; one of them is enough")
    return next(iter(given.values()), ())


def _is_mark(tool: Any) -> bool:
    """Whether an entry of Bedrock's tools only says where a server's cache may end."""
    return isinstance(tool, Mapping) and set(tool) == {"cachePoint"}


def _tools(value: Any, name: str) -> tuple[dict[str, Any], ...]:
    return tuple(_tool(entry, f"{name}[{number}]") for number, entry in enumerate(_list(value, name)))


def read_calls(turn: Mapping[str, Any], place: str) -> list[dict[str, Any]]:
    """Read the tool calls of an assistant's turn: `tool_calls` or `function_calls`, or OpenAI's earlier `function_call`.

    Arguments that are JSON text become an object: templates write it as JSON again, and servers read rows alike.

    Args:
        turn: of a row.
        place: what errors call it.

    Returns:
        Calls of the form `{"id": ..., "type": "function", "function": {"name": ..., "arguments": {...}}}`; `id` only where there is one.

    Raises:
        UnusableRow: two spellings that differ, or a call that has no name, whose arguments are no object, or that has two different ones.
    """
    given = {name: _calls(turn[name], name, place) for name in CALL_FIELDS if not says_nothing(turn.get(name))}
    functions = {name: [call["function"] for call in calls] for name, calls in given.items()}
    for name, called in functions.items():
        if called != next(iter(functions.values())):
            raise UnusableRow(f"{place} has {next(iter(given))} and other {name}; one of them is enough")
    # The spelling with ids, where there is one.
    return max(given.values(), key=lambda calls: sum("id" in call for call in calls), default=[])


def _calls(value: Any, name: str, place: str) -> list[dict[str, Any]]:
    calls = [value] if name == "function_call" else _list(value, f"{place}: {name}")
    return [_call(call, f"{place}: {name}[{number}]") for number, call in enumerate(calls)]


def says_nothing(value: Any) -> bool:
    """Whether a field holds nothing: null, something empty, or an object of such fields, as a table fills one in.

    Example: `{"name": None, "arguments": None}` is no call.

    Args:
        value: of a turn or a row.

    Returns:
        True where it counts as absent.
    """
    if isinstance(value, Mapping):
        return all(says_nothing(entry) for entry in value.values())
    return value in _NONE


def call_of_text(text: str, place: str) -> list[dict[str, Any]]:
    """Read the turn of a ShareGPT row that is a call: one call as JSON text, or a list of calls.

    Args:
        text: the turn's.
        place: what errors call it.

    Returns:
        As `read_calls`.

    Raises:
        UnusableRow: the text is no JSON, or no call.
    """
    calls = _parsed(text, place)
    calls = calls if isinstance(calls, list) else [calls]
    if not calls:
        raise UnusableRow(f"{place} is a list without a call")
    return [_call(call, f"{place}: call {number}") for number, call in enumerate(calls)]


def parsed_list(text: str, place: str) -> Any:
    """Parse a list that is JSON text.

    Args:
        text: of a row.
        place: what errors call it.

    Returns:
        The list.

    Raises:
        UnusableRow: it is no JSON.
    """
    return _parsed(text, place)


def _parsed(text: str, place: str) -> Any:
    """JSON text by the rules of rows; a list is parsed as the value of an object.

    Raises:
        UnusableRow: it is no JSON.
    """
    try:
        if not text.lstrip().startswith("["):
            return parse_object(text.encode())
        [(_, value)] = parse_object(f'{{"list": {text}}}'.encode()).items()
        return value
    except ValueError as error:  # no JSON, half a surrogate pair, or more behind the list
        raise UnusableRow(f"{place} is no JSON: {error}") from error


def _list(value: Any, place: str) -> list[Any] | tuple[Any, ...]:
    value = _parsed(value, place) if isinstance(value, str) else value
    if not isinstance(value, list | tuple):
        raise UnusableRow(f"{place} is {type(value).__name__}, not a list")
    return value


def _object(value: Any, place: str) -> dict[str, Any]:
    """An object, which may be JSON text; empty where it is null or the text says nothing.

    Raises:
        UnusableRow: it is none.
    """
    if value is None or (isinstance(value, str) and value.strip() in _NONE):
        return {}
    value = _parsed(value, place) if isinstance(value, str) else value
    if not isinstance(value, Mapping):
        raise UnusableRow(f"{place} is {type(value).__name__}, not an object")
    return dict(value)


def _function(entry: Any, place: str) -> Mapping[str, Any]:
    """The function of a tool or of a call, which may be JSON text, or bare.

    Raises:
        UnusableRow: there is none.
    """
    entry = _parsed(entry, place) if isinstance(entry, str) else entry
    if not isinstance(entry, Mapping):
        raise UnusableRow(f"{place} is {type(entry).__name__}, not an object")
    if entry.get("type") not in _CALL_TYPES:
        raise UnusableRow(f"{place} is of the type {entry['type']!r:.80}; only functions are read")
    function = next((entry[name] for name in _WRAPPERS if entry.get(name) is not None), entry)
    if isinstance(function, Mapping) and isinstance(function.get("function"), Mapping):
        function = function["function"]
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str) or not name.strip():
        raise UnusableRow(f"{place} names no function")
    return function


def _tool(entry: Any, place: str) -> dict[str, Any]:
    function = _function(entry, place)
    function = {name: value for name, value in _without_nulls(function).items() if name != "type"}
    for name in ("input_schema", "inputSchema"):  # Anthropic's name; that of MCP and Bedrock
        schema = function.pop(name, None)
        schema = schema["json"] if isinstance(schema, Mapping) and set(schema) == {"json"} else schema
        function |= {} if schema is None else {"parameters": schema}
    if isinstance(function.get("parameters"), str):
        function["parameters"] = _parameters(function["parameters"])
    return {"type": "function", "function": function}


def _parameters(text: str) -> Any:
    """A tool's parameters that are JSON text, as an object; text that holds none stays as it is."""
    with contextlib.suppress(UnusableRow):
        return _without_nulls(_object(text, "the parameters"))
    return text


def _without_nulls(schema: Any) -> Any:
    """A definition without the keys that are null: tables give each tool the keys of all others."""
    if isinstance(schema, Mapping):
        kept = {name: entry for name, entry in schema.items() if entry is not None or name in _NULLABLE}
        return {name: _without_nulls(entry) for name, entry in kept.items()}
    return [_without_nulls(entry) for entry in schema] if isinstance(schema, list | tuple) else schema


def without_fillers(turns: Sequence[T], tools: Sequence[Mapping[str, Any]]) -> tuple[T, ...]:
    """Leave out arguments that are null and that the called tool does not have: a table gives each call the names of all others.

    Args:
        turns: of a conversation.
        tools: their definitions, as `read_tools` makes them.

    Returns:
        The turns.
    """
    names = {tool["function"]["name"]: _argument_names(tool["function"]) for tool in tools}
    return tuple(_without_fillers(turn, names) for turn in turns)


def _without_fillers(turn: T, names: Mapping[str, Collection[str] | None]) -> T:
    if not names or not turn.get("tool_calls"):
        return turn
    calls = []
    for call in turn["tool_calls"]:
        function = call["function"]
        own = names.get(function["name"])
        if own is not None:
            kept = {name: value for name, value in function["arguments"].items() if value is not None or name in own}
            call = {**call, "function": {**function, "arguments": kept}}
        calls.append(call)
    return cast(T, {**turn, "tool_calls": calls})


def _argument_names(function: Mapping[str, Any]) -> Collection[str] | None:
    """The arguments that a tool takes; None where its definition does not list them."""
    parameters = function.get("parameters")
    properties = parameters.get("properties") if isinstance(parameters, Mapping) else None
    return set(properties) if isinstance(properties, Mapping) else None


def _call(entry: Any, place: str) -> dict[str, Any]:
    function = _function(entry, place)
    arguments = _arguments(function, place)
    own_id = entry.get("id") if isinstance(entry, Mapping) else None
    if own_id is not None and not isinstance(own_id, str):
        raise UnusableRow(f"{place}: the id is {own_id!r:.80}, not text")
    call = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return call if own_id is None else {"id": own_id, **call}


def _arguments(function: Mapping[str, Any], place: str) -> dict[str, Any]:
    """The arguments of a call, from the first field that says something.

    Raises:
        UnusableRow: they are no object, or two fields say different things.
    """
    values = {name: function[name] for name in _ARGUMENT_FIELDS if function.get(name) not in _NONE}
    given = {name: _object(value, f"{place}: the {name}") for name, value in values.items()}
    saying = [name for name, arguments in given.items() if not says_nothing(arguments)]
    for name in saying[1:]:
        if given[name] != given[saying[0]]:
            raise UnusableRow(f"{place} has two different objects in {saying[0]} and {name}; one of them is enough")
    # Where all are null, they are the call's own all the same.
    return given[saying[0]] if saying else max(given.values(), key=len, default={})

"""Rows in the form of Gemini's API: `contents` of `role` and `parts`, each made into a turn with blocks.

Owns: what a part means, and where such a row keeps its system's words, its tools and its answer. Does not know: fields of turns,
templates, logs.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from draftsmith.data.chats.messages import listed, objects
from draftsmith.data.chats.tool_calls import says_nothing
from draftsmith.json_rows import UnusableRow

# Each field by its name in JSON, with the name that Python's client gives it.
_SNAKE = {
    "systemInstruction": "system_instruction",
    "functionDeclarations": "function_declarations",
    "functionCall": "function_call",
    "functionResponse": "function_response",
    "inlineData": "inline_data",
    "fileData": "file_data",
    "mimeType": "mime_type",
    "fileUri": "file_uri",
    "finishReason": "finish_reason",
    "parametersJsonSchema": "parameters_json_schema",
}
_PARTS = ("functionCall", "functionResponse", "inlineData", "fileData")
_CODE = ("executableCode", "executable_code", "codeExecutionResult", "code_execution_result")
_MEDIA = ("image", "audio", "video")
# Why a reply that is whole ended; the number is that of an older client.
_WHOLE = (None, "STOP", 1)
_TYPE_NAMES = ("STRING", "NUMBER", "INTEGER", "BOOLEAN", "ARRAY", "OBJECT", "NULL")
GEMINI_ANSWER = ("candidates",)
"""The field of a response that a conversation is made of."""
GEMINI_FIELDS = ("contents", *GEMINI_ANSWER, "systemInstruction", "system_instruction", "config")
"""The fields of a request and its response that a conversation is made of, beside `tools`."""


def is_gemini(row: Mapping[str, Any]) -> bool:
    """Whether a row holds `contents` of parts.

    Args:
        row: of a data set.

    Returns:
        True where it does.
    """
    contents = objects(row.get("contents"))
    return bool(contents) and all("parts" in content for content in contents)


def has_candidates(response: Mapping[str, Any]) -> bool:
    """Whether a response holds candidates.

    Args:
        response: of a log, or a row.

    Returns:
        True where it does.
    """
    return any("content" in candidate for candidate in objects(response.get("candidates")))


def flat_gemini(row: Mapping[str, Any]) -> tuple[dict[str, Any], str | None]:
    """Give a row with `contents`, and perhaps `candidates`, the fields of a conversation.

    Args:
        row: of a data set, or of a request and its response.

    Returns:
        The row with `messages` and `tools`; and why its reply cannot be learned from, where it was cut.

    Raises:
        UnusableRow: a part or a tool of another kind, or several candidates.
    """
    flat = {name: value for name, value in row.items() if name not in GEMINI_FIELDS}
    config = row.get("config")
    given = {**(config if isinstance(config, Mapping) else {}), **{n: v for n, v in row.items() if v is not None}}
    contents, flaw = list(objects(row.get("contents"))), None
    if not says_nothing(row.get("candidates")):
        candidates = objects(row["candidates"])
        if len(candidates) != 1:
            raise UnusableRow(f"the response has {len(candidates)} candidates; a conversation has one reply")
        answer = candidates[0].get("content")
        contents.append({"role": "model", **answer} if isinstance(answer, Mapping) else {"role": "model"})
        finish = _field(candidates[0], "finishReason")
        flaw = None if finish in _WHOLE else f"the reply was cut (finishReason {finish!r:.80})"
    turns = [
        {"role": content.get("role") or "user", "content": _blocks(content.get("parts"), f"turn {number}")}
        for number, content in enumerate(contents)
    ]
    system = _field(given, "systemInstruction")
    if not says_nothing(system):
        parts = system.get("parts") if isinstance(system, Mapping) else system
        turns.insert(0, {"role": "system", "content": _blocks(parts, "systemInstruction")})
    return flat | {"messages": turns, "tools": _tools(given.get("tools"))}, flaw


def _field(fields: Mapping[str, Any], name: str) -> Any:
    """A field under either of its names; null counts as absent."""
    return fields.get(_SNAKE[name]) if fields.get(name) is None else fields[name]


def _blocks(parts: Any, place: str) -> list[dict[str, Any]]:
    """The blocks of a content's parts; a part that is a text may be alone."""
    if says_nothing(parts):
        return []
    parts = [parts] if isinstance(parts, str | Mapping) else parts
    if not isinstance(parts, list | tuple):
        raise UnusableRow(f"{place}: the parts are {type(parts).__name__}, not a list")
    return [_block(part, place) for part in parts]


def _block(part: Any, place: str) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    fields: Mapping[str, Any] = part if isinstance(part, Mapping) else {}
    kinds = [kind for kind in _PARTS if not says_nothing(_field(fields, kind))]
    text, has_code = fields.get("text"), any(not says_nothing(fields.get(name)) for name in _CODE)
    if len(kinds) + isinstance(text, str) != 1 or has_code:
        raise UnusableRow(f"{place}: a part holds one of text, {', '.join(_PARTS)}; another one is {part!r:.80}")
    if isinstance(text, str):
        return (
            {"type": "thinking", "thinking": text} if fields.get("thought") is True else {"type": "text", "text": text}
        )
    value = _field(fields, kinds[0])
    if not isinstance(value, Mapping):
        raise UnusableRow(f"{place}: {kinds[0]} is {type(value).__name__}, not an object")
    if kinds[0] == "functionCall":
        return {"type": "tool_use", "id": value.get("id"), "name": value.get("name"), "input": value.get("args")}
    if kinds[0] == "functionResponse":
        response = value.get("response")
        words = response if isinstance(response, str) else "" if response is None else _as_json(response, place)
        return {"type": "tool_result", "tool_use_id": value.get("id"), "name": value.get("name"), "content": words}
    return _media(value, place)


def _as_json(value: Any, place: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UnusableRow(f"{place}: a functionResponse holds what JSON cannot: {error}") from error


def _media(value: Mapping[str, Any], place: str) -> dict[str, Any]:
    """A picture, sound or video as a part of its kind, with its data or its address."""
    kind = str(_field(value, "mimeType")).partition("/")[0]
    address = _field(value, "fileUri")
    if address is None and isinstance(value.get("data"), str):
        address = f"data:{_field(value, 'mimeType')};base64,{value['data']}"
    if kind not in _MEDIA or not isinstance(address, str):
        raise UnusableRow(
            f"{place}: a part of the mimeType {_field(value, 'mimeType')!r:.80}; types are {', '.join(_MEDIA)}"
        )
    return {"type": kind, kind: address}


def _tools(value: Any) -> list[Any]:
    """The functions of all tools, as one list; those in OpenAI's form stay as they are."""
    functions: list[Any] = []
    for number, entry in enumerate(_entries(value, "tools")):
        declarations = _field(entry, "functionDeclarations") if isinstance(entry, Mapping) else None
        if says_nothing(declarations):
            if not isinstance(entry, Mapping) or not (entry.get("function") or entry.get("name")):
                raise UnusableRow(f"tools[{number}] has no functionDeclarations; only functions are read")
            functions.append(entry)
            continue
        functions += [_function(each) for each in _entries(declarations, f"tools[{number}].functionDeclarations")]
    return functions


def _entries(value: Any, place: str) -> Sequence[Any]:
    """The entries of a list, which may be JSON text; an object is its only entry."""
    if says_nothing(value):
        return []
    value = listed(value, place)
    if not isinstance(value, list | tuple | Mapping):
        raise UnusableRow(f"{place} is {type(value).__name__}, not a list")
    return [value] if isinstance(value, Mapping) else value


def _function(declaration: Any) -> Any:
    """A function with its parameters as JSON Schema has them, whose types are in small letters."""
    if not isinstance(declaration, Mapping):
        return declaration
    function = {name: value for name, value in declaration.items() if name not in _schema_names()}
    schema = _field(declaration, "parametersJsonSchema")
    schema = declaration.get("parameters") if schema is None else schema
    return function if schema is None else function | {"parameters": _lower_types(schema)}


def _schema_names() -> Sequence[str]:
    return ("parameters", "parametersJsonSchema", _SNAKE["parametersJsonSchema"])


def _lower_types(schema: Any) -> Any:
    if isinstance(schema, Mapping):
        return {
            name: value.lower() if name == "type" and value in _TYPE_NAMES else _lower_types(value)
            for name, value in schema.items()
        }
    return [_lower_types(entry) for entry in schema] if isinstance(schema, list | tuple) else schema

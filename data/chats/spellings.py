"""How other software spells a turn and a block of one, made into the fields and types that rows have here.

Owns: the names of roles, and those that LangChain, Bedrock, OpenTelemetry, Cohere, Vercel's AI SDK and others give to turns and
blocks. Does not know: what a field means, rows, templates.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeGuard

from draftsmith.data.chats.tool_calls import CALL_FIELDS, says_nothing
from draftsmith.json_rows import UnusableRow

ROLE_FIELDS, CONTENT_FIELDS = ("role", "from"), ("content", "value")
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "ai": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "environment": "tool",
    "tool_response": "tool",
    "tool_result": "tool",
    "function_response": "tool",
    "ipython": "tool",
    "function_call": "assistant",
    "tool_call": "assistant",
}
THOUGHT, CALL, RESULT, STEP = "thinking", "tool_use", "tool_result", "step-start"
"""The types of blocks that are a thought, a call, what a tool gave back, and the beginning of a further reply."""

# Fields that name the speaker where there is no role, and hold the words where there is no content.
_OTHER_ROLE_FIELDS = ("type", "author", "sender", "speaker", "source", "kind", "part_kind")
_OTHER_CONTENT_FIELDS = ("text", "message", "parts", "blocks", "items")
_ROLE_ENDINGS = ("chunk", "message", "_prompt", "_return")
# The type of a block, or the only field of one without a type (Bedrock, Haystack).
_TYPE_FIELDS = ("type", "part_kind", "block_type", "content_type")
_KINDS = {
    "text": "text",
    **dict.fromkeys(("reasoning", "reasoningContent", THOUGHT), THOUGHT),
    **dict.fromkeys(("toolUse", "tool-call", "tool_call", "function_call"), CALL),
    **dict.fromkeys(("toolResult", "tool-result", "tool-return", "tool_call_response", "tool_call_result"), RESULT),
    **{kind: kind for kind in ("image", "audio", "video")},
}
# Marks of a server's own; and Bedrock's name of a thought that it has encrypted, which Anthropic has as a type.
_SILENT, _ENCRYPTED = ("cachePoint", "step-finish"), "redactedContent"
_IDS = ("id", "toolUseId", "toolCallId", "tool_call_id", "call_id", "callID")
_NAMES = ("name", "toolName", "tool_name", "tool")
_INPUTS = ("input", "args", "arguments")
_RESULTS = ("content", "output", "result", "response")
_TEXTS = ("text", "content", "value", "thinking", "reasoning", "reasoning_text", "reasoningText", "summary")
# Why a server ended a reply that is whole: OpenAI's words, Anthropic's, Cohere's, and those of Text Generation Inference.
_WHOLE = (
    "stop",
    "tool_calls",
    "tool_call",
    "function_call",
    "end_turn",
    "stop_sequence",
    "tool_use",
    "complete",
    "eos",
    "eos_token",
)
# LangChain keeps here what its own fields do not name.
_EXTRAS, _BAD_CALLS = "additional_kwargs", "invalid_tool_calls"
_KEPT_EXTRAS = ("tool_calls", "function_call", "reasoning_content")


def word(role: Any) -> str | None:
    """A role in the spelling that its names are listed in, such as `tool_response` for `Tool-Response`.

    Args:
        role: of a turn.

    Returns:
        The word; None where the role is no text.
    """
    return role.strip().lower().replace("-", "_").replace(" ", "_") if isinstance(role, str) else None


def is_whole(finish: Any) -> bool:
    """Whether a server ended a reply because it was whole.

    Args:
        finish: the server's reason.

    Returns:
        True where it was, or the server does not say.
    """
    return finish is None or (isinstance(finish, str) and finish.lower() in _WHOLE)


def role_of(value: Any) -> str | None:
    """Name who speaks.

    Args:
        value: of a turn's role.

    Returns:
        "system", "user", "assistant" or "tool"; None where the value names none of them.
    """
    return ROLES.get(word(value) or "")


def plain_turns(turn: Any) -> list[Any]:
    """Give a turn of other software the fields `role` and `content`.

    Example: LangChain's `{"type": "human", "data": {"content": "Sure?"}}` has the role `human` and this content.

    Args:
        turn: of a row.

    Returns:
        The turn; several where its parts are turns of their own; as it is where it has a role and a content, or neither is known.

    Raises:
        UnusableRow: LangChain could not read its calls.
    """
    if not isinstance(turn, Mapping):
        return [turn]
    inner = _unwrapped(turn)
    parts = inner.get("parts")
    if parts is not None and inner.get("kind") == "request" and _has_blocks(parts):
        return [each for part in parts for each in plain_turns(part)]  # Pydantic AI: each part is somebody's
    fields = dict(inner)
    if all(fields.get(name) is None for name in ROLE_FIELDS) and (role := _other_role(fields)) is not None:
        fields["role"] = role
    if not any(fields.get(name) is not None for name in ROLE_FIELDS):
        return [turn]
    has_content = any(fields.get(name) is not None for name in CONTENT_FIELDS)
    if _has_blocks(parts) and not isinstance(fields.get("content"), list | tuple) and _are_content(parts, fields):
        fields |= {"content": parts, "value": None}
    elif not has_content:
        types = list | tuple if any(not says_nothing(fields.get(name)) for name in CALL_FIELDS) else str | list | tuple
        name = next((name for name in _OTHER_CONTENT_FIELDS if isinstance(fields.get(name), types)), None)
        fields |= {} if name is None else {"content": fields[name]}
    extras = fields.get(_EXTRAS)
    for name, value in extras.items() if isinstance(extras, Mapping) else ():
        if name in _KEPT_EXTRAS and says_nothing(fields.get(name)) and not says_nothing(value):
            fields[name] = value
    if role_of(fields.get("role")) == "tool" and fields.get("name") is None and fields.get("tool_name") is not None:
        fields["name"] = fields["tool_name"]
    if not says_nothing(fields.get(_BAD_CALLS)):
        raise UnusableRow(f"a turn has {_BAD_CALLS}, which LangChain could not read; remove the row, or mend the calls")
    return [fields]


def _unwrapped(turn: Mapping[str, Any]) -> Mapping[str, Any]:
    """The fields of a turn that lie in an object of it: LangChain's two dumps, an event with a `message`, OpenCode's `info`."""
    if any(turn.get(name) is not None for name in ROLE_FIELDS):
        return turn
    inner: Any = turn.get("kwargs")
    if "lc" in turn and isinstance(inner, Mapping):
        name = turn.get("id")
        return {"type": name[-1] if isinstance(name, list | tuple) and name else None, **inner}
    for name in ("data", "message", "info"):
        inner = turn.get(name)
        if isinstance(inner, Mapping) and (name == "data" or _names_a_role(inner)):
            rest = {field: value for field, value in turn.items() if field != name and name != "message"}
            return {**rest, **inner}
    return turn


def _names_a_role(fields: Mapping[str, Any]) -> bool:
    return any(role_of(fields.get(name)) for name in ROLE_FIELDS) or _other_role(fields) is not None


def _other_role(fields: Mapping[str, Any]) -> str | None:
    """The role in a field of another name, such as `author` or LangChain's `type`; Pydantic AI calls a reply `response`."""
    if fields.get("kind") == "response" and _has_blocks(fields.get("parts")):
        return "assistant"
    for name in _OTHER_ROLE_FIELDS:
        value = fields.get(name)
        role = word(value.get("role") if isinstance(value, Mapping) else value) or ""
        for ending in _ROLE_ENDINGS:
            role = role.removesuffix(ending)
        if role in ROLES:
            return role
    return None


def _has_blocks(parts: Any) -> TypeGuard[Sequence[Mapping[str, Any]]]:
    """Whether a value is a list of objects that name their type."""
    return (
        isinstance(parts, list | tuple)
        and bool(parts)
        and all(isinstance(part, Mapping) and _type_of(part) is not None for part in parts)
    )


def _are_content(parts: Sequence[Mapping[str, Any]], fields: Mapping[str, Any]) -> bool:
    """Whether parts are the content of a turn, whose words a client of Vercel's AI SDK repeats; parts of other types may be anything.

    Raises:
        UnusableRow: they are, and the content beside them has other words.
    """
    content = next((fields[name] for name in CONTENT_FIELDS if isinstance(fields.get(name), str)), "")
    if not content.strip():
        return True
    types = [_type_of(part) or "" for part in parts]
    if not any(own_type in _KINDS or _is_call_with_result(own_type) for own_type in types):
        return False
    texts = [_words(part) or "" for part, own_type in zip(parts, types, strict=True) if _KINDS.get(own_type) == "text"]
    own, given = ("".join(words.split()) for words in ("".join(texts), content))
    if not own or (own not in given and given not in own):
        raise UnusableRow("a turn has parts, and a content with other words; one of them is enough")
    return True


def plain_blocks(blocks: Sequence[Any]) -> list[Any]:
    """Give the blocks of a turn the types and fields that Anthropic's have.

    Example: Bedrock's `{"toolUse": {"toolUseId": "c1", "name": "weather", "input": {}}}` becomes
    `{"type": "tool_use", "id": "c1", "name": "weather", "input": {}}`.

    Args:
        blocks: of a turn.

    Returns:
        The blocks, without those that say nothing; a call with its result is two.

    Raises:
        UnusableRow: what a tool gave back cannot be written as JSON.
    """
    return [plain for block in blocks for plain in _plain_blocks(block)]


def _plain_blocks(block: Any) -> Iterator[Any]:
    if not isinstance(block, Mapping):
        yield block
        return
    own_type = _type_of(block)
    if own_type in _SILENT or (own_type is None and any(name in block for name in _SILENT)):
        return
    kind, inner = _KINDS.get(own_type or ""), block
    if own_type is None:
        names = [name for name, value in block.items() if name in _KINDS and value is not None]
        if len(names) != 1:
            yield block
            return
        value = block[names[0]]
        kind, inner = _KINDS[names[0]], value if isinstance(value, Mapping) else {"text": value}
    elif _is_call_with_result(own_type):
        yield from _call_with_result(block, own_type)
        return
    if kind == THOUGHT and own_type != THOUGHT and _ENCRYPTED in inner:
        yield {"type": "redacted_thinking"}
    elif kind == THOUGHT and (own_type != THOUGHT or THOUGHT not in inner):
        # A server may keep the text of its thought to itself.
        if words := _words(inner):
            yield {"type": THOUGHT, THOUGHT: words}
        elif own_type == THOUGHT:
            yield block
    elif kind == "text" and (own_type is None or not isinstance(inner.get("text"), str)):
        yield {"type": "text", "text": _words(inner)}
    elif kind == CALL:
        yield {"type": CALL, "id": _first(inner, _IDS), "name": _first(inner, _NAMES), "input": _first(inner, _INPUTS)}
    elif kind == RESULT:
        yield _result(inner)
    elif own_type is None and kind is not None:
        yield {"type": kind}  # a picture, of which only the template's placeholder is read
    else:
        yield block if own_type is None or "type" in block else {**block, "type": own_type}


def _type_of(block: Mapping[str, Any]) -> str | None:
    return next((block[name] for name in _TYPE_FIELDS if isinstance(block.get(name), str)), None)


def _is_call_with_result(own_type: str) -> bool:
    """Whether a block is a call and what came of it: Vercel's AI SDK writes `tool-NAME`, OpenCode `tool`."""
    return (own_type in ("tool", "dynamic-tool") or own_type.startswith("tool-")) and own_type not in _KINDS


def _call_with_result(block: Mapping[str, Any], own_type: str) -> Iterator[dict[str, Any]]:
    state = block.get("state")
    fields = {**block, **(state if isinstance(state, Mapping) else {})}
    name = _first(fields, _NAMES)
    name = own_type.removeprefix("tool-") if name is None else name
    yield {"type": CALL, "id": _first(fields, _IDS[1:]), "name": name, "input": _first(fields, _INPUTS)}
    output = next((fields[each] for each in ("output", "errorText", "error") if fields.get(each) is not None), None)
    if output is not None:
        yield _result({"id": _first(fields, _IDS[1:]), "name": name, "output": output})


def _result(inner: Mapping[str, Any]) -> dict[str, Any]:
    origin = inner.get("origin")
    fields = {**(origin if isinstance(origin, Mapping) else {}), **inner}
    content = _result_content(_first(fields, _RESULTS))
    return {"type": RESULT, "tool_use_id": _first(fields, _IDS), "name": _first(fields, _NAMES), "content": content}


def _result_content(value: Any) -> Any:
    """What a tool gave back: words, or parts; another value as JSON text."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, Mapping) and set(value) == {"type", "value"}:
        return _result_content(value["value"])
    if isinstance(value, list | tuple) and value and all(_is_part(part) for part in value):
        return [{"type": "text", "text": as_json(part["json"])} if "json" in part else part for part in value]
    return as_json(value)


def _is_part(part: Any) -> bool:
    return isinstance(part, Mapping) and (
        "json" in part or isinstance(part.get("text"), str) or part.get("type") == "image" or "image" in part
    )


def as_json(value: Any) -> str:
    """Write what a tool gave back as JSON text.

    Args:
        value: of any type.

    Returns:
        The text.

    Raises:
        UnusableRow: JSON has no such value.
    """
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UnusableRow(f"what a tool gave back holds what JSON cannot: {error}") from error


def _words(fields: Any) -> str | None:
    """The words of a block, which may lie in an object or a list of them; None where there are none."""
    if isinstance(fields, str):
        return fields
    if isinstance(fields, list | tuple):
        texts = [_words(entry) for entry in fields]
        return "\n\n".join(text for text in texts if text) or None
    return _words(_first(fields, _TEXTS)) if isinstance(fields, Mapping) else None


def _first(fields: Mapping[str, Any], names: Sequence[str]) -> Any:
    """The value of the first of some fields that is not null."""
    return next((fields[name] for name in names if fields.get(name) is not None), None)

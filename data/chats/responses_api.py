"""Rows in the form of OpenAI's Responses API: `input` and `output` hold items, each made into a turn or a block of one.

Owns: what an item means, which items make one reply, and which replies are whole. Does not know: fields of turns, templates, logs.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from draftsmith.data.chats.messages import fields_beside, is_role, listed, objects
from draftsmith.data.chats.tool_calls import CALL_FIELDS, says_nothing
from draftsmith.json_rows import UnusableRow

_MESSAGE, _CALL, _RESULT, _THOUGHT = "message", "function_call", "function_call_output", "reasoning"
_TYPES = (_MESSAGE, _CALL, _RESULT, _THOUGHT)
_EARLIER = ("previous_response_id", "conversation")
_ENDS = ("status", "incomplete_details")
RESPONSES_ANSWER = ("output", "output_text", *_ENDS)
"""The fields of a response that a conversation is made of."""
RESPONSES_FIELDS = ("input", "instructions", *_EARLIER, *RESPONSES_ANSWER)
"""The fields of a request and its response that a conversation is made of."""
# What a response that is not whole has in `status`; rows of texts may have a status of their own, which says less.
_NOT_WHOLE, _CUT = ("incomplete", "failed", "cancelled", "in_progress", "queued"), ("incomplete", "failed")


def is_responses(row: Mapping[str, Any]) -> bool:
    """Whether a row holds items: its `input` does, or its `output` behind an `input` that is a text.

    Args:
        row: of a data set.

    Returns:
        True where it does.
    """
    given = row.get("input")
    return _are_items(given) or (isinstance(given, str) and has_items(row))


def has_items(response: Mapping[str, Any]) -> bool:
    """Whether the `output` of a response holds items, or is empty because the response was cut or failed before the first.

    Args:
        response: of a log, or a row.

    Returns:
        True where it does.
    """
    output, status = response.get("output"), response.get("status")
    is_empty = (output in ([], ()) and isinstance(status, str)) or (output is None and status in _NOT_WHOLE)
    return is_empty or _are_items(output)


def parameters_of_items(row: Mapping[str, Any]) -> set[str]:
    """Name the fields of a row with items that only set something in the request, though they have the names of older formats.

    Args:
        row: of a data set.

    Returns:
        The names: `text` and `prompt` where they are objects, and a `conversation` that is no list.
    """
    names = {name for name in ("text", "prompt") if isinstance(row.get(name), Mapping)}
    return names if objects(row.get("conversation")) else names | {"conversation"}


def flat_responses(row: Mapping[str, Any]) -> tuple[dict[str, Any], str | None]:
    """Give a row with `input` and `output`, each a text or items, the fields of a conversation.

    A `reasoning` item whose text the server kept to itself counts as none; its summary counts where there is no more.

    Args:
        row: of a data set, or of a request and its response.

    Returns:
        The row with `messages`; and why its reply cannot be learned from, where it was cut.

    Raises:
        UnusableRow: an item of another type, or earlier turns that the row does not hold.
    """
    for name in _EARLIER:
        if not says_nothing(row.get(name)):
            raise UnusableRow(
                f"the row continues an earlier response ({name}), whose turns it does not hold; give it all its turns in input"
            )
    output = row.get("output_text") if row.get("output") is None else row["output"]
    items = [*_items(row.get("input"), "user", "input"), *_items(output, "assistant", "output")]
    turns = list(_turns(items))
    if not says_nothing(row.get("instructions")):
        turns.insert(0, {"role": "system", "content": row["instructions"]})
    flat = {name: value for name, value in row.items() if name not in RESPONSES_FIELDS}
    return flat | {"messages": turns}, _cut(row, items)


def _are_items(value: Any) -> bool:
    """Whether a value is a list of items. JSON text may be an answer, such as a list of people with their roles."""
    items, is_text = objects(value), isinstance(value, str)
    is_known = [_is_item(item, is_text=is_text) for item in items]
    others = ("type",) if is_text else ("type", "role")
    return any(is_known) and all(
        known or any(isinstance(item.get(name), str) for name in others)
        for known, item in zip(is_known, items, strict=True)
    )


def _is_item(item: Mapping[str, Any], *, is_text: bool) -> bool:
    """Whether an object is an item of a known type; a message in JSON text has its content too."""
    kind = item.get("type")
    is_message = kind in (None, _MESSAGE) and is_role(item.get("role")) and ("content" in item or not is_text)
    return is_message or (kind in _TYPES and (kind != _MESSAGE or not is_text))


def _items(value: Any, role: str, name: str) -> Sequence[Any]:
    """The items of a field; a text is a message of `role`."""
    if value is None:
        return []
    value = listed(value, name) if _are_items(value) else value
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if not isinstance(value, list | tuple):
        raise UnusableRow(f"{name} is {type(value).__name__}, neither text nor a list of items")
    return value


def _turns(items: Sequence[Any]) -> Iterator[dict[str, Any]]:
    """The turns of all items; those of one reply are its blocks."""
    reply: list[Any] = []
    beside: dict[str, Any] = {}
    for number, item in enumerate(items):
        kind = _kind(item, number)
        blocks = _blocks(item, kind, f"item {number}")
        has_words = any(block.get("type") in ("text", "output_text") for block in reply)
        begins_anew = kind == _MESSAGE and (has_words or bool(beside.keys() & CALL_FIELDS))
        if blocks is None or begins_anew:
            yield from _reply(reply, beside)
            reply, beside = [], {}
        if blocks is not None:
            reply = [*reply, *blocks]
            beside = _joined(beside, fields_beside(item), f"item {number}")
        elif kind == _RESULT:
            yield {"role": "tool", "tool_call_id": item.get("call_id"), "content": item.get("output")}
        else:
            yield dict(item)
    yield from _reply(reply, beside)


def _reply(blocks: list[Any], beside: dict[str, Any]) -> list[dict[str, Any]]:
    """The turn of a reply; none where it says nothing and calls nothing."""
    return [{**beside, "role": "assistant", "content": blocks}] if blocks or beside.keys() & CALL_FIELDS else []


def _joined(earlier: dict[str, Any], later: dict[str, Any], place: str) -> dict[str, Any]:
    """The fields that the items of one reply have beside their content, such as `weight`.

    Raises:
        UnusableRow: two items differ.
    """
    for name in earlier.keys() & later.keys():
        if earlier[name] != later[name]:
            raise UnusableRow(f"{place} has another {name} than an item before it, and both are of one reply")
    return earlier | later


def _kind(item: Any, number: int) -> str:
    kind = item.get("type") if isinstance(item, Mapping) else None
    if kind is None and isinstance(item, Mapping) and item.get("role") is not None:
        return _MESSAGE
    if kind not in _TYPES:
        what = f"of the type {kind!r:.80}" if isinstance(item, Mapping) else type(item).__name__
        raise UnusableRow(f"item {number} of input and output is {what}; items are {', '.join(_TYPES)}")
    return str(kind)


def _blocks(item: Mapping[str, Any], kind: str, place: str) -> list[Any] | None:
    """What an item adds to the assistant's reply; None where it is no part of one."""
    if kind == _CALL:
        return [
            {"type": "tool_use", "id": item.get("call_id"), "name": item.get("name"), "input": item.get("arguments")}
        ]
    if kind == _THOUGHT:
        thought = _texts(item.get("content"), place, "") or _texts(item.get("summary"), place, "\n\n")
        return [{"type": "thinking", "thinking": thought}] if thought else []
    if kind == _RESULT or item.get("role") != "assistant":
        return None
    content = item.get("content")
    if content is None and fields_beside(item).keys() & CALL_FIELDS:
        return []
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not objects(content):
        raise UnusableRow(f"{place}: the content is neither text nor a list of parts")
    return objects(content)


def _texts(value: Any, place: str, between: str) -> str:
    """The texts of a thought, which are parts or one text."""
    if says_nothing(value):
        return ""
    parts = [{"text": value}] if isinstance(value, str) else value
    texts = [part.get("text") if isinstance(part, Mapping) else None for part in parts] if _is_list(parts) else [None]
    words = [text for text in texts if isinstance(text, str)]
    if len(words) < len(texts):
        raise UnusableRow(f"{place}: a part of the reasoning has no text")
    return between.join(words)


def _is_list(value: object) -> bool:
    return isinstance(value, list | tuple)


def _cut(row: Mapping[str, Any], items: Sequence[Any]) -> str | None:
    """Why a reply is not whole, by the status of the response and of its items."""
    details, status = row.get("incomplete_details"), row.get("status")
    reason = details.get("reason", details) if isinstance(details, Mapping) else details
    why = [] if says_nothing(reason) else [f"{reason!s:.80}"]
    if status not in (_NOT_WHOLE if has_items(row) else _CUT):
        own = [item.get("status") for number, item in enumerate(items) if _is_replys(item, number)]
        status = next((given for given in own if given not in (None, "completed")), None)
    why = why if status is None else [f"status {status!r:.80}", *why]
    if not why and row.get("output") in ([], ()):
        return "the response has no items in output"
    return f"the reply was cut ({', '.join(why)})" if why else None


def _is_replys(item: Any, number: int) -> bool:
    """Whether an item is the assistant's."""
    return _kind(item, number) in (_CALL, _THOUGHT) or item.get("role") == "assistant"

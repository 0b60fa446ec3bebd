"""Rows in the form of OpenAI's Responses API: `input` and `output` hold items, each made into a turn or a block of one.

Owns: what an item means, which items make one reply, and which replies are whole. Does not know: fields of turns, templates, logs.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from draftsmith.data.chats.messages import listed, objects
from draftsmith.data.chats.tool_calls import says_nothing
from draftsmith.json_rows import UnusableRow

_MESSAGE, _CALL, _RESULT, _THOUGHT = "message", "function_call", "function_call_output", "reasoning"
_TYPES = (_MESSAGE, _CALL, _RESULT, _THOUGHT)
_EARLIER = ("previous_response_id", "conversation")
_ENDS = ("status", "incomplete_details")
RESPONSES_FIELDS = ("input", "output", "output_text", "instructions", *_EARLIER, *_ENDS)
"""The fields of a request and its response that a conversation is made of."""


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
    """Whether the `output` of a response holds items.

    Args:
        response: of a log, or a row.

    Returns:
        True where it does.
    """
    return _are_items(response.get("output"))


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
    items = objects(value)
    is_known = [item.get("role") is not None or item.get("type") in _TYPES for item in items]
    return any(is_known) and all(
        known or isinstance(item.get("type"), str) for known, item in zip(is_known, items, strict=True)
    )


def _items(value: Any, role: str, name: str) -> Sequence[Any]:
    """The items of a field; a text is a message of `role`."""
    if value is None:
        return []
    value = listed(value, name) if objects(value) else value
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if not isinstance(value, list | tuple):
        raise UnusableRow(f"{name} is {type(value).__name__}, neither text nor a list of items")
    return value


def _turns(items: Sequence[Any]) -> Iterator[dict[str, Any]]:
    """The turns of all items; those of one reply are its blocks."""
    reply: list[Any] = []
    for number, item in enumerate(items):
        kind = _kind(item, number)
        blocks = _blocks(item, kind, f"item {number}")
        begins_anew = kind == _MESSAGE and any(block.get("type") in ("text", "output_text") for block in reply)
        if reply and (blocks is None or begins_anew):
            yield {"role": "assistant", "content": reply}
            reply = []
        if blocks is not None:
            reply = [*reply, *blocks]
        elif kind == _RESULT:
            yield {"role": "tool", "tool_call_id": item.get("call_id"), "content": item.get("output")}
        else:
            yield dict(item)
    if reply:
        yield {"role": "assistant", "content": reply}


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
    response = row if has_items(row) else {}
    for status in (response.get("status"), *(item.get("status") for item in items)):
        if status not in (None, "completed"):
            details = response.get("incomplete_details")
            reason = details.get("reason") if isinstance(details, Mapping) else None
            return f"the reply was cut (status {status!r:.80}{'' if reason is None else f', {reason!s:.80}'})"
    return None

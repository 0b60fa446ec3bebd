"""Rows of a server's log: a request and its response, as OpenAI's batch files, proxies and vLLM write them.

Owns: where such a row keeps its turns, and which replies are whole. Does not know: fields of turns, templates.
"""

from collections.abc import Mapping
from typing import Any

from draftsmith.data.chats.tool_calls import TOOL_FIELDS
from draftsmith.json_rows import UnusableRow, parse_object

_REQUEST_FIELDS, _RESPONSE_FIELDS, _BODY = ("request", "body"), ("response", "completion"), "body"
# Of the request, what belongs to the row.
_KEPT = ("messages", "system", "chat_template_kwargs", *TOOL_FIELDS)
# Why a server ended a reply that is whole.
_WHOLE = (None, "stop", "eos", "end_turn", "tool_calls", "function_call")


def is_log(row: Mapping[str, Any]) -> bool:
    """Whether a row is a request, a response, or both, rather than a conversation.

    Args:
        row: of a data set.

    Returns:
        True where its turns lie in an object beside it, or its answer in `choices`.
    """
    if _are_choices(row.get("choices")) or any(_object(row, name) is not None for name in _REQUEST_FIELDS):
        return True
    return any("choices" in _inner(_object(row, name) or {}) for name in _RESPONSE_FIELDS)


def flat_log(row: Mapping[str, Any]) -> tuple[dict[str, Any], str | None]:
    """Give a log's row the fields of a conversation.

    Args:
        row: of a log.

    Returns:
        The row with `messages`, the response's among them; and why its reply cannot be learned from, where it was cut.

    Raises:
        UnusableRow: there is no request, the response has several choices or none, or the server failed.
    """
    requests = [_inner(inner) for name in _REQUEST_FIELDS if (inner := _object(row, name)) is not None]
    flat = {name: value for name, value in row.items() if name not in (*_REQUEST_FIELDS, *_RESPONSE_FIELDS, "choices")}
    for request in requests:
        flat |= {name: request[name] for name in _KEPT if request.get(name) is not None}
    if flat.get("messages") is None:
        raise UnusableRow(
            "the row is a response without its request, or a request without messages; put both into one row (`request` and `response`), "
            "joined by custom_id"
        )
    choice = _choice(row)
    if choice is None:
        return flat, None
    turns = flat["messages"]
    if not isinstance(turns, list | tuple):
        raise UnusableRow("the messages of the request are not a list")
    flat["messages"] = [*turns, choice.get("message")]
    finish = choice.get("finish_reason")
    return flat, None if finish in _WHOLE else f"the reply was cut (finish_reason {finish!r:.80})"


def _object(row: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    """An object of a row, which may be JSON text."""
    value = row.get(name)
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            value = parse_object(value.encode(errors="surrogatepass"))
        except UnusableRow:  # then it is words
            return None
    return value if isinstance(value, Mapping) else None


def _inner(outer: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a batch file holds in a `body`."""
    return _object(outer, _BODY) or outer


def _are_choices(value: object) -> bool:
    """Whether a value is a response's list of choices; that of a multiple-choice question holds texts."""
    return isinstance(value, list | tuple) and any(isinstance(entry, Mapping) and "message" in entry for entry in value)


def _choice(row: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The choice of a row's response; None where the row has no response."""
    responses = [_inner(inner) for name in _RESPONSE_FIELDS if (inner := _object(row, name)) is not None]
    if _are_choices(row.get("choices")):
        responses.append(row)
    if not responses:
        return None
    choices = responses[-1].get("choices")
    if not isinstance(choices, list | tuple) or len(choices) != 1 or not isinstance(choices[0], Mapping):
        number = len(choices) if isinstance(choices, list | tuple) else 0
        raise UnusableRow(f"the response has {number} choices; a conversation has one reply")
    return choices[0]

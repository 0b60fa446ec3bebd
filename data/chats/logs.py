"""Rows of a server's log: a request and its response, as OpenAI's batch files, proxies and vLLM write them.

Owns: where such a row keeps its turns, and which replies are whole. Does not know: fields of turns, templates.
"""

from collections.abc import Mapping
from typing import Any

from draftsmith.data.chats.messages import listed
from draftsmith.data.chats.tool_calls import TOOL_FIELDS
from draftsmith.json_rows import UnusableRow, parse_object

_REQUEST_FIELDS, _RESPONSE_FIELDS, _BODY = ("request", "body"), ("response", "completion"), "body"
# Of the request, what belongs to the row.
_KEPT = ("messages", "system", "chat_template_kwargs", *TOOL_FIELDS)
# Why a server ended a reply that is whole: OpenAI's words, Anthropic's and those of Text Generation Inference.
_WHOLE = (
    *(None, "stop", "tool_calls", "function_call"),
    *("end_turn", "stop_sequence", "tool_use"),
    *("eos", "eos_token"),
)


def is_log(row: Mapping[str, Any]) -> bool:
    """Whether a row is a request, a response, or both, rather than a conversation.

    Args:
        row: of a data set.

    Returns:
        True where its turns lie in the `messages` of a request, or its answer in `choices`. A field that only has such a name, and JSON
        text that is an answer itself, make no log.
    """
    if _are_choices(row.get("choices")) or _requests(row):
        return True
    has_turns = row.get("messages") is not None
    responses = [name for name in _RESPONSE_FIELDS if has_turns or not isinstance(row.get(name), str)]
    return any(_are_choices(_inner(_object(row, name) or {}).get("choices")) for name in responses)


def flat_log(row: Mapping[str, Any]) -> tuple[dict[str, Any], str | None]:
    """Give a log's row the fields of a conversation.

    Args:
        row: of a log.

    Returns:
        The row with `messages`, the response's among them; and why its reply cannot be learned from, where it was cut.

    Raises:
        UnusableRow: there is no request, the response has several choices or none, or the server failed.
    """
    flat = {name: value for name, value in row.items() if name not in (*_REQUEST_FIELDS, *_RESPONSE_FIELDS, "choices")}
    for request in _requests(row):
        flat |= {name: request[name] for name in _KEPT if request.get(name) is not None}
    if flat.get("messages") is None:
        raise UnusableRow(
            "the row is a response without its request, or a request without messages; put both into one row (`request` and `response`), "
            "joined by custom_id"
        )
    choice = _choice(row)
    if choice is None:
        return flat, None
    turns = listed(flat["messages"], "the list of turns")
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


def _requests(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The requests of a row: objects with `messages`."""
    requests = [_inner(inner) for name in _REQUEST_FIELDS if (inner := _object(row, name)) is not None]
    return [request for request in requests if request.get("messages") is not None]


def _are_choices(value: object) -> bool:
    """Whether a value is a response's list of choices; that of a multiple-choice question holds texts."""
    return isinstance(value, list | tuple) and any(isinstance(entry, Mapping) and "message" in entry for entry in value)


def _choice(row: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The choice of a row's response; None where the row has no response.

    A response may be the message itself, as Anthropic's is, or its text.
    """
    given = [(name, row[name]) for name in _RESPONSE_FIELDS if row.get(name) is not None]
    responses = [_inner(inner) for name, _ in given if (inner := _object(row, name)) is not None]
    if _are_choices(row.get("choices")):
        responses.append(row)
    if not responses and given:
        name, value = given[0]
        if not isinstance(value, str):
            raise UnusableRow(f"the {name} is {type(value).__name__}, neither an object nor text")
        return {"message": {"role": "assistant", "content": value}}
    if not responses:
        return None
    response = responses[-1]
    if "choices" not in response and response.get("role") == "assistant":
        return {"message": response, "finish_reason": response.get("stop_reason")}
    choices = response.get("choices")
    if not isinstance(choices, list | tuple) or len(choices) != 1 or not isinstance(choices[0], Mapping):
        number = len(choices) if isinstance(choices, list | tuple) else 0
        raise UnusableRow(f"the response has {number} choices; a conversation has one reply")
    return choices[0]

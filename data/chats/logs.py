"""Rows of a server's log: a request and its response, as OpenAI's two APIs, Gemini's, batch files, proxies and vLLM write them.

Owns: where such a row keeps its turns, and which replies are whole. Does not know: fields of turns, templates.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from draftsmith.data.chats.gemini import GEMINI_ANSWER, GEMINI_FIELDS, flat_gemini, has_candidates, is_gemini
from draftsmith.data.chats.messages import listed, objects
from draftsmith.data.chats.responses_api import (
    RESPONSES_ANSWER,
    RESPONSES_FIELDS,
    flat_responses,
    has_items,
    is_responses,
)
from draftsmith.data.chats.tool_calls import TOOL_FIELDS, says_nothing
from draftsmith.json_rows import UnusableRow, parse_object

_REQUEST_FIELDS, _RESPONSE_FIELDS, _BODY = ("request", "body"), ("response", "completion"), "body"
# Of the request, what belongs to the row.
_KEPT = ("messages", "system", "chat_template_kwargs", *TOOL_FIELDS)


class _Dialect(NamedTuple):
    """An API whose requests hold no `messages`: what tells its rows and answers, what makes them a conversation, and the fields that it
    has, in all and in a response."""

    is_own: Callable[[Mapping[str, Any]], bool]
    is_answer: Callable[[Mapping[str, Any]], bool]
    flatten: Callable[[Mapping[str, Any]], tuple[dict[str, Any], str | None]]
    fields: tuple[str, ...]
    answer: tuple[str, ...]


_DIALECTS = (
    _Dialect(is_responses, has_items, flat_responses, RESPONSES_FIELDS, RESPONSES_ANSWER),
    _Dialect(is_gemini, has_candidates, flat_gemini, GEMINI_FIELDS, GEMINI_ANSWER),
)
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
        True where its turns lie in a request, or its answer in the `choices`, `candidates` or items of a response. A field that only has
        such a name, and JSON text that is an answer itself, make no log.
    """
    if _are_choices(row.get("choices")) or any(_is_request(request) for request in _requests(row)):
        return True
    has_turns = row.get("messages") is not None or any(objects(row.get(name)) for name in ("input", "contents"))
    responses = [name for name in _RESPONSE_FIELDS if has_turns or not isinstance(row.get(name), str)]
    return any(_is_response(_inner(_object(row, name) or {})) for name in responses)


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
    flaw = None
    if flat.get("messages") is None:
        flat, flaw, is_answered = _of_other_api(flat, row)
        if is_answered:
            return flat, flaw
    if flat.get("messages") is None:
        raise UnusableRow(
            "the row is a response without its request, or a request without messages; put both into one row (`request` and `response`), "
            "joined by custom_id"
        )
    choice = _choice(row)
    if choice is None:
        return flat, flaw
    turns = listed(flat["messages"], "the list of turns")
    if not isinstance(turns, list | tuple):
        raise UnusableRow("the messages of the request are not a list")
    flat["messages"] = [*turns, choice.get("message")]
    finish = choice.get("finish_reason")
    return flat, flaw if finish in _WHOLE else f"the reply was cut (finish_reason {finish!r:.80})"


def _of_other_api(flat: dict[str, Any], row: Mapping[str, Any]) -> tuple[dict[str, Any], str | None, bool]:
    """The fields of a conversation where the request is another API's than OpenAI's first; what it has of an answer; whether it has one."""
    for dialect in _DIALECTS:
        own = dict(flat)
        # Beside a whole request, the log's own fields are none of the API's, such as the name of a conversation.
        if any(dialect.is_own(request) for request in _requests(row)):
            answer = () if _responses(row) else dialect.answer
            own = {name: value for name, value in flat.items() if name in answer or name not in dialect.fields}
        for inner in (*_responses(row), *_requests(row)):
            own |= {name: inner[name] for name in (*dialect.fields, *_KEPT) if inner.get(name) is not None}
        if dialect.is_own(own):
            return *dialect.flatten(own), dialect.is_answer(own)
    return flat, None, False


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
    """What may be a request of a row."""
    return [_inner(inner) for name in _REQUEST_FIELDS if (inner := _object(row, name)) is not None]


def _responses(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What may be a response of a row."""
    return [_inner(inner) for name in _RESPONSE_FIELDS if (inner := _object(row, name)) is not None]


def _is_request(request: Mapping[str, Any]) -> bool:
    """Whether an object holds turns, by any API's name."""
    return request.get("messages") is not None or any(dialect.is_own(request) for dialect in _DIALECTS)


def _is_response(response: Mapping[str, Any]) -> bool:
    """Whether an object holds an answer, by any API's name."""
    return _are_choices(response.get("choices")) or any(dialect.is_answer(response) for dialect in _DIALECTS)


def _are_choices(value: object) -> bool:
    """Whether a value is a response's list of choices; that of a multiple-choice question holds texts."""
    return isinstance(value, list | tuple) and any(isinstance(entry, Mapping) and "message" in entry for entry in value)


def _choice(row: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The choice of a row's response; None where the row has no response.

    A response may be the message itself, as Anthropic's is, or its text.
    """
    given = [(name, row[name]) for name in _RESPONSE_FIELDS if row.get(name) is not None]
    responses = _responses(row)
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
    if not says_nothing(response.get("error")):
        raise UnusableRow(f"the response is an error of the server: {response['error']!r:.80}")
    choices = response.get("choices")
    if not isinstance(choices, list | tuple) or len(choices) != 1 or not isinstance(choices[0], Mapping):
        number = len(choices) if isinstance(choices, list | tuple) else 0
        raise UnusableRow(f"the response has {number} choices; a conversation has one reply")
    return choices[0]

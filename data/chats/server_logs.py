"""Rows of a server's log: a request and its response, as OpenAI's two APIs, Gemini's, batch files, proxies and vLLM write them.

Owns: where such a row keeps its turns, and which replies are whole. Does not know: fields of turns, templates.
"""

from collections.abc import Callable, Iterable, Mapping
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
from draftsmith.data.chats.spellings import ROLE_FIELDS, is_whole, plain_turns, role_of
from draftsmith.data.chats.tool_calls import TOOL_FIELDS, says_nothing
from draftsmith.data.chats.unusual_rows import usual
from draftsmith.json_rows import UnusableRow, parse_object

_REQUEST_FIELDS = (
    *("request", "body", "params", "modelInput", "request_body", "requestBody", "proxy_server_request"),
    *("inputs", "input", "chat"),
)
_RESPONSE_FIELDS = (
    *("response", "completion", "result", "modelOutput", "response_body", "responseBody"),
    *("outputs", "output", "preferred_output"),
)
_BODIES = ("body", "inputBodyJson", "outputBodyJson")
# Beside one of these, a field such as `input` is the format's.
_OLDER = ("conversations", "conversation", "instruction", "question", "turns", "prompt", "text")
_LOGS_OWN = ("request", "body", "response", "completion", "choices")
# Where a response has its reply, and why it ended.
_REPLIES = ("choices", "message", "output", "generations", "messages", "text", "generated_text")
_FINISH = ("finish_reason", "stop_reason", "stopReason", "done_reason", "finishReason")
# Of the request, what belongs to the row.
_KEPT = ("messages", "system", "chat_template_kwargs", "toolConfig", *TOOL_FIELDS)


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
    given = [
        _inner(outer) for name in responses if (outer := _object(row, name)) is not None and not _is_older(row, name)
    ]
    may_end = has_turns and not _is_answered(row)
    return any(_is_response(response) or (may_end and _holds_turn(response)) for response in given)


def flat_log(row: Mapping[str, Any]) -> tuple[dict[str, Any], str | None]:
    """Give a log's row the fields of a conversation.

    Args:
        row: of a log.

    Returns:
        The row with `messages`, the response's among them; and why its reply cannot be learned from, where it was cut.

    Raises:
        UnusableRow: there is no request, the response has several choices or none, or the server failed.
    """
    envelopes = (*_REQUEST_FIELDS, *_RESPONSE_FIELDS)
    flat = {name: value for name, value in row.items() if name not in _LOGS_OWN}
    flat = {name: value for name, value in flat.items() if name not in envelopes or _object(row, name) is None}
    for request in _requests(row):
        flat |= {name: request[name] for name in _KEPT if request.get(name) is not None}
    for response in _responses(row):
        if not says_nothing(response.get("error")):
            raise UnusableRow(f"the response is an error of the server: {response['error']!r:.80}")
    flaw = None
    if says_nothing(flat.get("messages")):
        flat.pop("messages", None)
    if flat.get("messages") is None:
        flat, flaw, is_answered = _of_other_api(flat, row)
        if is_answered:
            return flat, flaw
    if flat.get("messages") is None:
        raise UnusableRow(
            "the row is a response without its request, or a request without messages; put both into one row (`request` and `response`), "
            "joined by custom_id"
        )
    reply = _reply_of(row)
    if reply is None:
        return flat, flaw
    turns = listed(flat["messages"], "the list of turns")
    if isinstance(turns, list | tuple) and len(turns) == 1 and isinstance(turns[0], list | tuple):
        [turns] = turns  # LangChain's runs hold a list of conversations
    if not isinstance(turns, list | tuple):
        raise UnusableRow("the messages of the request are not a list")
    replies, finish = reply
    # A graph's output begins with its input.
    flat["messages"] = replies if list(turns) == replies[: len(turns)] else [*turns, *replies]
    flat = {name: value for name, value in flat.items() if name not in _RESPONSE_FIELDS}
    return flat, flaw if is_whole(finish) else f"the reply was cut (finish_reason {finish!r:.80})"


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
    if value is None:
        return None
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            value = parse_object(value.encode(errors="surrogatepass"))
        except UnusableRow:  # then it is words
            return None
    return value if isinstance(value, Mapping) else None


def _inner(outer: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a batch file, or Bedrock's log, holds in a body."""
    return next((inner for name in _BODIES if (inner := _object(outer, name)) is not None), outer)


def _is_older(row: Mapping[str, Any], name: str) -> bool:
    """Whether a field that is not a log's alone belongs to the format of another field, or only describes turns that lie beside it."""
    if name in _LOGS_OWN:
        return False
    has_turns = bool(objects(row.get("messages"))) if name in _REQUEST_FIELDS else _is_answered(row)
    return has_turns or any(row.get(older) is not None for older in _OLDER)


def _is_answered(row: Mapping[str, Any]) -> bool:
    """Whether the turns of a row end with a reply."""
    turns = objects(row.get("messages"))
    return bool(turns) and any(role_of(turns[-1].get(name)) == "assistant" for name in ROLE_FIELDS)


def _objects(row: Mapping[str, Any], names: Iterable[str]) -> list[Mapping[str, Any]]:
    """The objects in some fields; beside those that are a log's alone, others count for nothing."""
    outer = {name: inner for name in names if (inner := _object(row, name)) is not None and not _is_older(row, name)}
    own = [inner for name, inner in outer.items() if name in _LOGS_OWN]
    return [_inner(inner) for inner in own or outer.values()]


def _requests(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What may be a request of a row, with the names that formats know."""
    return [_usual_request(request) for request in _objects(row, _REQUEST_FIELDS)]


def _usual_request(request: Mapping[str, Any]) -> Mapping[str, Any]:
    try:
        return usual(request)[0]
    except UnusableRow:  # then it only has the name of a request
        return request


def _responses(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What may be a response of a row."""
    return _objects(row, _RESPONSE_FIELDS)


def _is_request(request: Mapping[str, Any]) -> bool:
    """Whether an object holds turns, by any API's name."""
    return request.get("messages") is not None or any(dialect.is_own(request) for dialect in _DIALECTS)


def _is_response(response: Mapping[str, Any]) -> bool:
    """Whether an object holds an answer, by any API's name."""
    return _are_choices(response.get("choices")) or any(dialect.is_answer(response) for dialect in _DIALECTS)


def _are_choices(value: object) -> bool:
    """Whether a value is a response's list of choices; that of a multiple-choice question holds texts."""
    return isinstance(value, list | tuple) and any(isinstance(entry, Mapping) and "message" in entry for entry in value)


def _holds_turn(response: Mapping[str, Any]) -> bool:
    """Whether an object is an assistant's turn, or holds one as its message."""
    return any(
        isinstance(turn, Mapping) and role_of(turn.get("role")) == "assistant"
        for turn in (response, response.get("message"))
    )


def _reply_of(row: Mapping[str, Any]) -> tuple[list[Any], Any] | None:
    """The turns of a row's response, and why they ended; None where the row has no response.

    A response may be the message itself, as Anthropic's is, or its text.
    """
    values: list[Any] = [*_responses(row)]
    if _are_choices(row.get("choices")):
        values.append({"choices": row["choices"]})
    if not values:
        given = [row[name] for name in _RESPONSE_FIELDS if row.get(name) is not None and not _is_older(row, name)]
        values = [listed(value, "the response") for value in given[:1]]
    return _reply(values[-1], "the response") if values else None


def _reply(value: Any, place: str) -> tuple[list[Any], Any]:
    """The turns of a reply, and why it ended.

    Raises:
        UnusableRow: there is none, or several to choose among.
    """
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}], None
    if isinstance(value, list | tuple):
        turns = [each for entry in value for each in plain_turns(entry)]
        if (
            len(value) > 1
            and not _are_choices(value)
            and all(isinstance(turn, Mapping) and role_of(turn.get("role")) for turn in turns)
        ):
            return turns, next((turns[-1][name] for name in _FINISH if turns[-1].get(name) is not None), None)
        if len(value) != 1:
            raise UnusableRow(f"{place} has {len(value)} choices; a conversation has one reply")
        return _reply(value[0], place)
    if not isinstance(value, Mapping):
        raise UnusableRow(f"the {place.removeprefix('the ')} is {type(value).__name__}, neither an object nor text")
    finish = next((value[name] for name in _FINISH if value.get(name) is not None), None)
    [turn] = plain_turns(value) if value.get("kind") != "request" else [None]
    name = next((name for name in _REPLIES if not says_nothing(value.get(name))), None)
    # A choice holds its message; Anthropic's response, and LangChain's, are one.
    if (
        isinstance(turn, Mapping)
        and role_of(turn.get("role")) == "assistant"
        and name not in ("choices", "generations")
    ):
        return [turn], finish
    if name is None and "choices" in value:
        raise UnusableRow(f"{place} has 0 choices; a conversation has one reply")
    if name is None:
        status = "" if value.get("status") is None else f" (status {value['status']!r:.80})"
        raise UnusableRow(f"{place} has no reply{status}; its fields are {sorted(value)!s:.120}")
    replies, inner = _reply(value[name], place)
    return replies, finish if inner is None else inner

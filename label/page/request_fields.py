"""The fields of a request of the labelling page, read and checked one by one.

Owns which values are taken, and the sentence for those that are not. Knows nothing of what is done with them, and no web framework.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, cast, get_args

from draftsmith.label.schema import Span, Verdict

MAX_NAME = 64
MAX_SECONDS = 86_400.0


class BadRequest(ValueError):
    """A request that is not one of those the page sends."""


def read_object(content_type: str, body: bytes) -> dict[str, Any]:
    """The JSON object that a request holds.

    Args:
        content_type: the header.
        body: of the request.

    Raises:
        BadRequest: it is something else.
    """
    if content_type.partition(";")[0].strip().lower() != "application/json":
        raise BadRequest("the request is not JSON; send it as application/json")
    try:
        fields = json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise BadRequest("the request cannot be read as JSON; send one object") from error
    if not isinstance(fields, dict):
        raise BadRequest(f"the request is a {type(fields).__name__}; send one JSON object")
    return fields


def only_known(fields: Mapping[str, Any], *known: str) -> None:
    """Checks that a request has no other fields.

    Args:
        fields: of the request.
        known: their names.

    Raises:
        BadRequest: it has another.
    """
    for field in fields:
        if field not in known:
            raise BadRequest(f"the field {_short(field)} is not known; the fields are {', '.join(known)}; leave it out")


def annotator_name(fields: Mapping[str, Any]) -> str:
    """Who asks.

    Args:
        fields: of the request.

    Raises:
        BadRequest: it is no name.
    """
    name = text_field(fields, "annotator")
    if not name or name != name.strip() or not name.isprintable() or len(name) > MAX_NAME:
        rule = f"a name is 1 to {MAX_NAME} printable characters, without space around it"
        raise BadRequest(f"annotator is {_short(name)}; {rule}; give another")
    return name


def text_field(fields: Mapping[str, Any], field: str, default: str | None = None) -> str:
    """A field that has to be text.

    Args:
        fields: of the request.
        field: its name.
        default: what counts where it is missing; None makes that an error.

    Raises:
        BadRequest: it is no text that every database keeps.
    """
    value = fields.get(field, default)
    if not isinstance(value, str):
        raise BadRequest(f"{field} is {_short(value)}; it is text; send text")
    if "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
        raise BadRequest(f"{field} holds a NUL or half a character; no database keeps these; leave them out")
    return value


def span_field(fields: Mapping[str, Any]) -> Span | None:
    """The span of the error, or None.

    Args:
        fields: of the request.

    Raises:
        BadRequest: it is something else.
    """
    value = fields.get("error")
    if value is None:
        return None
    # bool is an int for Python.
    if not isinstance(value, list) or len(value) != 2 or any(type(number) is not int for number in value):
        raise BadRequest(f"error is {_short(value)}; it is two whole numbers, start and end; send [start, end]")
    return (value[0], value[1])


def entry_field(fields: Mapping[str, Any]) -> int:
    """The number of a label.

    Args:
        fields: of the request.

    Raises:
        BadRequest: it is none.
    """
    number = fields.get("entry")
    if type(number) is not int or not 0 <= number < 2**63:
        raise BadRequest(f"entry is {_short(number)}; it is the number of a label; send the one that the page received")
    return number


def verdict_field(fields: Mapping[str, Any]) -> Verdict:
    """The verdict.

    Args:
        fields: of the request.

    Raises:
        BadRequest: it is none.
    """
    verdict = fields.get("verdict")
    if not isinstance(verdict, str) or verdict not in get_args(Verdict):
        raise BadRequest(f"verdict is {_short(verdict)}; it is {', '.join(get_args(Verdict))}; send one of them")
    return cast(Verdict, verdict)


def seconds_field(fields: Mapping[str, Any]) -> float | None:
    """How long a label took, or None.

    Args:
        fields: of the request.

    Raises:
        BadRequest: it is no such time.
    """
    value = fields.get("seconds")
    if value is None:
        return None
    if type(value) not in (int, float) or not 0 <= value <= MAX_SECONDS:
        raise BadRequest(
            f"seconds is {_short(value)}; it is a number from 0 to {MAX_SECONDS:.0f}; send the time it took"
        )
    return float(value)


def _short(value: object) -> str:
    try:
        shown = json.dumps(value)
    except RecursionError:
        return "nested too deeply"
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


def _no_constant(word: str) -> None:
    raise ValueError(f"{word} is no JSON")

"""Replies that nobody has labelled: chats that end with the model's turn, as `draftsmith data respond` and engines' logs have them.

Owns which turn is the answer. Knows no store.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from draftsmith.data.chats.messages import Message
from draftsmith.label.answer_rows import with_parts
from draftsmith.label.formats.fields import Row, licence_of, model_of, unpacked
from draftsmith.label.schema import Answer, refusal
from draftsmith.label.store.label_source import LabelSource


def ends_with_a_reply(row: Row) -> bool:
    """Whether a row holds a chat whose last turn is the model's.

    Args:
        row: of a file.
    """
    messages = unpacked(row.get("messages"))
    last = messages[-1] if isinstance(messages, Sequence) and not isinstance(messages, str) and messages else None
    return isinstance(last, Mapping) and last.get("role") == "assistant"


def read_reply(row: Row, place: str, origin: LabelSource) -> Iterator[Answer]:
    """The last turn as an answer without a label; the turns before it are its prompt.

    Args:
        row: of the file.
        place: of the row, for messages.
        origin: what the row does not say.

    Raises:
        ValueError: with place, field, value, rule and remedy.
    """
    messages: Any = unpacked(row.get("messages"))
    if not ends_with_a_reply(row):
        raise refusal(place, "messages", messages, "a chat ends with the model's turn", "remove the turns behind it")
    *asked, reply = messages
    place_of_reply = f"messages[{len(asked)}]"
    more = [name for name in reply if name not in ("role", "content") and reply[name]]
    if more:
        rule = "a label marks a place of the text, and this reply is more than text"
        raise refusal(place, f"{place_of_reply}.{more[0]}", reply[more[0]], rule, "remove the field, or the row")
    if not isinstance(reply.get("content"), str):
        raise refusal(place, f"{place_of_reply}.content", reply.get("content"), "a reply is text", "write it as text")
    prompt = [with_parts(_turn(message), f"{place}: messages[{index}]") for index, message in enumerate(asked)]
    yield origin.answer(prompt, reply["content"], None, place, model_of(row), licence_of(row))


def _turn(message: Any) -> Message:
    """A turn without its empty fields, which tables write. What is no turn, or has more fields, is for the schema to refuse."""
    if not isinstance(message, Mapping):
        return cast(Message, message)
    return cast(Message, {name: value for name, value in message.items() if name in ("role", "content") or value})

"""The row formats of public prompt sets, each turned into one `Conversation`.

Owns: what the fields of a row mean. Does not know: files, ids, splits, tokenizers.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

Format = Literal["auto", "openai", "sharegpt", "alpaca", "gsm8k", "specbench", "prompt", "text"]

_ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
_CALCULATOR_MARK = re.compile(r"<<[^<>]*>>")


class Message(TypedDict):
    """One chat turn; `role` is "system", "user" or "assistant"."""

    role: str
    content: str


@dataclass(frozen=True)
class Conversation:
    """What a row asks, and what its data set answered.

    `messages` holds an optional leading system turn and the user turns. `reference[i]` is the data set's own
    answer to user turn i; there may be fewer answers than turns. `text` is set instead for a plain document
    (base models), and then `messages` is empty.
    """

    messages: tuple[Message, ...]
    reference: tuple[str, ...] = ()
    text: str | None = None


class UnusableRow(ValueError):
    """A row that cannot be a prompt; the message is the reason recorded in `dropped.jsonl`."""


def detect_format(row: Mapping[str, Any]) -> Format:
    """Names the format of a row from its fields.

    Raises ValueError, with the fields seen, when none fits.
    """
    if "messages" in row:
        return "openai"
    if "conversations" in row:
        return "sharegpt"
    if "instruction" in row:
        return "alpaca"
    if "question" in row and "answer" in row:
        return "gsm8k"
    if "turns" in row:
        return "specbench"
    if "prompt" in row:
        return "prompt"
    if "text" in row:
        return "text"
    known = ", ".join(name for name in Format.__args__ if name != "auto")  # type: ignore[attr-defined]
    raise ValueError(f"no known prompt format has the fields {sorted(row)}; name one with --format ({known})")


def to_conversation(row: Mapping[str, Any], row_format: Format) -> Conversation:
    """Reads one row in a named format. Raises `UnusableRow` with the reason when it holds no usable prompt."""
    conversation = _READERS[row_format](row)
    if conversation.text is None and not any(m["role"] == "user" for m in conversation.messages):
        raise UnusableRow("no user turn")
    if any(not m["content"].strip() for m in conversation.messages):
        raise UnusableRow("an empty turn")
    return conversation


def _text_field(row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        raise UnusableRow(f"field {key!r} is {type(value).__name__}, not text")
    return value


def _turn_content(content: Any) -> str:
    """Text of a turn; OpenAI content parts are joined when all of them are text."""
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence) and all(
        isinstance(part, Mapping) and part.get("type") == "text" for part in content
    ):
        return "".join(_text_field(part, "text") for part in content)
    raise UnusableRow(f"a turn's content is {type(content).__name__}, not text")


def _from_turns(turns: Any, role_key: str, content_key: str) -> Conversation:
    if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
        raise UnusableRow("the list of turns is empty or not a list")
    messages: list[Message] = []
    reference: list[str] = []
    expected = "user"
    for number, turn in enumerate(turns):
        if not isinstance(turn, Mapping):
            raise UnusableRow(f"turn {number} is {type(turn).__name__}, not an object")
        role = _ROLES.get(str(turn.get(role_key)))
        if role is None:
            raise UnusableRow(f"turn {number} has the role {turn.get(role_key)!r}")
        content = _turn_content(turn.get(content_key))
        if role == "system" and number == 0:
            messages.append(Message(role=role, content=content))
            continue
        if role != expected:
            raise UnusableRow(f"turn {number} is the {role}'s where the {expected}'s belongs")
        if role == "user":
            messages.append(Message(role=role, content=content))
        else:
            reference.append(content)
        expected = "assistant" if role == "user" else "user"
    return Conversation(tuple(messages), tuple(reference))


def _openai(row: Mapping[str, Any]) -> Conversation:
    """`messages`; a separate `reference` list (this project's own prompt files) stands in for assistant turns.

    A system turn or several user turns in a row are allowed only with that list, because without answers between
    them two user turns in a row are a broken conversation.
    """
    turns = row.get("messages")
    if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
        raise UnusableRow("the list of turns is empty or not a list")
    answers = row.get("reference")
    if answers is None:
        return _from_turns(turns, "role", "content")
    messages = tuple(Message(role=str(m.get("role")), content=_turn_content(m.get("content"))) for m in turns)
    return Conversation(messages, tuple(str(answer) for answer in answers))


def _sharegpt(row: Mapping[str, Any]) -> Conversation:
    turns = row.get("conversations")
    if isinstance(turns, Sequence) and turns and isinstance(turns[0], Mapping) and "role" in turns[0]:
        return _from_turns(turns, "role", "content")
    return _from_turns(turns, "from", "value")


def _alpaca(row: Mapping[str, Any]) -> Conversation:
    content = _text_field(row, "instruction")
    if row.get("input"):
        content = f"{content}\n\n{_text_field(row, 'input')}"
    reference = (row["output"],) if isinstance(row.get("output"), str) else ()
    return Conversation((Message(role="user", content=content),), reference)


def _gsm8k(row: Mapping[str, Any]) -> Conversation:
    """The `<<48/2=24>>` marks are instructions to a calculator, not text a model is meant to say: they are removed."""
    answer = _CALCULATOR_MARK.sub("", _text_field(row, "answer"))
    return Conversation((Message(role="user", content=_text_field(row, "question")),), (answer,))


def _specbench(row: Mapping[str, Any]) -> Conversation:
    """`turns` are the user's; each is a string or `{"content": ...}` (Arena-Hard)."""
    turns = row.get("turns")
    if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
        raise UnusableRow("the list of turns is empty or not a list")
    contents = [_turn_content(turn.get("content") if isinstance(turn, Mapping) else turn) for turn in turns]
    reference = tuple(str(answer) for answer in row.get("reference") or ())
    return Conversation(tuple(Message(role="user", content=content) for content in contents), reference)


def _prompt(row: Mapping[str, Any]) -> Conversation:
    prompt = row.get("prompt")
    if isinstance(prompt, Sequence) and not isinstance(prompt, str):
        return _from_turns(prompt, "role", "content")
    return Conversation((Message(role="user", content=_text_field(row, "prompt")),))


def _text(row: Mapping[str, Any]) -> Conversation:
    text = _text_field(row, "text")
    if not text.strip():
        raise UnusableRow("an empty document")
    return Conversation((), (), text)


_READERS: dict[str, Callable[[Mapping[str, Any]], Conversation]] = {
    "openai": _openai,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "gsm8k": _gsm8k,
    "specbench": _specbench,
    "prompt": _prompt,
    "text": _text,
}

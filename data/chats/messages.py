"""Chat turns as rows hold them, each read into one `Message`: OpenAI's, ShareGPT's and Hugging Face's spellings.

Owns: what the fields of a turn mean, and the order that turns come in. A value of another type is never made into text.
Does not know: the formats of rows, templates, tokens.
"""

import contextlib
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NotRequired, TypedDict, TypeGuard

from draftsmith.data.chats.content_blocks import spread, thought_text
from draftsmith.data.chats.spellings import (
    CONTENT_FIELDS,
    ROLE_FIELDS,
    ROLES,
    THOUGHT,
    plain_blocks,
    plain_turns,
    role_of,
    word,
)
from draftsmith.data.chats.tool_calls import (
    CALL_FIELDS,
    TOOL_FIELDS,
    call_of_text,
    parsed_list,
    read_calls,
    read_tools,
    says_nothing,
)
from draftsmith.json_rows import UnusableRow

# Roles of ShareGPT rows whose text is a call.
_CALL_ROLES = ("function_call", "tool_call")
_THOUGHT_FIELDS = ("reasoning_content", "thinking", "reasoning", "tool_plan")
# What changes the words of a turn in a way that nothing here renders.
_UNREAD_FIELDS = ("audio", "audios", "images", "image", "video", "videos")
_SPANS = "train_detail"  # of Axolotl
# Thoughts of servers in a form that only repeats one of the fields above.
_THOUGHT_COPIES, _COPY_TEXTS = ("reasoning_details", "thinking_blocks"), ("text", "summary", "thinking")
_BESIDE_CONTENT = (
    *("weight", "train", "training", "loss", "train_detail", "channel"),
    *(*CALL_FIELDS, *_THOUGHT_FIELDS, *_THOUGHT_COPIES, *_UNREAD_FIELDS),
)
# Channels of Harmony (gpt-oss) that hold no final words; other software has channels of other meanings.
_HIDDEN_CHANNELS = ("analysis", "commentary")
_TEXT_TYPES = ("text", "input_text", "output_text")
_MEDIA_TYPES = ("image", "image_url", "audio", "audio_url", "input_audio", "video", "video_url")
_INPUT_IMAGE = "input_image"  # of OpenAI's Responses API
# Who may speak next; messages name the first one.
_NEXT = {None: ("user",), "user": ("assistant",), "assistant": ("user", "tool"), "tool": ("assistant", "tool")}


class Message(TypedDict):
    """One chat turn.

    Attributes:
        role: "system", "user", "assistant" or "tool" (what a tool gave back).
        content: the text; of a turn with other parts, its texts joined.
        parts: the parts as they are, where one of them is no text, such as an image.
        train: False marks an assistant turn that is read and not learned from; absent where a row does not say.
        reasoning_content: the thought before an assistant's content; absent where there is none.
        tool_calls: an assistant's calls, as `read_calls` makes them; absent where there are none.
        tool_call_id: the call that a tool's turn answers, where the row says so.
        name: the tool's, where the row says so.
        tools: definitions that a system's turn has, until the conversation takes them.
    """

    role: str
    content: str
    parts: NotRequired[list[dict[str, Any]]]
    train: NotRequired[bool]
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[dict[str, Any]]]
    tool_call_id: NotRequired[str]
    name: NotRequired[str]
    tools: NotRequired[tuple[dict[str, Any], ...]]


def as_row(message: Message) -> dict[str, Any]:
    """A turn as rows hold it: its parts, if any, are its content.

    Args:
        message: the turn.

    Returns:
        The fields to write, which `read_turns` reads back.
    """
    fields: dict[str, Any] = dict(message)
    if "parts" in fields:
        fields["content"] = fields.pop("parts")
    return fields


def is_plain(message: Message) -> bool:
    """Whether a turn holds words alone.

    Args:
        message: the turn.

    Returns:
        False for a tool's turn, and for one with calls, a thought or other parts.
    """
    return message["role"] != "tool" and not message.keys() & {"parts", "reasoning_content", "tool_calls"}


def is_blank_system(message: Message) -> bool:
    """Whether a turn is the system's and says nothing. Plain text leaves it out, and it makes no other prompt.

    Args:
        message: the turn.

    Returns:
        True where it holds neither words nor other parts.
    """
    return message["role"] == "system" and is_plain(message) and not message["content"].strip()


def read_turns(value: Any) -> list[Message]:
    """Read chat turns in their own order, whatever it is.

    Args:
        value: of a row.

    Returns:
        The turns.

    Raises:
        UnusableRow: no list of turns, or a turn with a field that breaks its rule.
    """
    value = listed(value, "the list of turns")
    if isinstance(value, list | tuple) and len(value) == 1 and isinstance(value[0], list | tuple):
        [value] = value  # LangChain's runs hold a list of conversations
    if not isinstance(value, list | tuple) or not value:
        raise UnusableRow("the list of turns is empty or not a list")
    turns: list[Message] = []
    for number, turn in [(number, turn) for number, given in enumerate(value) for turn in plain_turns(given)]:
        is_system = isinstance(turn, Mapping) and any(role_of(turn.get(name)) == "system" for name in ROLE_FIELDS)
        # The words of a system may show what a thought looks like, at any place.
        for part in [turn] if is_system else spread(turn, f"turn {number}"):
            message = _turn(part, number)
            if turns and _continues(part, message, turns[-1]):
                turns[-1]["tool_calls"] = [*turns[-1].get("tool_calls", ()), *message["tool_calls"]]
            else:
                turns.append(message)
    return turns


def fields_beside(turn: Mapping[str, Any]) -> dict[str, Any]:
    """The fields beside the content of an assistant's turn that change what is learned of it, as `read_turns` reads them.

    Args:
        turn: of a row.

    Returns:
        Those that say something; a `loss` that was measured does not.
    """
    given = {name: turn[name] for name in _BESIDE_CONTENT if not says_nothing(turn.get(name))}
    return {name: value for name, value in given.items() if name != "loss" or not _is_measured(value)}


def is_role(value: Any) -> bool:
    """Whether a value names who speaks.

    Args:
        value: of a turn's role.

    Returns:
        True where it is a known role.
    """
    return role_of(value) is not None


def _continues(turn: Mapping[str, Any], message: Message, before: Message) -> bool:
    """Whether a turn that is a call belongs to the reply before it: such rows write parallel calls, and a call behind words, as turns."""
    is_call = any(word(turn.get(name)) in _CALL_ROLES for name in ROLE_FIELDS)
    same = before["role"] == "assistant" and message.get("train", True) == before.get("train", True)
    return is_call and same and "reasoning_content" not in message


def listed(value: Any, place: str) -> Any:
    """A list that a row may hold as its JSON text, as tables of texts do.

    Args:
        value: of a row.
        place: what errors call it.

    Returns:
        The list; the value as it is where it is no text that begins one.

    Raises:
        UnusableRow: the text begins a list and is no JSON.
    """
    return parsed_list(value, place) if isinstance(value, str) and value.lstrip().startswith("[") else value


def objects(value: Any) -> list[Mapping[str, Any]]:
    """The objects of a list, which may be JSON text.

    Args:
        value: of a row.

    Returns:
        The objects; none where the value is anything else, or a list with another entry.
    """
    if value is None:
        return []
    with contextlib.suppress(UnusableRow):  # then it is words
        value = listed(value, "the list")
    given = list(value) if isinstance(value, list | tuple) else []
    return given if all(isinstance(entry, Mapping) for entry in given) else []


def check_order(turns: Sequence[Message]) -> None:
    """Check the turns of a whole conversation: user and assistant in turn, and the system's turns anywhere but before a tool's.

    Turns of a tool follow the assistant's, and the assistant speaks after them.

    Args:
        turns: of a conversation.

    Raises:
        UnusableRow: a turn is where another's belongs.
    """
    before: Message | None = None
    for number, turn in enumerate(turns):
        role = turn["role"]
        allowed = _NEXT[before["role"] if before else None]
        if before and "tool_calls" in before:
            allowed = ("tool",)
        elif role == "system":
            continue
        if role not in allowed:
            raise UnusableRow(f"turn {number} is the {role}'s where the {allowed[0]}'s belongs")
        if role == "tool" and turns[number - 1]["role"] == "system":
            raise UnusableRow(f"turn {number - 1} is the system's between turns of tools; put it before or behind them")
        before = turn
    if before and before["role"] == "assistant" and turns[-1]["role"] == "system":
        raise UnusableRow(f"turn {len(turns) - 1} is the system's, and no question or reply follows it")


def is_given(turns: Sequence[Message], number: int) -> bool:
    """Whether an assistant's turn belongs to what is asked, because a tool has answered it.

    Args:
        turns: of a conversation.
        number: of the turn.

    Returns:
        True where a tool's turn follows it.
    """
    following = turns[number + 1 : number + 2]
    return turns[number]["role"] == "assistant" and bool(following) and following[0]["role"] == "tool"


def check_askable(turns: Sequence[Message]) -> None:
    """Check that what is asked says which turns come before which reply, though the replies are not there.

    Example: of user, system, assistant, user remains user, system, user, in which the system would speak behind the first reply.

    Args:
        turns: of a conversation.

    Raises:
        UnusableRow: a system's turn comes between a question and a reply that is not the last one.
    """
    spoken = [number for number, turn in enumerate(turns) if turn["role"] != "system"]
    for number, following in itertools.pairwise(spoken):
        is_reply = turns[number]["role"] != "assistant" and turns[following]["role"] == "assistant"
        if following > number + 1 and is_reply and following != spoken[-1]:
            raise UnusableRow(
                f"turn {number + 1} is the system's between a question and its reply, which a prompt of several replies cannot hold; "
                "put it before the question"
            )


def read_content(value: Any, place: str) -> tuple[str, list[dict[str, Any]] | None]:
    """Read a turn's content: text, or a list of parts.

    Args:
        value: of a row.
        place: what errors call it.

    Returns:
        The text, joined from the parts that are text; and the parts as they are, where one is no text.

    Raises:
        UnusableRow: neither text nor a list of known parts.
    """
    if isinstance(value, str):
        return value, None
    if not isinstance(value, list | tuple):
        raise UnusableRow(f"{place}: the content is {_kind(value)}, not text")
    texts, parts = [], []
    for part in plain_blocks(value):
        if not isinstance(part, Mapping):
            raise UnusableRow(f"{place}: a part is {_kind(part)}, not an object")
        kind = part.get("type")
        if kind in _TEXT_TYPES:
            texts.append(_text(part, "text", place))
            part = {**part, "type": "text"}
        elif kind == THOUGHT:
            part = {"type": THOUGHT, THOUGHT: thought_text(part, place)}
        elif kind == _INPUT_IMAGE:
            address = part.get("image_url") if part.get("image_url") is not None else part.get("file_id")
            part = {"type": "image_url", "image_url": {"url": address}}
        elif kind == "refusal":
            raise UnusableRow(f"{place} is a refusal, which a server writes in place of the reply; remove the turn")
        elif kind not in _MEDIA_TYPES:
            known = ", ".join(("text", *_MEDIA_TYPES))
            what = (
                f"has no type, and the fields {sorted(part)!s:.80}" if kind is None else f"is of the type {kind!r:.80}"
            )
            raise UnusableRow(f"{place}: a part {what}; types are {known}")
        parts.append({name: entry for name, entry in part.items() if entry is not None})
    return "".join(texts), parts if len(texts) < len(parts) else None


def _kind(value: object) -> str:
    return "null" if value is None else type(value).__name__


def _text(fields: Mapping[str, Any], name: str, place: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str):
        raise UnusableRow(f"{place}: field {name!r} is {_kind(value)}, not text")
    return value


def _turn(turn: Any, number: int) -> Message:
    place = f"turn {number}"
    if not isinstance(turn, Mapping):
        raise UnusableRow(f"{place} is {_kind(turn)}, not an object")
    name = _only(turn, ROLE_FIELDS, place)
    role = role_of(turn[name])
    if role is None:
        raise UnusableRow(f"{place} has the role {turn[name]!r:.80}; roles are {', '.join(ROLES)}")
    for field in _UNREAD_FIELDS:
        if turn.get(field) and not says_nothing(turn[field]):
            raise UnusableRow(f"{place} has {field}, which are not read beside the content; make them parts of it")
    if role == "assistant" and turn.get("channel") in _HIDDEN_CHANNELS:
        raise UnusableRow(
            f"{place} is in the channel {turn['channel']!r:.80}; put thoughts into reasoning_content, calls into tool_calls"
        )
    message = Message(role=role, content="")
    if word(turn[name]) in _CALL_ROLES:
        message["tool_calls"] = call_of_text(_text(turn, _only(turn, CONTENT_FIELDS, place), place), place)
    else:
        _add_content(message, turn, place)
    if not _is_trained(turn, role, place):
        message["train"] = False
    thought = _thought(turn, place)
    if thought is not None:
        if role != "assistant":
            raise UnusableRow(f"{place} is the {role}'s and has a thought; only assistant turns have one")
        message["reasoning_content"] = thought
    if role == "tool":
        _add_call_names(message, turn, place)
    if role == "system" and (tools := read_tools(turn)):
        message["tools"] = tools
    elif any(objects(turn.get(name)) for name in TOOL_FIELDS):
        raise UnusableRow(f"{place} is the {role}'s and has tools; put them beside the turns")
    return message


def _add_content(message: Message, turn: Mapping[str, Any], place: str) -> None:
    """The content and calls of a turn. Content may be absent where there are calls."""
    calls, role = read_calls(turn, place), message["role"]
    if calls:
        if role != "assistant":
            raise UnusableRow(f"{place} is the {role}'s and has tool_calls; only assistant turns have them")
        message["tool_calls"] = calls
    may_be_silent = calls or (role == "system" and any(not says_nothing(turn.get(field)) for field in TOOL_FIELDS))
    if may_be_silent and all(turn.get(name) is None for name in CONTENT_FIELDS):
        return
    message["content"], parts = read_content(turn[_only(turn, CONTENT_FIELDS, place)], place)
    if parts is None:
        return
    if role == "assistant":
        kind = next(part["type"] for part in parts if part["type"] != "text")
        raise UnusableRow(f"{place}: a part is of the type {kind!r}; an assistant's turn is text")
    message["parts"] = parts


def _add_call_names(message: Message, turn: Mapping[str, Any], place: str) -> None:
    """Which call a tool's turn answers, and the tool's name."""
    if turn.get("tool_call_id") is not None:
        message["tool_call_id"] = _text(turn, "tool_call_id", place)
    if turn.get("name") is not None:
        message["name"] = _text(turn, "name", place)


def _only(turn: Mapping[str, Any], fields: Sequence[str], place: str) -> str:
    """Which of two spellings a turn uses; null counts as absent."""
    there = [name for name in fields if turn.get(name) is not None]
    if len(there) == 1:
        return there[0]
    if there:
        raise UnusableRow(f"{place} has {there[0]} and {there[1]}; one of them is enough")
    if turn.get("refusal"):
        raise UnusableRow(f"{place} is a refusal, which a server writes in place of the reply; remove the turn")
    raise UnusableRow(f"{place} has no {fields[0]}")


def _is_trained(turn: Mapping[str, Any], role: str, place: str) -> bool:
    """OpenAI's `weight` (0 or 1), or `train`, `training` or `loss` (false or true); without any, an assistant turn is learned from.

    A `loss` that is another number than 0 and 1 was measured, and says nothing of training.
    """
    weight = turn.get("weight")
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        raise UnusableRow(f"{place} has the weight {weight!r:.80}; weights are 0 and 1")
    given = [] if weight is None else [bool(weight)]
    for name in ("train", "training", "loss"):
        if turn.get(name) is None or (name == "loss" and _is_measured(turn[name])):
            continue
        if not isinstance(turn[name], bool):
            raise UnusableRow(f"{place} has {name} {turn[name]!r:.80}; it is true or false")
        given.append(turn[name])
    if not says_nothing(turn.get(_SPANS)):
        given.append(_trains_spans(turn, place))
    if role != "assistant":
        if any(given):
            raise UnusableRow(f"{place} is the {role}'s and has a weight; only assistant turns are learned from")
        return True
    return all(given)


def _trains_spans(turn: Mapping[str, Any], place: str) -> bool:
    """Whether Axolotl's spans of characters train on a whole turn or on none of it. What no span names is not trained on.

    Example: of "No.", a span from 0 to 2 that trains is the whole turn, because its end counts.

    Raises:
        UnusableRow: they train on a part of it, or are no spans.
    """
    words = next((turn[name] for name in CONTENT_FIELDS if isinstance(turn.get(name), str)), None)
    spans = objects(turn[_SPANS])
    trained: set[int] = set()
    for span in spans:
        first, last, train = span.get("begin_offset"), span.get("end_offset"), span.get("train", False)
        if not _is_offset(first) or not _is_offset(last) or not isinstance(train, bool):
            raise UnusableRow(f"{place}: {_SPANS} has an entry that lacks a begin_offset, an end_offset or a train")
        trained |= set(range(first, min(last + 1, len(words or "")))) if train else set()
    if words is None or not spans:
        raise UnusableRow(
            f"{place} has {_SPANS}, which is read beside a text alone, as a list of spans of its characters"
        )
    left = [number for number, letter in enumerate(words) if number not in trained and not letter.isspace()]
    if trained and left:
        raise UnusableRow(
            f"{place} has {_SPANS}, which trains on a part of it (not on character {left[0]}, among others), and a turn is trained on as a "
            "whole or not at all; remove it and set train to true or false"
        )
    return bool(trained)


def _is_offset(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_measured(loss: Any) -> bool:
    return isinstance(loss, int | float) and loss not in (0, 1)


def _thought(turn: Mapping[str, Any], place: str) -> str | None:
    """The thought under any of its names; one that is empty is none."""
    there = [name for name in _THOUGHT_FIELDS if not (says_nothing(turn.get(name)) or _is_blank(turn[name]))]
    if not there:
        for name in _THOUGHT_COPIES:
            # What a server has encrypted nobody can read.
            if any(not says_nothing(entry.get(text)) for entry in objects(turn.get(name)) for text in _COPY_TEXTS):
                raise UnusableRow(f"{place} has {name}, which are not read; put the thought into reasoning_content")
        return None
    thoughts = [_text(turn, name, place) for name in there]
    if len(set(thoughts)) > 1:
        raise UnusableRow(f"{place} has two different thoughts, {there[0]} and {there[1]}")
    return thoughts[0]


def _is_blank(value: Any) -> bool:
    return isinstance(value, str) and not value.strip()

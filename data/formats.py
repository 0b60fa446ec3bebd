"""The row formats of public data sets, each turned into one `Conversation`: the only place that says what a field means.

Owns: what the fields of a row mean, and which rows are dropped, with the reason. A value of another type is never made into
text. Does not know: files, splits, tokenizers, which templates take what.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NotRequired, TypedDict, get_args

from draftsmith.json_rows import UnusableRow

__all__ = ["Conversation", "Format", "Message", "UnusableRow", "detect_format", "row_id", "to_conversation"]

Format = Literal["auto", "openai", "sharegpt", "alpaca", "gsm8k", "specbench", "prompt", "text"]

_ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
_ROLE_FIELDS, _CONTENT_FIELDS = ("role", "from"), ("content", "value")
_THOUGHT_FIELDS = ("reasoning_content", "thinking", "reasoning")
# What changes the words of a turn in a way that nothing here renders.
_UNREAD_FIELDS = ("tool_calls", "function_call", "audio", "images", "image", "videos")
_CALCULATOR_MARK = re.compile(r"<<[^<>]*>>")


class Message(TypedDict):
    """One chat turn.

    Attributes:
        role: "system", "user" or "assistant".
        content: the text.
        train: False marks an assistant turn that is read and not learned from; absent where a row does not say.
        reasoning_content: the thought before an assistant's content; absent where there is none.
    """

    role: str
    content: str
    train: NotRequired[bool]
    reasoning_content: NotRequired[str]


@dataclass(frozen=True)
class Conversation:
    """What a row holds.

    Attributes:
        turns: an optional system turn, then the user's turns, each with the data set's own answer behind it where there is one.
        text: set instead for a plain document (base models).
        flaw: why the answers cannot be learned from, though what the user asks is fit for a prompt.
    """

    turns: tuple[Message, ...] = ()
    text: str | None = None
    flaw: str | None = None

    @property
    def messages(self) -> tuple[Message, ...]:
        """The system turn and the user's turns: what a target is asked."""
        return tuple(turn for turn in self.turns if turn["role"] != "assistant")

    @property
    def reference(self) -> tuple[str, ...]:
        """The answer to each user turn, possibly fewer; none at all where `no_reference` says why."""
        return () if self.no_reference else tuple(answer["content"] for answer in self._answers)

    @property
    def no_reference(self) -> str | None:
        """Why a row that has answers gives no reference, which holds words alone, all of them to be learned from."""
        if self.flaw is None and any("reasoning_content" in answer for answer in self._answers):
            return "an answer has a thought"
        if self.flaw is None and any("train" in answer for answer in self._answers):
            return "an answer has weight 0"
        return self.flaw

    @property
    def _answers(self) -> list[Message]:
        return [turn for turn in self.turns if turn["role"] == "assistant"]

    def to_learn_from(self) -> tuple[Message, ...]:
        """The turns up to the last answer; all of them where there is none.

        Returns:
            The turns.

        Raises:
            UnusableRow: an answer is empty, or none is to be learned from.
        """
        if self.flaw is not None:
            raise UnusableRow(self.flaw)
        answers = self._answers
        if answers and not any(answer.get("train", True) for answer in answers):
            raise UnusableRow("no assistant turn is to be learned from (weight 0)")
        last = max((number for number, turn in enumerate(self.turns, 1) if turn["role"] == "assistant"), default=None)
        return self.turns[:last]


def detect_format(row: Mapping[str, Any]) -> Format:
    """Name the format of a row from its fields; one that is null counts as absent.

    Args:
        row: of a data set.

    Returns:
        The format, never `auto`.

    Raises:
        UnusableRow: none fits; the fields are named.
    """
    fields = {name for name, value in row.items() if value is not None}
    if "messages" in fields and (row["messages"] or "text" not in fields):
        return "openai"
    if fields & {"conversations", "conversation"}:
        return "sharegpt"
    if "instruction" in fields:
        return "alpaca"
    if {"question", "answer"} <= fields:
        return "gsm8k"
    for name in ("turns", "prompt", "text"):
        if name in fields:
            return _SINGLE_FIELD[name]
    known = ", ".join(name for name in get_args(Format) if name != "auto")
    raise UnusableRow(f"no known format has the fields {sorted(fields)!s:.200}; known are {known}")


def to_conversation(row: Mapping[str, Any], row_format: Format) -> Conversation:
    """Read one row in a named format.

    Args:
        row: of a data set.
        row_format: any but `auto`.

    Returns:
        The conversation.

    Raises:
        UnusableRow: the row holds no usable prompt, or a known field holds something that is not read.
    """
    conversation = _READERS[row_format](row)
    if conversation.text is not None:
        return conversation
    for number, turn in enumerate(conversation.turns):
        if not turn["content"].strip():
            reason = f"an empty turn (turn {number}, the {turn['role']}'s)"
            if turn["role"] != "assistant":
                raise UnusableRow(reason)
            conversation = replace(conversation, flaw=reason)
    if not any(turn["role"] == "user" for turn in conversation.turns):
        raise UnusableRow("no user turn")
    return conversation


def row_id(row: Mapping[str, Any], default: str) -> str:
    """A row's own `id`: text, or a whole number in digits.

    Args:
        row: of a data set.
        default: for a row that has none.

    Returns:
        The id.

    Raises:
        UnusableRow: an id of another type, or an empty one.
    """
    value = row.get("id")
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
        raise UnusableRow(f"id is {value!r:.80}, which is neither text nor a whole number")
    return str(value)


def text_field(row: Mapping[str, Any], name: str) -> str:
    """Read a field that must be text.

    Args:
        row: of a data set.
        name: the field's.

    Returns:
        The text.

    Raises:
        UnusableRow: it is missing, or of another type.
    """
    value = row.get(name)
    if not isinstance(value, str):
        raise UnusableRow(f"field {name!r} is {_kind(value)}, not text")
    return value


def _kind(value: object) -> str:
    return "null" if value is None else type(value).__name__


def _is_list(value: object) -> bool:
    return isinstance(value, list | tuple)


def _turns(value: Any) -> list[Message]:
    """Chat turns in their own order, whatever it is."""
    if not _is_list(value) or not value:
        raise UnusableRow("the list of turns is empty or not a list")
    return [_turn(turn, number) for number, turn in enumerate(value)]


def _turn(turn: Any, number: int) -> Message:
    if not isinstance(turn, Mapping):
        raise UnusableRow(f"turn {number} is {_kind(turn)}, not an object")
    name = _only(turn, _ROLE_FIELDS, number)
    role = _ROLES.get(turn[name]) if isinstance(turn[name], str) else None
    if role is None:
        raise UnusableRow(f"turn {number} has the role {turn[name]!r:.80}; roles are {', '.join(_ROLES)}")
    for field in _UNREAD_FIELDS:
        if turn.get(field):
            raise UnusableRow(f"turn {number} has {field}, which are not read")
    message = Message(role=role, content=_content(turn[_only(turn, _CONTENT_FIELDS, number)], f"turn {number}"))
    if not _is_trained(turn, role, number):
        message["train"] = False
    thought = _thought(turn, number)
    if thought is not None:
        if role != "assistant":
            raise UnusableRow(f"turn {number} is the {role}'s and has a thought; only assistant turns have one")
        message["reasoning_content"] = thought
    return message


def _only(turn: Mapping[str, Any], fields: Sequence[str], number: int) -> str:
    """Which of two spellings a turn uses; null counts as absent."""
    there = [name for name in fields if turn.get(name) is not None]
    if len(there) == 1:
        return there[0]
    if there:
        raise UnusableRow(f"turn {number} has {there[0]} and {there[1]}; one of them is enough")
    raise UnusableRow(f"turn {number} has no {fields[0]}")


def _content(value: Any, place: str) -> str:
    """Text, or a list of parts that are all text, joined."""
    if isinstance(value, str):
        return value
    if not _is_list(value):
        raise UnusableRow(f"{place}: the content is {_kind(value)}, not text")
    texts = []
    for part in value:
        if not isinstance(part, Mapping):
            raise UnusableRow(f"{place}: a part is {_kind(part)}, not an object")
        if part.get("type") != "text":
            raise UnusableRow(f"{place}: a part is of the type {part.get('type')!r:.80}; only text is read")
        texts.append(text_field(part, "text"))
    return "".join(texts)


def _is_trained(turn: Mapping[str, Any], role: str, number: int) -> bool:
    """OpenAI's `weight` (0 or 1), or `train` (false or true); without either, an assistant turn is learned from."""
    weight, train = turn.get("weight"), turn.get("train")
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        raise UnusableRow(f"turn {number} has the weight {weight!r:.80}; weights are 0 and 1")
    if train is not None and not isinstance(train, bool):
        raise UnusableRow(f"turn {number} has train {train!r:.80}; it is true or false")
    if role != "assistant":
        if weight or train:
            raise UnusableRow(f"turn {number} is the {role}'s and has a weight; only assistant turns are learned from")
        return True
    return bool(weight is None or weight) and train is not False


def _thought(turn: Mapping[str, Any], number: int) -> str | None:
    """The thought under any of its names; one that is empty is none."""
    there = [name for name in _THOUGHT_FIELDS if turn.get(name) not in (None, "")]
    if not there:
        return None
    thoughts = [text_field(turn, name) for name in there]
    if len(set(thoughts)) > 1:
        raise UnusableRow(f"turn {number} has two different thoughts, {there[0]} and {there[1]}")
    return thoughts[0] if thoughts[0].strip() else None


def _alternating(turns: Sequence[Message]) -> Conversation:
    """Turns of a whole conversation: a system turn at most at its beginning, then user and assistant in turn."""
    first = int(bool(turns) and turns[0]["role"] == "system")
    for number, turn in enumerate(turns[first:], start=first):
        expected = ("user", "assistant")[(number - first) % 2]
        if turn["role"] != expected:
            raise UnusableRow(f"turn {number} is the {turn['role']}'s where the {expected}'s belongs")
    return Conversation(tuple(turns))


def _asked(turns: Sequence[Message], answer: Any, field: str) -> Conversation:
    """User turns, several in a row perhaps, with the answers that are apart from them in `field`: one text, or a list of them."""
    for number, turn in enumerate(turns):
        if turn["role"] == "assistant":
            raise UnusableRow(f"turn {number} is the assistant's in a row whose answers are in {field!r}")
        if turn["role"] == "system" and number:
            raise UnusableRow(f"turn {number} is the system's where the user's belongs")
    answers = [answer] if isinstance(answer, str) else [] if answer is None else answer
    num_users = sum(turn["role"] == "user" for turn in turns)
    if not _is_list(answers) or not all(isinstance(entry, str) for entry in answers):
        return Conversation(tuple(turns), flaw=f"field {field!r} is neither text nor a list of texts")
    if len(answers) > num_users:
        return Conversation(tuple(turns), flaw=f"field {field!r} has {len(answers)} answers to {num_users} user turns")
    left = iter(answers)
    woven: list[Message] = []
    for turn in turns:
        woven.append(turn)
        if turn["role"] == "user" and (text := next(left, None)) is not None:
            woven.append(Message(role="assistant", content=text))
    return Conversation(tuple(woven))


def _openai(row: Mapping[str, Any]) -> Conversation:
    """`messages`; beside a `reference`, and in one of this project's prompts, they are the user's alone.

    Elsewhere two user turns in a row are a broken conversation.
    """
    turns = _turns(row.get("messages"))
    is_prompt = {"id", "split", "source"} <= row.keys() and all(turn["role"] != "assistant" for turn in turns)
    if is_prompt or row.get("reference") is not None:
        return _asked(turns, row.get("reference"), "reference")
    return _alternating(turns)


def _sharegpt(row: Mapping[str, Any]) -> Conversation:
    turns = row.get("conversations")
    return _alternating(_turns(row.get("conversation") if turns is None else turns))


def _alpaca(row: Mapping[str, Any]) -> Conversation:
    content = text_field(row, "instruction")
    given = row.get("input")
    if given is not None and text_field(row, "input").strip():
        content = f"{content}\n\n{given}"
    return _asked([Message(role="user", content=content)], row.get("output"), "output")


def _gsm8k(row: Mapping[str, Any]) -> Conversation:
    """A question and its answer. The `<<48/2=24>>` marks are removed: they are for a calculator, not text that a model should say."""
    answer = _CALCULATOR_MARK.sub("", text_field(row, "answer"))
    return _asked([Message(role="user", content=text_field(row, "question"))], answer, "answer")


def _specbench(row: Mapping[str, Any]) -> Conversation:
    """`turns` are the user's; each is a text or `{"content": ...}` (Arena-Hard). Turns with roles are a conversation."""
    turns = row.get("turns")
    if not _is_list(turns) or not turns:
        raise UnusableRow("the list of turns is empty or not a list")
    if any(isinstance(turn, Mapping) and any(turn.get(name) is not None for name in _ROLE_FIELDS) for turn in turns):
        return _alternating(_turns(turns))
    contents = [turn.get("content") if isinstance(turn, Mapping) else turn for turn in turns]
    asked = [
        Message(role="user", content=_content(content, f"turn {number}")) for number, content in enumerate(contents)
    ]
    return _asked(asked, row.get("reference"), "reference")


def _prompt(row: Mapping[str, Any]) -> Conversation:
    prompt = row.get("prompt")
    if _is_list(prompt):
        return _alternating(_turns(prompt))
    return Conversation((Message(role="user", content=text_field(row, "prompt")),))


def _text(row: Mapping[str, Any]) -> Conversation:
    text = text_field(row, "text")
    if not text.strip():
        raise UnusableRow("an empty document")
    return Conversation(text=text)


_SINGLE_FIELD: dict[str, Format] = {"turns": "specbench", "prompt": "prompt", "text": "text"}

_READERS: dict[str, Callable[[Mapping[str, Any]], Conversation]] = {
    "openai": _openai,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "gsm8k": _gsm8k,
    "specbench": _specbench,
    "prompt": _prompt,
    "text": _text,
}

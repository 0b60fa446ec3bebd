"""The row formats of public data sets, each turned into one `Conversation`: the only place that says what a field means.

Owns: what the fields of a row mean, and which rows are dropped, with the reason. A value of another type is never made into
text. Does not know: a turn's own fields (`chats/`), files, splits, tokenizers, which templates take what.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from draftsmith.data.benchmark_fields import PLACEHOLDER, is_question
from draftsmith.data.chats.logs import flat_log, is_log
from draftsmith.data.chats.messages import (
    ROLE_FIELDS,
    Message,
    check_order,
    is_given,
    is_plain,
    listed,
    read_content,
    read_turns,
)
from draftsmith.data.chats.tool_calls import read_tools, says_nothing, without_fillers
from draftsmith.json_rows import UnusableRow, parse_object

__all__ = ["Conversation", "Format", "Message", "UnusableRow", "detect_format", "row_id", "to_conversation"]

Format = Literal["auto", "openai", "sharegpt", "alpaca", "gsm8k", "specbench", "prompt", "text", "log"]

_SYSTEM_FIELDS = ("system", "system_prompt")
_MEDIA_FIELDS = ("images", "image", "videos", "video", "audios", "audio")
_CALCULATOR_MARK = re.compile(r"<<[^<>]*>>")


@dataclass(frozen=True)
class Conversation:
    """What a row holds.

    Attributes:
        turns: an optional system turn, then the user's turns, each with the data set's own answer behind it where there is one.
            Between the two may be calls of tools and what these gave back.
        text: set instead for a plain document (base models).
        flaw: why the answers cannot be learned from, though what the user asks is fit for a prompt.
        tools: definitions of the tools that may be called.
        variables: of the chat template, for this row alone.
    """

    turns: tuple[Message, ...] = ()
    text: str | None = None
    flaw: str | None = None
    tools: tuple[dict[str, Any], ...] = ()
    variables: Mapping[str, Any] = field(default_factory=dict)

    @property
    def messages(self) -> tuple[Message, ...]:
        """What a target is asked: all turns but those that it has to say. A call that a tool has answered is one of them."""
        asked = [n for n, turn in enumerate(self.turns) if turn["role"] != "assistant" or is_given(self.turns, n)]
        return tuple(self.turns[number] for number in asked)

    @property
    def reference(self) -> tuple[str, ...]:
        """The answer to each user turn, possibly fewer; none at all where `no_reference` says why."""
        return () if self.no_reference else tuple(answer["content"] for answer in self._answers)

    @property
    def no_reference(self) -> str | None:
        """Why a row that has answers gives no reference, which holds words alone, all of them to be learned from."""
        if self.flaw is not None or not self._answers:
            return self.flaw
        if any("reasoning_content" in answer for answer in self._answers):
            return "an answer has a thought"
        if any("tool_calls" in turn or turn["role"] == "tool" for turn in self.turns):
            return "an answer has tool calls"
        if any("train" in answer for answer in self._answers):
            return "an answer has weight 0"
        return None

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
    if is_log(row):
        return "log"
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
    if {"question", "response"} <= fields or _is_list(row.get("chosen")):
        return "prompt"
    if "chosen" in fields:
        raise UnusableRow(
            "chosen is a text without a prompt; give turns, as in [{'role': 'user', 'content': ...}, ...]"
        )
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
    flaw = None
    if row_format == "log":
        row, flaw = flat_log(row)
    conversation = _READERS[row_format](row)
    if conversation.text is not None:
        return conversation
    tools, variables = _tools_and_variables(row)
    turns = without_fillers(_with_system(row, conversation.turns), tools)
    conversation = replace(conversation, turns=turns, tools=tools, variables=variables, flaw=conversation.flaw or flaw)
    _check_words(conversation)
    _check_media(row, conversation)
    _check_json(conversation)
    for number, turn in enumerate(conversation.turns):
        # What an empty system turn shows is the template's choice: often it takes the place of the template's own words.
        if is_plain(turn) and turn["role"] != "system" and not turn["content"].strip():
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
        kind = "null" if value is None else type(value).__name__
        raise UnusableRow(f"field {name!r} is {kind}, not text")
    return value


def _with_system(row: Mapping[str, Any], turns: Sequence[Message]) -> tuple[Message, ...]:
    """The turns behind the system's text that lies beside them.

    Raises:
        UnusableRow: it is no text, the turns begin with another, or two fields differ.
    """
    texts = {name: _system_text(row[name], name) for name in _SYSTEM_FIELDS if _says_something(row.get(name))}
    texts = {name: text for name, text in texts.items() if text.strip()}
    if len({text.strip() for text in texts.values()}) > 1:
        raise UnusableRow(f"the row has two different texts in {' and '.join(texts)}; one of them is enough")
    for name, text in texts.items():
        if not turns or turns[0]["role"] != "system":
            return (Message(role="system", content=text), *turns)
        if turns[0]["content"].strip() != text.strip():
            raise UnusableRow(f"the row has {name} and another system turn; one of them is enough")
    return tuple(turns)


def _says_something(value: Any) -> bool:
    """Whether a field of a system's text is in use; a flag or an empty value is not."""
    return bool(value) and not isinstance(value, bool)


def _system_text(value: Any, name: str) -> str:
    text, parts = read_content(value, name)
    if parts is not None:
        kind = next(part["type"] for part in parts if part["type"] != "text")
        raise UnusableRow(f"{name} has a part of the type {kind!r}; beside the turns, a system's words are text")
    return text


def _check_words(conversation: Conversation) -> None:
    """Check that a benchmark's row holds its question, and not the note that somebody has to fetch it.

    Raises:
        UnusableRow: it holds the note.
    """
    if any(PLACEHOLDER in turn["content"] for turn in conversation.turns):
        raise UnusableRow(
            "the placeholder of SPEED-Bench instead of a question; make the full file with its own prepare_data script"
        )


def _is_list(value: object) -> bool:
    return isinstance(value, list | tuple)


def _tools_and_variables(row: Mapping[str, Any]) -> tuple[tuple[dict[str, Any], ...], dict[str, Any]]:
    """The tools of a row, which may lie among its template's variables, and the other variables.

    Raises:
        UnusableRow: it has different tools in both places, or what is none of either.
    """
    tools, variables = read_tools(row), _variables(row)
    inner = read_tools({"tools": variables.pop("tools", None)})
    if tools and inner and tools != inner:
        raise UnusableRow("the row has tools, and others in chat_template_kwargs; one of them is enough")
    return tools or inner, variables


def _variables(row: Mapping[str, Any]) -> dict[str, Any]:
    """The template's variables of one row, as TRL and Transformers name them; null ones count as absent."""
    value = row.get("chat_template_kwargs")
    if isinstance(value, str) and value.strip():
        value = parse_object(value.encode(errors="surrogatepass"))
    if value in (None, ""):
        return {}
    if not isinstance(value, Mapping):
        raise UnusableRow(f"chat_template_kwargs is {type(value).__name__}, not an object")
    return {name: entry for name, entry in value.items() if entry is not None}


def _check_media(row: Mapping[str, Any], conversation: Conversation) -> None:
    """Check that pictures beside the turns have their places in them.

    Raises:
        UnusableRow: no turn has a part for them.
    """
    for name in _MEDIA_FIELDS:
        if not says_nothing(row.get(name)) and not any("parts" in turn for turn in conversation.turns):
            raise UnusableRow(f"the row has {name}, and no turn has a part for them")


def _check_json(conversation: Conversation) -> None:
    """Check that what is more than words can be written as JSON; Parquet files may hold bytes and dates.

    Raises:
        UnusableRow: it cannot.
    """
    try:
        json.dumps([conversation.turns, conversation.tools, conversation.variables], allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UnusableRow(f"a turn, a tool or a variable holds what JSON cannot: {error}") from error


def _conversation(turns: Sequence[Message]) -> Conversation:
    check_order(turns)
    return Conversation(tuple(turns))


def _asked(turns: Sequence[Message], answer: Any, field: str) -> Conversation:
    """What is asked, several user turns in a row perhaps, with the answers apart from it in `field`: one text, or a list of them."""
    for number, turn in enumerate(turns):
        if turn["role"] == "assistant" and not is_given(turns, number):
            raise UnusableRow(f"turn {number} is the assistant's in a row whose answers are in {field!r}")
        if turn["role"] == "system" and number:
            raise UnusableRow(f"turn {number} is the system's where the user's belongs")
    answers = [answer] if isinstance(answer, str) else [] if answer is None else answer
    num_users = sum(turn["role"] == "user" for turn in turns)
    if answers and any(turn["role"] == "tool" for turn in turns):
        return Conversation(tuple(turns), flaw=f"field {field!r} cannot say which answers are to a tool's turn")
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
    """`messages`; beside a `reference`, in one of this project's prompts, and in a benchmark's row, they are the user's alone.

    Elsewhere two user turns in a row are a broken conversation.
    """
    turns = read_turns(row.get("messages"))
    is_asked = all(turn["role"] != "assistant" or is_given(turns, number) for number, turn in enumerate(turns))
    is_prompt = is_asked and ({"id", "split", "source"} <= row.keys() or is_question(row))
    if is_prompt or row.get("reference") is not None:
        return _asked(turns, row.get("reference"), "reference")
    return _conversation(turns)


def _sharegpt(row: Mapping[str, Any]) -> Conversation:
    given = row.get("conversations")
    return _conversation(read_turns(row.get("conversation") if given is None else given))


def _alpaca(row: Mapping[str, Any]) -> Conversation:
    """An instruction with its text (Alpaca's `input`, Dolly's `context`), behind the pairs of an earlier `history`."""
    content = text_field(row, "instruction")
    extras = [] if row.get("input") is None else [text_field(row, "input")]
    if isinstance(row.get("context"), str):  # in sets that are not Dolly's it may be anything
        extras.append(row["context"])
    if extra := next((text for text in extras if text.strip()), ""):
        content = f"{content}\n\n{extra}"
    asked = Message(role="user", content=content)
    answer, history = _first_field(row, ("output", "response")), listed(row.get("history"), "history")
    if history in (None, [], ()) or (isinstance(history, str) and history.strip() in ("", "null", "None")):
        return _asked([asked], row.get(answer), answer)
    earlier = [turn for pair in _pairs(history) for turn in pair]
    last = row.get(answer)
    return _conversation(
        [*earlier, asked, *([] if last is None else read_turns([{"role": "assistant", "content": last}]))]
    )


def _pairs(history: Any) -> list[list[Message]]:
    """The turns of a history: pairs of a question and its answer."""
    if not _is_list(history) or not all(_is_list(pair) and len(pair) == 2 for pair in history):
        raise UnusableRow("history is no list of pairs, each a question and its answer")
    roles = ("user", "assistant")
    return [
        read_turns([{"role": role, "content": text} for role, text in zip(roles, pair, strict=True)])
        for pair in history
    ]


def _first_field(row: Mapping[str, Any], names: Sequence[str]) -> str:
    """The first of some fields that the row has; the first of all where it has none."""
    return next((name for name in names if row.get(name) is not None), names[0])


def _gsm8k(row: Mapping[str, Any]) -> Conversation:
    """A question and its answer. The `<<48/2=24>>` marks are removed: they are for a calculator, not text that a model should say."""
    answer = _CALCULATOR_MARK.sub("", text_field(row, "answer"))
    return _asked([Message(role="user", content=text_field(row, "question"))], answer, "answer")


def _specbench(row: Mapping[str, Any]) -> Conversation:
    """`turns` are the user's; each is a text or `{"content": ...}` (Arena-Hard). One text is one turn, turns with roles a conversation."""
    turns = listed(row.get("turns"), "turns")
    turns = [turns] if isinstance(turns, str) else turns
    if not _is_list(turns) or not turns:
        raise UnusableRow("the list of turns is empty or not a list")
    if any(isinstance(turn, Mapping) and any(turn.get(name) is not None for name in ROLE_FIELDS) for turn in turns):
        return _conversation(read_turns(turns))
    contents = [turn.get("content") if isinstance(turn, Mapping) else turn for turn in turns]
    asked = read_turns([{"role": "user", "content": content} for content in contents])
    return _asked(asked, row.get("reference"), "reference")


def _prompt(row: Mapping[str, Any]) -> Conversation:
    """`prompt`, a text or turns, and perhaps an answer of the same kind: TRL's `completion`, a `response`, or the `chosen` of two.

    An answer in turns may repeat the prompt, or hold it alone. Behind a prompt with answers of its own, a text is the last answer.
    """
    asked = _first_field(row, ("prompt", "question"))
    prompt, name = row.get(asked), _first_field(row, ("completion", "response", "chosen"))
    answer = row.get(name)
    turns: list[Message] = []
    if _is_list(prompt):
        turns = read_turns(prompt)
    elif prompt is not None or not _is_list(answer):
        turns = [Message(role="user", content=text_field(row, asked))]
    if answer is None:
        return _asked(turns, None, name) if is_question(row) else _conversation(turns)
    if isinstance(answer, str) and any(turn["role"] == "assistant" for turn in turns):
        return _conversation([*turns, Message(role="assistant", content=answer)])
    if not _is_list(answer) or not any(isinstance(entry, Mapping) for entry in answer):
        return _asked(turns, answer, name)
    answers = read_turns(answer)
    users = [turn["content"] for turn in answers if turn["role"] == "user"]
    repeats = answers[: len(turns)] == turns or (not _is_list(prompt) and bool(turns) and turns[0]["content"] in users)
    return _conversation(answers if repeats else [*turns, *answers])


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
    "log": _openai,
}

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
from draftsmith.data.chats.gemini import flat_gemini, is_gemini
from draftsmith.data.chats.media import place_media
from draftsmith.data.chats.messages import (
    Message,
    check_order,
    is_given,
    is_plain,
    listed,
    read_turns,
)
from draftsmith.data.chats.responses_api import flat_responses, is_responses, parameters_of_items
from draftsmith.data.chats.server_logs import flat_log, is_log
from draftsmith.data.chats.spellings import ROLE_FIELDS
from draftsmith.data.chats.system_and_tools import tools_and_variables, unwanted, with_system, without_tools
from draftsmith.data.chats.tool_calls import says_nothing, without_fillers
from draftsmith.data.chats.unusual_rows import check_whole, thought_beside, turns_of_pairs, usual
from draftsmith.json_rows import UnusableRow

Format = Literal[
    "auto", "openai", "sharegpt", "alpaca", "gsm8k", "specbench", "prompt", "text", "log", "responses", "gemini"
]

_CALCULATOR_MARK = re.compile(r"<<[^<>]*>>")


@dataclass(frozen=True)
class Conversation:
    """What a row holds.

    Attributes:
        turns: an optional system turn, then the user's turns, each with the data set's own answer behind it where there is one.
            Between them may be calls of tools, what these gave back, and further turns of the system.
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
    row, _ = usual(row)
    fields = {name for name, value in row.items() if value is not None}
    if is_log(row):
        return "log"
    if "messages" in fields and (row["messages"] or "text" not in fields):
        return "openai"
    if is_gemini(row):
        return "gemini"
    has_items = is_responses(row)
    if has_items:
        fields -= parameters_of_items(row)
    if fields & {"conversations", "conversation"}:
        return "sharegpt"
    if "instruction" in fields:
        return "alpaca"
    check_whole(row)
    if {"question", "answer"} <= fields:
        return "gsm8k"
    for name in ("turns", "prompt", "text"):
        if name in fields:
            return _SINGLE_FIELD[name]
    if {"question", "response"} <= fields or _is_list(row.get("chosen")):
        return "prompt"
    if has_items or all(isinstance(row.get(name), str) for name in ("input", "output")):
        return "responses"
    if "chosen" in fields:
        raise UnusableRow(
            "chosen is a text without a prompt; give turns, as in [{'role': 'user', 'content': ...}, ...]"
        )
    if row.get("object") == "response":
        raise UnusableRow(
            "the row is a response without its request (object 'response'); put both into one row, `request` and `response`"
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
    dislike = unwanted(row)
    row, flaw = usual(row)
    flaw = dislike or unwanted(row) or flaw
    if row_format in _FLATTENED:
        row, cut = _FLATTENED[row_format](row)
        flaw = flaw or cut
    conversation = _with_thought(_READERS[row_format](row), row, row_format)
    if conversation.text is not None:
        return conversation
    turns, inner = without_tools(conversation.turns)
    tools, variables = tools_and_variables(row, inner)
    turns = place_media(row, without_fillers(with_system(row, turns), tools))
    conversation = replace(conversation, turns=turns, tools=tools, variables=variables, flaw=conversation.flaw or flaw)
    _check_words(conversation)
    _check_json(conversation)
    return _checked_turns(conversation)


def _with_thought(conversation: Conversation, row: Mapping[str, Any], row_format: Format) -> Conversation:
    """Give an answer that lies apart from its question the thought that lies beside it."""
    turns = conversation.turns
    is_apart = row_format in ("prompt", "alpaca", "gsm8k", "responses") and turns and turns[-1]["role"] == "assistant"
    thought = thought_beside(row) if is_apart and "reasoning_content" not in turns[-1] else None
    if thought is None:
        return conversation
    answer = turns[-1].copy()
    answer["reasoning_content"] = thought
    return replace(conversation, turns=(*turns[:-1], answer))


def _checked_turns(conversation: Conversation) -> Conversation:
    """Check that each turn says something; a question must, and an answer that does not cannot be learned from.

    Raises:
        UnusableRow: a question or a tool's turn is empty, or nobody asks.
    """
    for number, turn in enumerate(conversation.turns):
        # What an empty system turn shows is the template's choice: often it takes the place of the template's own words.
        if is_plain(turn) and turn["role"] != "system" and not turn["content"].strip():
            reason = f"an empty turn (turn {number}, the {turn['role']}'s)"
            if turn["role"] != "assistant":
                raise UnusableRow(reason)
            conversation = replace(conversation, flaw=reason)
        # A budget that ended within the thought left it so; the end token behind it would be learned.
        if "reasoning_content" in turn and "tool_calls" not in turn and not turn["content"].strip():
            conversation = replace(conversation, flaw=f"a thought without words or a call behind it (turn {number})")
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
        if turn["role"] == "tool" and number and turns[number - 1]["role"] == "system":
            raise UnusableRow(f"turn {number - 1} is the system's before a turn of a tool; put it before the question")
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
    # The system's turns behind the last question come before its answer.
    num_asked = max((number for number, turn in enumerate(turns, 1) if turn["role"] != "system"), default=0)
    for number, turn in enumerate(turns, 1):
        woven += turns[number - 1 :] if number == num_asked else [turn]
        if turn["role"] == "user" and (text := next(left, None)) is not None:
            woven.append(Message(role="assistant", content=text))
        if number == num_asked:
            break
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
    """`conversations` of turns, or of pairs; LLaMA-Factory puts the last answer, the better of two, into `chosen`."""
    given = row.get("conversations")
    turns = read_turns(turns_of_pairs(row.get("conversation") if given is None else given))
    chosen = row.get("chosen")
    is_unanswered = turns[-1]["role"] != "assistant" and isinstance(chosen, Mapping) and not says_nothing(chosen)
    return _conversation([*turns, *read_turns([chosen])] if is_unanswered else turns)


def _alpaca(row: Mapping[str, Any]) -> Conversation:
    """An instruction with its text (Alpaca's `input`, Dolly's `context`), behind the pairs of an earlier `history`."""
    content = text_field(row, "instruction")
    extras = [] if row.get("input") is None else [text_field(row, "input")]
    if isinstance(row.get("context"), str):  # in sets that are not Dolly's it may be anything
        extras.append(row["context"])
    if extra := next((text for text in extras if text.strip()), ""):
        content = f"{content}\n\n{extra}"
    asked = Message(role="user", content=content)
    answer, history = _first_field(row, ("output", "response", "chosen")), listed(row.get("history"), "history")
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


_FLATTENED: dict[str, Callable[[Mapping[str, Any]], tuple[dict[str, Any], str | None]]] = {
    "log": flat_log,
    "responses": flat_responses,
    "gemini": flat_gemini,
}
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
    "responses": _openai,
    "gemini": _openai,
}

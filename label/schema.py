"""One labelled answer: what it holds, how it is written as a JSON line, and which lines are errors.

Owns the fields and their rules. One polarity everywhere: 1 is correct, 0 is wrong. Spans count characters (code points)
of the response, the end is not included. Knows nothing of stores, of other formats, or of tokenizers.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from draftsmith.data.chats.messages import as_row, read_content
from draftsmith.data.formats import Message
from draftsmith.files import atomic_file, read_jsonl
from draftsmith.foreign import json_text
from draftsmith.json_rows import Dropped, check_values, shown_row

Verdict = Literal["correct", "wrong", "unplaced"]
How = Literal["person", "rule", "mined"]
Span = tuple[int, int]

ROLES = ("system", "user", "assistant")
_REQUIRED = ("messages", "response", "model", "licence", "source", "verdict")
_OF_LABEL = ("error", "labelled_by", "how", "checked", "note", "replaces")
_NOT_KEPT = re.compile("[\0\ud800-\udfff]")
# What the columns of a store hold.
_LONGEST_NAME, _LONGEST_TOKENIZER = 255, 64
_FIELDS = ("id", *_REQUIRED, *_OF_LABEL, "tokens", "reference")


@dataclass(frozen=True)
class Label:
    """What somebody found out about one answer.

    Attributes:
        verdict: "correct" (no error), "wrong", or "unplaced" (wrong, but nobody has said where).
        labelled_by: whose verdict it is.
        how: whether a person, a rule or mining found it.
        error: with "wrong", the span of the first error.
        checked: the part of the response that the label speaks of; None for all of it.
        note: a word on why.
        replaces: whose labels of this answer no longer count beside this one: the set's whose step it refines, or those of the people
            between whom it decides. See `deciding`.
    """

    verdict: Verdict
    labelled_by: str
    how: How
    error: Span | None = None
    checked: Span | None = None
    note: str = ""
    replaces: tuple[str, ...] = ()


@dataclass(frozen=True)
class Tokens:
    """How one tokenizer cuts the response.

    Attributes:
        tokenizer: its fingerprint (sha256, hex).
        offsets: each token's span, in order.
    """

    tokenizer: str
    offsets: tuple[Span, ...]


@dataclass(frozen=True)
class Answer:
    """One answer to one prompt, with one label or none.

    An answer that several people have labelled is several of these, with the same `id`.

    Attributes:
        id: of the answer.
        messages: the prompt.
        response: the answer's text.
        model: that wrote it.
        licence: of the source.
        source: where the question is from.
        label: one label, or None.
        tokens: how a tokenizer cuts the response, or None.
        reference: the right answer, as its source has it, or None. It is not part of what the model read or wrote.
    """

    id: str
    messages: tuple[Message, ...]
    response: str
    model: str
    licence: str
    source: str
    label: Label | None = None
    tokens: Tokens | None = None
    reference: str | None = None

    def question(self) -> str:
        """What answers to the same prompt share: the key for splits, which must never part them."""
        return _digest([dict(message) for message in self.messages])


def answer_id(source: str, messages: Sequence[Message], response: str, model: str) -> str:
    """The id that the same answer of the same model always gets.

    Args:
        source: where the question is from.
        messages: the prompt.
        response: the answer's text.
        model: that wrote it.
    """
    return f"{source}-{_digest([[dict(message) for message in messages], response, model])}"


def deciding(answers: Sequence[Answer]) -> list[Answer]:
    """The labels of one answer that count: those that no other label replaces.

    Worked example: a set's step, and alice's mark that replaces it, give alice's mark. In a circle all count.

    Args:
        answers: of one id, each with a label.
    """
    replaced = {name for answer in answers if answer.label is not None for name in answer.label.replaces}
    kept = [answer for answer in answers if answer.label is not None and answer.label.labelled_by not in replaced]
    return kept or list(answers)


def _digest(value: object) -> str:
    return hashlib.sha256(
        json.dumps(value, ensure_ascii=False, sort_keys=True).encode("utf-8", "backslashreplace")
    ).hexdigest()[:16]


def refusal(place: str, field: str, value: object, rule: str, remedy: str) -> ValueError:
    """The error for one bad field.

    Args:
        place: `FILE:LINE`, or an id.
        field: its name.
        value: what it holds.
        rule: that it breaks.
        remedy: what to do.
    """
    # A cell of a table may hold a dictionary with keys that JSON has not.
    shown = json.dumps(value, ensure_ascii=False, default=str, skipkeys=True)
    if len(shown) > 80:
        shown = f"{shown[:77]}..."
    return ValueError(f"{place}: {field} is {shown}; {rule}; {remedy}")


def check_label(label: Label, response: str, place: str) -> None:
    """Checks a label by its rules.

    Args:
        label: to check.
        response: that it speaks of.
        place: for messages.

    Raises:
        ValueError: with place, field, value, rule and remedy.
    """
    _one_of(label.verdict, get_args(Verdict), place, "verdict")
    _one_of(label.how, get_args(How), place, "how")
    _words(label.labelled_by, place, "labelled_by", _LONGEST_NAME)
    if not isinstance(label.note, str):
        raise refusal(place, "note", label.note, "a note is text", 'leave it out or write ""')
    _keepable(label.note, place, "note")
    _check_replaces(label, place)
    if label.verdict == "wrong" and label.error is None:
        remedy = 'give the span of the first error, or the verdict "unplaced"'
        raise refusal(place, "error", None, 'the verdict "wrong" needs the place of the first error', remedy)
    if label.verdict != "wrong" and label.error is not None:
        remedy = 'leave the span out, or give the verdict "wrong"'
        raise refusal(place, "error", label.error, f"the verdict {label.verdict!r} has no error span", remedy)
    for field, span in (("error", label.error), ("checked", label.checked)):
        if span is not None:
            _check_span(span, len(response), place, field)
    if label.checked is None:
        return
    if label.verdict == "unplaced":
        remedy = "leave checked out"
        raise refusal(place, "checked", label.checked, 'the verdict "unplaced" speaks of the whole answer', remedy)
    if label.error is not None and not (label.checked[0] <= label.error[0] and label.error[1] <= label.checked[1]):
        remedy = f"widen checked so that it holds the error {list(label.error)}"
        raise refusal(place, "checked", label.checked, "what was checked includes the error that was found", remedy)


def check_answer(answer: Answer, place: str) -> None:
    """Checks an answer, with its label and tokens, by the rules.

    Args:
        answer: to check.
        place: for messages.

    Raises:
        ValueError: with place, field, value, rule and remedy.
    """
    _words(answer.id, place, "id", _LONGEST_NAME)
    check_messages(answer.messages, place)
    for field in ("response", "model", "licence", "source"):
        _words(getattr(answer, field), place, field)
    if answer.label is not None:
        check_label(answer.label, answer.response, place)
    if answer.reference is not None:
        _words(answer.reference, place, "reference")
    if answer.tokens is not None:
        _words(answer.tokens.tokenizer, place, "tokens.tokenizer", _LONGEST_TOKENIZER)
        _check_offsets(answer.tokens.offsets, len(answer.response), place)


def from_row(row: Mapping[str, Any], place: str) -> Answer:
    """Reads one JSON object.

    Args:
        row: the object.
        place: `FILE:LINE`, for messages.

    Raises:
        ValueError: an unknown, missing or malformed field, or fields that contradict each other.
    """
    for field in row:
        if field not in _FIELDS:
            near = difflib.get_close_matches(field, _FIELDS, n=1)
            hint = f"did you mean {near[0]}?" if near else "remove it"
            raise refusal(place, field, row[field], f"the fields are {', '.join(_FIELDS)}", hint)
    for field in _REQUIRED:
        if field not in row:
            remedy = "write null for an answer without a label" if field == "verdict" else "add it"
            raise ValueError(f"{place}: {field} is missing; every line has it; {remedy}")
    messages = _messages(row["messages"], place)
    for field in ("response", "model", "licence", "source"):
        _words(row[field], place, field)
    own_id = row.get("id")
    answer = Answer(
        id=answer_id(row["source"], messages, row["response"], row["model"]) if own_id is None else own_id,
        messages=messages,
        response=row["response"],
        model=row["model"],
        licence=row["licence"],
        source=row["source"],
        label=_label(row, place),
        tokens=_tokens(row.get("tokens"), place),
        reference=row.get("reference"),
    )
    check_answer(answer, place)
    return answer


def to_row(answer: Answer) -> dict[str, Any]:
    """The JSON object of an answer; `from_row` gives the same answer back.

    Args:
        answer: with or without label and tokens.
    """
    row: dict[str, Any] = {
        "id": answer.id,
        "messages": [as_row(message) for message in answer.messages],
        "response": answer.response,
        "model": answer.model,
        "licence": answer.licence,
        "source": answer.source,
        "verdict": None,
    }
    label = answer.label
    if label is not None:
        row |= {"verdict": label.verdict, "error": None, "labelled_by": label.labelled_by, "how": label.how}
        row["error"] = None if label.error is None else list(label.error)
        if label.checked is not None:
            row["checked"] = list(label.checked)
        if label.note:
            row["note"] = label.note
        if label.replaces:
            row["replaces"] = list(label.replaces)
    if answer.tokens is not None:
        offsets = [list(span) for span in answer.tokens.offsets]
        row["tokens"] = {"tokenizer": answer.tokens.tokenizer, "offsets": offsets}
    if answer.reference is not None:
        row["reference"] = answer.reference
    return row


def read_answers(path: Path, dropped: list[Dropped] | None = None) -> Iterator[Answer]:
    """The answers of a JSON-lines file.

    Args:
        path: the file.
        dropped: takes the record of each line that is no answer, and the others are read. None: such a line is an error.

    Yields:
        each answer.

    Raises:
        ValueError: naming file, line, field, value, rule and remedy.
    """
    for line, row in read_jsonl(path, dropped):
        place = f"{path}:{line}"
        try:
            answer = from_row(row, place)
        except ValueError as error:
            if dropped is None:
                raise
            dropped.append(Dropped(place, str(error).removeprefix(f"{place}: "), shown_row(row)))
            continue
        yield answer


def write_answers(path: Path, answers: Iterable[Answer]) -> None:
    """Writes answers as JSON lines, all or nothing. None of them is kept.

    Args:
        path: the file.
        answers: in order.
    """
    with atomic_file(path) as file:
        for answer in answers:
            file.write(f"{json_text(to_row(answer))}\n".encode())


def _messages(value: Any, place: str) -> tuple[Message, ...]:
    """A prompt as lines hold it: where a message has parts, they are its content."""
    listed = enumerate(value) if isinstance(value, list) else ()
    read = [with_parts(message, f"{place}: messages[{index}]") for index, message in listed] or value
    check_messages(read, place)
    return tuple(read)


def with_parts(message: Any, place: str) -> Any:
    """Tells text and other parts of a message apart.

    Args:
        message: whose content may be a list of parts; what is no such message is given back as it is.
        place: for messages.

    Raises:
        ValueError: a part is of no known type.
    """
    if not isinstance(message, Mapping) or not isinstance(message.get("content"), list):
        return message
    text, parts = read_content(message["content"], place)
    return {**message, "content": text} | ({} if parts is None else {"parts": parts})


def _label(row: Mapping[str, Any], place: str) -> Label | None:
    if row["verdict"] is None:
        for field in _OF_LABEL:
            if row.get(field) not in (None, "", []):
                remedy = "give a verdict, or leave the field out"
                raise refusal(place, field, row[field], "an answer without a verdict has no label", remedy)
        return None
    for field in ("labelled_by", "how"):
        if row.get(field) is None:
            raise ValueError(f"{place}: {field} is missing; every verdict says who gave it and how; add it")
    note = row.get("note")
    return Label(
        verdict=row["verdict"],
        labelled_by=row["labelled_by"],
        how=row["how"],
        error=_span(row.get("error"), place, "error"),
        checked=_span(row.get("checked"), place, "checked"),
        note="" if note is None else note,
        replaces=replaced_names(row.get("replaces"), place),
    )


def replaced_names(value: Any, place: str) -> tuple[str, ...]:
    """Reads whose labels a label replaces; `check_label` checks the names.

    Args:
        value: the JSON value, or None.
        place: for messages.

    Raises:
        ValueError: it is no list.
    """
    if value is not None and not isinstance(value, list):
        raise refusal(place, "replaces", value, "it is a list of names", 'write ["alice", "bob"], or leave it out')
    return tuple(value or ())


def _tokens(value: Any, place: str) -> Tokens | None:
    if value is None:
        return None
    if not isinstance(value, Mapping) or set(value) != {"tokenizer", "offsets"}:
        raise refusal(place, "tokens", value, "it is an object of tokenizer and offsets", "add both, and nothing else")
    if not isinstance(value["offsets"], list):
        raise refusal(place, "tokens.offsets", value["offsets"], "it is a list of spans", "write [[0, 3], [3, 5], ...]")
    spans = [_span(span, place, f"tokens.offsets[{index}]") for index, span in enumerate(value["offsets"])]
    if None in spans:
        raise refusal(place, f"tokens.offsets[{spans.index(None)}]", None, "it is a span", "give start and end")
    return Tokens(value["tokenizer"], tuple(span for span in spans if span is not None))


def _span(value: Any, place: str, field: str) -> Span | None:
    if value is None:
        return None
    # bool is an int for Python, but [true, 3] is a mistake in a file.
    if not isinstance(value, list) or len(value) != 2 or any(type(number) is not int for number in value):
        raise refusal(place, field, value, "a span is two whole numbers, start and end", "write [start, end]")
    return (value[0], value[1])


def _check_replaces(label: Label, place: str) -> None:
    for index, name in enumerate(label.replaces):
        _words(name, place, f"replaces[{index}]", _LONGEST_NAME)
    if label.labelled_by in label.replaces or len(set(label.replaces)) < len(label.replaces):
        rule = "it names other labellers, each once; an author's new label replaces their old one anyway"
        raise refusal(place, "replaces", list(label.replaces), rule, "take the name out")


def _check_span(span: Span, length: int, place: str, field: str) -> None:
    start, end = span
    if not 0 <= start < end <= length:
        rule = f"0 <= start < end <= {length}, the characters of the response"
        remedy = "count characters (not bytes, not tokens) from the start of the response"
        raise refusal(place, field, list(span), rule, remedy)


def _check_offsets(offsets: Sequence[Span], length: int, place: str) -> None:
    """Tokens may share characters (pieces of one multi-byte character) and may be empty, but never step back."""
    if all(start == end for start, end in offsets):
        rule = "at least one token covers a character, or nobody could mark an error"
        raise refusal(place, "tokens.offsets", [list(span) for span in offsets], rule, "leave tokens out")
    last: Span = (0, 0)
    for index, (start, end) in enumerate(offsets):
        if not 0 <= start <= end <= length or start < last[0] or end < last[1]:
            rule = f"offsets do not step back and stay within the {length} characters of the response"
            remedy = "take them from the tokenizer of this very response"
            raise refusal(place, f"tokens.offsets[{index}]", [start, end], rule, remedy)
        last = (start, end)


def check_messages(messages: Any, place: str) -> None:
    """Checks a prompt of any origin by the rules.

    Args:
        messages: to check.
        place: for messages.

    Raises:
        ValueError: with place, field, value, rule and remedy.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        remedy = 'write [{"role": "user", "content": "..."}]'
        raise refusal(place, "messages", messages, "the prompt is a list of at least one message", remedy)
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or set(message) - {"parts"} != {"role", "content"}:
            remedy = "write both, and nothing else"
            raise refusal(place, f"messages[{index}]", message, "a message has role and content", remedy)
        _one_of(message["role"], ROLES, place, f"messages[{index}].role")
        if "parts" in message:
            _check_parts(message, place, f"messages[{index}]")
        else:
            _words(message["content"], place, f"messages[{index}].content")
    if messages[-1]["role"] != "user":
        remedy = "end the prompt before the assistant's turn, which is the response"
        raise refusal(place, f"messages[{len(messages) - 1}].role", messages[-1]["role"], "a user asks last", remedy)


def _check_parts(message: Mapping[str, Any], place: str, field: str) -> None:
    """Checks a message that is more than text: its parts hold its text and something else, such as a picture's path."""
    parts = message["parts"]
    if message["role"] == "assistant":
        raise refusal(place, f"{field}.parts", parts, "an assistant's turn is text", "take the other parts out")
    try:
        json.dumps(parts, allow_nan=False)
        check_values({"parts": parts})
        text, kept = read_content(parts, field)
    except (TypeError, ValueError) as error:
        remedy = "write text, and pictures as paths or addresses"
        raise refusal(place, f"{field}.parts", parts, str(error), remedy) from error
    if kept is None or text != message["content"]:
        rule = "they hold the text of the content, and at least one part that is no text"
        raise refusal(place, f"{field}.parts", parts, rule, "correct them, or write the content alone")


def _one_of(value: Any, allowed: Sequence[str], place: str, field: str) -> None:
    if value not in allowed:
        raise refusal(place, field, value, f"it is one of {', '.join(allowed)}", "correct it")


def _words(value: Any, place: str, field: str, longest: int | None = None) -> None:
    if not isinstance(value, str) or not value.strip():
        raise refusal(place, field, value, "it is text, and not empty", "fill it in")
    _keepable(value, place, field)
    if longest is not None and len(value) > longest:
        raise refusal(place, field, value, f"it has {len(value)} characters, and a store keeps {longest}", "shorten it")


def is_keepable(value: str) -> bool:
    """Whether a text is one that a store, a page and a file keep alike: not empty, no NUL, no half of a surrogate pair.

    Args:
        value: text.
    """
    return bool(value.strip()) and not _NOT_KEPT.search(value)


def _keepable(value: str, place: str, field: str) -> None:
    """A store, a page and a file hold the same text only where every one of them can encode it."""
    if _NOT_KEPT.search(value):
        raise refusal(place, field, value, "it holds a NUL or half of a surrogate pair", "take that character out")

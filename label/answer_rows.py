"""Labelled answers as JSON lines: how they are written, and which lines are errors.

Owns the names of the fields and what may be left out. The rules of what they hold are those of `schema`. Knows nothing of other formats.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from draftsmith.data.chats.messages import Message, as_row, read_content
from draftsmith.files import atomic_file, read_jsonl
from draftsmith.json_rows import Dropped, shown_row
from draftsmith.json_text import json_text
from draftsmith.label.schema import (
    Answer,
    Label,
    Span,
    Tokens,
    answer_id,
    check_answer,
    check_messages,
    check_words,
    refusal,
)

_REQUIRED = ("messages", "response", "model", "licence", "source", "verdict")
_OF_LABEL = ("error", "labelled_by", "how", "checked", "note", "replaces")
_FIELDS = ("id", *_REQUIRED, *_OF_LABEL, "tokens", "reference")


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
        check_words(row[field], place, field)
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

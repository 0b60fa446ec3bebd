"""One labelled answer: what it holds, and the rules that it follows.

Owns the fields and their rules. One polarity everywhere: 1 is correct, 0 is wrong. Spans count characters (code points)
of the response, the end is not included. Knows nothing of JSON lines, stores, other formats, or tokenizers.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from draftsmith.data.chats.messages import Message, read_content
from draftsmith.json_rows import check_values

Verdict = Literal["correct", "wrong", "unplaced"]
How = Literal["person", "rule", "mined"]
Span = tuple[int, int]

ROLES = ("system", "user", "assistant")
_NOT_KEPT = re.compile("[\0\ud800-\udfff]")
# What the columns of a store hold.
_LONGEST_NAME, _LONGEST_TOKENIZER = 255, 64


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
    check_words(label.labelled_by, place, "labelled_by", _LONGEST_NAME)
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
    check_words(answer.id, place, "id", _LONGEST_NAME)
    check_messages(answer.messages, place)
    for field in ("response", "model", "licence", "source"):
        check_words(getattr(answer, field), place, field)
    if answer.label is not None:
        check_label(answer.label, answer.response, place)
    if answer.reference is not None:
        check_words(answer.reference, place, "reference")
    if answer.tokens is not None:
        check_words(answer.tokens.tokenizer, place, "tokens.tokenizer", _LONGEST_TOKENIZER)
        _check_offsets(answer.tokens.offsets, len(answer.response), place)


def _check_replaces(label: Label, place: str) -> None:
    for index, name in enumerate(label.replaces):
        check_words(name, place, f"replaces[{index}]", _LONGEST_NAME)
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
            check_words(message["content"], place, f"messages[{index}].content")
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


def check_words(value: Any, place: str, field: str, longest: int | None = None) -> None:
    """Checks a field that holds text.

    Args:
        value: to check.
        place: for messages.
        field: its name.
        longest: most characters; None for any number.

    Raises:
        ValueError: with place, field, value, rule and remedy.
    """
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

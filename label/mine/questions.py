"""The questions that are mined, from a file of prompts.

Owns what a row may hold and its ids. Knows the chat template, no model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from draftsmith.data.chat_template import ChatTemplate
from draftsmith.data.chats.messages import Message
from draftsmith.data.formats import row_id, to_conversation
from draftsmith.data.prompts import PROMPT_FILE, say_dropped
from draftsmith.files import read_jsonl
from draftsmith.json_rows import Dropped, shown_row, summary
from draftsmith.label.checkers.checkers import Checker, Row
from draftsmith.label.mine.answers import Parse
from draftsmith.label.mine.question_mining import MiningQuestion
from draftsmith.label.schema import Answer, refusal


@dataclass(frozen=True)
class QuestionRow:
    """A question and its row in a file.

    Attributes:
        question: to be mined.
        messages: of the prompt; none where the row has token ids only.
        source: of the question.
        licence: of the source; None where the row names none.
        row: the whole row, for a checker.
        place: of the row, `FILE:LINE`.
    """

    question: MiningQuestion
    messages: tuple[Message, ...]
    source: str
    licence: str | None
    row: Row
    place: str

    @property
    def key(self) -> str:
        """What answers to the same prompt share, as in :meth:`draftsmith.label.schema.Answer.question`."""
        if self.messages:
            return Answer("-", self.messages, "-", "-", "-", "-").question()
        return hashlib.sha256(json.dumps(self.question.prompt_ids).encode()).hexdigest()[:16]


def read_questions(
    path: Path,
    chat: ChatTemplate,
    parse: Parse,
    vocab_size: int,
    limit: int | None = None,
    fit: Callable[[QuestionRow], QuestionRow] = lambda question_row: question_row,
) -> list[QuestionRow]:
    """The first `limit` questions of a JSON-lines file, or of the folder that `draftsmith data prompts` wrote.

    A row has `messages` of one turn (an optional system turn, then the user's) or `prompt_ids`. It may have `id`, `source` and `licence`;
    `reply_ids`, the target's reply, which mining then need not find; and `answer` or `reference`, a text or number, or a list that begins
    with one. Other fields are passed over. Three kinds of rows are left out and counted on standard error: rows that are no question, rows
    whose id is taken, and rows for which `fit` raises ValueError.

    Args:
        path: the file or folder.
        chat: the target's chat template.
        parse: reads an answer out of a text.
        vocab_size: of the target.
        limit: read at most this many questions; None for all.
        fit: what else a run asks of a question; gives it back, changed or not.

    Raises:
        ValueError: no row is a question; each reason names file, line, field, value, rule and remedy.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; it must be at least 1; raise it, or leave it out")
    file = path / PROMPT_FILE if path.is_dir() else path
    questions: list[QuestionRow] = []
    seen: dict[str, str] = {}
    dropped: list[Dropped] = []
    for line, row in read_jsonl(file, dropped):
        if limit is not None and len(questions) >= limit:
            break
        place = f"{file}:{line}"
        try:
            question_row = fit(_question_row(row, place, chat, parse, vocab_size, file.stem))
            first = seen.setdefault(question_row.question.id, place)
            if first != place:
                raise refusal(
                    place, "id", question_row.question.id, f"{first} has it already", "give each row an id of its own"
                )
        except ValueError as error:
            dropped.append(Dropped(place, str(error).removeprefix(f"{place}: "), shown_row(row)))
            continue
        questions.append(question_row)
    if not questions:
        raise ValueError(f"no question in {file}: {summary(dropped)}")
    say_dropped(dropped)
    return questions


def judged_by(checker: Checker, question_row: QuestionRow, decode: Callable[[list[int]], str]) -> QuestionRow:
    """The question with each reply read as the verdict of a checker, and "correct" for its reference.

    Args:
        checker: judges replies.
        question_row: the question with its row.
        decode: writes token ids out.

    Raises:
        ValueError: the checker cannot judge by this row; names file and line. Later the same for a reply.
    """

    def verdict(text: str) -> str:
        try:
            return checker.check(question_row.row, text).verdict
        except ValueError as error:
            raise ValueError(f"{question_row.place}: {error}") from error

    if checker.probed:
        verdict("")
    question = replace(question_row.question, reference="correct", parse=lambda reply: verdict(decode(reply)))
    return replace(question_row, question=question)


def _question_row(
    row: Mapping[str, Any], place: str, chat: ChatTemplate, parse: Parse, vocab_size: int, stem: str
) -> QuestionRow:
    messages = _messages(row, place)
    given_ids = _ids(row, "prompt_ids", place, vocab_size)
    if messages and given_ids:
        raise ValueError("the row has messages and prompt_ids; one of them is the prompt; leave the other out")
    prompt_ids = chat.first_prompt_ids(messages) if messages else given_ids
    if prompt_ids is None:
        raise ValueError("the row has neither messages nor prompt_ids, so nothing is asked; add one of them")
    name = row_id(row, hashlib.sha256(json.dumps(prompt_ids).encode()).hexdigest()[:16])
    question = MiningQuestion(
        name, prompt_ids, _ids(row, "reply_ids", place, vocab_size), _reference(row, place, parse)
    )
    source, licence = (_text(row, field, place) for field in ("source", "licence"))
    return QuestionRow(question, messages, source or stem, licence, row, place)


def _text(row: Mapping[str, Any], field: str, place: str) -> str | None:
    value = row.get(field)
    if value is not None and not isinstance(value, str):
        raise refusal(place, field, value, "it is text", "correct it, or leave it out")
    return value


def _messages(row: Mapping[str, Any], place: str) -> tuple[Message, ...]:
    """The one turn that is asked, read as every command reads turns; a later turn would need the replies before it."""
    if row.get("messages") is None:
        return ()
    turns = to_conversation({"messages": row["messages"]}, "openai").turns
    if [turn["role"] for turn in turns] not in (["user"], ["system", "user"]):
        rule = "they are one question: a user turn, with a system turn before it or none"
        remedy = "leave later turns out, or give the whole prompt as prompt_ids"
        raise refusal(place, "messages", row["messages"], rule, remedy)
    return turns


def _ids(row: Mapping[str, Any], field: str, place: str, vocab_size: int) -> list[int] | None:
    value = row.get(field)
    if value is None:
        return None
    if (
        not isinstance(value, list)
        or not value
        or not all(type(token) is int and 0 <= token < vocab_size for token in value)
    ):
        rule = f"it is a list of token ids below {vocab_size}, and not empty"
        raise refusal(place, field, value, rule, "encode the prompt with the target's tokenizer")
    return value


def _reference(row: Mapping[str, Any], place: str, parse: Parse) -> str | None:
    """What the data set's answer comes to, read as a reply is; None where it has none."""
    field = "answer" if row.get("answer") is not None else "reference"
    value = row.get(field)
    value = (value[0] if value else None) if isinstance(value, list) else value
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise refusal(place, field, value, "it is a text or a number, or a list that begins with one", "correct it")
    return parse(str(value))

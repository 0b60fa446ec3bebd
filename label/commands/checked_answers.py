"""From replies to labelled answers: every answer checked once, repeated ones left out, and pairs of a right and a wrong one.

Owns: which reply is an answer, the log of checks, pairs, counts. Does not know: how replies are made, what a checker does.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from draftsmith.data.chats.messages import Message
from draftsmith.data.prompts import Prompt
from draftsmith.files import JsonlAppender, read_jsonl
from draftsmith.label.checkers.checkers import Checked, Checker, Row
from draftsmith.label.schema import Answer, Label, answer_id, check_answer, is_keepable

CHECKS = "checks.jsonl"
_LEFT_OUT = ("unfinished", "empty", "repeated")
_ENDED = ("eos", "stop")


@dataclass(frozen=True)
class LicensedPrompt:
    """A prompt with its row and its licence.

    Attributes:
        prompt: the prompt.
        row: the whole row that it was read from.
        place: of the row, `FILE:LINE`.
        licence: of its source.
    """

    prompt: Prompt
    row: Row
    place: str
    licence: str


@dataclass
class Tally:
    """What became of each model's answers: verdicts, and reasons to leave one out."""

    counts: dict[str, Counter[str]] = field(default_factory=dict)

    def add(self, model: str, kind: str) -> None:
        """Counts an answer.

        Args:
            model: that wrote it.
            kind: a verdict, or a reason to leave it out.
        """
        self.counts.setdefault(model, Counter())[kind] += 1

    def lines(self) -> Iterator[str]:
        """One line a model: `embedded:target: 9 correct, 1 wrong; left out: 2 repeated`."""
        for model, counts in self.counts.items():
            left_out = _counts(counts, _LEFT_OUT)
            yield f"{model}: {_counts(counts, ('correct', 'wrong', 'unplaced'))}" + (
                f"; left out: {left_out}" if left_out != "none" else ""
            )


def labelled_answers(
    questions: Sequence[LicensedPrompt], folders: Sequence[tuple[str, Path]], checker: Checker, out: Path, tally: Tally
) -> Iterator[tuple[str, Answer]]:
    """Labelled answers, question by question. The same text of the same model comes only once.

    Args:
        questions: in the order of the answers.
        folders: each model with a folder of its replies.
        checker: of the answers.
        out: folder of the log of checks.
        tally: counts what became of each reply.

    Yields:
        the question's id and an answer with its label.

    Raises:
        ValueError: the checker cannot judge by a row.
    """
    replies = [
        (model, {row["id"]: row for _, row in read_jsonl(folder / "responses.jsonl")}) for model, folder in folders
    ]
    seen: set[str] = set()
    with JsonlAppender(out / CHECKS) as log:
        known: dict[str, Row] = {row["key"]: row for row in log.rows}
        for question in questions:
            for model, rows in replies:
                answer = _answer(question, model, rows.get(question.prompt.id))
                kind = answer if isinstance(answer, str) else "repeated" if answer.id in seen else None
                if isinstance(answer, str) or kind is not None:
                    tally.add(model, str(kind))
                    continue
                seen.add(answer.id)
                place = f"{question.place} (question {question.prompt.id}, answer of {model})"
                labelled = _with_label(answer, question, checker, log, known, place)
                assert labelled.label is not None
                tally.add(model, labelled.label.verdict)
                yield question.prompt.id, labelled


def _answer(question: LicensedPrompt, model: str, reply: Row | None) -> Answer | str:
    """The answer in a reply, or why there is none."""
    if reply is None or len(reply["turns"]) < len(question.prompt.user_turns()):
        return "unfinished"
    if any(turn["finish"] not in _ENDED for turn in reply["turns"]):
        return "unfinished"
    *asked, said = reply["messages"]
    if not said["content"].strip():
        return "empty"
    messages = tuple(Message(role=message["role"], content=message["content"]) for message in asked)
    source = question.prompt.source
    own_id = answer_id(source, messages, said["content"], model)
    reference = question.prompt.reference[-1] if question.prompt.reference else question.row.get("answer")
    reference = str(reference) if isinstance(reference, str | int | float) else None
    if reference is not None and not is_keepable(reference):
        reference = None
    return Answer(own_id, messages, said["content"], model, question.licence, source, reference=reference)


def _with_label(
    answer: Answer, question: LicensedPrompt, checker: Checker, log: JsonlAppender, known: dict[str, Row], place: str
) -> Answer:
    """Checks an answer, or recalls the same checker's verdict from an earlier run for the same row and response."""
    key = digest([checker.code, question.row, answer.response])
    if key not in known:
        checked = _checked(checker, question.row, answer.response, place)
        known[key] = {"key": key} | asdict(checked)
        _apply(answer, checker, checked, place)
        log.write(dict(known[key]))
    row = known[key]
    error = None if row["error"] is None else (row["error"][0], row["error"][1])
    return _apply(answer, checker, Checked(row["verdict"], error, row["note"]), place)


def _apply(answer: Answer, checker: Checker, checked: Checked, place: str) -> Answer:
    label = Label(checked.verdict, checker.name, "rule", checked.error, None, checked.note)
    labelled = replace(answer, label=label)
    check_answer(labelled, place)
    return labelled


def _checked(checker: Checker, row: Row, response: str, place: str) -> Checked:
    try:
        return checker.check(row, response)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


def right_and_wrong(answers: Sequence[tuple[str, Answer]], seed: int) -> list[Answer]:
    """One right and one wrong answer of each question that has both.

    A wrong answer whose error is placed comes before one that is only wrong somewhere. Among equals the choice is by a hash, so no model
    comes first.

    Args:
        answers: each with its question's id.
        seed: of the hash.
    """
    by_question: dict[str, list[Answer]] = {}
    for question, answer in answers:
        by_question.setdefault(question, []).append(answer)
    kept = []
    for of_question in by_question.values():
        of_question.sort(key=lambda answer: hashlib.sha256(f"{seed}\0{answer.id}".encode()).digest())
        by_verdict = {answer.label.verdict: answer for answer in reversed(of_question) if answer.label is not None}
        wrong = by_verdict.get("wrong") or by_verdict.get("unplaced")
        if wrong is not None and "correct" in by_verdict:
            kept += [by_verdict["correct"], wrong]
    return kept


def verdicts(answers: Sequence[Answer]) -> str:
    """The verdicts of answers in words: `9 correct, 1 wrong`.

    Args:
        answers: with labels.
    """
    counts = Counter(answer.label.verdict for answer in answers if answer.label is not None)
    return _counts(counts, ("correct", "wrong", "unplaced"))


def _counts(counts: Counter[Any], kinds: Sequence[str]) -> str:
    return ", ".join(f"{counts[kind]} {kind}" for kind in kinds if counts[kind]) or "none"


def digest(value: Any) -> str:
    """sha256 (hex) of a value, whatever the order of its keys.

    Args:
        value: what JSON can hold.
    """
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False, default=str).encode()).hexdigest()

"""What mining leaves behind: token rows, labelled answers, a report, and the log that they are made from.

Owns the shape of these files. Knows no model: whoever calls says how token ids are written out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from draftsmith.label.mine.many_questions import ForwardCounts
from draftsmith.label.mine.question_mining import MiningCost, MiningResult, Swap
from draftsmith.label.mine.questions import QuestionRow
from draftsmith.label.schema import Answer, Label, answer_id
from draftsmith.label.token_labels import CORRECT, IGNORED, WRONG
from draftsmith.label.token_rows import LabelledRow

LABELLED_BY = "draftsmith mine"


def to_log(mined: MiningResult, spent: Sequence[ForwardCounts]) -> dict[str, Any]:
    """A question's line in the log.

    Args:
        mined: its outcome.
        spent: forwards of target and draft since the line before it.
    """
    return {**asdict(mined), "spent": [asdict(forwards) for forwards in spent]}


def from_log(row: Mapping[str, Any]) -> tuple[MiningResult, tuple[ForwardCounts, ForwardCounts]]:
    """The outcome in a line of the log, and the forwards of target and draft.

    Args:
        row: from `to_log`, through JSON.
    """
    fields = {name: row[name] for name in MiningResult.__dataclass_fields__}
    fields |= {"swaps": tuple(Swap(**swap) for swap in row["swaps"]), "cost": MiningCost(**row["cost"])}
    target, draft = (ForwardCounts(**forwards) for forwards in row["spent"])
    return MiningResult(**fields), (target, draft)


def token_rows(question_row: QuestionRow, mined: MiningResult) -> list[LabelledRow]:
    """A question's labels in the very tokens that the target read.

    The final reply has 1 on every accepted swap, and is left out where there is none. Each rejected swap is a row of its own: what is
    before it, and the draft's token with 0. All other tokens are ignored.

    Example: the final reply 5 6 7 8 with swaps accepted at 1 and rejected (to 9) at 3. The replies are 5 6 7 8 with labels - 1 - -, and
    5 6 7 9 with - - - 0.

    Args:
        question_row: the question with its row.
        mined: its outcome.
    """
    accepted = {swap.place for swap in mined.swaps if swap.label == CORRECT}
    rows = []
    if accepted:
        labels = [CORRECT if place in accepted else IGNORED for place in range(len(mined.reply_ids))]
        rows.append(_row(question_row, mined, f"{mined.id}/accepted", mined.reply_ids, labels))
    for swap in mined.swaps:
        if swap.label == WRONG:
            reply = tried(mined, swap)
            labels = [IGNORED] * swap.place + [WRONG]
            rows.append(_row(question_row, mined, f"{mined.id}/rejected-{swap.place}", reply, labels))
    return rows


def tried(mined: MiningResult, swap: Swap) -> list[int]:
    """The reply up to a swap, with it. Later swaps change nothing before them, so the final reply begins the same way.

    Args:
        mined: a question's outcome.
        swap: one of its swaps.
    """
    return [*mined.reply_ids[: swap.place], swap.draft_token]


def labelled_answers(
    question_row: QuestionRow, mined: MiningResult, decode: Callable[[list[int]], str], model: str, licence: str
) -> tuple[list[Answer], int]:
    """One answer a swap, cut behind the draft's token, which alone is labelled.

    A swap gives no answer where the question has no messages. It gives none either where its token is no characters of its own: an end
    token, or a part of a character.

    Args:
        question_row: the question with its row.
        mined: its outcome.
        decode: writes token ids out.
        model: the target's name.
        licence: of a question whose row names none.

    Returns:
        the answers, and how many swaps give none.
    """
    answers = []
    for swap in mined.swaps if question_row.messages else ():
        before, text = decode(mined.reply_ids[: swap.place]), decode(tried(mined, swap))
        span = (len(before), len(text))
        if not text.startswith(before) or span[0] >= span[1] or "\ufffd" in text or not text.strip():
            continue
        correct = swap.label == CORRECT
        label = Label("correct" if correct else "wrong", LABELLED_BY, "mined", None if correct else span, span)
        name = answer_id(question_row.source, question_row.messages, text, model)
        answers.append(
            Answer(
                name, question_row.messages, text, model, question_row.licence or licence, question_row.source, label
            )
        )
    return answers, len(mined.swaps) - len(answers)


def counts(log: Sequence[tuple[MiningResult, tuple[ForwardCounts, ForwardCounts]]]) -> dict[str, Any]:
    """Labels, questions left out with the reason, and what the mining took.

    Args:
        log: outcomes with the forwards of target and draft.
    """
    labels = Counter(swap.label for mined, _ in log for swap in mined.swaps)
    num_labels = labels[CORRECT] + labels[WRONG]
    target, draft = ForwardCounts(), ForwardCounts()
    tokens: Counter[str] = Counter()
    row_forwards: Counter[str] = Counter()
    for mined, spent in log:
        target, draft = target.plus(spent[0]), draft.plus(spent[1])
        tokens.update(mined.cost.tokens)
        row_forwards.update(mined.cost.row_forwards)
    return {
        "questions": len(log),
        "mined": sum(mined.left_out is None for mined, _ in log),
        "left_out": dict(Counter(mined.left_out for mined, _ in log if mined.left_out is not None)),
        "labels": {"correct": labels[CORRECT], "wrong": labels[WRONG]},
        "target": asdict(target),
        "draft": asdict(draft),
        "tokens": dict(tokens),
        "row_forwards": dict(row_forwards),
        "target_forwards_per_label": target.forwards / num_labels if num_labels else None,
        "target_tokens_per_label": target.tokens / num_labels if num_labels else None,
    }


def _row(question_row: QuestionRow, mined: MiningResult, name: str, reply: list[int], labels: list[int]) -> LabelledRow:
    return LabelledRow(name, question_row.key, question_row.source, "mined", mined.prompt_ids, reply, labels)

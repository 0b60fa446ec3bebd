"""What mining leaves behind: token rows, labelled answers, a report, and the log that they are made from.

Owns the shape of these files. Knows no model: whoever calls says how token ids are written out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from draftsmith.label.mine.many_questions import Forwards
from draftsmith.label.mine.questions import Asked
from draftsmith.label.mine.walk import Cost, Mined, Swap
from draftsmith.label.schema import Answer, Label, answer_id
from draftsmith.label.token_labels import CORRECT, IGNORED, WRONG
from draftsmith.label.token_rows import LabelledRow

LABELLED_BY = "draftsmith mine"


def to_log(mined: Mined, spent: Sequence[Forwards]) -> dict[str, Any]:
    """A question's line in the log; `spent`: forwards of target and draft since the line before it."""
    return {**asdict(mined), "spent": [asdict(forwards) for forwards in spent]}


def from_log(row: Mapping[str, Any]) -> tuple[Mined, tuple[Forwards, Forwards]]:
    """The other way round."""
    fields = {name: row[name] for name in Mined.__dataclass_fields__}
    fields |= {"swaps": tuple(Swap(**swap) for swap in row["swaps"]), "cost": Cost(**row["cost"])}
    target, draft = (Forwards(**forwards) for forwards in row["spent"])
    return Mined(**fields), (target, draft)


def token_rows(asked: Asked, mined: Mined) -> list[LabelledRow]:
    """A question's labels in the very tokens that the target read.

    The final reply has 1 on every accepted swap, and is left out where there is none. Each rejected swap is a row of its own: what
    stood before it, and the draft's token with 0. All other tokens are ignored.

    Example: the final reply 5 6 7 8 with swaps accepted at 1 and rejected (to 9) at 3 gives the replies 5 6 7 8 with labels
    - 1 - - and 5 6 7 9 with - - - 0.
    """
    accepted = {swap.place for swap in mined.swaps if swap.label == CORRECT}
    rows = []
    if accepted:
        labels = [CORRECT if place in accepted else IGNORED for place in range(len(mined.reply_ids))]
        rows.append(_row(asked, mined, f"{mined.id}/accepted", mined.reply_ids, labels))
    for swap in mined.swaps:
        if swap.label == WRONG:
            reply = tried(mined, swap)
            labels = [IGNORED] * swap.place + [WRONG]
            rows.append(_row(asked, mined, f"{mined.id}/rejected-{swap.place}", reply, labels))
    return rows


def tried(mined: Mined, swap: Swap) -> list[int]:
    """The reply up to a swap, with it. Later swaps leave what stands before them alone, so the final reply still begins so."""
    return [*mined.reply_ids[: swap.place], swap.draft_token]


def labelled_answers(
    asked: Asked, mined: Mined, decode: Callable[[list[int]], str], model: str, licence: str
) -> tuple[list[Answer], int]:
    """One answer a swap, cut behind the draft's token, which alone is labelled; and how many swaps give none.

    A swap gives none where the question has no messages, or where its token is no characters of its own: an end token, or a part of a
    character.
    """
    answers = []
    for swap in mined.swaps if asked.messages else ():
        before, text = decode(mined.reply_ids[: swap.place]), decode(tried(mined, swap))
        span = (len(before), len(text))
        if not text.startswith(before) or span[0] >= span[1] or "\ufffd" in text or not text.strip():
            continue
        correct = swap.label == CORRECT
        label = Label("correct" if correct else "wrong", LABELLED_BY, "mined", None if correct else span, span)
        name = answer_id(asked.source, asked.messages, text, model)
        answers.append(Answer(name, asked.messages, text, model, asked.licence or licence, asked.source, label))
    return answers, len(mined.swaps) - len(answers)


def counts(log: Sequence[tuple[Mined, tuple[Forwards, Forwards]]]) -> dict[str, Any]:
    """What a log comes to: labels, questions left out with the reason, and what it took."""
    labels = Counter(swap.label for mined, _ in log for swap in mined.swaps)
    num_labels = labels[CORRECT] + labels[WRONG]
    target, draft = Forwards(), Forwards()
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


def _row(asked: Asked, mined: Mined, name: str, reply: list[int], labels: list[int]) -> LabelledRow:
    return LabelledRow(name, asked.key, asked.source, "mined", mined.prompt_ids, reply, labels)

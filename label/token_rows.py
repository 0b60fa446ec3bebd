"""Labelled token rows: what the judge is trained on, one JSON line an answer, in the very ids that the target reads.

Owns the row's fields and their rules. A file of rows is also a source for `draftsmith data extract`, which caches the states that
the labels belong to under the same ids. Knows no store, no tokenizer and no training.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from draftsmith.files import atomic_file, read_jsonl
from draftsmith.json_text import json_text
from draftsmith.label.schema import refusal
from draftsmith.label.token_labels import CORRECT, IGNORED, WRONG


@dataclass(frozen=True)
class LabelledRow:
    """One answer in token ids.

    Attributes:
        id: its sample id in a hidden-state cache.
        question: what answers to the same prompt share; a split never parts rows of one question.
        source: where the answer is from.
        how: whether a person, a rule or mining labelled it.
        prompt_ids: as the target reads them.
        reply_ids: as the target reads them.
        labels: one a reply token: 1 correct, 0 wrong, -100 nothing is known.
    """

    id: str
    question: str
    source: str
    how: str
    prompt_ids: list[int]
    reply_ids: list[int]
    labels: list[int]


_FIELDS = tuple(LabelledRow.__dataclass_fields__)


def write_rows(path: Path, rows: Iterable[LabelledRow]) -> None:
    """Replaces the file as a whole. No row is kept; an error on the way leaves the file as it was.

    Args:
        path: the file.
        rows: in order.
    """
    with atomic_file(path) as file:
        for row in rows:
            file.write(f"{json_text(asdict(row))}\n".encode())


def read_rows(path: Path) -> Iterator[LabelledRow]:
    """The rows of a file.

    Args:
        path: the file.

    Yields:
        each row.

    Raises:
        ValueError: naming file, line, field, value, rule and remedy; a repeated id is an error too.
    """
    seen: dict[str, int] = {}
    for line, row in read_jsonl(path):
        labelled = _row(row, f"{path}:{line}")
        if labelled.id in seen:
            raise refusal(
                f"{path}:{line}",
                "id",
                labelled.id,
                f"line {seen[labelled.id]} has it already",
                "give each row an id of its own",
            )
        seen[labelled.id] = line
        yield labelled


def _row(row: dict[str, Any], place: str) -> LabelledRow:
    for field in _FIELDS:
        if field not in row:
            raise ValueError(
                f"{place}: {field} is missing; a labelled row has {', '.join(_FIELDS)}; make it with draftsmith label rows"
            )
    for field in ("id", "question", "source", "how"):
        if not isinstance(row[field], str) or not row[field]:
            raise refusal(place, field, row[field], "it is a text that is not empty", "write one")
    for field in ("prompt_ids", "reply_ids", "labels"):
        if not isinstance(row[field], list) or not all(type(number) is int for number in row[field]):
            raise refusal(
                place, field, row[field], "it is a list of integers", "make the rows anew with draftsmith label rows"
            )
    if len(row["labels"]) != len(row["reply_ids"]):
        rule = f"there is one label for each of the {len(row['reply_ids'])} reply tokens"
        raise refusal(place, "labels", len(row["labels"]), rule, "make the rows anew with draftsmith label rows")
    for label in row["labels"]:
        if label not in (CORRECT, WRONG, IGNORED):
            rule = f"a label is {CORRECT} (correct), {WRONG} (wrong) or {IGNORED} (unknown)"
            raise refusal(place, "labels", label, rule, "make the rows anew with draftsmith label rows")
    return LabelledRow(**{field: row[field] for field in _FIELDS})

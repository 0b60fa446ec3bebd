"""Answers that are labelled as a whole or at one token: GSM8K's model solutions and AutoJudge's mined tokens.

Owns what their fields mean, and the turn of AutoJudge's polarity. Knows no store.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from draftsmith.label.formats import calculations
from draftsmith.label.formats.fields import Row, licence_of, model_of, text_of, unpacked, value_of, whole
from draftsmith.label.schema import Answer, refusal
from draftsmith.label.store.label_source import LabelSource


def read_solutions(row: Row, place: str, origin: LabelSource) -> Iterator[Answer]:
    """GSM8K's model solutions: one field a model, with `solution` and the verdict `is_correct` on its final number.

    Calculator marks are taken out. Where a solution is wrong, the first wrong calculation is its error if there is one;
    else nobody has said where it is wrong.

    Args:
        row: of the file.
        place: of the row, for messages.
        origin: what the row does not say.

    Raises:
        ValueError: with place, field, value, rule and remedy.
    """
    solutions = solutions_of(row)
    if not solutions:
        rule = "a row has one object a model, with solution and is_correct"
        raise ValueError(f"{place}: the fields are {sorted(row)}; {rule}; name another --format")
    for model, entry in solutions.items():
        solution = text_of(entry.get("solution"), place, f"{model}.solution")
        is_correct = _truth(entry.get("is_correct"))
        if is_correct is None:
            raise refusal(place, f"{model}.is_correct", entry.get("is_correct"), "it is true or false", "correct it")
        error = None if is_correct else calculations.first_wrong(solution)
        label = origin.label("rule", error)
        if not is_correct and error is None:
            label = origin.unplaced("rule")
        response = calculations.without_marks(solution)
        yield origin.answer(value_of(row, "question", place), response, label, place, model, licence_of(row))


def read_autojudge(row: Row, place: str, origin: LabelSource) -> Iterator[Answer]:
    """AutoJudge's mined tokens as text: after `prefix`, the draft said `draft_token` where the target had another one.

    Its polarity is the reverse of this project's: important (true, 1) means that the answer changed with the token, so the
    token is wrong. The label speaks of that token alone.

    Args:
        row: of the file.
        place: of the row, for messages.
        origin: what the row does not say.

    Raises:
        ValueError: with place, field, value, rule and remedy.
    """
    prefix, token = value_of(row, "prefix", place), value_of(row, "draft_token", place)
    for field, value in (("prefix", prefix), ("draft_token", token)):
        if not isinstance(value, str) or (field == "draft_token" and not value):
            raise refusal(
                place, field, value, "it is text (only the prefix may be empty)", "decode the token ids first"
            )
    important = _truth(value_of(row, "important", place))
    if important is None:
        raise refusal(place, "important", row["important"], "it is true or false (or 1 or 0)", "correct it")
    span = (len(prefix), len(prefix) + len(token))
    label = origin.label("mined", span if important else None, span)
    question = value_of(row, "question", place)
    yield origin.answer(question, prefix + token, label, place, model_of(row), licence_of(row))


def solutions_of(row: Row) -> dict[str, Mapping[str, Any]]:
    """The objects of the models, by their names. A table that lacks one model's solution may hold an object of nulls in its place.

    Args:
        row: of a file.
    """
    cells = {name: value for name, cell in row.items() if isinstance(value := unpacked(cell), Mapping)}
    return {
        name: value
        for name, value in cells.items()
        if any(value.get(field) is not None for field in ("solution", "is_correct"))
    }


def _truth(value: Any) -> bool | None:
    """True or false, also as 1, 0, 1.0, "true" or "False" as tables write them; None for anything else."""
    if isinstance(value, str):
        return {"true": True, "false": False}.get(value.strip().lower())
    if isinstance(value, bool):
        return value
    number = whole(value)
    return None if number is None else {1: True, 0: False}.get(number)

"""Which format the rows of a file have, by the names of their fields.

Owns the signs of each format and their order. Reads no field's content beyond them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, get_args

from draftsmith.label.formats.fields import Row, unpacked, whole
from draftsmith.label.formats.prm800k import is_published
from draftsmith.label.formats.replies import ends_with_a_reply
from draftsmith.label.formats.row_shapes import is_step_row
from draftsmith.label.formats.solutions import solutions_of
from draftsmith.label.formats.step_labels import (
    LABEL_FIELDS,
    MARK,
    OF_STEP,
    STEP_FIELDS,
    label_lists,
    other_label_lists,
    step_list,
)
from draftsmith.label.formats.step_sets import LAYOUTS, LESS_KNOWN_ERRORS

Format = Literal[
    "auto",
    "answers",
    "label-studio",
    "prm800k",
    "mistake",
    "processbench",
    "stepwise",
    "wrong-steps",
    "step-labels",
    "step-rows",
    "math-shepherd",
    "solutions",
    "autojudge",
    "replies",
]


def detect(row: Row, place: str) -> Format:
    """Names the format of a row from its fields.

    Args:
        row: of a file.
        place: of the row, `FILE:LINE`.

    Raises:
        ValueError: none fits; names the fields seen.
    """
    fitting = fitting_formats(row)
    if fitting:
        return fitting[0]
    known = ", ".join(name for name in get_args(Format) if name != "auto")
    texts = [name for name in (*STEP_FIELDS, *LABEL_FIELDS) if str(row.get(name)).lstrip().startswith("[")]
    unread = [name for name in texts if isinstance(unpacked(row[name]), str)]
    no_list = f"; {' and '.join(unread)} cannot be read as a list; write it as JSON, [..., ...]" if unread else ""
    raise ValueError(
        f"{place}: no known format has the fields {sorted(row)}; name one with --format ({known}){no_list}"
    )


def fitting_formats(row: Row) -> list[Format]:
    """The formats whose signs a row bears, the one that counts first.

    Args:
        row: of a file.
    """
    fields = {name for name, value in row.items() if value is not None}
    fitting = [
        row_format
        for row_format, fits in _SIGNS
        if fits(row, fields if row_format not in ("mistake", "stepwise") else set(row))
    ]
    return list(dict.fromkeys(fitting))


def _has_labels_of_steps(row: Row, fields: set[str]) -> bool:
    steps = next((inside for name in STEP_FIELDS if isinstance(inside := step_list(row, name), list)), None)
    if steps is None:
        return False
    objects = [step for step in steps if isinstance(step, Mapping)]
    return bool(label_lists(row) or other_label_lists(row)) or any(name in step for step in objects for name in OF_STEP)


def _has_objects_for_steps(row: Row, fields: set[str]) -> bool:
    lists = (inside for name in STEP_FIELDS if isinstance(inside := step_list(row, name), list))
    return any(isinstance(step, Mapping) for step in next(lists, []))


def _has_number_beside_steps(row: Row, fields: set[str]) -> bool:
    """One number for the whole row: lists of ratings beside it are more than the format needs."""
    steps = unpacked(row.get("steps"))
    are_texts = isinstance(steps, list) and not any(isinstance(step, Mapping) for step in steps)
    return are_texts and whole(row.get("label")) is not None


def _has_object(row: Row, *names: str) -> bool:
    return any(isinstance(unpacked(row.get(name)), Mapping) for name in names)


def _is_shepherd(row: Row, fields: set[str]) -> bool:
    return isinstance(row.get("input"), str) and isinstance(row.get("label"), str) and MARK in row["input"]


def _names_a_step(row: Row, fields: set[str]) -> bool:
    layout = LAYOUTS["stepwise"]
    own = {"model_output_steps", "Model_Solution_Steps"} & fields
    return bool(own and fields & {"question", "Question"}) or bool(
        fields & {*layout.steps} and fields & {*layout.errors}
    )


# The first that fits counts, so that what is peculiar to a format comes before what several have.
_SIGNS: tuple[tuple[Format, Callable[[Row, set[str]], bool]], ...] = (
    ("answers", lambda row, _: "verdict" in row and "response" in row),
    ("label-studio", lambda _, fields: "data" in fields and not fields & {"steps", "completions"}),
    ("mistake", lambda _, fields: {"steps", "mistake_index"} <= fields),
    ("stepwise", _names_a_step),
    ("processbench", _has_number_beside_steps),
    ("wrong-steps", lambda _, fields: bool(fields & {*LAYOUTS["wrong-steps"].errors})),
    ("prm800k", lambda row, fields: is_published(row) or {"steps", "ratings"} <= fields),
    ("math-shepherd", _is_shepherd),
    ("step-labels", _has_labels_of_steps),
    ("step-labels", lambda _, fields: "conversations" in fields),
    ("processbench", lambda _, fields: {"steps", "label"} <= fields),
    ("prm800k", lambda row, fields: {"question", "label"} <= fields and _has_object(row, "question", "label")),
    ("autojudge", lambda _, fields: {"prefix", "draft_token", "important"} <= fields),
    ("step-rows", lambda row, _: is_step_row(row)),
    ("solutions", lambda row, fields: "question" in fields and bool(solutions_of(row))),
    ("mistake", lambda _, fields: bool(fields & {*LAYOUTS["mistake"].steps} and fields & {*LESS_KNOWN_ERRORS})),
    ("replies", lambda row, fields: not fields & {"verdict", "response"} and ends_with_a_reply(row)),
    ("step-labels", _has_objects_for_steps),  # for its reason why they give nothing
)

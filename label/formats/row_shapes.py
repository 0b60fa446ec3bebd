"""Rows of other shapes: an answer inside an object, several annotators in a row, a row for each step, pictures beside the question.

Owns how such rows become rows of one answer with steps and labels at the top, as the formats read them, and what REVEAL's labels mean.
Knows no file.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from draftsmith.data.chats.messages import Message
from draftsmith.label.distinct import Distinct
from draftsmith.label.formats.fields import (
    QUESTIONS,
    Row,
    contradiction,
    field_of,
    is_absent,
    model_of,
    unpacked,
    value_of,
    whole,
)
from draftsmith.label.formats.prm800k import is_published
from draftsmith.label.formats.step_labels import (
    OF_STEP,
    STEP_FIELDS,
    RatedSteps,
    Rating,
    label_lists,
    other_label_lists,
    rating_of,
    step_list,
)
from draftsmith.label.formats.step_sets import LAYOUTS, names_a_step
from draftsmith.label.schema import Answer, answer_id, refusal
from draftsmith.label.store.label_source import LabelSource

STEP_ROWS = "step rows"
"""The field of a joined row that holds the rows of its steps."""

_OBJECTS = ("response", "solution", "answer", "output", "completion", "model_response", "trajectory")
_ANSWERS = ("responses", "solutions", "answers", "outputs", "completions", "candidates", "samples")
_ANNOTATIONS = ("annotations", "human_annotations", "annotators", "votes")
_ANNOTATORS = (
    "annotator",
    "annotator_id",
    "annotator_name",
    "labeler",
    "labeller",
    "rater",
    "rater_id",
    "worker",
    "worker_id",
)
_STEP_NUMBERS = ("step_idx", "step_index", "step_number", "step_num", "step_id")
_STEP_TEXTS = ("step", "step_text", "text", "sentence")
_ANSWER_IDS = ("answer_id", "solution_id", "response_id", "chain_id", "trace_id", "question_id")
_MEDIA = ("image", "images", "video", "videos", "audio", "audios")
_ERRORS = {name for layout in LAYOUTS.values() for name in layout.errors}
_ATTRIBUTION, _LOGIC, _IS_FINAL = "attribution_label", "correctness_label", "is_final_rated_evidence_for_step"
_ATTRIBUTIONS = ("fully", "partially", "unsupported", "contradictory")


def unfolded(row: Row) -> list[Row]:
    """The answers of a row, or its annotators, each as a row of its own. A row of the usual shape is given back as it is.

    Steps inside an object do not replace those of the row, such as a reference beside the answer. Nor does one label of the row become
    that of several answers. A label of the row beside its annotators' stays: a row of its own gives it.

    Worked example: `{"question": "q", "response": {"steps": ["a"], "process_correctness": [1]}}` becomes
    `{"question": "q", "steps": ["a"], "process_correctness": [1]}`.

    Args:
        row: of a file.
    """
    if is_published(row) or "data" in row:
        return [row]
    rows = [row]
    for names, is_inner in ((_OBJECTS, _has_steps), (_ANSWERS, _has_steps), (_ANNOTATIONS, _speaks_of_steps)):
        rows = [inner for outer in rows for inner in _inner_rows(outer, names, is_inner)]
    return rows


def _inner_rows(row: Row, names: Sequence[str], is_inner: Callable[[Row], bool]) -> list[Row]:
    """A row for each object under the first of these names that holds any, with the other fields of the row beside it."""
    for name in names:
        value = unpacked(row.get(name))
        inner = [value] if isinstance(value, Mapping) else value
        is_list = isinstance(inner, list) and bool(inner)
        if not is_list or not all(isinstance(each, Mapping) and is_inner(each) for each in inner):
            continue
        rest = {field: other for field, other in row.items() if field != name}
        if names is _ANNOTATIONS:
            return _annotated(row, rest, inner)
        return [row] if _is_by_itself(rest, inner) else [{**_without_steps(rest), **each} for each in inner]
    return [row]


def _is_by_itself(rest: Row, answers: Sequence[Row]) -> bool:
    """Whether a row has labelled steps beside those inside its answers, or a label that may be that of any of several answers."""
    are_labelled = all(_speaks_of_steps(answer) or _has_labelled_steps(answer) for answer in answers)
    if _has_steps(_without_answers(rest)) and (_speaks_of_steps(rest) or _has_labelled_steps(rest)):
        return True
    return not are_labelled and (_has_steps(_without_answers(rest)) or (len(answers) > 1 and bool(_own_labels(rest))))


def _without_answers(row: Row) -> Row:
    """A row without its empty lists, and without its lists of answers with steps each."""
    return {
        name: value
        for name, value in row.items()
        if name not in STEP_FIELDS
        or not isinstance(steps := step_list(row, name), list)
        or not all(isinstance(step, Mapping) and _has_steps(step) for step in steps)
    }


def _without_steps(row: Row) -> Row:
    own = _without_answers(row)
    return {name: value for name, value in row.items() if not (name in own and _has_steps({name: value}))}


def _annotated(row: Row, rest: Row, annotations: Sequence[Row]) -> list[Row]:
    """A row for each annotator, behind one for the label of the row that theirs would replace."""
    is_unlabelled = _has_steps(rest) and not (_speaks_of_steps(rest) or _has_labelled_steps(rest))
    if not is_unlabelled and not any(_can_label(each) for each in annotations):
        return [row]  # such as `{"label": "algebra"}`
    replaced = {name for name in _own_labels(rest) if any(name in each for each in annotations)}
    lists = [name for each in annotations for name in (*label_lists(each), *other_label_lists(each))]
    is_stripped = bool(lists) and _has_labelled_steps(rest)
    unlabelled = {name: value for name, value in rest.items() if name not in replaced}
    if is_stripped:
        unlabelled = {name: _without_labels(rest, name) for name in unlabelled}
    rows: list[Row] = [{**unlabelled, **each} for each in annotations]
    named = [each if annotator_of(each) else {**each, "annotator": str(number)} for number, each in enumerate(rows, 1)]
    return [rest, *named] if replaced or is_stripped else named


def _without_labels(row: Row, field: str) -> Any:
    """A field's value; steps without the labels in them."""
    steps = step_list(row, field) if field in STEP_FIELDS else None
    if not isinstance(steps, list):
        return row[field]
    return [
        {name: value for name, value in step.items() if name not in OF_STEP} if isinstance(step, Mapping) else step
        for step in steps
    ]


def _own_labels(row: Row) -> set[str]:
    """The fields of a row that label its steps."""
    names = (name for name in row if not is_absent(row[name]))
    return {name for name in names if _can_label({name: row[name]})}


def _can_label(row: Row) -> bool:
    """Whether a list can rate steps, or a number name one; `{"label": "algebra"}` does neither."""
    lists = (row[name] for name in (*label_lists(row), *other_label_lists(row)))
    return names_a_step(row) or any(_is_rating(listed) for listed in lists)


def _is_rating(listed: Any) -> bool:
    try:
        return any(rating_of(entry, "row", "label") is not None for entry in unpacked(listed))
    except ValueError:
        return False


def _has_labelled_steps(row: Row) -> bool:
    steps = (step for name in STEP_FIELDS if isinstance(inside := step_list(row, name), list) for step in inside)
    return any(isinstance(step, Mapping) and any(name in step for name in OF_STEP) for step in steps)


def _has_steps(inner: Row) -> bool:
    return any(isinstance(step_list(inner, name), list) for name in STEP_FIELDS)


def _speaks_of_steps(inner: Row) -> bool:
    return bool(label_lists(inner) or other_label_lists(inner)) or any(name in inner for name in _ERRORS)


def annotator_of(row: Row) -> str | None:
    """Who labelled, where the row says it by a name or a number.

    Args:
        row: of a file.
    """
    for name in _ANNOTATORS:
        value = row.get(name)
        if isinstance(value, str) and not is_absent(value):
            return value.strip()
        number = whole(value)
        if number is not None:
            return str(number)
    return None


def origin_of(row: Row, origin: LabelSource) -> LabelSource:
    """What a row does not say, with its annotator's name behind the name of the set.

    Args:
        row: of a file.
        origin: of the file.
    """
    name = annotator_of(row)
    return origin if name is None else replace(origin, labelled_by=f"{origin.labelled_by}:{name}")


def is_step_row(row: Row) -> bool:
    """Whether a row is one step of an answer, as in REVEAL: its number, its text and a label of it.

    Args:
        row: of a file.
    """
    number, text = (_first_of(row, names) for names in (_STEP_NUMBERS, _STEP_TEXTS))
    has_step = number is not None and whole(row[number]) is not None and text is not None
    is_labelled = any(name in row for name in (*OF_STEP, _LOGIC, _ATTRIBUTION))
    return has_step and is_labelled and not _has_steps(row)


def joined(placed: Iterable[tuple[str, Row]]) -> Iterator[tuple[str, Row]]:
    """Joins the rows of each answer, which stand together: one row, at the place of the first, with all of them in it.

    Args:
        placed: rows that are steps.

    Yields:
        Place and row of each answer.

    Raises:
        ValueError: an answer's rows do not stand together, so that a part of it would be taken for all of it.
    """
    with Distinct() as seen:
        for key, group in itertools.groupby(placed, key=lambda each: _answer_key(each[1])):
            members = list(group)
            place, first = members[0]
            if not seen.add(repr(key)):
                raise ValueError(
                    f"{place}: rows of the same answer stand at another place of the file too; the steps of an answer stand together; sort "
                    "the file by answer, and by annotator where there are several"
                )
            yield place, {**first, STEP_ROWS: [row for _, row in members]}


def _answer_key(row: Row) -> tuple[Any, ...]:
    ids = tuple(str(row[name]) for name in _ANSWER_IDS if row.get(name) is not None)
    return (*ids, str(row.get(field_of(row, QUESTIONS))), model_of(row), str(row.get("full_answer")), annotator_of(row))


def joined_steps(row: Row, place: str, origin: LabelSource) -> RatedSteps:
    """The steps of a joined row in the order of their numbers, with their ratings.

    Args:
        row: of `joined`.
        place: of the row, for messages.
        origin: what the row does not say.

    Raises:
        Contradiction: two rows rate the same step differently.
        ValueError: with place, field, value, rule and remedy.
    """
    number_field, text_field = _first_of(row, _STEP_NUMBERS), _first_of(row, _STEP_TEXTS)
    if number_field is None or text_field is None:
        names = f"{' or '.join(_STEP_NUMBERS)}, and {' or '.join(_STEP_TEXTS)}"
        raise ValueError(f"{place}: a row of a step has {names}; the row has {sorted(row)}; name another --format")
    by_number: dict[int, list[Row]] = {}
    for of_step in row[STEP_ROWS]:
        number = whole(of_step.get(number_field))
        if number is None:
            raise refusal(place, number_field, of_step.get(number_field), "it is the number of a step", "correct it")
        by_number.setdefault(number, []).append(of_step)
    numbers = sorted(by_number)
    is_whole = numbers[0] in (0, 1) and numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    if not is_whole:
        rule = "the steps of an answer are numbered from 0 or from 1, without a gap"
        raise refusal(place, number_field, numbers, rule, "add the rows that are missing")
    steps = [_text_of_step(by_number[number], text_field, place) for number in numbers]
    filled = (name for name in OF_STEP if not all(is_absent(of_step.get(name)) for of_step in row[STEP_ROWS]))
    field = next(filled, OF_STEP[0])
    ratings = [_rating_of_step(by_number[number], field, place) for number in numbers]
    question = value_of(row, field_of(row, QUESTIONS), place)
    return RatedSteps(question, steps, ratings, [], origin.labelled_by, field=text_field)


def _text_of_step(rows: Sequence[Row], field: str, place: str) -> str:
    text, *others = [row.get(field) for row in rows]
    if not isinstance(text, str) or any(other != text for other in others):
        rule = "a step is text, the same in all rows of its number"
        raise refusal(place, field, text if not others else [text, *others], rule, "correct it, or give answer_id")
    return text


def _rating_of_step(rows: Sequence[Row], field: str, place: str) -> Rating | None:
    """What a step is rated, by one row or more. REVEAL's labels count before the field."""
    if not any(name in row for row in rows for name in (_LOGIC, _ATTRIBUTION)):
        rating, *others = [rating_of(row.get(field), place, field) for row in rows]
        if any(other != rating for other in others):
            rule = "another row rates the same step differently"
            raise contradiction(place, field, rows[0].get(field), rule, "name the annotators in a field annotator")
        return rating
    logic = {rating_of(row.get(_LOGIC), place, _LOGIC) for row in rows} - {None}
    final = [row for row in rows if str(row.get(_IS_FINAL)).strip().lower() in ("true", "1", "1.0")] or rows
    sources = {_attribution(row.get(_ATTRIBUTION), place) for row in final} - {None}
    if logic & {-1, 0, "wrong"} or sources == {"contradictory"}:
        return "wrong"
    # What no source confirms may be right or wrong.
    return "right" if (logic or sources) and sources <= {"fully"} else None


def _attribution(value: Any, place: str) -> str | None:
    if is_absent(value):
        return None
    word = str(value).strip().lower().partition(" ")[0].rstrip(".")
    if word not in _ATTRIBUTIONS:
        rule = f"it is one of {', '.join(_ATTRIBUTIONS)}"
        raise refusal(place, _ATTRIBUTION, value, rule, "correct it, or take the field out")
    return word


def _first_of(row: Row, names: Sequence[str]) -> str | None:
    return next((name for name in names if row.get(name) is not None), None)


def with_media(answer: Answer, row: Row, place: str) -> Answer:
    """The answer with the pictures, sounds and videos beside its question as parts of the prompt.

    Args:
        answer: of the row; its id is that of its prompt and text.
        row: of the file.
        place: of the row, for messages.

    Raises:
        ValueError: one is neither a path nor an address.
    """
    media = [
        {"type": name.rstrip("s"), name.rstrip("s"): address}
        for name in _MEDIA
        for address in _addresses(row.get(name), place, name)
    ]
    if not media:
        return answer
    *before, asked = answer.messages
    text = asked["content"]
    parts = [*media, {"type": "text", "text": text}]
    messages = (*before, Message(role=asked["role"], content=text, parts=parts))
    return replace(answer, id=answer_id(answer.source, messages, answer.response, answer.model), messages=messages)


def _addresses(value: Any, place: str, field: str) -> list[str]:
    value = unpacked(value)
    addresses = []
    for entry in value if isinstance(value, list) else [value]:
        if is_absent(entry) or entry == {} or isinstance(entry, bool):  # a flag says that there is one, and not where
            continue
        # As `datasets` writes a picture into a table: its bytes, and its path where there is one.
        address = entry.get("path") or entry.get("url") if isinstance(entry, Mapping) else entry
        if not isinstance(address, str):
            rule = "a picture, sound or video is a path or an address"
            remedy = "write it into a file and its path into the field, or take the field out"
            raise refusal(place, field, entry, rule, remedy)
        addresses.append(address)
    return addresses

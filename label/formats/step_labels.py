"""Sets with a label a step: objects of text and label, lists of labels beside the steps, `+` and `-` behind the steps (Math-Shepherd).

Owns which values are right, neutral and wrong. What was not rated is not checked. Knows no store.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from draftsmith.label.formats.fields import (
    QUESTIONS,
    STEP_BREAK,
    Row,
    check_one_a_step,
    contradiction,
    field_of,
    is_absent,
    licence_of,
    list_of,
    model_of,
    span_of_step,
    text_of,
    texts_of,
    unpacked,
    value_of,
    whole,
)
from draftsmith.label.schema import Answer, How, refusal
from draftsmith.label.store.label_source import LabelSource, SkippedRow

MARK = "ки"
"""Behind each step of Math-Shepherd's `input`; its `label` has + or - in that place."""

STEP_FIELDS = (
    "steps",
    "completions",
    "model_output_steps",
    "model_response_by_step",
    "solution_steps",
    "reasoning_steps",
    "process",
    "solution",
    "response",
)
LABEL_FIELDS = ("labels", "step_labels", "human_labels", "ratings", "step_ratings", "label", "rating")
# Lists that count where no field above has any: in other sets they may be a model's opinion.
_OTHER_LABEL_FIELDS = (
    "process_correctness",
    "step_correctness",
    "steps_correctness",
    "correctness_labels",
    "correctness",
    "is_correct",
    "step_is_correct",
    "gold_labels",
    "verdicts",
)
# Published with -1 for a wrong step, so that its 0 is never wrong.
_NEUTRAL_ZERO = "process_correctness"
OF_STEP = (
    "label",
    "rating",
    "is_correct",
    "correct",
    "correctness",
    "score",
    "human_label",
    "step_label",
    "human_rating",
    "verdict",
)
"""The names of a label in a step."""
# Behind each step of MATH-APS's `process`, which is one text, with a list of labels beside it.
_STEP_MARKS = (MARK, "\n\n\n\n\n")
Rating = Literal[1, 0, -1, "right", "neutral", "wrong"]
"""What a step is rated. The numbers stand apart from the words: what 0 means, only other numbers say."""
NUMBERS: dict[int, Rating] = {1: 1, 0: 0, -1: -1}
_WORDS: dict[str, Rating] = {
    "+": 1,
    "-": -1,
    **dict.fromkeys(("correct", "right", "good", "true", "yes", "positive", "valid", "accurate"), "right"),
    **dict.fromkeys(("neutral", "ok", "okay"), "neutral"),
    **dict.fromkeys(
        ("incorrect", "wrong", "bad", "false", "no", "negative", "invalid", "inaccurate", "error", "mistake"), "wrong"
    ),
}
_RULE = "a step is rated 1, 0, -1, true, false, + or -, or null where nobody has rated it"
# Where the first step begins behind the question, which may speak of steps itself.
_FIRST_STEP = re.compile(r"(?:^|\s)(?=Step 1\s*:)")


@dataclass(frozen=True)
class RatedSteps:
    """Steps and what each is rated.

    Attributes:
        question: that they answer.
        steps: the rated ones, from the first.
        ratings: one for each of `steps`; None where nobody has rated it.
        unrated: further steps, in text.
        labelled_by: who rated.
        how: who or what found it.
        field: that holds the ratings.
    """

    question: Any
    steps: Sequence[str]
    ratings: Sequence[Rating | None]
    unrated: Sequence[str]
    labelled_by: str
    how: How = "person"
    field: str = "steps"

    def answer(self, row: Row, origin: LabelSource, place: str, zero_is_neutral: bool = True) -> Answer:
        """The answer: the first step rated wrong is the error, and what nobody rated is not checked.

        Args:
            row: of the file.
            origin: what the row does not say.
            place: of the row, for messages.
            zero_is_neutral: a step rated 0 is neither right nor wrong; else it is wrong.

        Raises:
            SkippedRow: nobody has rated the first step with text.
            ValueError: with place, field, value, rule and remedy.
        """
        bad = (-1, "wrong") if zero_is_neutral else (-1, 0, "wrong")
        num_checked, error = len(self.steps), None
        for index, rating in enumerate(self.ratings):
            if rating in bad:
                error = span_of_step(self.steps, index, place, self.field)
            if rating in bad or rating is None:
                num_checked = index
                break
        response = STEP_BREAK.join([*self.steps, *self.unrated])
        if error is None and not any(step.strip() for step in self.steps[:num_checked]):
            raise SkippedRow("no step is rated")
        end = len(STEP_BREAK.join(self.steps[:num_checked]))
        checked = (0, end) if error is None and end < len(response) else None
        label = origin.label(self.how, error, checked, labelled_by=self.labelled_by)
        return origin.answer(self.question, response, label, place, model_of(row), licence_of(row))


def rating_of(value: Any, place: str, field: str) -> Rating | None:
    """What a step is rated, however it is written; None where nobody has rated it. Each word is one of three.

    Args:
        value: of the field.
        place: of the row, for messages.
        field: its name.

    Raises:
        ValueError: it is something else.
    """
    if is_absent(value):
        return None
    if isinstance(value, bool):
        return "right" if value else "wrong"
    rating = _WORDS.get(value.strip().rstrip(".").lower()) if isinstance(value, str) else None
    number = whole(value)
    if rating is None and number is not None:
        rating = NUMBERS.get(number)
    if rating is None:
        is_share = isinstance(value, float) and 0 < value < 1
        remedy = "decide from which share on a step is right, and write 1 or 0" if is_share else "correct it"
        raise refusal(place, field, value, _RULE, remedy)
    return rating


def label_lists(row: Row) -> list[str]:
    """The names of the fields with a list that may label the steps of a row.

    Args:
        row: of a file.
    """
    return [name for name in LABEL_FIELDS if isinstance(unpacked(row.get(name)), list)]


def other_label_lists(row: Row) -> list[str]:
    """The names of further fields with such a list. They count where nothing else labels the steps.

    Args:
        row: of a file.
    """
    return [name for name in _OTHER_LABEL_FIELDS if isinstance(unpacked(row.get(name)), list)]


def step_list(row: Row, field: str) -> Any:
    """The steps of a field: its list, or the parts of a `process` that is one text with a mark behind each step. Else its value.

    Args:
        row: of a file.
        field: the name.
    """
    value = unpacked(row.get(field))
    mark = next((mark for mark in _STEP_MARKS if mark in value), None) if isinstance(value, str) else None
    if field != "process" or mark is None:
        return value
    parts = [part.strip() for part in value.split(mark)]
    return parts if parts[-1] else parts[:-1]


def rated_steps(
    row: Row,
    place: str,
    origin: LabelSource,
    zero_is_neutral_in: Collection[str] = (),
    with_minus: set[str] | None = None,
) -> RatedSteps:
    """The steps of a row that is no Math-Shepherd's, with their ratings as they are written.

    Where several lists may rate the steps, those that cannot do not count, and the others have to agree.

    Args:
        row: of the file.
        place: of the row, for messages.
        origin: what the row does not say.
        zero_is_neutral_in: lists that have a -1 in some row, by the way to one of their labels. Lists that agree with 0 as neutral there
            do not contradict each other.
        with_minus: takes the lists of this row that have a -1, likewise.

    Raises:
        Contradiction: two lists say different things of the steps.
        ValueError: with place, field, value, rule and remedy.
    """
    field = _steps_field(row)
    value_of(row, field, place)
    steps = texts_of(step_list(row, field), place, field)
    given = _given_labels(row, place, field)
    if not given:
        rule = f"each step is an object with {', '.join(OF_STEP)}, or the row has a list of labels"
        raise refusal(place, field, step_list(row, field), rule, "add them, or name another --format")
    readable, reasons = {}, []
    for name, labels in given.items():
        ratings, unread = _ratings(labels, name, place)
        if with_minus is not None and -1 in ratings:
            with_minus.add(name)
        try:
            check_one_a_step(labels, len(steps), "label", place, name.partition("[")[0])
            if unread is not None:
                raise unread
            readable[name] = ratings
        except ValueError as error:
            reasons.append(error)
    if not readable:
        raise reasons[0]
    (first, ratings), *others = readable.items()
    for name, other in others:
        if _first_bad(other) != _first_bad(ratings):
            rule = f"{name.partition('[')[0]} says something else of the steps"
            remedy = "take out the one that does not count"
            neutral, first_neutral = (each in zero_is_neutral_in for each in (name, first))
            differ = _first_bad(other, neutral) != _first_bad(ratings, first_neutral)
            raise (contradiction if differ else refusal)(place, first.partition("[")[0], given[first], rule, remedy)
    question = value_of(row, field_of(row, QUESTIONS), place)
    return RatedSteps(question, steps, ratings, [], origin.labelled_by, field=field)


def _steps_field(row: Row) -> str:
    return field_of(row, [name for name in STEP_FIELDS if isinstance(step_list(row, name), list)] or STEP_FIELDS)


def _given_labels(row: Row, place: str, field: str) -> dict[str, list[Any]]:
    """The lists that may label the steps of a field, by the way to one of their labels."""
    inner = _inner_labels(list_of(step_list(row, field), place, field), field)
    names = label_lists(row) or ([] if inner else other_label_lists(row))
    return {f"{name}[{{}}]": list_of(row[name], place, name) for name in names} | inner


def _inner_labels(objects: Sequence[Any], field: str) -> dict[str, list[Any]]:
    """The labels in the steps, by the way to one of them."""
    for name in OF_STEP:
        if any(isinstance(step, Mapping) and name in step for step in objects):
            return {
                f"{field}[{{}}].{name}": [step.get(name) if isinstance(step, Mapping) else None for step in objects]
            }
    return {}


def _ratings(labels: Sequence[Any], name: str, place: str) -> tuple[list[Rating | None], ValueError | None]:
    """The ratings of a list, and why the first that is none cannot be read. Each label is read once."""
    ratings: list[Rating | None] = []
    unread: ValueError | None = None
    for index, entry in enumerate(labels):
        try:
            rating = rating_of(entry, place, name.format(index))
        except ValueError as error:
            rating, unread = None, unread or error
        ratings.append("neutral" if rating == 0 and name.startswith(_NEUTRAL_ZERO) else rating)
    return ratings, unread


def _first_bad(ratings: Sequence[Rating | None], zero_is_neutral: bool = False) -> int | None:
    """The first wrong step of a list, in which 0 is neutral if the caller says so or it has a -1, too."""
    bad = (-1, "wrong") if zero_is_neutral or -1 in ratings else (-1, 0, "wrong")
    return next((index for index, rating in enumerate(ratings) if rating in bad), None)


def shepherd_steps(row: Row, place: str, origin: LabelSource) -> RatedSteps:
    """Math-Shepherd's steps: `input` with a mark behind each, `label` with + or - in its place, found by sampling.

    Args:
        row: of the file.
        place: of the row, for messages.
        origin: what the row does not say.

    Raises:
        ValueError: with place, field, value, rule and remedy.
    """
    marked, signs = (text_of(value_of(row, field, place), place, field) for field in ("input", "label"))
    parts, at, ratings = marked.split(MARK), 0, list[Rating]()
    for number, part in enumerate(parts[:-1], start=1):
        at += len(part)
        if signs[at - len(part) : at] != part or signs[at : at + 1] not in ("+", "-"):
            rule = f"it has the text of input, with + or - in place of each {MARK}; step {number} differs"
            raise refusal(place, "label", signs, rule, "correct it")
        ratings.append(1 if signs[at] == "+" else -1)
        at += 1
    if not ratings:
        raise refusal(place, "input", marked, f"each step ends with {MARK}", "correct it, or name another --format")
    question, first = _question_and_first(parts[0], place, "input")
    steps = [step.strip() for step in [first, *parts[1:-1]]]
    rest = [parts[-1].strip()] if parts[-1].strip() else []
    return RatedSteps(question, steps, ratings, rest, origin.labelled_by, "rule", "input")


def turned_steps(row: Row, place: str, origin: LabelSource) -> RatedSteps:
    """Steps as turns of a conversation: the user shows a step, and the assistant says + or - (the question stands before the first).

    Args:
        row: of the file.
        place: of the row, for messages.
        origin: what the row does not say.

    Raises:
        ValueError: with place, field, value, rule and remedy.
    """
    turns = list_of(value_of(row, "conversations", place), place, "conversations")
    texts = [turn.get("content") if isinstance(turn, Mapping) else None for turn in turns]
    said = [text for text in texts if isinstance(text, str)]
    if len(said) < 2 or len(said) % 2 or len(said) < len(texts):
        rule = "a step of the user and + or - of the assistant take turns"
        raise refusal(place, "conversations", turns, rule, "correct it, or name another --format")
    ratings = [rating_of(text, place, f"conversations[{2 * index + 1}]") for index, text in enumerate(said[1::2])]
    question, first = _question_and_first(said[0], place, "conversations[0]")
    return RatedSteps(question, [first, *said[2::2]], ratings, [], origin.labelled_by, "rule", "conversations")


def _question_and_first(text: str, place: str, field: str) -> tuple[str, str]:
    """The question and the first step, which stands behind it: "How many? Step 1: 3"."""
    starts = [match.end() for match in _FIRST_STEP.finditer(text)]
    if not starts or not text[: starts[-1]].strip():
        rule = "the question stands before 'Step 1:'"
        raise refusal(place, field, text, rule, "correct it, or name another --format")
    return text[: starts[-1]].strip(), text[starts[-1] :].strip()

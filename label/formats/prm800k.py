"""PRM800K: steps rated 1, 0 (neither helps nor harms) or -1 (wrong), as published or with one rating a step.

Owns what was chosen where several completions stand at one step. Knows no store.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from draftsmith.label.formats.fields import (
    QUESTIONS,
    Row,
    check_one_a_step,
    field_of,
    is_absent,
    list_of,
    text_of,
    texts_of,
    unpacked,
    value_of,
    whole,
)
from draftsmith.label.formats.step_labels import NUMBERS, RatedSteps, Rating
from draftsmith.label.schema import Answer, refusal
from draftsmith.label.store.label_source import LabelSource, SkippedRow


def is_published(row: Row) -> bool:
    """Whether a row has PRM800K's own layout.

    Args:
        row: of a file.
    """
    return all(isinstance(unpacked(row.get(field)), Mapping) for field in ("question", "label"))


def read_prm800k(row: Row, place: str, origin: LabelSource) -> Iterator[Answer]:
    """The first step rated -1 is the error, 0 is none. What was not rated is not checked (`tail`, too).

    Args:
        row: of the file.
        place: of the row, for messages.
        origin: what the row does not say.

    Raises:
        SkippedRow: the problem is broken, or no step is rated.
        ValueError: with place, field, value, rule and remedy.
    """
    is_flat = not is_published(row) and bool({"steps", "ratings"} & {*row} or "label" not in row)
    yield (_flat(row, place, origin) if is_flat else _published(row, place)).answer(row, origin, place)


def _flat(row: Row, place: str, origin: LabelSource) -> RatedSteps:
    steps = texts_of(value_of(row, "steps", place), place, "steps")
    ratings = list_of(value_of(row, "ratings", place), place, "ratings")
    check_one_a_step(ratings, len(steps), "rating", place, "ratings")
    rated = [_rating(rating, place, f"ratings[{index}]") for index, rating in enumerate(ratings)]
    tail = text_of(row.get("tail") or "", place, "tail")
    question = value_of(row, field_of(row, QUESTIONS), place)
    return RatedSteps(question, steps, rated, [tail] if tail else [], origin.labelled_by)


def _rating(value: Any, place: str, field: str) -> Rating | None:
    if is_absent(value):
        return None
    number = whole(value)
    if number not in NUMBERS:
        raise refusal(place, field, value, "a rating is 1, 0, -1 or null", "correct it")
    return NUMBERS[number]


def _published(row: Row, place: str) -> RatedSteps:
    """At each step several candidates, of which one was chosen, or none and the work ended."""
    question, label = (unpacked(value_of(row, field, place)) for field in ("question", "label"))
    for field, value in (("question", question), ("label", label)):
        if not isinstance(value, Mapping):
            raise refusal(place, field, value, "it is an object", "give PRM800K's published rows, or steps and ratings")
    if label.get("finish_reason") == "bad_problem":
        raise SkippedRow("the labeller found the problem itself broken")
    steps: list[str] = []
    ratings: list[Rating | None] = []
    for index, step in enumerate(list_of(value_of(label, "steps", place), place, "label.steps")):
        field = f"label.steps[{index}]"
        chosen = _chosen(step, field, place)
        if chosen is None:
            break
        steps.append(chosen[0])
        ratings.append(_rating(chosen[1], place, f"{field}.rating"))
        if ratings[-1] == -1:
            break
    planned = list_of(question.get("pre_generated_steps") or [], place, "question.pre_generated_steps")
    tail = planned[len(steps) :] if planned[: len(steps)] == steps else []
    labeller = row.get("labeler")
    labelled_by = labeller if isinstance(labeller, str) and labeller else "prm800k"
    unrated = texts_of(tail, place, "pre_generated_steps") if tail else []
    return RatedSteps(value_of(question, "problem", place), steps, ratings, unrated, labelled_by, field="label.steps")


def _chosen(step: Any, field: str, place: str) -> tuple[str, Any] | None:
    """The text and rating of the candidate that was chosen, of the labeller's own, or of the first wrong one; None where there is none."""
    if not isinstance(step, Mapping) or not isinstance(step.get("completions"), list | None):
        raise refusal(place, field, step, "a step is an object with completions", "correct it")
    candidates, index, human = step.get("completions") or [], step.get("chosen_completion"), _human(step)
    if not is_absent(index):
        number = whole(index)
        if number is None or not 0 <= number < len(candidates):
            rule = f"it is null or the index of one of {len(candidates)} completions"
            raise refusal(place, f"{field}.chosen_completion", index, rule, "correct it")
        candidate = candidates[number]
    elif human is not None:
        # Written by the labeller in place of candidates that were all wrong.
        candidate = {"text": human, "rating": 1}
    else:
        wrong = (item for item in candidates if isinstance(item, Mapping) and whole(item.get("rating")) == -1)
        candidate = next(wrong, None)
        if candidate is None:
            return None
    if not isinstance(candidate, Mapping):
        raise refusal(place, field, candidate, "a completion is an object of text and rating", "correct it")
    text = candidate.get("text")
    if not isinstance(text, str) or not text.strip():
        raise refusal(place, f"{field}.text", text, "a step is text, and not empty", "correct it")
    return text, candidate.get("rating")


def _human(step: Mapping[str, Any]) -> Any:
    """What the labeller wrote; None where a table holds an object of nulls in its place."""
    human = step.get("human_completion")
    text = human.get("text") if isinstance(human, Mapping) else human
    return None if is_absent(text) else text

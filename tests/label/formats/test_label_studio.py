import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from labelled_files import read_labelled

from draftsmith.label.formats.label_studio import write_tasks
from draftsmith.label.schema import Answer, Label
from draftsmith.label.store.label_source import LabelSource

RESPONSE = "😀 1+1=3"
SPAN = {"start": 6, "end": 7, "text": "3", "labels": ["error"]}


def region(value: dict[str, Any]) -> dict[str, Any]:
    return {"id": "x", "from_name": "error", "to_name": "response", "type": "labels", "value": value}


def choice(*words: str) -> dict[str, Any]:
    return {"id": "y", "from_name": "verdict", "to_name": "response", "type": "choices", "value": {"choices": [*words]}}


def task(*annotations: dict[str, Any], **data: Any) -> dict[str, Any]:
    return {"id": 1, "data": {"prompt": "1+1?", "response": RESPONSE} | data, "annotations": list(annotations)}


def read(tmp_path: Path, *tasks: dict[str, Any]) -> list[Answer]:
    (tmp_path / "tasks.json").write_text(json.dumps(tasks))
    return read_labelled(tmp_path / "tasks.json", "auto", LabelSource("tasks", "them", "MIT")).answers


def labels(tmp_path: Path, *results: dict[str, Any], **fields: Any) -> Label | None:
    [answer] = read(tmp_path, task({"result": list(results), "completed_by": 7} | fields))
    return answer.label


def test_what_is_written_is_read_back(tmp_path: Path, make: Callable[..., Answer], wrong: Label) -> None:
    answers = [
        make("a", label=wrong),
        make("a", label=Label("correct", "bob", "person", note="fine")),
        make("b", RESPONSE, Label("wrong", "m", "mined", (6, 7), (6, 7))),
        make("c", label=Label("unplaced", "r", "rule")),
        make("d"),
    ]
    write_tasks(tmp_path / "out.json", answers)
    assert len(json.loads((tmp_path / "out.json").read_text())) == 4
    assert read_labelled(tmp_path / "out.json", "auto", LabelSource("x", "y")).answers == answers


@pytest.mark.parametrize(
    ("reference", "kept"), [("It is 2.", "It is 2."), (2, None), (["2"], None), (" ", None), (None, None)]
)
def test_only_a_reference_that_is_text_is_taken(tmp_path: Path, reference: Any, kept: str | None) -> None:
    [answer] = read(tmp_path, task(reference=reference))
    assert answer.reference == kept


def test_a_span_is_the_error_and_the_user_its_author(tmp_path: Path) -> None:
    assert labels(tmp_path, region(SPAN)) == Label("wrong", "label-studio:7", "person", (6, 7))
    by_mail = labels(tmp_path, region(SPAN), completed_by={"id": 3, "email": "a@b.c"})
    assert by_mail is not None
    assert by_mail.labelled_by == "label-studio:a@b.c"


def test_of_several_spans_the_first_counts(tmp_path: Path) -> None:
    found = labels(tmp_path, region(SPAN), region({"start": 2, "end": 3, "text": "1", "labels": ["error"]}))
    assert found is not None
    assert found.error == (2, 3)


def test_offsets_in_utf16_units_are_told_by_the_quoted_text(tmp_path: Path) -> None:
    found = labels(tmp_path, region(SPAN | {"start": 7, "end": 8}))
    assert found is not None
    assert found.error == (6, 7)


def test_a_verdict_needs_no_span(tmp_path: Path) -> None:
    assert labels(tmp_path, choice("correct")) == Label("correct", "label-studio:7", "person")
    assert labels(tmp_path, choice("unplaced")) == Label("unplaced", "label-studio:7", "person")


def test_two_annotators_give_two_labels_and_a_skip_none(tmp_path: Path) -> None:
    both = task(
        {"result": [region(SPAN)], "completed_by": 1},
        {"result": [choice("correct")], "completed_by": 2},
        {"result": [], "was_cancelled": True, "completed_by": 3},
    )
    first, second = read(tmp_path, both)
    assert first.id == second.id
    assert [one.label.verdict for one in (first, second) if one.label] == ["wrong", "correct"]
    [unlabelled] = read(tmp_path, task({"result": [], "was_cancelled": True}))
    assert unlabelled.label is None


@pytest.mark.parametrize(
    ("results", "told"),
    [
        ([], "result is []; an annotation has a span labelled error, or a verdict"),
        ([region(SPAN | {"end": 99})], "the span lies within the 7 characters of the response and quotes them"),
        ([region(SPAN | {"text": "4"})], 'result[0].value.text is "4"'),
        ([region(SPAN | {"start": 7, "end": 6})], "result[0].value is [7, 6]; 0 <= start < end"),
        (
            [region(SPAN | {"labels": ["person"]})],
            "result[0].value.labels is [\"person\"]; the one span label is 'error'",
        ),
        ([choice("good")], 'verdict is "good"; it is one of correct, wrong, unplaced'),
        ([choice("correct", "wrong")], "one verdict is chosen"),
        ([choice("correct"), region(SPAN)], "the verdict 'correct' has no error span"),
        ([choice("wrong")], 'the verdict "wrong" needs the place'),
        ([{"type": "rating", "value": {"rating": 3}}], 'result[0].type is "rating"'),
        ([3], "result is [3]; it is a list of objects"),
    ],
)
def test_a_bad_annotation_is_refused_with_its_place(tmp_path: Path, results: list[Any], told: str) -> None:
    with pytest.raises(ValueError, match=r"tasks\.json\[0\]") as refusal:
        labels(tmp_path, *results)
    assert told in str(refusal.value)


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ({"response": ""}, 'data.response is ""'),
        ({"prompt": None}, "data.prompt is null"),
        ({"prompt": ""}, "messages[0]"),
    ],
)
def test_a_task_without_question_or_answer_is_refused(tmp_path: Path, data: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=r"tasks\.json\[0\]") as refusal:
        read(tmp_path, task(**data))
    assert told in str(refusal.value)

"""Label Studio's JSON, both ways: a task an answer, a span labelled `error`, a choice for the verdict.

Owns that layout and its offsets. Knows nothing of other formats or the store. See docs/how-to/judge/label.md for the labelling
configuration that fits.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from draftsmith.files import atomic_file
from draftsmith.json_text import json_text
from draftsmith.label.answer_rows import replaced_names
from draftsmith.label.schema import Answer, How, Label, Span, Verdict, is_keepable, refusal
from draftsmith.label.store.label_source import LabelSource

SPAN_LABEL = "error"


def read_task(task: Mapping[str, Any], place: str, origin: LabelSource) -> Iterator[Answer]:
    """The answers of one task: one for each finished annotation, or one without a label where there is none.

    `data.response` (or `data.text`) is the answer, `data.messages` or `data.prompt` what it answers.

    Args:
        task: Label Studio's JSON object.
        place: of the task, for messages.
        origin: what the task does not say.

    Raises:
        ValueError: with place, field, value, rule and remedy.
    """
    data = task.get("data")
    if not isinstance(data, Mapping):
        raise refusal(place, "data", data, "it is an object with prompt and response", "export the tasks as JSON")
    response = data.get("response", data.get("text"))
    if not isinstance(response, str) or not response.strip():
        raise refusal(place, "data.response", response, "it is text, and not empty", "name the answer's field response")
    labels: list[Label | None] = []
    for index, annotation in enumerate(_objects(task.get("annotations"), place, "annotations")):
        if not annotation.get("was_cancelled"):
            labels.append(_label(annotation, response, f"{place}: annotations[{index}]", origin))
    for label in labels or [None]:
        answer = origin.answer(_prompt(data, place), response, label, place, data.get("model"), data.get("licence"))
        reference = data.get("reference")
        if isinstance(reference, str) and is_keepable(reference):
            answer = replace(answer, reference=reference)
        if isinstance(data.get("source"), str) and isinstance(data.get("id"), str):
            answer = replace(answer, id=data["id"], source=data["source"])
        yield answer


def write_tasks(path: Path, answers: Iterable[Answer]) -> None:
    """Writes answers as tasks that Label Studio imports, all or nothing; `read_task` gives the same answers back.

    The labels of one answer become the annotations of one task. Tokens are left out: spans are of characters. One task is held at a time.

    Args:
        path: the file to write.
        answers: with labels or without; those of one id stand together.
    """
    with atomic_file(path) as file:
        file.write(b"[")
        for number, (_, labelled) in enumerate(itertools.groupby(answers, key=lambda answer: answer.id)):
            task = json_text(_task(list(labelled)), indent=1).replace("\n", "\n ")
            file.write(f"{',' if number else ''}\n {task}".encode())
        file.write(b"\n]\n")


def _task(labelled: Sequence[Answer]) -> dict[str, Any]:
    """The task of one answer and its labels."""
    results = [_result(answer.label, answer.response) for answer in labelled if answer.label is not None]
    return {"data": _data(labelled[0]), "annotations": [{"result": result} for result in results]}


def _data(answer: Answer) -> dict[str, Any]:
    return {
        "id": answer.id,
        "prompt": "\n\n".join(message["content"] for message in answer.messages),
        "messages": [dict(message) for message in answer.messages],
        "response": answer.response,
        "model": answer.model,
        "licence": answer.licence,
        "source": answer.source,
        **({} if answer.reference is None else {"reference": answer.reference}),
    }


def _result(label: Label, response: str) -> list[dict[str, Any]]:
    checked = None if label.checked is None else list(label.checked)
    meta: dict[str, Any] = {"labelled_by": label.labelled_by, "how": label.how, "checked": checked, "note": label.note}
    if label.replaces:
        meta["replaces"] = list(label.replaces)
    choice = {"from_name": "verdict", "to_name": "response", "type": "choices", "value": {"choices": [label.verdict]}}
    result: list[dict[str, Any]] = [{"id": "verdict", **choice, "meta": meta}]
    if label.error is not None:
        start, end = label.error
        value = {"start": start, "end": end, "text": response[start:end], "labels": [SPAN_LABEL]}
        span = {"from_name": SPAN_LABEL, "to_name": "response", "type": "labels", "value": value}
        result.append({"id": SPAN_LABEL, **span})
    return result


def _prompt(data: Mapping[str, Any], place: str) -> Any:
    messages = data.get("messages")
    if isinstance(messages, list) and all(
        isinstance(message, Mapping) and {*message} - {"parts"} == {"role", "content"} for message in messages
    ):
        return messages
    prompt = data.get("prompt")
    if not isinstance(prompt, str):
        raise refusal(place, "data.prompt", prompt, "it is text", "name the question's field prompt, or give messages")
    return prompt


def _label(annotation: Mapping[str, Any], response: str, place: str, origin: LabelSource) -> Label:
    choice: str | None = None
    meta: Mapping[str, Any] = {}
    spans: list[Span] = []
    for index, region in enumerate(_objects(annotation.get("result"), place, "result")):
        field, value = f"result[{index}]", region.get("value")
        if region.get("type") == "choices" and isinstance(value, Mapping):
            choice = _choice(value, place, field)
            meta = region["meta"] if isinstance(region.get("meta"), Mapping) else {}
        elif region.get("type") == "labels" and isinstance(value, Mapping):
            spans.append(_region_span(value, response, place, field))
        else:
            rule = "a result is the verdict (choices) or a span (labels)"
            raise refusal(place, f"{field}.type", region.get("type"), rule, "take other tags out of the configuration")
    if choice is None and not spans:
        rule = "an annotation has a span labelled error, or a verdict"
        raise refusal(place, "result", [], rule, "choose correct, wrong or unplaced; an empty one may be an oversight")
    verdict = choice or "wrong"
    if verdict not in get_args(Verdict):
        raise refusal(place, "verdict", verdict, f"it is one of {', '.join(get_args(Verdict))}", "rename the choice")
    checked = meta.get("checked")
    return Label(
        verdict=verdict,  # type: ignore[arg-type]  # checked above
        labelled_by=_annotator(annotation, meta, origin),
        how=_how(meta, place),
        error=min(spans, default=None),
        checked=None if checked is None else _pair(checked, place),
        note=meta.get("note") or "",
        replaces=replaced_names(meta.get("replaces"), place),
    )


def _annotator(annotation: Mapping[str, Any], meta: Mapping[str, Any], origin: LabelSource) -> str:
    """Who labelled: what this project wrote, else Label Studio's user, else what the user of the import says."""
    if isinstance(meta.get("labelled_by"), str):
        return str(meta["labelled_by"])
    user = annotation.get("completed_by")
    if isinstance(user, Mapping):
        user = user.get("email") or user.get("id")
    return origin.labelled_by if user is None else f"label-studio:{user}"


def _how(meta: Mapping[str, Any], place: str) -> How:
    how = meta.get("how", "person")
    if how not in get_args(How):
        raise refusal(place, "meta.how", how, f"it is one of {', '.join(get_args(How))}", "correct it")
    return how


def _objects(value: Any, place: str, field: str) -> list[Mapping[str, Any]]:
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(entry, Mapping) for entry in value):
        raise refusal(place, field, value, "it is a list of objects", "export the tasks as JSON, not JSON-MIN")
    return value


def _pair(value: Any, place: str) -> Span:
    if not isinstance(value, list) or len(value) != 2 or any(type(number) is not int for number in value):
        raise refusal(place, "meta.checked", value, "a span is two whole numbers, start and end", "write [start, end]")
    return (value[0], value[1])


def _choice(value: Mapping[str, Any], place: str, field: str) -> str:
    choices = value.get("choices")
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], str):
        raise refusal(place, f"{field}.value.choices", choices, "one verdict is chosen", 'set choice="single"')
    return choices[0].lower()


def _region_span(value: Mapping[str, Any], response: str, place: str, field: str) -> Span:
    """The span of a region in code points.

    Label Studio has counted UTF-16 units as well as code points (its issues 1008 and 1347); the quoted text shows which.
    """
    labels = value.get("labels")
    if labels != [SPAN_LABEL]:
        rule = f"the one span label is {SPAN_LABEL!r}"
        raise refusal(place, f"{field}.value.labels", labels, rule, "rename the label in the configuration")
    start, end, quote = value.get("start"), value.get("end"), value.get("text")
    if type(start) is not int or type(end) is not int or not 0 <= start < end:
        raise refusal(place, f"{field}.value", [start, end], "0 <= start < end, in characters", "mark the span anew")
    if end <= len(response) and (quote is None or response[start:end] == quote):
        return (start, end)
    units = response.encode("utf-16-le")
    if end * 2 <= len(units) and units[start * 2 : end * 2] == str(quote).encode("utf-16-le", "surrogatepass"):
        first = len(units[: start * 2].decode("utf-16-le", "surrogatepass"))
        return (first, first + len(str(quote)))
    rule = f"the span lies within the {len(response)} characters of the response and quotes them"
    remedy = f"mark it anew; [{start}, {end}] of the response is {response[start:end]!r}"
    raise refusal(place, f"{field}.value.text", quote, rule, remedy)

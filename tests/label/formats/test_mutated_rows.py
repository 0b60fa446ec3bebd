"""Other people's rows, broken in every field: never a traceback, and nothing that a store or the page would refuse later."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from labelled_files import read_labelled

from draftsmith.label.page.markable_spans import Cutter
from draftsmith.label.page.server import LabellingActions
from draftsmith.label.store.label_source import LabelSource
from draftsmith.label.store.store import Store

ROWS: dict[str, dict[str, Any]] = {
    "answers": {
        "id": "a",
        "messages": [{"role": "user", "content": "q"}],
        "response": "3 + 4 = 8",
        "model": "m",
        "licence": "MIT",
        "source": "s",
        "verdict": "wrong",
        "error": [8, 9],
        "labelled_by": "me",
        "how": "person",
        "note": "n",
        "tokens": {"tokenizer": "ab", "offsets": [[0, 3], [3, 9]]},
    },
    "label-studio": {
        "data": {"prompt": "q", "response": "ab cd", "model": "m"},
        "annotations": [
            {
                "completed_by": {"email": "a@b"},
                "result": [
                    {
                        "type": "labels",
                        "from_name": "error",
                        "to_name": "text",
                        "value": {"start": 0, "end": 2, "text": "ab", "labels": ["error"]},
                    }
                ],
            }
        ],
    },
    "prm800k": {
        "labeler": "x",
        "question": {"problem": "q", "pre_generated_steps": ["a", "b"]},
        "label": {
            "finish_reason": "found_error",
            "steps": [
                {
                    "completions": [{"text": "a", "rating": -1}],
                    "chosen_completion": 0,
                    "human_completion": {"text": "h"},
                }
            ],
        },
    },
    "mistake": {"input": "q", "steps": ["a", "b"], "mistake_index": 1},
    "processbench": {"generator": "m", "problem": "q", "steps": ["a", "b"], "label": 1, "final_answer_correct": False},
    "stepwise": {
        "question": "q",
        "model_output_steps": ["a", "b"],
        "model_output_solution_correctness": "wrong",
        "model_output_solution_first_error_step": 2,
    },
    "wrong-steps": {
        "question": "q",
        "original_process": ["a", "c"],
        "modified_process": ["a", "b"],
        "error_steps": [2],
    },
    "step-labels": {"question": "q", "steps": [{"text": "a", "label": 1}, {"text": "b", "label": -1}]},
    "math-shepherd": {
        "input": "q Step 1: a \u043a\u0438\nStep 2: b \u043a\u0438",
        "label": "q Step 1: a +\nStep 2: b -",
        "task": "t",
    },
    "solutions": {"question": "q", "m": {"solution": "3 + 4 = <<3+4=8>>8", "is_correct": False}},
    "autojudge": {"question": "q", "prefix": "It is", "draft_token": " 8", "important": True},
}
STRANGE: tuple[Any, ...] = (
    None, True, -1, 1e300, 10**4000, "", " ", "a\0b", "\ud800", "\ufeff", [], {}, [[]], [None], {"text": 1}, [{}], "x" * 300, [1, 2],
)  # fmt: skip


def places(value: Any, way: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to everything inside a row."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, one in inner for found in [(*way, key), *places(one, (*way, key))]]


def changed(row: dict[str, Any], way: tuple[Any, ...], strange: Any, delete: bool) -> dict[str, Any]:
    found = copy.deepcopy(row)
    holder: Any = found
    for key in way[:-1]:
        holder = holder[key]
    if delete:
        del holder[way[-1]]
    else:
        holder[way[-1]] = strange
    return found


@pytest.mark.parametrize("name", ROWS)
@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_broken_row_is_left_out_and_the_store_and_the_page_take_the_others(
    tmp_path: Path, name: str, data: st.DataObject
) -> None:
    row = ROWS[name]
    way = data.draw(st.sampled_from(places(row)))
    bad = changed(row, way, data.draw(st.sampled_from(STRANGE)), data.draw(st.booleans()))
    file = tmp_path / "in.jsonl"
    file.write_bytes("".join(json.dumps(one) + "\n" for one in (bad, row)).encode())
    imported = read_labelled(file, name, LabelSource("in", "them", "MIT", None))  # type: ignore[arg-type]
    assert imported.answers
    assert all(reason.startswith(f"{file}:1") for reason in imported.left_out)
    (tmp_path / "store.db").unlink(missing_ok=True)
    with Store(str(tmp_path / "store.db"), create=True) as store:
        store.add(imported.answers[:1], "me")
        actions = LabellingActions(store, Cutter(), shared=0.0)
        item = actions.next({"annotator": "p"})["item"]
        if item is not None:  # None: its label has placed the error already
            json.dumps(item, ensure_ascii=False).encode("utf-8")
            marked = next(segment for segment in item["segments"] if len(segment) == 3)
            fields = {"annotator": "p", "item": item["id"], "verdict": "wrong", "error": marked[1:], "seconds": 1}
            assert actions.label(fields)["entry"]

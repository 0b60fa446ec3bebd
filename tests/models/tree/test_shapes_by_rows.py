"""A shape for every number of rows, and the file in which tune keeps them beside a drafter."""

from __future__ import annotations

import json
import logging
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from draftsmith.models.tree.kept_shapes import SHAPES_FILE, KeptShapes, fitting_shapes, read_kept_shapes
from draftsmith.models.tree.limits import DraftLimits
from draftsmith.models.tree.shapes import full_tree, parse_shape
from draftsmith.models.tree.shapes_by_rows import ShapesByRows, as_shapes, limits_text

TREE, CHAIN = parse_shape("4x5n11"), DraftLimits(draft_length=4)
STATIC = DraftLimits(paths=full_tree((3, 2)))
SHAPES = ShapesByRows(((2, TREE), (8, CHAIN), (16, None)))
KEPT = KeptShapes(SHAPES, (1, 4, 16), "tiny", "ab12", "cpu", "a processor", "float32")


def test_a_shape_serves_up_to_its_rows_and_the_last_one_all_above() -> None:
    assert [SHAPES.at(rows) for rows in (1, 2, 3, 8, 9, 16, 17, 400)] == [TREE, TREE, CHAIN, CHAIN, *[None] * 4]
    assert as_shapes(CHAIN).at(1) == as_shapes(CHAIN).at(99) == CHAIN
    assert as_shapes(SHAPES) is SHAPES
    assert SHAPES.shapes == (TREE, CHAIN, None)


@pytest.mark.parametrize("texts", [["4x5n11", "1x8"], ["1x1", "8x1"], ["t3.2.1", "2x6"], ["10x2n4", "1x9", "t4"]])
def test_buffers_for_the_most_hold_every_shape(texts: list[str]) -> None:
    shapes = ShapesByRows(tuple((rows + 1, parse_shape(text)) for rows, text in enumerate(texts)))
    for shape in shapes.drafted:
        assert shapes.most.draft_length >= shape.draft_length
        assert shapes.most.max_nodes >= shape.max_nodes
        assert shapes.most.max_fed >= shape.max_fed
    assert as_shapes(STATIC).most == STATIC


def test_shapes_are_told_in_words() -> None:
    assert str(SHAPES) == "4x5n11 up to 2 rows, 1x4 up to 8 rows, no draft for more"
    assert limits_text(ShapesByRows(((1, TREE), (2, CHAIN)))) == "by rows: 4x5n11 up to 1 row, 1x4 for more"
    assert limits_text(CHAIN) == "1x4"


@pytest.mark.parametrize("steps", [(), ((0, CHAIN),), ((2, CHAIN), (2, None)), ((4, CHAIN), (1, TREE))])
def test_rows_must_rise(steps: tuple[tuple[int, DraftLimits | None], ...]) -> None:
    with pytest.raises(ValueError, match="numbers of rows are"):
        ShapesByRows(steps)


@pytest.mark.parametrize("text", ["s1.1", "k2.1", "1x4e0.5"])
def test_shapes_that_are_verified_or_steered_by_themselves_are_not_mixed(text: str) -> None:
    shape = parse_shape(text)
    assert as_shapes(shape).drafted == (shape,)
    for other in (CHAIN, None):
        with pytest.raises(ValueError, match=f"shape {text} is one of several"):
            ShapesByRows(((1, shape), (4, other)))


def test_the_file_reads_back_as_written(tmp_path: Path) -> None:
    kept = replace(KEPT, shapes=ShapesByRows(((1, STATIC), (4, parse_shape("2x3n4p0.1")), (9, None))))
    kept = replace(kept, drafter_fingerprint="ef34")
    assert read_kept_shapes(tmp_path) is None
    assert kept.write(tmp_path) == tmp_path / SHAPES_FILE
    assert read_kept_shapes(tmp_path) == kept
    assert [path.name for path in tmp_path.iterdir()] == [SHAPES_FILE]


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "version": ({"version": 2}, "version is 2, it must be 1"),
    "target": ({"target": 3}, "target is 3, it must be text"),
    "drafter": ({"drafter_fingerprint": 3}, "drafter_fingerprint is 3, it must be text"),
    "device": ({"device": ""}, "device is '', it must be a kind of device"),
    "rows": ({"measured_rows": [0]}, r"measured_rows is \[0\], it must be a list of whole numbers"),
    "no shapes": ({"shapes": []}, r"shapes is \[\], it must be a list of objects"),
    "no object": ({"shapes": ["1x4"]}, "it must be a list of objects"),
    "no field": ({"shapes": [{"shape": "1x4"}]}, r"shapes\[0\] lacks up_to_rows"),
    "flag": ({"shapes": [{"up_to_rows": True, "shape": "1x4"}]}, r"shapes\[0\]: up_to_rows is True"),
    "text": ({"shapes": [{"up_to_rows": 1, "shape": "wide"}]}, r"shapes\[0\]: shape is 'wide', which cannot be used"),
    "another file": ({"shapes": [{"up_to_rows": 1, "shape": "tree:a.json"}]}, r"shapes\[0\]: shape is 'tree:a.json'"),
    "sampled": ({"shapes": [{"up_to_rows": 1, "shape": "s1.1"}]}, "must be no sampled tree"),
    "huge": ({"shapes": [{"up_to_rows": 1, "shape": "9999x9n4"}]}, "at most 4096 nodes"),
    "falling": (
        {"shapes": [{"up_to_rows": 4, "shape": "1x4"}, {"up_to_rows": 1, "shape": None}]},
        r"numbers of rows are \[4, 1\]",
    ),
    "mixed": (
        {"shapes": [{"up_to_rows": 1, "shape": "1x4e0.5"}, {"up_to_rows": 4, "shape": None}]},
        "1x4e0.5 is one of several",
    ),
}


@pytest.mark.parametrize(("changes", "problem"), BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_an_error_with_field_rule_and_remedy(
    tmp_path: Path, changes: dict[str, Any], problem: str
) -> None:
    path = KEPT.write(tmp_path)
    path.write_text(json.dumps(json.loads(path.read_bytes()) | changes))
    with pytest.raises(ValueError, match=problem) as caught:
        read_kept_shapes(tmp_path)
    assert str(path) in str(caught.value)
    assert "run `draftsmith tune` again, or delete the file" in str(caught.value)


@pytest.mark.parametrize("content", ["[]", "{", "{}", ""])
def test_a_file_that_is_no_such_object_is_an_error(tmp_path: Path, content: str) -> None:
    (tmp_path / SHAPES_FILE).write_text(content)
    with pytest.raises(ValueError, match=rf"{SHAPES_FILE}.*draftsmith tune"):
        read_kept_shapes(tmp_path)


def test_fitting_shapes_are_used_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    KEPT.write(tmp_path)
    with caplog.at_level(logging.INFO, "draftsmith"), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fitting_shapes(tmp_path, "cpu", "ab12") == SHAPES
        assert fitting_shapes(tmp_path, "cpu", "") == SHAPES  # a target whose weights nobody has hashed
        nobody_asks = partial(pytest.fail, "a fingerprint is costly")
        assert fitting_shapes(tmp_path / "elsewhere", "cpu", "ab12", nobody_asks) is None
    assert caplog.messages == [f"drafts the shapes that tune kept in {tmp_path}: {SHAPES}"] * 2


def test_shapes_measured_with_another_pool_are_left_and_those_that_tell_none_are_used(tmp_path: Path) -> None:
    path = replace(KEPT, drafter_fingerprint="ef34").write(tmp_path)
    assert fitting_shapes(tmp_path, "cpu", "ab12", lambda: "ef34") == SHAPES
    with pytest.warns(
        UserWarning, match="is not used: it was measured with another config of this drafter, or another"
    ):
        assert fitting_shapes(tmp_path, "cpu", "ab12", lambda: "gh56") is None
    fields = json.loads(path.read_bytes())
    del fields["drafter_fingerprint"]
    path.write_text(json.dumps(fields))
    assert read_kept_shapes(tmp_path) == KEPT
    assert fitting_shapes(tmp_path, "cpu", "ab12", lambda: "gh56") == SHAPES


@pytest.mark.parametrize(
    ("device", "fingerprint", "reason"),
    [
        ("cuda", "ab12", r"measured on cpu \(a processor\), and the target runs on cuda"),
        ("cpu", "cd", "another target, 'tiny'"),
    ],
)
def test_shapes_of_another_device_or_target_are_left_with_the_reason(
    tmp_path: Path, device: str, fingerprint: str, reason: str
) -> None:
    KEPT.write(tmp_path)
    with pytest.warns(UserWarning, match=rf"{SHAPES_FILE} is not used: .*{reason}"):
        assert fitting_shapes(tmp_path, device, fingerprint) is None

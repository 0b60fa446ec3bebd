"""The benchmark of lossless rules: a table of every rule at equal nodes, with the walk as what the others are compared with."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.drafters import rules
from draftsmith.embedded import path
from draftsmith.models import ReDrafter
from draftsmith.models.target.target import TargetEnds
from draftsmith.models.tree.shapes import parse_shape


def test_each_shape_drafts_as_many_nodes_as_its_column_says() -> None:
    for shapes in rules.RULES.values():
        for nodes, shape in shapes.items():
            assert parse_shape(shape).max_nodes - 1 == nodes


def test_every_rule_has_a_row_and_the_walk_is_compared_with_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    target = str(path("target"))
    ReDrafter.for_target(TargetEnds.load(target), num_draft_steps=4).save_pretrained(tmp_path / "head")
    tests = tmp_path / "tests.jsonl"
    tests.write_text("".join(json.dumps({"prompt_ids": [20 + number]}) + "\n" for number in range(3)))
    words = f"rules --target {target} --tests {tests} --heads random={tmp_path}/head --work {tmp_path}/work"
    words += " --nodes 6 12 --temperatures 1 --tokens 6 --seeds 1"
    monkeypatch.setattr(sys, "argv", words.split())
    assert rules.main() == 0
    lines = [line for line in (tmp_path / "work" / "page.md").read_text().split("\n") if line.startswith("| ")]
    rows = {cells[1].strip(): [cell.strip() for cell in cells[2:-1]] for line in lines if (cells := line.split("|"))}
    assert list(rows) == ["rule", *rules.RULES]
    assert rows[rules.WALK][1::2] == ["1.00 (1.00 to 1.00)"] * 2
    assert all(float(rows[rule][place].split()[0]) >= 1.0 for rule in rules.RULES for place in (0, 2))
    counted = (tmp_path / "work" / "counts.json").stat().st_mtime_ns
    assert rules.main() == 0
    assert (tmp_path / "work" / "counts.json").stat().st_mtime_ns == counted, "it counts what it has counted already"

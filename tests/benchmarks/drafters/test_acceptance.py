"""The benchmark of losses: a recurrent head and a block drafter go through training and counting, with a row for each loss."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.drafters import acceptance
from draftsmith.data.cache.extract import extract
from draftsmith.data.cache.extraction import StorageOptions
from draftsmith.embedded import path
from draftsmith.models.families import block
from draftsmith.models.target.target import PRE_NORM, TargetEnds


def test_a_recurrent_head_and_a_block_drafter_have_a_table_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"id": str(n), "prompt_ids": [20 + n], "reply_ids": [n + token for token in range(20)]} for n in range(8)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "rows.jsonl").write_text(text)
    num_layers = TargetEnds.load(str(path("target"))).config.num_hidden_layers
    layers = dict.fromkeys((PRE_NORM, *block.default_layers(num_layers, 2)))
    extract(
        str(path("target")), tmp_path / "rows.jsonl", tmp_path / "cache", storage=StorageOptions(layers=tuple(layers))
    )
    words = f"acceptance --target {path('target')} --tests {tmp_path}/rows.jsonl --cache {tmp_path}/cache --work {tmp_path}/work"
    words += " --families redrafter;block --steps 2 --prompts 2 --tokens 6 --seeds 1 --draft-vocab 96 --shapes 0:1x5 1:s1.1.1.1.1"
    losses = ["l1, text 0.1", "forward_kl, d_pace 0.5"]
    monkeypatch.setattr(sys, "argv", [*words.split(), "--losses", ";".join(losses)])
    assert acceptance.main() == 0
    tables = (tmp_path / "work" / "page.md").read_text().split("## Losses: ")[1:]
    assert [table.split("\n")[0] for table in tables] == ["redrafter", "block"]
    for table in tables:
        cells = [line.split(" | ") for line in table.split("\n") if line.startswith("| `") and "T =" not in line]
        assert [row[0] for row in cells] == [f"| `{loss}`" for loss in losses]
        assert len(cells[0]) == 3
        assert all(float(cell.split()[0]) >= 1.0 for row in cells for cell in row[1:])
    counted = (tmp_path / "work" / "counts.json").stat().st_mtime_ns
    assert acceptance.main() == 0
    assert (tmp_path / "work" / "counts.json").stat().st_mtime_ns == counted, "it counts what it has counted already"

"""The fastest shape for each number of rows, down to no draft; how it is kept beside the drafter, and who then drafts by it."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from doubles import random_target

from draftsmith.data.replies.reply_sources import BundledEngine
from draftsmith.decode import Engine
from draftsmith.decode.decode_command import decode
from draftsmith.decode.sampling import DrawOptions
from draftsmith.evaluate.drafters import parse_entries
from draftsmith.evaluate.evaluate_command import load_candidates
from draftsmith.evaluate.tune.by_rows import RowsOutcome, fastest_by_rows, keep, shapes_by_rows
from draftsmith.evaluate.tune.costs import Cost, Costs
from draftsmith.evaluate.tune.recording import NOWHERE, Recorded
from draftsmith.evaluate.tune.tune import Outcome
from draftsmith.evaluate.tune.tune_command import RowsOptions, TimingOptions, is_folder_of_the_caller, tune
from draftsmith.models import DraftLimits, ShapesByRows, Target
from draftsmith.models.composed.shared_pool import SharedPool
from draftsmith.models.drafters.drafter_folder import load_drafter
from draftsmith.models.tree.kept_shapes import SHAPES_FILE, read_kept_shapes
from draftsmith.models.tree.shapes import parse_shape, shape_text

CHAINS = [DraftLimits(draft_length=depth) for depth in (1, 2, 4)]


def made_up(accepted: list[int], depth: int = 4) -> Recorded:
    """A reply whose chains hold so many tokens of what follows each position."""
    ahead = np.full((len(accepted), depth, depth), NOWHERE, dtype=np.int32)
    ranks = np.full((len(accepted), depth), -1, dtype=np.int32)
    for place, count in enumerate(accepted):
        for step in range(count):
            ahead[place, step, step:] = step
            ranks[place, step] = 0
    return Recorded((1,), tuple(range(len(accepted) + 1)), {1: ahead}, {1: ranks})


def test_more_rows_are_given_smaller_shapes_and_at_last_none() -> None:
    """A node costs a tenth of a plain step for each row; the drafts are all right, so longer chains win where nodes are cheap."""
    replies = [made_up([4] * 40)]
    timed: list[tuple[int, list[str]]] = []

    def costs_of(num_rows: int, shapes: Sequence[DraftLimits]) -> Costs:
        timed.append((num_rows, [shape_text(shape) for shape in shapes]))
        whole = {
            shape: Cost(0.0, 1 + {1: 0.1, 4: 0.85, 9: 2.0}[num_rows] * shape.draft_length**1.5) for shape in shapes
        }
        return Costs(1.0, 0.0, whole, {}, {}, follow=1.05)

    outcomes = fastest_by_rows([9, 4, 1, 30], replies, CHAINS, [], costs_of)
    assert [(each.rows, each.shape) for each in outcomes] == [(1, CHAINS[2]), (4, CHAINS[0]), (9, None)]
    assert timed == [(1, ["1x1", "1x2", "1x4"]), (4, ["1x1", "1x2", "1x4"]), (9, ["1x1"])]
    assert [each.no_draft for each in outcomes] == [pytest.approx(1 / 1.05)] * 3
    assert str(shapes_by_rows(outcomes)) == "1x4 up to 2 rows, 1x1 up to 6 rows, no draft for more"


def outcome(rows: int, shape: str, speedup: float) -> RowsOutcome:
    return RowsOutcome(rows, Outcome(shape, "chain", 1, 1, 1, 1.5, (1.0, 2.0), 0.1, 1.0, speedup), 1.0)


def test_borders_are_geometric_means_and_equal_neighbours_are_one_step() -> None:
    outcomes = [outcome(1, "2x3n4", 1.5), outcome(4, "2x3n4", 1.2), outcome(16, "1x1", 1.1), outcome(17, "1x1", 0.9)]
    assert shapes_by_rows(outcomes).steps == ((8, parse_shape("2x3n4")), (16, parse_shape("1x1")), (17, None))
    assert shapes_by_rows(outcomes[3:]).steps == ((17, None),)


def test_a_draft_that_does_not_pay_is_better_than_none_where_keeping_up_costs_more() -> None:
    assert outcome(1, "1x1", 0.9).shape is None
    assert replace(outcome(1, "1x1", 0.9), no_draft=0.8).shape == parse_shape("1x1")


@pytest.mark.parametrize("rows", [(), (0, 1)])
def test_rows_must_be_numbers_of_rows(rows: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="give at least one number, each at least 1"):
        RowsOptions(rows=rows)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.jsonl"
    rows = [{"id": f"p{n}", "prompt_ids": [4 + n, 9, 30, 5 + n], "source": "s"} for n in range(3)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def tuned(target: Path, drafter: Path, prompts: Path, out: Path, rows: tuple[int, ...] = (1, 2)) -> None:
    tune(
        str(target),
        str(drafter),
        prompts,
        out,
        widths=[1],
        depths=[1, 2],
        nodes=[2],
        draw=DrawOptions(max_new_tokens=8),
        timing=TimingOptions(rounds=1, prompt_lookup=0),
        load=RowsOptions(rows=rows),
    )


def test_what_tune_keeps_is_drafted_by_whoever_asks_for_nothing_else(
    tmp_path: Path,
    target: Path,
    drafter: Path,
    prompts: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder, out = tmp_path / "mine", tmp_path / "out"
    shutil.copytree(drafter, folder)
    tuned(target, folder, prompts, out)
    kept = read_kept_shapes(folder)
    assert kept is not None
    model = Target.load(str(target))
    assert (kept.target_fingerprint, kept.device, kept.dtype) == (model.fingerprint, "cpu", "float32")
    report, page, printed = (
        json.loads((out / "tune.json").read_text()),
        (out / "tune.md").read_text(),
        capsys.readouterr().out,
    )
    assert [each["rows"] for each in report["by_rows"]] == list(kept.measured_rows)
    assert report["kept"] == f"kept in {folder / SHAPES_FILE}: {kept.shapes}"
    assert "## The fastest by rows" in page
    assert "| rows | shape |" in printed
    assert report["kept"] in printed

    replace(kept, shapes=ShapesByRows(((1, DraftLimits(2, 2)), (4, None)))).write(folder)
    with caplog.at_level(logging.INFO, "draftsmith"):
        decode("How many?", str(target), folder, draw=DrawOptions(max_new_tokens=4))
        [candidate] = load_candidates(parse_entries([f"mine={folder}"], None), model, "")
    assert caplog.messages == [f"drafts the shapes that tune kept in {folder}: 2x2 up to 1 row, no draft for more"] * 2
    assert candidate.label == "mine by rows: 2x2 up to 1 row, no draft for more"
    [other] = load_candidates(parse_entries([f"mine={folder}@1x3"], None), model, "")
    assert other.limits == DraftLimits(draft_length=3)
    assert Engine(model, load_drafter(folder)).shapes == candidate.limits
    assert BundledEngine(model, folder)._engine.shapes == candidate.limits


@pytest.mark.parametrize("model_type", ["draftsmith_suffix", "draftsmith_phrases"])
def test_shapes_kept_with_another_shared_pool_are_not_drafted(
    tmp_path: Path, target: Path, drafter: Path, prompts: Path, model_type: str
) -> None:
    folder, pool = tmp_path / "mine", tmp_path / "pool"
    folder.mkdir()
    pool.mkdir()
    vocab_size, model = load_drafter(drafter).config.vocab_size, Target.load(str(target))
    SharedPool.of([[1, 2, 3]], vocab_size).save(pool)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, "shared_pool": "../pool"}))
    tuned(target, folder, prompts, tmp_path / "out", rows=(1,))
    kept = read_kept_shapes(folder)
    assert kept is not None
    assert load_drafter(folder).kept_shapes(model) == kept.shapes
    SharedPool.of([[1, 2, 4]], vocab_size).save(pool)
    with pytest.warns(
        UserWarning, match="is not used: it was measured with .* another content of a folder that the config names"
    ):
        assert load_drafter(folder).kept_shapes(model) is None
    SharedPool.of([[1, 2, 3]], vocab_size).save(pool)
    assert load_drafter(folder).kept_shapes(model) == kept.shapes


def test_a_folder_that_cannot_be_written_leaves_the_report_and_says_so(
    tmp_path: Path, target: Path, drafter: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = tmp_path / "mine", tmp_path / "out"
    shutil.copytree(drafter, folder)
    (folder / SHAPES_FILE).mkdir()  # as root, the only file that cannot be written
    tuned(target, folder, prompts, out, rows=(1,))
    assert f"not kept: {folder} cannot be written" in capsys.readouterr().out
    assert json.loads((out / "tune.json").read_text())["kept"].startswith("not kept")


def test_the_folder_of_a_model_of_the_package_or_of_the_hub_is_not_changed(tmp_path: Path) -> None:
    words = ("embedded:draft_lm", "name=embedded:draft_lm", "someone/a-drafter", str(tmp_path), f"mine={tmp_path}")
    assert [is_folder_of_the_caller(word) for word in words] == [False, False, False, True, True]
    assert keep([outcome(1, "1x1", 1.2)], random_target(), tmp_path, is_own=False).startswith("not kept: ")
    assert not list(tmp_path.iterdir())

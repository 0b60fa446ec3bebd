"""Learning at the positions of prompts: which predictions count, how much, and that replies alone stay what they were."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from training import HIDDEN, PROMPT, VOCAB, MakeCache, make_module, make_trainer

from draftsmith.data.shards.packing import pack
from draftsmith.data.shards.shards import CachedSample
from draftsmith.models.drafters.rollout import PackedBatch, Rollout, data_rollout
from draftsmith.models.families.eagle import EagleFamily
from draftsmith.models.families.redrafter import ReDrafterFamily
from draftsmith.models.target.target import PRE_NORM, Target
from draftsmith.train.batches.data_module import CacheDataModule
from draftsmith.train.drafter.objective import Objective, inverse_draft_ids, prepare, run
from draftsmith.train.drafter_callbacks.keep_best_drafter import KeepBestDrafter
from draftsmith.train.drafter_callbacks.run_length import RunLength
from draftsmith.train.losses import StepSums

EVERYTHING = torch.arange(VOCAB)
FAMILIES = {"redrafter": ReDrafterFamily(), "eagle": EagleFamily()}


def batch_of(masks: list[list[int]], pad_to: int | None = None) -> PackedBatch:
    """One sample for each mask; their tokens count up from 1."""
    generator = torch.Generator().manual_seed(0)
    samples = [
        CachedSample(
            str(number),
            torch.arange(1, len(mask) + 1),
            torch.tensor(mask, dtype=torch.bool),
            {PRE_NORM: torch.randn(len(mask), HIDDEN, generator=generator)},
            torch.randint(2, VOCAB, (len(mask), 4), generator=generator),
        )
        for number, mask in enumerate(masks)
    ]
    return pack(samples, None, pad_to)


def rows_of(rollout: Rollout) -> dict[tuple[int, int], float]:
    """(anchor, step) -> weight, of what counts."""
    weights = torch.ones(rollout.targets.shape) if rollout.weights is None else rollout.weights
    return {
        (int(rollout.anchors[row]), int(step)): round(float(weights[row, step]), 4)
        for row, step in rollout.valid.nonzero().tolist()
    }


def test_every_prediction_counts_with_the_weight_of_where_it_begins() -> None:
    rollout = Objective(2, "path", prompt_weight=0.5).rollout(batch_of([[0, 0, 1, 1, 1]]))
    # Anchor 1 is fed the first labelled token: its predictions are those of the reply.
    assert rows_of(rollout) == {(0, 0): 0.5, (0, 1): 0.5, (1, 0): 1.0, (1, 1): 1.0, (2, 0): 1.0}
    assert rollout.targets[0].tolist() == [3, 4]


def test_padding_and_samples_without_a_reply_teach_nothing() -> None:
    rollout = Objective(1, "path", prompt_weight=1.0).rollout(batch_of([[0, 1, 1], [0, 0, 0, 0]], pad_to=6))
    assert rows_of(rollout) == {(0, 0): 1.0}


@pytest.mark.parametrize("distillation", ["none", "path", "local"])
def test_weight_zero_is_the_replies_alone(distillation: str) -> None:
    batch = batch_of([[0, 0, 1, 1, 1], [0, 1, 1]])
    alone = Objective(2, distillation).rollout(batch)  # type: ignore[arg-type]
    assert alone.weights is None
    with_prompts = rows_of(Objective(2, distillation, prompt_weight=0.25).rollout(batch))  # type: ignore[arg-type]
    assert {row: weight for row, weight in with_prompts.items() if weight == 1.0} == rows_of(alone)
    assert set(with_prompts.values()) == {0.25, 1.0}


def test_the_targets_own_continuations_teach_prompts_too() -> None:
    batch = batch_of([[0, 0, 1, 1, 1]])
    rollout = Objective(2, "local", prompt_weight=0.5).rollout(batch)
    assert batch.greedy_ids is not None
    assert rollout.anchors.tolist() == [0, 1, 2, 3]
    assert rollout.targets[0].tolist() == batch.greedy_ids[0, 1:3].tolist()


def sums_of(target: Target, family: str, batch: PackedBatch, objective: Objective) -> StepSums:
    torch.manual_seed(0)
    drafter = FAMILIES[family].build(target.ends, None, objective.num_steps, "")
    for weight in drafter.parameters():
        if weight.requires_grad:
            torch.nn.init.normal_(weight, std=0.3)
    prepared = prepare(objective, batch, inverse_draft_ids(EVERYTHING, VOCAB))
    sums = run(objective, prepared, drafter.eval(), target.ends, torch.ones(objective.num_steps), True)
    torch.testing.assert_close(sums.loss_rows, prepared.loss_rows.float())
    return sums


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("distillation", ["none", "path"])
def test_the_loss_is_that_of_replies_and_of_prompts_each_with_its_weight(
    target: Target, family: str, distillation: str
) -> None:
    """Weighted sums are linear: what weight 0.5 adds is half of what weight 1 adds."""
    batch, steps = batch_of([[0, 0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 1]]), 2
    feature = {"feature_weight": 0.7} if family == "eagle" else {}
    totals = [
        sums_of(target, family, batch, Objective(steps, distillation, prompt_weight=weight, **feature)).total  # type: ignore[arg-type]
        for weight in (0.0, 0.5, 1.0)
    ]
    torch.testing.assert_close(totals[1], (totals[0] + totals[2]) / 2)
    assert totals[2] > totals[0]


def test_accuracies_count_every_position_alike(target: Target) -> None:
    batch = batch_of([[0, 0, 0, 1, 1, 1, 1]])
    little, much = (
        sums_of(target, "redrafter", batch, Objective(2, "path", prompt_weight=weight)) for weight in (0.1, 2.0)
    )
    assert little.rows.tolist() == much.rows.tolist() == [5, 4]
    assert torch.equal(little.top1, much.top1)  # type: ignore[arg-type]


@pytest.mark.parametrize("weight", [-0.1, float("inf"), float("nan")])
def test_a_weight_that_is_no_weight_is_an_error(weight: float) -> None:
    with pytest.raises(ValueError, match="prompt_weight is"):
        Objective(1, "path", prompt_weight=weight)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_learns_at_prompt_positions_says_so_and_records_it(
    target_dir: Path, make_cache: MakeCache, tmp_path: Path, caplog: pytest.LogCaptureFixture, family: str
) -> None:
    cache = make_cache([PROMPT + 1] * 10)  # one labelled token each, so replies alone teach nothing
    weights = {}
    for weight in (0.0, 0.5):
        module = make_module(
            target_dir, drafter=FAMILIES[family], distillation="path", num_steps=1, prompt_weight=weight
        )
        keep = KeepBestDrafter(tmp_path / f"{weight}" / "drafter")
        with caplog.at_level(logging.INFO):
            make_trainer(tmp_path, callbacks=[keep, RunLength()], max_epochs=2).fit(
                module, CacheDataModule(cache, val_fraction=0.2, tokens_per_batch=12)
            )
        assert module.drafter is not None
        weights[weight] = torch.cat([each.detach().flatten() for each in module.drafter.parameters()])
    assert f"it learns from {10 * PROMPT} prompt tokens too, each 0.5 times as much as a labelled one" in caplog.text
    assert not torch.equal(weights[0.0], weights[0.5])
    record = json.loads((tmp_path / "0.5" / "drafter" / "provenance.json").read_text())["config"]
    assert record["objective"]["prompt_weight"] == 0.5
    assert record["data"]["prompt_tokens"] == 10 * PROMPT


def test_the_anchors_of_replies_are_those_of_the_data_rollout() -> None:
    batch = batch_of([[0, 0, 1, 1, 1]])
    assert rows_of(data_rollout(batch, 2)) == {(1, 0): 1.0, (1, 1): 1.0, (2, 0): 1.0}
